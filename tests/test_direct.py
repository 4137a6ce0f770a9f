"""Direct calls of the CPU's kernels: the operators' results bit for bit, and who gets those."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import emulated
import pytest
import torch
from cases import CELLS, CLASSES, DTYPES, Case, pair, pairwise, random_case
from helpers import assert_close, flatten
from torch import Tensor, nn
from torch.func import vmap
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import fused_rnn
from fused_rnn import ops, reference

pytestmark = pytest.mark.engine


def find_direct() -> Any:
    """The functions, which the first call of all makes available."""
    with torch.no_grad():
        fused_rnn.GRUCell(1, 1)(torch.zeros(1, 1))
    return ops.direct.functions


DIRECT = find_direct()
needs_direct = pytest.mark.skipif(not DIRECT, reason="there are no direct calls")


def test_where_there_are_direct_calls() -> None:
    """Not where another engine poses as the CPU's, or torch has no way to exchange tensors."""
    if emulated.WANTED or fused_rnn.backend_info()["backend"] != "native":
        assert not DIRECT
    elif hasattr(torch.Tensor, "__dlpack_c_exchange_api__"):
        assert DIRECT


class Spy:
    """The functions, and how the calls of them ended: with results, or with None.

    Of a module whose call is not a direct one its forward is asked next, so that goes unsaid.
    """

    def __init__(self) -> None:
        self.done: list[bool] = []
        self.names: list[str] = []

    def __getattr__(self, name: str) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            result = getattr(DIRECT, name)(*args)
            if name == "call_module" and result is None:
                return None
            self.done.append(result is not None)
            self.names.append(name)
            return result

        return call


@pytest.fixture
def spy(monkeypatch: pytest.MonkeyPatch) -> Iterator[Spy]:
    spy = Spy()
    monkeypatch.setattr(ops.direct, "functions", spy)
    with torch.no_grad():
        yield spy


def forward(case: Case, tensors: Sequence[Any], batch_sizes: Any = None, **changes: Any) -> Any:
    x, h0, c0, *weights = tensors
    arguments = {
        "cell": case.kernel,
        "layers": case.num_layers,
        "directions": case.directions,
        "present": case.present,
    }
    arguments |= {"x": x, "h0": h0, "c0": c0, "batch_sizes": batch_sizes}
    arguments |= {"weights": tuple(weights), "packed": None, "tape": False}
    return DIRECT.forward(*(arguments | changes).values())


def infer_stack(cell: str, x: Any, hx: Any, weights: list[Any], *rest: Any) -> Any:
    """The function, of weights without names."""
    names = [str(i) for i in range(len(weights))]
    named = dict(zip(names, weights, strict=True))
    return DIRECT.infer_stack(cell, x, hx, named, names, *rest, None)


def step(cell: str, x: Any, hx: Any, *weights: Any) -> Any:
    names = [str(i) for i in range(len(weights))]
    return DIRECT.step(cell, x, hx, dict(zip(names, weights, strict=True)), names, None)


def by_operator(fn: Callable[[], Any]) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ops.direct, "functions", False)
        return fn()


def assert_identical(actual: Any, expected: Any) -> None:
    ours, theirs = flatten(actual), flatten(expected)
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
        assert a.is_inference() == b.is_inference()
        assert [s for s, n in zip(a.stride(), a.shape, strict=True) if n > 1] == [
            s for s, n in zip(b.stride(), b.shape, strict=True) if n > 1
        ]
        assert torch.equal(a, b)


# --- The same results ----------------------------------------------------------------------------


@needs_direct
@pytest.mark.parametrize("index", range(60))
def test_layers(index: int, seed: int, spy: Spy) -> None:
    torch.manual_seed(seed + index)
    case = random_case(torch.Generator().manual_seed(seed + index))
    print(case)
    (x, h0, c0, *weights), batch_sizes = case.arguments()
    # Rows past the last step are ignored.
    x = torch.cat([x, x[:1]]) if case.packed and index % 2 else x
    for h, c in ((h0, c0), (None, None)):
        tensors = (x, h, c, *weights)
        found = case.call(ops.recurrent, tensors, batch_sizes)
        assert spy.done.pop()
        expected = by_operator(lambda t=tensors: case.call(ops.recurrent, t, batch_sizes))
        assert_identical(found, expected)
        assert (found[2] is None) == (len(reference.CELLS[case.kernel].states) == 1)


@needs_direct
@pytest.mark.parametrize("index", range(40))
def test_training(index: int, seed: int, spy: Spy) -> None:
    """Outputs, and the gradients of those inputs that want one, of which some are chosen."""
    torch.manual_seed(seed + index)
    generator = torch.Generator().manual_seed(seed + index)
    case = random_case(generator)
    arguments, batch_sizes = case.arguments()
    if case.packed and index % 2:  # rows past the last step, whose gradient is zero
        arguments[0] = torch.cat([arguments[0], arguments[0][:1]])
    wanted = [bool(torch.randint(3, (), generator=generator)) or index % 3 == 0 for _ in arguments]
    wanted[1] = True
    used = [bool(torch.randint(3, (), generator=generator)) for _ in range(3)]

    def train() -> list[Tensor | None]:
        tensors = [
            None if t is None else t.clone().requires_grad_(want)
            for t, want in zip(arguments, wanted, strict=True)
        ]
        outputs = case.call(ops.recurrent, tensors, batch_sizes)
        chosen = [o for o, use in zip(outputs, used, strict=True) if use and o is not None]
        chosen = chosen or [outputs[0]]
        cotangents = torch.Generator().manual_seed(seed)
        torch.autograd.backward(
            chosen, [torch.randn(o.shape, generator=cotangents).to(o.dtype) for o in chosen]
        )
        return [o.detach() for o in outputs if o is not None] + [
            t.grad for t in tensors if t is not None and t.requires_grad
        ]

    with torch.enable_grad():
        found, expected = train(), by_operator(train)
    assert spy.names == ["forward", "backward"]
    assert spy.done == [True, not (case.packed and index % 2)]
    assert_identical(found, expected)


@needs_direct
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CLASSES)
def test_training_of_modules(name: str, dtype: torch.dtype, spy: Spy) -> None:
    """A loop over single steps, from states that want gradients."""
    module = getattr(fused_rnn, name)(5, 17, dtype=dtype)
    lead = (3,) if name.endswith("Cell") else (1, 3)
    states = [torch.randn(*lead, 17).to(dtype).requires_grad_() for _ in range(2)]
    x = torch.randn(4, *lead, 5).to(dtype)

    def train() -> list[Tensor]:
        hx: Any = tuple(states) if name.startswith("LSTM") else states[0]
        for step in x:
            result = module(step, hx)
            hx = result if name.endswith("Cell") else result[1]
        results = flatten(result)
        loss = sum(t.float().square().sum() for t in results)
        used = states if name.startswith("LSTM") else states[:1]
        return results + list(torch.autograd.grad(loss, [*module.parameters(), *used]))

    with torch.enable_grad():
        assert_identical([t.detach() for t in train()], [t.detach() for t in by_operator(train)])
    step = name.endswith("Cell")
    names = ["call_module", "step_backward"] if step else ["forward", "backward"]
    assert spy.names == names[:1] * 4 + names[1:] * 4 and all(spy.done)


@needs_direct
def test_training_beside_the_usual(spy: Spy) -> None:
    """Second derivatives, batched gradients, expanded ones, and hooks on what is saved."""
    case = Case("lstm", num_layers=2, bidirectional=True, proj_size=2)
    (x, *rest), _ = case.arguments()

    def call(x: Tensor) -> Tensor:
        found: Tensor = case.call(ops.recurrent, (x, *rest), None)[0]
        return found

    def work() -> list[Tensor]:
        leaf = x.clone().requires_grad_()
        (first,) = torch.autograd.grad(call(leaf).square().sum(), leaf, create_graph=True)
        (second,) = torch.autograd.grad(first.square().sum(), leaf)
        batched = torch.autograd.functional.jacobian(call, x[:2], vectorize=True)
        (expanded,) = torch.autograd.grad(call(leaf).sum(), leaf)
        with torch.autograd.graph.save_on_cpu():
            (hooked,) = torch.autograd.grad(call(leaf).sum(), leaf)
        with torch.autograd.set_detect_anomaly(True):
            (watched,) = torch.autograd.grad(call(leaf).sum(), leaf)
        return [first, second, batched, expanded, hooked, watched]

    with torch.enable_grad():
        assert_identical(work(), by_operator(work))
    backwards = [ok for name, ok in zip(spy.names, spy.done, strict=True) if "backward" in name]
    # The second derivative goes through y too; batched and expanded gradients are the operator's.
    assert backwards == [True, False, False, False, False]


@needs_direct
def test_modes_see_the_operators_of_training(spy: Spy) -> None:
    module, x, mode = fused_rnn.GRU(3, 4), torch.randn(5, 2, 3), Dispatch()
    with torch.enable_grad(), mode:
        module(x)[0].sum().backward()
    assert {"fused_rnn.recurrent.default", "fused_rnn.recurrent_backward.default"} <= set(mode.seen)
    with torch.enable_grad():
        y = module(x)[0]
        with torch.profiler.profile() as trace:
            y.sum().backward()
    assert "fused_rnn::recurrent_backward" in {event.key for event in trace.key_averages()}
    assert spy.done == [False, False, True, False]


@needs_direct
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", pairwise()[::3], ids=str)
def test_modules(case: Case, dtype: torch.dtype, spy: Spy) -> None:
    _, ours = case.modules(dtype)
    x, hx = case.inputs(dtype)
    torch.manual_seed(1)
    found = ours(x, hx)
    if case.layout == "padded" and not (case.training and case.dropout):
        assert spy.done == [True]
    torch.manual_seed(1)
    assert_identical(found, by_operator(lambda: ours(x, hx)))


@needs_direct
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("cell", CELLS)
def test_cells(cell: str, dtype: torch.dtype, bias: bool, spy: Spy) -> None:
    name, kwargs = CELLS[cell]
    for sizes in ((1, 1, 1), (5, 3, 17), (65, 7, 33), (16, 33, 130)):
        inputs, batch, hidden = sizes
        module = getattr(fused_rnn, name)(inputs, hidden, bias=bias, dtype=dtype, **kwargs)
        for lead in ((batch,), ()):
            x = torch.randn(*lead, inputs).to(dtype)
            h, c = torch.randn(2, *lead, hidden).to(dtype)
            for hx in (None, (h, c) if cell == "lstm" else h):
                found = module(x, hx)
                assert spy.done == [True]
                spy.done.clear()
                assert_identical(found, by_operator(lambda m=module, x=x, hx=hx: m(x, hx)))


@needs_direct
@pytest.mark.parametrize("batch", [1, 3, 17])
@pytest.mark.parametrize("hidden", [32, 40, 256])
@pytest.mark.parametrize("name", ["RNN", "LSTM", "GRU"])
def test_single_steps(name: str, hidden: int, batch: int, spy: Spy) -> None:
    """A loop over steps that carries the states, on any number of threads."""
    threads = torch.get_num_threads()
    for layers, both in ((1, False), (2, False), (2, True)):
        kwargs = {"num_layers": layers, "bidirectional": both, "batch_first": both}
        theirs, ours = pair(name, 24, hidden, **kwargs)
        steps = [torch.randn(*((batch, 1) if both else (1, batch)), 24) for _ in range(3)]
        runs: list[list[Tensor]] = []
        try:
            for n in (1, 2, 3):
                torch.set_num_threads(n)
                results, hx, expected_hx = [], None, None
                for x in steps:
                    y, hx = ours(x, hx)
                    expected, expected_hx = theirs(x, expected_hx)
                    torch.testing.assert_close(flatten((y, hx)), flatten((expected, expected_hx)))
                    results += flatten((y, hx))
                runs.append(results)
        finally:
            torch.set_num_threads(threads)
        assert_identical(runs[1], runs[0])
        assert_identical(runs[2], runs[0])
    assert all(spy.done) and set(spy.names) == {"call_module"}


@needs_direct
def test_large_results(spy: Spy) -> None:
    """Megabytes, which come from a pool and go back to it."""
    module = fused_rnn.LSTM(8, 64, num_layers=3, batch_first=True)
    x = torch.randn(64, 100, 8)
    expected = by_operator(lambda: module(x))
    for _ in range(3):
        found = module(x)
        assert_identical(found, expected)
        views = [t[..., :1] for t in flatten(found)]
        del found
        assert all(
            torch.equal(a, b[..., :1]) for a, b in zip(views, flatten(expected), strict=True)
        )
    assert all(spy.done)


# --- Results are tensors like others -------------------------------------------------------------


@needs_direct
def test_results_are_plain_tensors(spy: Spy) -> None:
    module = fused_rnn.LSTM(3, 4, num_layers=2)
    x, hx = torch.randn(5, 2, 3), (torch.randn(2, 2, 4), torch.randn(2, 2, 4))
    results = flatten(module(x, hx)) + flatten(fused_rnn.LSTMCell(3, 4)(x[0]))
    assert spy.done == [True, True]
    for t in results:
        assert type(t) is Tensor and t.is_leaf and not t.requires_grad and t._base is None
        assert not t.is_inference() and t.is_contiguous() and t._version == 0
        assert t.data_ptr() % 64 == 0
    memory = [t.untyped_storage().data_ptr() for t in (*results, x, *hx)]
    assert len(set(memory)) == len(memory), "each has memory of its own"

    y = results[0]
    copies = [
        copy.deepcopy(y),
        pickle.loads(pickle.dumps(y)),
        y.clone(),
        torch.from_numpy(y.numpy()),
    ]
    file = io.BytesIO()
    torch.save(y, file)
    file.seek(0)
    copies.append(torch.load(file))
    assert all(torch.equal(t, y) for t in copies)
    y.add_(1)
    assert torch.equal(y, copies[0] + 1) and torch.equal(copies[0], copies[1])
    y.share_memory_()
    assert y.is_shared() and torch.equal(y, copies[0] + 1)
    y.requires_grad_()
    with torch.enable_grad():
        (y * 2).sum().backward()
    assert torch.equal(y.grad, torch.full_like(y, 2))


@needs_direct
@pytest.mark.parametrize("name", CLASSES)
def test_inference_mode(name: str, spy: Spy) -> None:
    module = getattr(fused_rnn, name)(3, 4)
    with torch.inference_mode():
        found = module(
            torch.randn(2, 2, 3)[: None if name in ("RNN", "LSTM", "GRU") else 1].squeeze(0)
        )
        assert all(t.is_inference() for t in flatten(found))
    assert spy.done == [True]


@needs_direct
def test_nothing_is_kept() -> None:
    """Neither results nor arguments outlive their last use."""
    module, x, h = fused_rnn.GRU(3, 4), torch.randn(5, 2, 3), torch.randn(1, 2, 4)
    bad = torch.randn(1, 2, 5)
    everything = [x, h, bad, None, *module.parameters(), DIRECT]
    gc.collect()  # what other tests left would be taken from the counts meanwhile
    with torch.no_grad():
        module(x, h)
        before = [sys.getrefcount(t) for t in everything]
        for _ in range(50):
            y, h_n = module(x, h)
            module(x)
            module(x, hx=h)
            assert sys.getrefcount(y) == 2 and sys.getrefcount(h_n) == 2
            weights = list(module.parameters())
            assert infer_stack("gru", x, bad, weights, 1, 1, 0b1111, False) is None
        del weights, y, h_n
    after = [sys.getrefcount(t) for t in everything]
    assert [b - a for a, b in zip(before, after, strict=True) if abs(b - a) > 20] == []


@needs_direct
def test_other_threads_run_meanwhile() -> None:
    module, x = fused_rnn.LSTM(256, 256), torch.randn(400, 32, 256)
    with torch.no_grad():
        module(x[:1])
        worker = threading.Thread(target=lambda: torch.no_grad()(module)(x))
        switch = sys.getswitchinterval()
        sys.setswitchinterval(1000)  # so that only a thread that lets go lets another run
        try:
            worker.start()
            ticks = 0
            while worker.is_alive():
                time.sleep(0.001)
                ticks += 1
        finally:
            sys.setswitchinterval(switch)
    assert ticks > 3


@needs_direct
def test_weights_live_as_long_as_the_call() -> None:
    """Another thread may put others in their place meanwhile."""
    module, x = fused_rnn.LSTM(256, 256), torch.randn(400, 32, 256)
    with torch.no_grad():
        expected = module(x)
        found: list[Any] = []
        worker = threading.Thread(target=lambda: found.extend(torch.no_grad()(module)(x)))
        old = weakref.ref(module.weight_hh_l0)
        worker.start()
        time.sleep(0.005)
        module.weight_hh_l0 = nn.Parameter(torch.zeros(4 * 256, 256))
        kept = old() is not None
        running = worker.is_alive()
        worker.join()
    if running:
        assert kept and old() is None
        assert_identical(found, expected)


# --- Whole calls of modules ----------------------------------------------------------------------


def example(name: str, **kwargs: Any) -> tuple[Any, Tensor, Any]:
    """A module, an input of one step, and states."""
    lead = (2,) if name.endswith("Cell") else (1, 2)
    h, c = torch.randn(2, *lead, 4)
    return (
        getattr(fused_rnn, name)(3, 4, **kwargs),
        torch.randn(*lead, 3),
        (h, c) if name.startswith("LSTM") else h,
    )


@needs_direct
@pytest.mark.parametrize("name", CLASSES)
def test_whole_calls(name: str, spy: Spy) -> None:
    """In every mode without gradients, by position and by name."""
    module, x, hx = example(name)
    forward = "step" if name.endswith("Cell") else "infer_stack"
    expected = by_operator(lambda: module(x, hx))
    for given in ((x, hx), (x, None), (x,)):
        module(*given)
    with torch.inference_mode():
        module(x, hx)
    module.requires_grad_(False)
    with torch.enable_grad():
        assert_identical(module(x, hx), expected)
    assert_identical(module(x, hx=hx), expected)
    assert spy.names == ["call_module"] * 6
    assert_identical(module(input=x, hx=hx), expected)
    assert_identical(module.forward(x, hx), expected)
    assert spy.names[6:] == [forward] * 2
    module.eval()
    assert_identical(module(x, hx), expected)
    assert spy.names[8:] == ["call_module"]
    bad: Any
    for bad in (
        ((), {}),
        ((), {"hx": hx}),
        ((x, hx, x), {}),
        ((x, hx), {"hx": hx}),
        ((x,), {"h": hx}),
    ):
        with pytest.raises(TypeError):
            module(*bad[0], **bad[1])


@needs_direct
@pytest.mark.parametrize("name", CLASSES)
def test_whole_calls_know_who_wants_gradients(name: str, spy: Spy) -> None:
    module, x, hx = example(name)
    states = hx if isinstance(hx, tuple) else (hx,)
    with torch.enable_grad():
        for tensor in (x, *states, *module.parameters()):
            module.requires_grad_(False)
            tensor.requires_grad_()
            assert all(t.requires_grad for t in flatten(module(x, hx))[:1])
            tensor.requires_grad_(False)
    # Of a step it is the whole call, with its place in the graph of autograd.
    assert ("call_module" in spy.names) == name.endswith("Cell")


@needs_direct
@pytest.mark.parametrize("name", CLASSES)
def test_hooks_are_called(name: str, spy: Spy) -> None:
    module, x, hx = example(name)
    seen: list[str] = []
    everywhere = torch.nn.modules.module
    for register in (
        module.register_forward_hook,
        module.register_forward_pre_hook,
        module.register_full_backward_hook,
        module.register_full_backward_pre_hook,
        everywhere.register_module_forward_hook,
        everywhere.register_module_forward_pre_hook,
        everywhere.register_module_full_backward_hook,
        everywhere.register_module_full_backward_pre_hook,
    ):
        handle = register(lambda *args, **kwargs: seen.append("hook"))
        try:
            module(x, hx)
        finally:
            handle.remove()
        assert "call_module" not in spy.names
        module(x, hx)
        assert spy.names.pop() == "call_module"
        assert len(seen) == ("backward" not in register.__name__)
        seen.clear()


@needs_direct
@pytest.mark.parametrize("name", CLASSES)
def test_replaced_methods_are_called(name: str, spy: Spy, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the module, of its class, of all modules; and those of a subclass."""
    module, x, hx = example(name)

    def mine(*args: Any, **kwargs: Any) -> str:
        return "mine"

    for where, method in (
        (module, "forward"),
        (module, "_call_impl"),
        (module, "_compiled_call_impl"),
        (type(module), "forward"),
        (type(module), "_call_impl"),
        (type(module), "__call__"),
        (nn.Module, "_call_impl"),
        (nn.Module, "__call__"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(where, method, mine, raising=False)
            assert module(x, hx) == "mine"
        assert not isinstance(module(x, hx), str) and spy.names.pop() == "call_module"
    assert not spy.names

    class Sub(type(module)):  # type: ignore[misc]
        def forward(self, input: Tensor, hx: Any = None) -> Any:
            return super().forward(input, hx), "mine"

    class SubSub(Sub):
        pass

    for kind in (Sub, SubSub):
        assert kind(3, 4)(x, hx)[1] == "mine"
    assert "call_module" not in spy.names


@needs_direct
def test_whole_calls_see_changes(spy: Spy) -> None:
    """Nothing that a module holds is remembered from one call to the next."""
    _, ours = pair("LSTM", 3, 3, num_layers=2, batch_first=True, dropout=0.5)
    x = torch.randn(4, 4, 3)

    def check(whole: bool) -> None:
        spy.names.clear()
        torch.manual_seed(0)
        found = ours(x)
        assert ("call_module" in spy.names) == whole
        torch.manual_seed(0)
        assert_identical(found, by_operator(lambda: ours(x)))

    check(False)
    ours.eval()
    check(True)
    ours.batch_first = False
    check(True)
    ours.train()
    ours.dropout = 0.0
    check(True)
    ours.weight_hh_l1 = nn.Parameter(torch.randn(12, 3))
    check(True)
    ours.weight_hh_l0.data = torch.randn(12, 3)
    check(True)
    ours.weight_ih_l0.data.zero_()
    check(True)
    torch.nn.utils.parametrize.register_parametrization(ours, "weight_hh_l0", nn.Tanh())
    check(False)
    torch.nn.utils.parametrize.remove_parametrizations(ours, "weight_hh_l0")
    check(True)
    others = {name: p + 1 for name, p in ours.named_parameters()}
    found = torch.func.functional_call(ours, others, x)
    ours.load_state_dict(others)
    assert_identical(found, ours(x))
    del ours.bias_hh_l1
    ours.bias_hh_l1 = torch.randn(12)
    check(False)


@needs_direct
def test_whole_calls_of_a_compiled_module(spy: Spy) -> None:
    torch._dynamo.reset()
    module, x, hx = example("GRU")
    graphs: list[str] = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph.code)
        return graph.forward

    module.compile(backend=backend, fullgraph=True)
    found = module(x, hx)
    assert "recurrent_infer" in graphs[0] and not spy.names
    assert_identical(found, module.forward(x, hx))
    torch._dynamo.reset()


# --- What is left to the operators ---------------------------------------------------------------


class Subclass(Tensor):
    pass


def negative(t: Tensor) -> Tensor:
    """The same numbers, of a tensor that has only promised to negate its memory."""
    t = torch._neg_view(-t)
    assert t.is_neg() and t.is_contiguous()
    return t


def strided(t: Tensor) -> Tensor:
    return torch.stack([t, t], -1)[..., 0]


class Pair(NamedTuple):
    h: Tensor
    c: Tensor


UNUSUAL: dict[str, Callable[[Tensor], Tensor]] = {
    "negative bit": negative,
    "imaginary part": lambda t: torch.complex(t, -t).conj().imag,
    "strided": strided,
    "subclass": lambda t: t.as_subclass(Subclass),
    "sparse": Tensor.to_sparse,
    "mkldnn": Tensor.to_mkldnn,
    "meta": lambda t: t.to("meta"),
    "double": Tensor.double,
    "integers": Tensor.long,
    "complex": lambda t: t.to(torch.complex64),
    "functional": torch._to_functional_tensor,
    "zero": lambda t: torch._efficientzerotensor(t.shape),
    "no elements": lambda t: t[..., :0],
    "another width": lambda t: t[..., :-1].contiguous(),
    "more dimensions": lambda t: t[None, None, None],
    "quantized": lambda t: torch.quantize_per_tensor(t, 0.1, 0, torch.qint8),
    "array": lambda t: t.numpy(),
    "list": lambda t: [t],
    "text": lambda t: "x",
}


@needs_direct
@pytest.mark.parametrize("kind", UNUSUAL)
@pytest.mark.parametrize("place", ["x", "h0", "c0", "w_ih", "w_hh", "b_ih", "w_hr"])
def test_unusual_tensors(kind: str, place: str, spy: Spy) -> None:
    """They get None, not an error, wherever they are."""
    case = Case("lstm", proj_size=2, dtype=torch.float32)
    arguments, _ = case.arguments()
    index = ["x", "h0", "c0", "w_ih", "w_hh", "b_ih", "b_hh", "w_hr"].index(place)
    if kind == "mkldnn" and not torch.backends.mkldnn.is_available():
        pytest.skip("no mkldnn")
    plain = arguments[index]
    arguments[index] = UNUSUAL[kind](plain)
    assert forward(case, arguments) is None
    x, h0, c0, *weights = arguments
    assert infer_stack("lstm", x, (h0, c0), weights, 1, 1, case.present, False) is None
    assert step("lstm", x, (h0, c0), *weights[:4]) is None
    if kind in ("negative bit", "imaginary part", "strided"):  # the operator does the work
        found = case.call(ops.recurrent, arguments, None)
        arguments[index] = plain
        assert_identical(found, forward(case, arguments))
        assert spy.done == [False]


@needs_direct
def test_unusual_arguments() -> None:
    """Anything that is not as documented gets None too."""
    case = Case("gru", dtype=torch.float32)
    arguments, _ = case.arguments()
    x, h0, _, *four = arguments
    assert forward(case, arguments) is not None
    for bad in (
        {"cell": "grr"},
        {"cell": b"gru"},
        {"cell": None},
        {"cell": "lstm"},
        {"layers": 2},
        {"layers": 2**70},
        {"directions": 2},
        {"directions": 1.0},
        {"present": 0b111},
        {"present": 0b101111},
        {"present": -1},
        {"more": None},
        {"batch_sizes": torch.tensor([3, 2])},
        {"x": x[0], "h0": None, "batch_sizes": torch.tensor([3, 2], dtype=torch.int32)},
        {"x": x[0], "h0": None, "batch_sizes": torch.tensor([2**62])},
        {"x": x[0], "h0": None, "batch_sizes": torch.tensor([-1])},
        {"h0": None, "c0": h0},
        {"weights": (None,) * 4},
        {"weights": four},
        {"weights": ()},
    ):
        assert forward(case, arguments, **bad) is None, bad
    assert DIRECT.forward() is None
    rest = (1, 1, 0b1111, False)
    assert infer_stack("gru", x, h0, four, *rest) is not None
    for bad in (
        (x, h0, four[:3], *rest),
        (x, h0, [], *rest),
        (x, h0, four[:2], *rest),
        (x, h0, four, 2, *rest[1:]),
        (x, h0, four, 1, 2, *rest[2:]),
        (x, h0, four, 0, 0, *rest[2:]),
        (x, h0, four, -1, -1, *rest[2:]),
        (x, h0, four, 1, 2**70, *rest[2:]),
        (x, h0, four, 1.0, *rest[1:]),
        (x[0], h0[0], four, *rest),
        (x, (h0,), four, *rest),
        (x, (h0, h0), four, *rest),
        (x, (h0, None), four, *rest),
        (x, (h0, h0, h0), four, *rest),
        (x, (), four, *rest),
        (x, [h0], four, *rest),
        (x, Pair(h0, h0), four, *rest),
    ):
        assert infer_stack("gru", *bad) is None
    assert step("gru", x[0], h0[0], *four) is not None
    assert step("gru", x, h0, *four) is None
    assert step("gru", x[0, 0], h0[0], *four) is None
    assert step("gru", x[0], h0[0], *four[:1]) is None
    assert step("gru", x[0], h0[0], *four, four[0]) is None
    names = list("abcd")
    named = dict(zip(names, four, strict=True))
    for parameters, wanted in (
        (four, names),
        (None, names),
        (named, tuple(names)),
        (named, "abcd"),
        (named, [*"abce"]),
        (named, [*"abc", []]),
    ):
        assert DIRECT.infer_stack("gru", x, h0, parameters, wanted, *rest, None) is None
        assert DIRECT.step("gru", x[0], h0[0], parameters, wanted, None) is None


@needs_direct
def test_states_that_do_not_match(spy: Spy) -> None:
    """Of one layer too few, or too many: an error, and nothing read past the end."""
    module, x = fused_rnn.LSTM(3, 4, num_layers=2), torch.randn(5, 2, 3)
    for layers in ((2, 1), (1, 2), (2, 3), (4, 4)):
        h, c = (torch.randn(n, 2, 4) for n in layers)
        with pytest.raises(RuntimeError, match="Expected hidden"):
            module(x, (h, c))
    assert spy.done == [False] * 4
    case = Case("lstm")
    arguments, _ = case.arguments()
    arguments[2] = arguments[2].repeat(2, 1, 1)
    assert forward(case, arguments) is None
    assert forward(case, arguments, tape=True) is None


@needs_direct
def test_parameters_of_unusual_memory(spy: Spy) -> None:
    """A parameter is looked at anew in each call."""
    _, ours = pair("GRU", 3, 4)
    x = torch.randn(5, 2, 3)
    expected = ours(x)
    assert spy.done.pop()
    ours.weight_hh_l0.data = negative(ours.weight_hh_l0.data)
    assert_identical(ours(x), expected)
    assert not any(spy.done)


@needs_direct
def test_gradients_are_asked_for(spy: Spy) -> None:
    module, x = fused_rnn.GRU(3, 4), torch.randn(5, 2, 3)
    with torch.enable_grad():
        assert module(x)[0].requires_grad and spy.names == ["forward"]
        module.requires_grad_(False)
        assert not module(x)[0].requires_grad and spy.names == ["forward", "call_module"]
        assert module(x.requires_grad_())[0].requires_grad and spy.names.pop() == "forward"


class Dispatch(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


class Function(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


@needs_direct
@pytest.mark.parametrize("name", CLASSES)
def test_modes_see_the_operator(name: str, spy: Spy) -> None:
    module = getattr(fused_rnn, name)(3, 4)
    x = torch.randn(2, 3) if name.endswith("Cell") else torch.randn(5, 2, 3)
    expected = module(x)
    assert spy.done.pop()
    for mode in (Dispatch(), Function()):
        with mode:
            found = module(x)
        assert "fused_rnn.recurrent_infer.default" in mode.seen
        assert_identical(found, expected)
    with torch.profiler.profile() as trace:
        module(x)
    assert "fused_rnn::recurrent_infer" in {event.key for event in trace.key_averages()}
    with torch.autograd.profiler.profile(use_kineto=False) as trace:
        module(x)
    assert "fused_rnn::recurrent_infer" in {event.name for event in trace.function_events}
    graph = make_fx(lambda x: flatten(module(x))[0])(x)
    assert "fused_rnn.recurrent_infer" in graph.code
    torch.jit.trace(module, x, check_trace=False)
    mapped = vmap(lambda x: flatten(module(x))[0])(x[None])[0]  # by the reference
    assert_close(mapped, flatten(expected)[0], tol=1e-5)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, torch.ones_like(x))
        output = flatten(module(dual))[0]
        assert torch.autograd.forward_ad.unpack_dual(output).tangent is not None
    assert not any(spy.done)
    module(x)
    assert spy.done.pop(), "and afterwards the calls are direct again"


@needs_direct
@pytest.mark.parametrize("name", CLASSES)
def test_autocast(name: str, spy: Spy) -> None:
    """The choice of types comes first; what is then computed in them may be a direct call."""
    module = getattr(fused_rnn, name)(3, 4)
    x = torch.randn(2, 3) if name.endswith("Cell") else torch.randn(5, 2, 3)
    with torch.autocast("cpu", torch.bfloat16):
        for value in (x, x.bfloat16()):
            assert_identical(module(value), by_operator(lambda value=value: module(value)))
        weights = [p.detach() for p in module.parameters()]
        assert step("gru", x, None, *weights) is None


@needs_direct
def test_compiled_code_has_the_operator(spy: Spy) -> None:
    torch._dynamo.reset()
    module, x = fused_rnn.GRU(3, 4), torch.randn(5, 2, 3)
    graphs: list[Any] = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph.code)
        return graph.forward

    compiled = torch.compile(module, backend=backend, fullgraph=True)
    found = compiled(x)
    assert len(graphs) == 1 and "recurrent_infer" in graphs[0] and not spy.done
    assert_identical(found, module(x))
    program = torch.export.export(nn.Sequential(module), (x,))
    assert "fused_rnn.recurrent_infer" in program.graph_module.code
    torch._dynamo.reset()


@needs_direct
def test_fake_tensors_and_devices(spy: Spy) -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    mode = FakeTensorMode()
    module = fused_rnn.GRU(3, 4)
    with mode:
        fakes = fused_rnn.GRU(3, 4)
        assert fakes(torch.randn(5, 2, 3))[0].shape == (5, 2, 4)
    fake = mode.from_tensor(torch.randn(5, 2, 3))
    weights = [mode.from_tensor(p) for p in module.parameters()]
    assert infer_stack("gru", fake, None, weights, 1, 1, 0b1111, False) is None
    assert module.to("meta")(torch.randn(5, 2, 3, device="meta"))[0].device.type == "meta"
    assert not any(spy.done)


@needs_direct
def test_hooks_of_subclasses_are_called(spy: Spy) -> None:
    calls: list[str] = []

    class Mine(fused_rnn.GRU):
        def check_input(self, input: Tensor, batch_sizes: Tensor | None) -> None:
            calls.append("check_input")
            super().check_input(input, batch_sizes)

    class Plain(fused_rnn.GRU):
        pass

    x = torch.randn(5, 2, 3)
    Mine(3, 4)(x)
    assert calls == ["check_input"] and spy.done == [True], "by the layer, below the checks"
    spy.done.clear()
    Plain(3, 4)(x)
    assert spy.done == [True]


@pytest.mark.parametrize("train", [False, True], ids=["infer", "train"])
@pytest.mark.parametrize("name", CLASSES)
def test_sizes_that_overflow(name: str, train: bool) -> None:
    """Inputs that are expanded have any size for free. What they would need is not taken for 0."""
    module = getattr(fused_rnn, name)(1, 4)
    shapes: Any = [(2**60, 1)] if name.endswith("Cell") else [(1, 2**60, 1), (2**60, 1, 1)]
    for shape in shapes:
        with torch.set_grad_enabled(train), pytest.raises((RuntimeError, MemoryError)):
            module(torch.zeros(1).expand(shape))


# --- What a user has changed on the instance ------------------------------------------------------


HOOKS = ["check_forward_args", "check_input", "check_hidden_size", "permute_hidden"]
HOOKS += ["get_expected_hidden_size", "get_expected_cell_size"]


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("hook", HOOKS)
@pytest.mark.parametrize("name", ["RNN", "LSTM", "GRU"])
def test_methods_replaced_on_the_instance_are_called(name: str, hook: str, grad: bool) -> None:
    """If torch.nn calls them."""
    called = []
    for module in pair(name, 3, 4):
        module(torch.randn(5, 2, 3))
        calls: list[str] = []
        if hasattr(module, hook):
            usual = getattr(module, hook)
            setattr(module, hook, lambda *a, f=usual, calls=calls: (calls.append(""), f(*a))[1])
        with torch.set_grad_enabled(grad):
            module(torch.randn(5, 2, 3))
            module(torch.randn(5, 2, 3), module(torch.randn(5, 2, 3))[1])
        called.append(bool(calls))
    assert called[0] == called[1]


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("hx", [False, True])
@pytest.mark.parametrize("size", ["input_size", "hidden_size", "proj_size"])
@pytest.mark.parametrize("name", CLASSES)
def test_sizes_set_afterwards(name: str, size: str, hx: bool, grad: bool) -> None:
    """Raise where torch.nn raises."""
    kwargs = {"proj_size": 2} if name == "LSTM" else {}
    is_cell = name.endswith("Cell")
    raised = []
    for module in pair(name, 3, 4, **kwargs):
        x = torch.randn(2, 3) if is_cell else torch.randn(5, 2, 3)
        states = module(x) if is_cell else module(x)[1]
        setattr(module, size, 3)
        module.input_size += size == "input_size"
        with torch.set_grad_enabled(grad):
            try:
                module(x, states if hx else None)
            except RuntimeError as error:
                raised.append(type(error))
            else:
                raised.append(None)
    assert raised[0] is raised[1]
