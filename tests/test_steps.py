"""Training through cells, step by step: what autograd is given of a step, and all ways to do one.

How a step's products are done depends on its rows and on the widths of W: so few rows read W as it
lies, more of them are turned, and W is packed for others. A step of whole vectors of units needs no
copies of h for its backward.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import pair
from direct import needs_direct
from helpers import assert_all_close, flatten, native
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

pytestmark = [
    pytest.mark.engine,
    pytest.mark.skipif(not native(), reason="about the native kernels"),
]

KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "rnn_tanh": ("RNNCell", {}),
    "rnn_relu": ("RNNCell", {"nonlinearity": "relu"}),
    "gru": ("GRUCell", {}),
    "lstm": ("LSTMCell", {}),
}
# B (None: no batch), I, H.
SIZES = (
    (None, 5, 32),
    (1, 9, 64),
    (3, 40, 17),
    (15, 20, 96),
    (16, 33, 64),
    (30, 40, 50),
    (32, 300, 96),
    (57, 70, 160),
    (64, 24, 130),
    (100, 33, 64),
    (300, 17, 32),
)


def loop(
    module: nn.Module, x: Tensor, states: Any, *, higher: bool = False, first: bool = True
) -> list[Tensor]:
    """The last states of a loop over steps, and gradients: second ones, too, if ``higher``; of the
    first states if ``first``."""
    x = x.clone().requires_grad_()
    states = [s.clone().requires_grad_(first) for s in states]
    hx: Any = None if not states else states[0] if len(states) == 1 else tuple(states)
    for step in x:
        hx = module(step, hx)
    loss = sum(t.square().sum() for t in flatten(hx))
    leaves = [x, *module.parameters(), *(states if first else [])]
    grads = list(torch.autograd.grad(loss, leaves, create_graph=higher))
    found = [*flatten(hx), *grads]
    if higher:
        found += torch.autograd.grad(sum(g.square().sum() for g in grads), leaves)
    return [t.detach() for t in found]


def example(kind: str, size: Any, dtype: torch.dtype, bias: bool = True) -> Any:
    """torch.nn's module, ours, an input of three steps, and the states of the first."""
    batch, inputs, hidden = size
    name, kwargs = KINDS[kind]
    theirs, ours = (m.to(dtype) for m in pair(name, inputs, hidden, bias=bias, **kwargs))
    lead = () if batch is None else (batch,)
    x = torch.randn(3, *lead, inputs, dtype=dtype)
    states = torch.randn(2 if kind == "lstm" else 1, *lead, hidden, dtype=dtype)
    return theirs, ours, x, list(states)


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_gradients(kind: str, size: Any) -> None:
    """Those of torch.nn; with given states and with zeros, first and second ones."""
    for dtype, tol in ((torch.float64, 1e-9), (torch.float32, 1e-3)):
        if kind == "rnn_relu" and dtype == torch.float32:  # whose derivative jumps
            continue
        theirs, ours, x, states = example(kind, size, dtype, bias=size[2] != 50)
        for given in (states, []):
            higher = dtype == torch.float64 and (size[0] or 1) < 20
            assert_all_close(
                loop(ours, x, given, higher=higher), loop(theirs, x, given, higher=higher), tol
            )


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_any_number_of_threads(kind: str, size: Any) -> None:
    """The same bits, of gradients to all and to the weights alone."""
    _, ours, x, states = example(kind, size, torch.float32)
    before, found = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.append(loop(ours, x, states) + loop(ours, x, states, first=False))
    finally:
        torch.set_num_threads(before)
    for results in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results, found[0], strict=True))


@pytest.mark.parametrize("hidden", [17, 64])
@pytest.mark.parametrize("kind", KINDS)
def test_unused_results(kind: str, hidden: int) -> None:
    """Gradients of some results to some inputs; None where torch.nn has None."""
    theirs, ours, x, states = example(kind, (3, 5, hidden), torch.float64)

    def work(module: nn.Module, chosen: int) -> list[Tensor | None]:
        results = flatten(module(x[0], states[0] if len(states) == 1 else tuple(states)))
        parameters = list(module.parameters())
        return list(torch.autograd.grad(results[chosen].sum(), parameters, allow_unused=True))

    for chosen in range(len(states)):
        found, expected = work(ours, chosen), work(theirs, chosen)
        assert [g is None for g in found] == [g is None for g in expected]
        assert_all_close(found, expected, 1e-10)
    with pytest.raises(RuntimeError, match="second time"):
        result = flatten(ours(x[0]))[0].sum()
        result.backward()
        result.backward()


@pytest.mark.parametrize("hidden", [17, 64])
@pytest.mark.parametrize("kind", ["gru", "lstm"])
def test_results_may_be_changed(kind: str, hidden: int) -> None:
    """In place, where torch.nn's backward does not read them either."""

    def work(module: nn.Module) -> list[Tensor]:
        hx = module(x[0])
        for t in flatten(hx):
            t.mul_(2)
        total = sum(t.square().sum() for t in flatten(module(x[1], hx)))
        return list(torch.autograd.grad(total, list(module.parameters())))

    theirs, ours, x, _ = example(kind, (3, 5, hidden), torch.float64)
    assert_all_close(work(ours), work(theirs), 1e-10)


@pytest.mark.parametrize("kind", KINDS)
def test_what_the_backward_reads_may_not_be_changed(kind: str) -> None:
    for changed in range(4):
        for module in example(kind, (3, 5, 64), torch.float64)[:2]:
            x = torch.randn(3, 5, dtype=torch.float64)
            hx = module(x)
            h = flatten(hx)[0]
            result = flatten(module(x, hx))[0]
            if changed == 3:  # the derivatives of tanh and relu are those of their results
                h = result if kind.startswith("rnn") else h
            with torch.no_grad():
                (x, h, module.weight_hh, h)[changed].mul_(2)
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                result.sum().backward()


@needs_direct
def test_what_is_kept() -> None:
    """The inputs, and of what was computed as much as the backward reads; never None, for those who
    look at it."""
    for kind, of_gates in (("rnn_tanh", 0), ("gru", 4), ("lstm", 6)):
        _, ours, x, states = example(kind, (2, 5, 64), torch.float32)
        hx = states[0] if len(states) == 1 else tuple(states)
        result = flatten(ours(x[0], hx))[0]
        kept = result.grad_fn.saved_tensors
        assert all(isinstance(t, Tensor) for t in kept)
        inputs = {t.data_ptr() for t in (x[0], *states, *ours.parameters(), result)}
        own = [t for t in kept if t.data_ptr() not in inputs]
        assert sum(t.numel() for t in own) <= of_gates * 2 * 64
        assert len(kept) - len(own) == len(inputs) - (not kind.startswith("rnn"))


class Refused(Exception):
    pass


@needs_direct
def test_errors_of_hooks_arrive() -> None:
    """An error of what packs saved tensors is its owner's; the step is not tried another way."""
    _, ours, x, states = example("gru", (3, 5, 64), torch.float32)
    seen: list[Tensor] = []

    def refuse(tensor: Tensor) -> Any:
        seen.append(tensor)
        raise Refused

    call: Callable[[], Any]
    for call in (lambda: ours(x[0], states[0]), lambda: ours.forward(x[0], states[0])):
        with torch.autograd.graph.saved_tensors_hooks(refuse, lambda t: t), pytest.raises(Refused):
            call()
        assert len(seen) == 1
        seen.clear()
    assert ours(x[0], states[0]).requires_grad


@pytest.mark.parametrize("early_stop", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_checkpoints(kind: str, early_stop: bool) -> None:
    """A loop that runs again in the backward, and is left in the middle where that is enough."""
    _, ours, x, states = example(kind, (3, 5, 64), torch.float64)

    def steps(x: Tensor, *hx: Tensor) -> Any:
        state: Any = hx[0] if len(hx) == 1 else hx
        for step in x:
            state = ours(step, state)
        return state

    def work(run: Callable[..., Any]) -> list[Tensor]:
        leaf = x.clone().requires_grad_()
        total = sum(t.square().sum() for t in flatten(run(leaf, *states)))
        return list(torch.autograd.grad(total, [leaf, *ours.parameters()]))

    with torch.utils.checkpoint.set_checkpoint_early_stop(early_stop):
        again = work(lambda *a: checkpoint(steps, *a, use_reentrant=False))
    assert all(torch.equal(a, b) for a, b in zip(again, work(steps), strict=True))
    with torch.autograd.graph.save_on_cpu():
        assert all(torch.equal(a, b) for a, b in zip(work(steps), again, strict=True))
