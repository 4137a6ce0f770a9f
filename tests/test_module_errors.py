"""Errors and warnings of modules: the same types and texts as torch.nn's, or better ones."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from cases import CELL_CLASSES, CLASSES, LAYER_CLASSES, pair
from helpers import assert_all_close, flatten, native, run
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence

import fused_rnn

pytestmark = pytest.mark.module


def outcome(fn: Callable[[], Any]) -> tuple[str, str]:
    """How a call ends: the exception's type and text, or the shapes of what it returns."""
    try:
        result = fn()
    except Exception as error:
        return type(error).__name__, str(error)
    return "returned", str([tuple(t.shape) for t in flatten(result)]) if not isinstance(
        result, nn.Module
    ) else ""


BAD_CONSTRUCTIONS: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = [
    *((name, (3, 4), {"proj_size": size}) for name in ("RNN", "GRU") for size in (0, 2)),
    ("RNN", (3, 4), {"nonlinearity": "sigmoid"}),
    ("RNN", (3, 4, 1, "sigmoid"), {"dropout": 7}),
    *(
        ("GRU", (3, 4), {"dropout": p, "num_layers": 2})
        for p in ("x", "0.5", True, -0.1, 1.1, float("nan"), None)
    ),
    *(("LSTM", (3, 4), {key: 1}) for key in ("bias", "batch_first")),
    *(("LSTM", (size, 4), {}) for size in (0, -1, 3.0, "3", np.int64(3), True)),
    *(("LSTM", (3, size), {}) for size in (0, -1, 4.0, "4", np.int64(4), True)),
    *(("RNN", (3, 4), {"num_layers": n}) for n in (0, -1)),
    ("GRU", (3, 4), {"num_layers": 1.5}),
    *(("LSTM", (3, 4), {"proj_size": size}) for size in (-1, 4, 5, 0, 3)),
    *((name, (3, 4), {"dtype": torch.int64}) for name in CLASSES),
    *((name, (3,), {}) for name in CELL_CLASSES),
]


@pytest.mark.parametrize(("name", "args", "kwargs"), BAD_CONSTRUCTIONS, ids=str)
def test_constructor_errors(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    assert outcome(lambda: getattr(fused_rnn, name)(*args, **kwargs)) == outcome(
        lambda: getattr(nn, name)(*args, **kwargs)
    )


@pytest.mark.parametrize("name", LAYER_CLASSES)
@pytest.mark.parametrize(
    "argument, value",
    [("bidirectional", v) for v in ("False", 1, None, np.True_)] + [("num_layers", True)],
    ids=str,
)
def test_flags_that_are_none(argument: str, value: object, name: str) -> None:
    """torch.nn takes them and raises at the first call, which names nothing."""
    with pytest.raises(TypeError, match="received an invalid combination"):
        getattr(nn, name)(4, 6, **{argument: value})(torch.ones(5, 3, 4))
    with pytest.raises(TypeError, match=f"{argument} should be of type .*{type(value).__name__}"):
        getattr(fused_rnn, name)(4, 6, **{argument: value})
    with pytest.raises(TypeError, match="recompute should be of type bool, got: str"):
        getattr(fused_rnn, name)(4, 6, recompute="False")


def test_dropout_warning() -> None:
    texts = []
    for module in (nn, fused_rnn):
        with pytest.warns(UserWarning, match="dropout option adds dropout") as caught:
            module.GRU(3, 4, dropout=0.5)
        texts.append([str(w.message) for w in caught])
    assert texts[0] == texts[1]


def states(name: str, *shape: int, **kwargs: Any) -> Any:
    h = torch.zeros(*shape, **kwargs)
    return (h, h) if name.startswith("LSTM") else h


def x(*shape: int, **kwargs: Any) -> Tensor:
    return torch.zeros(*shape, **kwargs)


# Modules are (3, 4): calls are lambdas of the module and its name. Sizes: T = 5, B = 2.
BAD_CALLS: dict[str, Callable[[nn.Module, str], Any]] = {
    "1-D": lambda m, n: m(x(3)),
    "4-D": lambda m, n: m(x(5, 2, 3, 1)),
    "hx 2-D": lambda m, n: m(x(5, 2, 3), states(n, 2, 4)),
    "hx 4-D": lambda m, n: m(x(5, 2, 3), states(n, 1, 1, 2, 4)),
    "unbatched hx 3-D": lambda m, n: m(x(5, 3), states(n, 1, 1, 4)),
    "input dtype": lambda m, n: m(x(5, 2, 3, dtype=torch.float64)),
    "input int": lambda m, n: m(x(5, 2, 3, dtype=torch.int64)),
    "features": lambda m, n: m(x(5, 2, 7)),
    "features and dtype": lambda m, n: m(x(5, 2, 7, dtype=torch.float64)),
    "hx batch": lambda m, n: m(x(5, 2, 3), states(n, 1, 3, 4)),
    "hx layers": lambda m, n: m(x(5, 2, 3), states(n, 2, 2, 4)),
    "hx width": lambda m, n: m(x(5, 2, 3), states(n, 1, 2, 5)),
    "hx of unbatched": lambda m, n: m(x(5, 3), states(n, 2, 4)),
    "no steps": lambda m, n: m(x(0, 2, 3)),
    "no steps, no batch": lambda m, n: m(x(0, 0, 3)),
    "no batch": lambda m, n: m(x(5, 0, 3)),
    "list": lambda m, n: m([x(5, 2, 3)]),
    "tuple": lambda m, n: m((x(10, 3), torch.tensor([2, 2]))),
    "input on meta": lambda m, n: m(x(5, 2, 3, device="meta"), states(n, 1, 2, 4)),
    "hx on meta": lambda m, n: m(x(5, 2, 3), states(n, 1, 2, 4, device="meta")),
    "weights on meta": lambda m, n: m.to("meta")(x(5, 2, 3)),
    "packed features": lambda m, n: m(pack_sequence([x(3, 7), x(2, 7)])) if n != "LSTM" else None,
    "packed dtype": lambda m, n: m(pack_sequence([x(3, 3).double()])) if n != "LSTM" else None,
    "packed hx": lambda m, n: m(pack_sequence([x(3, 3)]), x(1, 2, 4)) if n != "LSTM" else None,
    "packed data 3-D": lambda m, n: (
        m(PackedSequence(x(3, 1, 3), torch.ones(3, dtype=torch.int64))) if n != "LSTM" else None
    ),
    "hx list": lambda m, n: m(x(5, 2, 3), [x(1, 2, 4), x(1, 2, 4)]),
    "hx triple": lambda m, n: m(x(5, 2, 3), (x(1, 2, 4),) * 3),
    "hx half a pair": lambda m, n: m(x(5, 2, 3), (x(1, 2, 4), None)),
    "dropout > 1": lambda m, n: (setattr(m, "dropout", 2.0), m(x(5, 2, 3)))[1],
}


@pytest.mark.parametrize("name", LAYER_CLASSES)
@pytest.mark.parametrize("call", BAD_CALLS)
def test_call_errors(call: str, name: str) -> None:
    theirs, ours = pair(name, 3, 4)
    found = outcome(lambda: BAD_CALLS[call](ours, name))
    expected = outcome(lambda: BAD_CALLS[call](theirs, name))
    if expected[1].startswith("input must have the type"):  # torch 2.10; newer ones say it as we do
        assert found[0] == expected[0] and found[1].startswith("RNN input dtype (")
    else:
        assert found == expected


# torch.nn's own text comes from oneDNN, or is a list of overloads, or there is no check at all.
BETTER_ERRORS: list[tuple[str, Callable[[nn.Module], Any], type[Exception], str]] = [
    *(
        (name, call, RuntimeError, "must have the same dtype, but got Double and Float")
        for name in LAYER_CLASSES
        for call in (
            lambda m: m(x(5, 2, 3), states(type(m).__name__, 1, 2, 4, dtype=torch.float64)),
        )
    ),
    (
        "LSTM",
        lambda m: m(x(5, 2, 3), x(2, 1, 2, 4)),
        TypeError,
        "must be tuple of Tensors, not Tensor",
    ),
    (
        "LSTM",
        lambda m: m(pack_sequence([x(3, 7)])),
        RuntimeError,
        "must be equal to input_size. Expected 3, got 7",
    ),
    ("LSTM", lambda m: m(pack_sequence([x(3, 3).double()])), ValueError, "input.to.torch.float32"),
    (
        "LSTM",
        lambda m: m(pack_sequence([x(3, 3)]), (x(1, 2, 4), x(1, 1, 4))),
        RuntimeError,
        r"Expected hidden\[0\] size \(1, 1, 4\), got \[1, 2, 4\]",
    ),
    *(
        (
            name,
            lambda m: m(
                pack_sequence([x(2, 3), x(3, 3)], enforce_sorted=False),
                states(type(m).__name__, 1, 3, 4),
            ),
            RuntimeError,
            r"Expected hidden.* size \(1, 2, 4\), got \[1, 3, 4\]",
        )
        for name in LAYER_CLASSES
    ),
]


@pytest.mark.parametrize(("name", "call", "kind", "text"), BETTER_ERRORS)
def test_errors_that_torch_words_worse(
    name: str, call: Callable[[nn.Module], Any], kind: type[Exception], text: str
) -> None:
    with pytest.raises(kind, match=text):
        call(getattr(fused_rnn, name)(3, 4))


BAD_CELL_CALLS: dict[str, Callable[[nn.Module, str], Any]] = {
    "3-D": lambda m, n: m(x(1, 2, 3)),
    "hx 0-D": lambda m, n: m(x(2, 3), states(n)),
    "hx 3-D": lambda m, n: m(x(2, 3), states(n, 1, 2, 4)),
    "features": lambda m, n: m(x(2, 7), states(n, 2, 4)),
    "hx width": lambda m, n: m(x(2, 3), states(n, 2, 5)),
    "hx batch": lambda m, n: m(x(2, 3), states(n, 3, 4)),
    "hx batch of one": lambda m, n: m(x(2, 3), states(n, 1, 4)),
    "hx 1-D": lambda m, n: m(x(2, 3), states(n, 4)),
    "unbatched, hx 2-D": lambda m, n: m(x(3), states(n, 2, 4)),
    "input dtype": lambda m, n: m(x(2, 3).double()),
    "hx dtype": lambda m, n: m(x(2, 3), states(n, 2, 4, dtype=torch.float64)),
    "hx triple": lambda m, n: m(x(2, 3), (x(2, 4),) * 3),
    "hx single": lambda m, n: m(x(2, 3), (x(2, 4),)),
    "hx half a pair": lambda m, n: m(x(2, 3), (x(2, 4), None)),
    "no batch": lambda m, n: m(x(0, 3)),
    "list": lambda m, n: m([x(2, 3)]),
}


@pytest.mark.parametrize("name", CELL_CLASSES)
@pytest.mark.parametrize("call", BAD_CELL_CALLS)
def test_cell_call_errors(call: str, name: str) -> None:
    theirs, ours = pair(name, 3, 4)
    found = outcome(lambda: BAD_CELL_CALLS[call](ours, name))
    wanted = outcome(lambda: BAD_CELL_CALLS[call](theirs, name))
    if "Expected 2D hidden0" in found[1] and "Expected 2D" not in wanted[1]:
        wanted = wanted[0], found[1]  # torch before 2.15 speaks of sizes that there are not
    assert found == wanted


def test_lstm_cell_wants_a_pair() -> None:
    with pytest.raises(TypeError, match="must be tuple of Tensors, not Tensor"):
        fused_rnn.LSTMCell(3, 4)(x(2, 3), x(2, 4))


@pytest.mark.parametrize("name", LAYER_CLASSES)
@pytest.mark.parametrize("change", [{"num_layers": 2}, {"bidirectional": True}, {"bias": False}])
@pytest.mark.parametrize("train", [False, True], ids=["infer", "train"])
def test_attributes_that_do_not_fit_the_weights(
    name: str, change: dict[str, Any], train: bool
) -> None:
    """torch.nn raises, too, but its LSTM reads past its weights for some."""
    module = getattr(fused_rnn, name)(3, 4)
    for key, value in change.items():
        setattr(module, key, value)
    with torch.set_grad_enabled(train), pytest.raises(RuntimeError, match="4 weights do not fit"):
        module(x(5, 2, 3))


@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize("train", [False, True], ids=["infer", "train"])
def test_weights_of_wrong_shapes_are_named(name: str, train: bool) -> None:
    """torch.nn names shapes only, and its LSTM reads past its weights."""
    if not native():
        pytest.skip("plain torch finds words of its own")
    for weight, change in (
        ("weight_ih", lambda w: w[:-1]),
        ("weight_hh", lambda w: torch.cat([w, w])),
        ("bias_ih", lambda w: w[:1]),
        ("bias_hh", lambda w: w[:, None]),
    ):
        module = getattr(fused_rnn, name)(3, 4)
        key = weight if name in CELL_CLASSES else f"{weight}_l0"
        expected = getattr(module, key)
        setattr(module, key, nn.Parameter(change(expected.detach())))
        given = getattr(module, key)
        letter = weight.replace("weight", "w").replace("bias", "b")
        message = f"{letter}: expected shape {listed(expected)}, got {listed(given)}"
        with torch.set_grad_enabled(train), pytest.raises(RuntimeError) as caught:
            module(x(2, 3) if name in CELL_CLASSES else x(5, 2, 3))
        assert str(caught.value) == message


def listed(tensor: Tensor) -> str:
    return f"({', '.join(map(str, tensor.shape))})"


def test_unknown_nonlinearity_of_a_cell() -> None:
    for module in (nn, fused_rnn):
        cell = module.RNNCell(3, 4, nonlinearity="foo")
        with pytest.raises(RuntimeError, match="Unknown nonlinearity: foo"):
            cell(x(2, 3))


@pytest.mark.parametrize("name", CELL_CLASSES)
@pytest.mark.parametrize(("inputs", "hidden"), [(0, 4), (3, 0), (0, 0)])
def test_cells_without_inputs_or_units(name: str, inputs: int, hidden: int) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # initializing zero elements
        theirs, ours = pair(name, inputs, hidden)
    assert_all_close(run(ours, x(2, inputs)), run(theirs, x(2, inputs)), tol=1e-6)
