"""Memory that is short, that is kept, and that tensors have in unusual ways."""

from __future__ import annotations

import ctypes
import gc
import os
import platform
import sys
from typing import Any

import emulated
import pytest
import short_memory
import torch
from cases import CLASSES, LAYER_CLASSES
from forked import python
from torch import Tensor, nn

import fused_rnn
from fused_rnn import build, ops

pytestmark = pytest.mark.engine

native = pytest.mark.skipif(build.backend() != "native", reason="about the native kernels")
cpu_engine = pytest.mark.skipif(bool(emulated.ENGINE), reason="about the CPU's own library")
glibc = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="asks glibc's allocator")


SHORT = """
import resource, sys, torch, fused_rnn
module = getattr(fused_rnn, sys.argv[1])(1, 16)
small, large = torch.randn(2, 2, 1), torch.randn(5000, 64, 1)
expected = module(small)[0]
size = int(open("/proc/self/statm").read().split()[0]) * 4096
resource.setrlimit(resource.RLIMIT_AS, (size + (10 << 20), resource.RLIM_INFINITY))
for train in (False, True):
    with torch.set_grad_enabled(train):
        try:
            module(large)
        except RuntimeError as error:
            print(error)
resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
assert torch.equal(module(small)[0], expected)
module(large)[0].sum().backward()
"""


@native
@cpu_engine
@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="asks Linux")
@pytest.mark.parametrize("name", LAYER_CLASSES)
def test_where_memory_is_short(name: str) -> None:
    """Torch's error, which names the bytes; then the next calls are right."""
    done = python("-c", SHORT, name)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("can't allocate memory: you tried to allocate") == 2, done.stdout


SMALL = [i for i, call in enumerate(short_memory.CALLS) if call.shape == short_memory.SMALL]


@native
@cpu_engine
@glibc
@pytest.mark.parametrize(
    "cases", [SMALL, pytest.param([], marks=pytest.mark.slow)], ids=["small", "all"]
)
def test_where_each_allocation_fails(cases: list[int]) -> None:
    """Alone, and with all that follow: torch's error, nothing lost, then right results."""
    done = short_memory.walked(cases)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout == ""


class _Malloc(ctypes.Structure):
    """struct mallinfo2 of glibc."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in (
            "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost".split()
        )
    ]


@pytest.mark.drawn(8)  # a thousand calls each
@native
@cpu_engine
@glibc
@pytest.mark.parametrize("train", [False, True], ids=["infer", "train"])
@pytest.mark.parametrize("direct", [True, False], ids=["direct", "dispatched"])
@pytest.mark.parametrize("name", [*CLASSES, "PeepholeLSTM", "BlockGRU"])
def test_calls_leave_nothing_behind(
    monkeypatch: pytest.MonkeyPatch, name: str, direct: bool, train: bool
) -> None:
    ask = getattr(ctypes.CDLL(None), "mallinfo2", None)
    if ask is None:
        pytest.skip("glibc before 2.33")
    ask.restype = _Malloc
    if not direct:
        monkeypatch.setattr(ops.direct, "functions", False)
    module, x = getattr(fused_rnn, name)(3, 4), torch.randn(5, 2, 3)
    x = x[0] if name.endswith("Cell") else x

    def call() -> None:
        with torch.set_grad_enabled(train):
            y = module(x)
            while not isinstance(y, Tensor):
                y = y[0]
            if train:
                torch.autograd.grad(y.sum(), list(module.parameters()))

    def used(calls: int) -> tuple[int, int]:
        """Bytes, and objects of Python, after so many calls."""
        for _ in range(calls):
            call()
        gc.collect()
        info = ask()
        return info.uordblks + info.hblkhd, sys.getallocatedblocks()

    calls, (bytes_before, objects_before) = 1000, used(100)
    bytes_after, objects_after = used(calls)
    assert bytes_after - bytes_before < calls * 8  # the smallest allocation takes more
    assert objects_after - objects_before < calls / 2


KEPT = """
import torch, fused_rnn

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096

rnn, x = fused_rnn.GRU(8, 64), torch.randn({steps}, 64, 8)  # results of {steps} * 16 KiB
with torch.no_grad():
    rnn(x)
    before = resident()
    kept = [rnn(x)[0] for _ in range({count})]
print((resident() - before) / ({count} * kept[0].numel() * 4))
"""


@native
@cpu_engine
@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="asks Linux")
@pytest.mark.parametrize("steps", [65, 100, 129, 400])
def test_results_that_are_kept_take_their_size(steps: int) -> None:
    code = KEPT.format(steps=steps, count=6400 // steps)
    assert float(python("-c", code).stdout) < 1.1


def example(name: str) -> tuple[Any, Tensor]:
    module = getattr(fused_rnn, name)(64, 64)
    return module, torch.randn(4, 64) if name.endswith("Cell") else torch.randn(5, 4, 64)


@native
@pytest.mark.parametrize("train", [False, True], ids=["infer", "train"])
@pytest.mark.parametrize("what", ["input", "weight_hh"])
@pytest.mark.parametrize("name", CLASSES)
def test_storage_that_was_resized_to_nothing(name: str, what: str, train: bool) -> None:
    """FSDP does so to save memory. The process goes on, and so does the module."""
    module, x = example(name)
    expected = module(x)
    weight = module.weight_hh if name.endswith("Cell") else module.weight_hh_l0
    gone = x if what == "input" else weight
    content = gone.detach().clone()
    gone.untyped_storage().resize_(0)
    with torch.set_grad_enabled(train), pytest.raises(RuntimeError):
        module(x)
    gone.untyped_storage().resize_(content.untyped_storage().nbytes())
    with torch.no_grad():
        gone.copy_(content)
        found = module(x)
    while not isinstance(found, Tensor):
        found, expected = found[0], expected[0]
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("name", CLASSES)
def test_weights_that_are_negated_views(name: str) -> None:
    """torch negates them when it reads. A parameter may become one at any time."""
    module, x = example(name)
    theirs = getattr(nn, name)(64, 64)
    with torch.no_grad():
        for _ in range(3):  # the second call of a module is a shorter one
            module(x)
        for parameter in module.parameters():
            parameter.data = torch._neg_view(parameter.data)
        theirs.load_state_dict(module.state_dict())
        found, expected = module(x), theirs(x)
        while not isinstance(found, Tensor):
            found, expected = found[0], expected[0]
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


class WithoutData(Tensor):
    """A tensor of somebody's class, which knows nothing of our operators."""

    @staticmethod
    def __new__(cls, like: Tensor) -> WithoutData:
        return Tensor._make_wrapper_subclass(cls, like.shape, dtype=like.dtype)  # type: ignore[attr-defined]

    def __init__(self, like: Tensor) -> None:
        pass

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return NotImplemented


LAYOUTS = {
    "subclass": WithoutData,
    "sparse": lambda w: w.to_sparse(),
    "mkldnn": lambda w: w.to_mkldnn(),
    "quantized": lambda w: torch.quantize_per_tensor(w, 0.1, 0, torch.qint8),
    "meta": lambda w: w.to("meta"),
    "double": lambda w: w.double(),
    "nested": lambda w: torch.nested.nested_tensor([w, w]),
}


@native
@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("place", [1, 2, "weights"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["recurrent_infer", "recurrent", "recurrent_recomputed"])
def test_operators_refuse_other_layouts(name: str, layout: str, place: int | str) -> None:
    """In words, where one argument is of another layout than the rest."""
    if layout == "mkldnn" and not torch.backends.mkldnn.is_available():
        pytest.skip("no mkldnn")
    x, h, weights = torch.randn(3, 2, 2), torch.randn(1, 2, 2), [torch.randn(2, 2)] * 2
    arguments: list[Any] = ["rnn_tanh", x, h, None, weights, None, None, 1, 1, 0b11, False]
    if place == "weights":
        arguments[4] = [weights[0], LAYOUTS[layout](weights[1])]
    else:
        arguments[place] = LAYOUTS[layout](arguments[place])  # type: ignore[index, arg-type]
    with pytest.raises((RuntimeError, TypeError, NotImplementedError)) as raised:
        getattr(torch.ops.fused_rnn, name).default(*arguments)
    assert not isinstance(raised.value, RecursionError)


def test_gradient_where_relu_is_nan() -> None:
    """It goes through, as in torch.nn, and does not turn into a number."""
    grads = []
    for library in (nn, fused_rnn):
        torch.manual_seed(0)
        module = library.RNN(1, 1, nonlinearity="relu")
        module(torch.ones(1, 1, 1), torch.full((1, 1, 1), float("nan")))[0].sum().backward()
        grads.append([str(p.grad.item()) for p in module.parameters()])
    assert grads[0] == grads[1]
