"""Autograd's machinery around a module: hooks, checkpoints, writes in place, parametrizations."""

from __future__ import annotations

import copy
import functools
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import CLASSES, pair
from double_modules import LAYERS, double_pair, first, is_cell, value
from helpers import assert_all_close, assert_close, flatten, run
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

import fused_rnn

pytestmark = pytest.mark.parity


@pytest.mark.parametrize("name", CLASSES)
def test_backward_twice(name: str) -> None:
    _, ours = double_pair(name)
    loss = first(ours(value(name))).square().sum()
    loss.backward(retain_graph=True)
    once = [p.grad.clone() for p in ours.parameters()]
    loss.backward()
    assert_all_close([p.grad for p in ours.parameters()], [2 * g for g in once])
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        loss.backward()


def changed_in_place(
    module: nn.Module, what: str, transposed: bool, unbatched: bool
) -> dict[str, Tensor] | None:
    """Gradients where ``what`` changes between forward and backward; None if autograd refuses."""
    cell, h_shape = isinstance(module, nn.RNNCellBase), [2, 4]
    x_shape = [2, 3] if cell else [2, 5, 3] if module.batch_first else [5, 2, 3]
    if not cell:
        h_shape.insert(0, module.num_layers * (1 + module.bidirectional))
    if unbatched:
        x_shape.remove(2)
        h_shape.remove(2)
    shapes = [x_shape, h_shape, h_shape]
    dtype = next(module.parameters()).dtype
    leaves = [torch.randn(s, dtype=dtype, requires_grad=True) for s in shapes]
    x, h, c = (
        t.transpose(0, 1).clone().transpose(0, 1) if transposed and t.dim() > 1 else t.clone()
        for t in leaves
    )
    pair = isinstance(module, (nn.LSTM, nn.LSTMCell, fused_rnn.LSTM, fused_rnn.LSTMCell))
    outputs = flatten(module(x, (h, c) if pair else h))
    loss = sum((i + 1) * (output * 1).sin().sum() for i, output in enumerate(outputs))
    names = ["y"] * (not cell) + ["h_n", "c_n"]
    named = {"x": x, "h0": h, "c0": c, **dict(zip(names, outputs, strict=False))}
    with torch.no_grad():
        named[what].mul_(2)
    try:
        loss.backward()
    except RuntimeError as error:
        assert "modified" in str(error)
        return None
    gradients = {name: p.grad for name, p in module.named_parameters()}
    return gradients | {str(i): t.grad for i, t in enumerate(leaves) if t.grad is not None}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("form", ["", "transposed", "unbatched"])
@pytest.mark.parametrize(
    "name, settings",
    [(name, {}) for name in CLASSES]
    + [
        (name, settings)
        for name in LAYERS
        for settings in ({"batch_first": True}, {"bidirectional": True}, {"num_layers": 2})
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(value),
)
def test_changes_in_place(
    name: str, settings: dict[str, Any], form: str, dtype: torch.dtype
) -> None:
    """Whatever may change after the forward in torch.nn may change here."""
    modules = pair(name, 3, 4, dtype=dtype, **settings)
    lstm = name.startswith("LSTM")
    for what in ("x", "h0", *["c0"] * lstm, *["y"] * (not is_cell(name)), "h_n", *["c_n"] * lstm):
        state = torch.get_rng_state()
        results = []
        for module in modules:
            torch.set_rng_state(state)
            module.zero_grad()
            results.append(
                changed_in_place(module, what, form == "transposed", form == "unbatched")
            )
        theirs, ours = results
        if theirs is not None:
            assert ours is not None, f"{what} changed"
            assert_all_close(ours, theirs, tol=1e-4 if dtype == torch.float32 else 1e-10)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("low", [None, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", LAYERS)
def test_residual_in_place(name: str, low: torch.dtype | None, recompute: bool) -> None:
    theirs, ours = pair(name, 4, 4, batch_first=True)
    ours.recompute = recompute
    x, gradients = torch.randn(2, 5, 4), []
    for rnn in (theirs, ours):
        leaf = x.clone().requires_grad_()
        y = leaf * 1
        try:
            with torch.autocast("cpu", low or torch.bfloat16, enabled=low is not None):
                y += rnn(y)[0]
        except RuntimeError as failure:  # a processor for which oneDNN has no LSTM in bfloat16
            assert rnn is theirs and "could not create a primitive" in str(failure)
            pytest.skip("torch.nn cannot do this here")
        y.sum().backward()
        gradients.append({"x": leaf.grad, **{k: p.grad for k, p in rnn.named_parameters()}})
    assert_all_close(gradients[1], gradients[0], tol=1e-5 if low is None else 5e-2)


@pytest.mark.parametrize("name", LAYERS)
def test_decoder_that_writes_its_input(name: str) -> None:
    """Each prediction goes into the buffer that the next step reads."""
    theirs, ours = double_pair(name, batch_first=True)
    head, gradients = nn.Linear(4, 3, dtype=torch.float64), []
    for rnn in (theirs, ours):
        buffer, hx = torch.zeros(2, 6, 3, dtype=torch.float64), None
        for t in range(5):
            x = buffer[:, t : t + 1]
            y, hx = rnn(x if rnn is ours else x.clone(), hx)  # few of torch.nn's copy one step
            buffer[:, t + 1] = head(y[:, 0])
        buffer.square().sum().backward()
        gradients.append({k: p.grad for k, p in rnn.named_parameters()})
    assert_all_close(*gradients[::-1])


@pytest.mark.parametrize("name", CLASSES)
def test_anomaly_and_deterministic_modes(name: str) -> None:
    theirs, ours = double_pair(name)
    x = value(name)
    torch.use_deterministic_algorithms(True)
    try:
        with warnings.catch_warnings(), torch.autograd.set_detect_anomaly(True):
            warnings.simplefilter("ignore")
            assert_all_close(run(ours, x), run(theirs, x))
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("name", LAYERS)
def test_checkpoint(name: str) -> None:
    """Recomputed forwards draw the same dropout masks."""
    _, ours = double_pair(name, num_layers=2, dropout=0.5)
    x = value(name).requires_grad_()
    for reentrant in (False, True):
        grads = []
        for call in (ours, lambda x, r=reentrant: checkpoint(ours, x, use_reentrant=r)):
            torch.manual_seed(2)
            ours.zero_grad()
            first(call(x)).square().sum().backward()
            grads.append([p.grad.clone() for p in ours.parameters()])
        assert_all_close(grads[1], grads[0])


@pytest.mark.parametrize("kept", ["all", "matrix products"])
@pytest.mark.parametrize("name", CLASSES)
def test_selective_checkpoint(name: str, kept: str) -> None:
    """It keeps results of operators, which nothing may change then. torch.nn's do."""

    def policy(context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        save = kept == "all" or "mm" in str(operator)
        return CheckpointPolicy.PREFER_SAVE if save else CheckpointPolicy.PREFER_RECOMPUTE

    contexts = functools.partial(create_selective_checkpoint_contexts, policy)
    _, ours = double_pair(name, **({} if is_cell(name) else {"batch_first": True}))
    x = value(name)
    expected = run(ours, x)
    call = functools.partial(checkpoint, ours, use_reentrant=False, context_fn=contexts)
    assert_all_close(run(Called(ours, call), x), expected)


class Called(nn.Module):
    """A module with the parameters of another, called in a way of its own."""

    def __init__(self, inner: nn.Module, call: Callable[..., Any]) -> None:
        super().__init__()
        self.__dict__.update(_parameters=inner._parameters, call=call)

    def forward(self, *args: Any) -> Any:
        return self.call(*args)


@pytest.mark.parametrize("name", CLASSES)
def test_subclasses_of_tensor(name: str) -> None:
    """As input, or as a weight: what comes out is one, too."""

    class Tagged(Tensor):
        pass

    kwargs = {} if is_cell(name) else {"batch_first": True, "num_layers": 2}
    theirs, ours = double_pair(name, **kwargs)
    x = value(name)
    expected = run(theirs, x)
    for module in (theirs, ours):
        assert type(first(module(x.as_subclass(Tagged)))) is Tagged
    assert_all_close(run(ours, x.as_subclass(Tagged)), expected)
    weight = "weight_hh" if is_cell(name) else "weight_hh_l0"
    setattr(ours, weight, nn.Parameter(getattr(ours, weight).detach().as_subclass(Tagged)))
    assert type(first(ours(x))) is Tagged
    assert_all_close(run(ours, x), expected)


@pytest.mark.parametrize("name", CLASSES)
def test_hooks(name: str) -> None:
    _, ours = double_pair(name)
    seen: list[Any] = []
    ours.register_forward_pre_hook(lambda m, args: (args[0] * 2,))
    ours.register_forward_hook(lambda m, args, out: seen.append(first(out)))
    ours.register_full_backward_hook(lambda m, gi, go: seen.append(gi[0]))
    x = value(name).requires_grad_()
    first(ours(x)).sum().backward()
    assert len(seen) == 2 and seen[1].shape == x.shape
    assert_close(x.grad, 2 * seen[1])


def test_tensor_hooks_on_weights() -> None:
    _, ours = double_pair("GRU")
    ours.weight_hh_l0.register_hook(lambda g: g * 0)
    ours(value("GRU"))[0].sum().backward()
    assert ours.weight_hh_l0.grad.abs().max() == 0 < ours.weight_ih_l0.grad.abs().max()


def test_inference_mode_then_training() -> None:
    _, ours = double_pair("LSTM")
    x = value("LSTM")
    with torch.inference_mode():
        output, states = ours(x)
    assert output.is_inference() and not output.requires_grad
    ours(x, tuple(s.clone() for s in states))[0].sum().backward()


@pytest.mark.parametrize("kind", ["weight_norm", "spectral_norm", "prune", "cached"])
@pytest.mark.parametrize("name", LAYERS)
def test_parametrized_weights(name: str, kind: str) -> None:
    """Optimized, they follow the parameters they are computed from."""
    theirs, ours = double_pair(name)
    x = value(name)
    for module in (theirs, ours):
        torch.manual_seed(4)
        if kind == "prune":
            prune.random_unstructured(module, "weight_hh_l0", 0.5)
        elif kind == "spectral_norm":
            parametrizations.spectral_norm(module, "weight_hh_l0").eval()
        else:
            parametrizations.weight_norm(module, "weight_hh_l0")
        optimizer = torch.optim.SGD(module.parameters(), lr=0.5)
        for _ in range(3):
            optimizer.zero_grad()
            with parametrize.cached() if kind == "cached" else torch.enable_grad():
                module(x)[0].square().sum().backward()
            optimizer.step()
    assert_all_close(ours(x), theirs(x))
    assert_all_close([p.grad for p in ours.parameters()], [p.grad for p in theirs.parameters()])
    if kind in ("weight_norm", "spectral_norm"):
        assert_all_close(copy.deepcopy(ours)(x), theirs(x))
        assert_all_close(ours.float()(x.float()), theirs.float()(x.float()), tol=1e-5)
