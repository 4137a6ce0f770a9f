"""Direct calls of the CPU's kernels: the operators' results bit for bit, in tensors like others."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import sys
import threading
import time
import weakref
from typing import Any

import emulated
import pytest
import torch
from cases import CELLS, CLASSES, DTYPES, LAYER_CLASSES, Case, pair, pairwise, random_case
from direct import DIRECT, Spy, assert_identical, by_operator, infer_stack, needs_direct
from helpers import flatten
from torch import Tensor, nn

import fused_rnn
from fused_rnn import ops, reference

pytest_plugins = "direct_fixtures"
pytestmark = pytest.mark.engine


def test_where_there_are_direct_calls() -> None:
    """Not where another engine poses as the CPU's, or torch has no way to exchange tensors."""
    if emulated.WANTED or fused_rnn.backend_info()["backend"] != "native":
        assert not DIRECT
    elif hasattr(torch.Tensor, "__dlpack_c_exchange_api__"):
        assert DIRECT


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
    # The second derivative goes through y too; batched gradients are the operator's.
    assert backwards == [True, False, True, True, True]


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
@pytest.mark.parametrize("name", LAYER_CLASSES)
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
