"""The contract around the numbers: arguments, parameters, state, errors, what people do to them."""

from __future__ import annotations

import copy
import doctest
import inspect
import io
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from cases import CLASSES, Case, pair, small
from helpers import assert_all_close, flatten, native, run
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pack_sequence

import fused_rnn

pytestmark = pytest.mark.module

LAYERS = ["RNN", "LSTM", "GRU"]
CELLS = ["RNNCell", "LSTMCell", "GRUCell"]

CONSTRUCTIONS: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = [
    ("RNN", (3, 4), {}),
    ("RNN", (3, 4, 2, "relu", False, True, 0.5, True), {}),
    ("RNN", (3, 4), {"nonlinearity": "relu", "dtype": torch.float64}),
    ("LSTM", (3, 4), {}),
    ("LSTM", (3, 4, 2, False, True, 0.25, True, 2), {}),
    ("LSTM", (3, 4, 3), {"proj_size": 1, "bidirectional": True}),
    ("GRU", (3, 4), {}),
    ("GRU", (3, 4, 2, True, True, 0.5, True), {}),
    ("GRU", (3, 4), {"bidirectional": True, "dtype": torch.bfloat16}),
    ("RNNCell", (3, 4), {}),
    ("RNNCell", (3, 4, False, "relu"), {}),
    ("LSTMCell", (3, 4), {"bias": False}),
    ("GRUCell", (3, 4, True), {"dtype": torch.float16}),
    ("GRUCell", (0, 4), {}),
    ("LSTMCell", (3, 0), {}),
]


@pytest.mark.parametrize(("name", "args", "kwargs"), CONSTRUCTIONS, ids=str)
def test_same_seed_same_module(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    torch.manual_seed(3)
    theirs = getattr(nn, name)(*args, **kwargs)
    after = torch.get_rng_state()
    torch.manual_seed(3)
    ours = getattr(fused_rnn, name)(*args, **kwargs)

    assert torch.equal(torch.get_rng_state(), after)
    assert repr(ours) == repr(theirs)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert mine.dtype == other.dtype and torch.equal(mine, other)
    for key, value in vars(theirs).items():
        if not key.startswith("_"):
            assert getattr(ours, key) == value, key
    for attribute in ("bias_ih", "bias_hh", "proj_size", "nonlinearity", "__constants__"):
        if hasattr(theirs, attribute) and not isinstance(getattr(theirs, attribute), Tensor):
            assert getattr(ours, attribute) == getattr(theirs, attribute)
    ours.load_state_dict(theirs.state_dict())
    theirs.load_state_dict(ours.state_dict())


@pytest.mark.parametrize("name", CLASSES)
def test_signature(name: str) -> None:
    """The documented arguments in the documented order, and ``forward(input, hx=None)``. What
    torch.nn does not have is keyword-only."""
    documented = {
        "RNN": "num_layers nonlinearity bias batch_first dropout bidirectional",
        "LSTM": "num_layers bias batch_first dropout bidirectional proj_size",
        "GRU": "num_layers bias batch_first dropout bidirectional",
        "RNNCell": "bias nonlinearity",
        "LSTMCell": "bias",
        "GRUCell": "bias",
    }
    ours = getattr(fused_rnn, name)
    positional = [
        p.name
        for p in inspect.signature(ours).parameters.values()
        if p.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD
    ]
    expected = f"input_size hidden_size {documented[name]} device dtype"
    assert positional == expected.split()
    forward = inspect.signature(ours.forward).parameters
    assert list(forward)[:3] == ["self", "input", "hx"]
    assert all(p.kind is inspect.Parameter.KEYWORD_ONLY for p in list(forward.values())[3:])
    assert inspect.signature(ours.__call__) == inspect.signature(ours.forward)


@pytest.mark.parametrize("name", CLASSES)
def test_help(name: str) -> None:
    """What help() shows stands by itself, and its example runs."""
    cls = getattr(fused_rnn, name)
    assert "this file" not in cls.__doc__
    parser, failures = doctest.DocTestParser(), []
    names = {"torch": torch, "fused_rnn": fused_rnn}
    example = parser.get_doctest(cls.__doc__, names, name, None, 0)
    assert example.examples
    doctest.DocTestRunner().run(example, out=failures.append)
    assert not failures, "".join(failures)


@pytest.mark.parametrize("name", LAYERS)
def test_public_methods(name: str) -> None:
    public = {n for n in dir(getattr(nn, name)) if not n.startswith("__")}
    assert not {n for n in public if not hasattr(getattr(fused_rnn, name), n)}


def test_base_classes() -> None:
    """Dynamo refuses instances of nn.RNN, nn.LSTM and nn.GRU, so ours are none."""
    for name in LAYERS:
        assert issubclass(getattr(fused_rnn, name), nn.RNNBase)
        assert not issubclass(getattr(fused_rnn, name), (nn.RNN, nn.LSTM, nn.GRU))
    for name in CELLS:
        assert issubclass(getattr(fused_rnn, name), nn.RNNCellBase)


# --- Errors and warnings: the same type and the same text ----------------------------------------


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
    *((name, (3,), {}) for name in CELLS),
]


@pytest.mark.parametrize(("name", "args", "kwargs"), BAD_CONSTRUCTIONS, ids=str)
def test_constructor_errors(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    assert outcome(lambda: getattr(fused_rnn, name)(*args, **kwargs)) == outcome(
        lambda: getattr(nn, name)(*args, **kwargs)
    )


@pytest.mark.parametrize("name", LAYERS)
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


def no_warnings(fn: Callable[[], Any]) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return fn()


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


@pytest.mark.parametrize("name", LAYERS)
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
        for name in LAYERS
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
        for name in LAYERS
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


@pytest.mark.parametrize("name", CELLS)
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


@pytest.mark.parametrize("name", LAYERS)
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
        key = weight if name in CELLS else f"{weight}_l0"
        expected = getattr(module, key)
        setattr(module, key, nn.Parameter(change(expected.detach())))
        given = getattr(module, key)
        letter = weight.replace("weight", "w").replace("bias", "b")
        message = f"{letter}: expected shape {listed(expected)}, got {listed(given)}"
        with torch.set_grad_enabled(train), pytest.raises(RuntimeError) as caught:
            module(x(2, 3) if name in CELLS else x(5, 2, 3))
        assert str(caught.value) == message


def listed(tensor: Tensor) -> str:
    return f"({', '.join(map(str, tensor.shape))})"


def test_unknown_nonlinearity_of_a_cell() -> None:
    for module in (nn, fused_rnn):
        cell = module.RNNCell(3, 4, nonlinearity="foo")
        with pytest.raises(RuntimeError, match="Unknown nonlinearity: foo"):
            cell(x(2, 3))


@pytest.mark.parametrize("name", CELLS)
@pytest.mark.parametrize(("inputs", "hidden"), [(0, 4), (3, 0), (0, 0)])
def test_cells_without_inputs_or_units(name: str, inputs: int, hidden: int) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # initializing zero elements
        theirs, ours = pair(name, inputs, hidden)
    assert_all_close(run(ours, x(2, inputs)), run(theirs, x(2, inputs)), tol=1e-6)


# --- State: copies, files, devices, dtypes -------------------------------------------------------


def same(copied: nn.Module, original: nn.Module, name: str) -> None:
    assert type(copied) is type(original)
    if isinstance(copied, nn.RNNBase):
        for weight, attribute in zip(copied._flat_weights, copied._flat_weights_names, strict=True):
            assert weight is getattr(copied, attribute)
    value = torch.randn(2, 3) if name in CELLS else torch.randn(5, 2, 3)
    assert_all_close(copied(value), original(value), tol=0)
    for a, b in zip(copied.parameters(), original.parameters(), strict=True):
        assert a is not b and torch.equal(a, b)


@pytest.mark.parametrize("name", CLASSES)
def test_copies(name: str) -> None:
    module = getattr(fused_rnn, name)(3, 4)
    same(copy.deepcopy(module), module, name)
    same(pickle.loads(pickle.dumps(module)), module, name)
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    same(torch.load(file, weights_only=False), module, name)
    file = io.BytesIO()
    torch.save(module.state_dict(), file)
    file.seek(0)
    fresh = getattr(nn, name)(3, 4)
    fresh.load_state_dict(torch.load(file))
    assert all(
        torch.equal(a, b) for a, b in zip(fresh.parameters(), module.parameters(), strict=True)
    )


def test_pickle_of_an_old_module() -> None:
    """What torch wrote before projections existed lacks ``proj_size``."""
    module = fused_rnn.LSTM(3, 4)
    state = module.__getstate__()
    del state["proj_size"]
    old = fused_rnn.LSTM.__new__(fused_rnn.LSTM)
    old.__setstate__(state)
    assert old.proj_size == 0
    assert_all_close(old(x(5, 2, 3) + 1), module(x(5, 2, 3) + 1), tol=0)


@pytest.mark.parametrize("name", CLASSES)
def test_meta_device(name: str) -> None:
    def build(module: Any) -> nn.Module:
        with torch.device("meta"):
            return getattr(module, name)(3, 4)

    theirs, ours = build(nn), build(fused_rnn)
    value = (
        torch.empty(2, 3, device="meta") if name in CELLS else torch.empty(5, 2, 3, device="meta")
    )
    for a, b in zip(flatten(ours(value)), flatten(theirs(value)), strict=True):
        assert a.device.type == "meta" and a.shape == b.shape and a.dtype == b.dtype
    real = ours.to_empty(device="cpu")
    real.reset_parameters()
    assert all(p.device.type == "cpu" and p.abs().max() <= 0.5 for p in real.parameters())
    real(torch.zeros(value.shape))


@pytest.mark.parametrize("name", CLASSES)
def test_skip_init(name: str) -> None:
    """torch.nn's RNN, LSTM and GRU cannot do this: their signatures hide ``device``."""
    state = torch.get_rng_state()
    module = nn.utils.skip_init(getattr(fused_rnn, name), 3, 4)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(p.device.type == "cpu" for p in module.parameters())


@pytest.mark.parametrize("name", CLASSES)
def test_dtypes(name: str) -> None:
    value = torch.randn(2, 3) if name in CELLS else torch.randn(5, 2, 3)
    theirs, ours = pair(name, 3, 4)
    for dtype in (torch.float64, torch.bfloat16, torch.float16, torch.float32):
        ours, theirs = ours.to(dtype), theirs.to(dtype)
        for a, b in zip(
            flatten(ours(value.to(dtype))), flatten(theirs(value.to(dtype))), strict=True
        ):
            assert a.dtype == b.dtype == dtype
    assert ours.double().half().float() is ours


@pytest.mark.parametrize("name", CLASSES)
def test_default_dtype(name: str) -> None:
    torch.set_default_dtype(torch.float64)
    try:
        module = getattr(fused_rnn, name)(3, 4)
        output = flatten(module(torch.randn(2, 3) if name in CELLS else torch.randn(5, 2, 3)))[0]
    finally:
        torch.set_default_dtype(torch.float32)
    assert output.dtype == next(module.parameters()).dtype == torch.float64


@pytest.mark.parametrize("name", CLASSES)
def test_reset_parameters(name: str) -> None:
    theirs, ours = pair(name, 3, 4)
    for module in (theirs, ours):
        torch.manual_seed(11)
        module.reset_parameters()
    assert all(
        torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True)
    )


# --- Weights: read by name, at every call --------------------------------------------------------


@pytest.mark.parametrize(
    "case", small(num_layers=2, bidirectional=True, dropout=0.5), ids=lambda c: c.cell
)
def test_attributes_are_read_at_every_call(case: Case) -> None:
    theirs, ours = case.modules()
    value = torch.randn(3, 3, case.input_size, dtype=torch.float64)  # T = B: batch_first may change
    for change in (
        {},
        {"dropout": 0.0},
        {"batch_first": True},
        {"dropout": 1.0, "training": True},
        {"training": False},
    ):
        for module in (theirs, ours):
            torch.manual_seed(5)
            for key, setting in change.items():
                setattr(module, key, setting)
            module.result = module(value)
        assert_all_close(ours.result, theirs.result)


def test_weights_that_change() -> None:
    theirs, ours = pair("GRU", 3, 4)
    value = torch.randn(5, 2, 3)
    fresh = {k: torch.randn_like(v) for k, v in ours.state_dict().items()}

    def check() -> None:
        assert_all_close(ours(value), theirs(value), tol=1e-5)

    check()
    for module in (theirs, ours):
        module.weight_hh_l0.data = fresh["weight_hh_l0"].clone()
    check()
    for module in (theirs, ours):
        with torch.no_grad():
            module.weight_ih_l0.mul_(1.5)
    check()
    for module in (theirs, ours):
        module.load_state_dict(fresh, assign=True)
    check()
    for module in (theirs, ours):
        module.bias_hh_l0 = nn.Parameter(fresh["bias_hh_l0"] * 2)
    check()
    assert ours._flat_weights[3] is ours.bias_hh_l0
    for module in (theirs, ours):
        with torch.no_grad():
            module.weight_hh_l0.set_(
                torch.randn(99)[-12 * 4 :].view(12, 4).copy_(fresh["weight_hh_l0"])
            )
    check()


@pytest.mark.parametrize("name", LAYERS)
def test_tied_weights(name: str) -> None:
    theirs, ours = pair(name, 3, 4, bidirectional=True)
    for module in (theirs, ours):
        module.bias_ih_l0_reverse = module.bias_ih_l0
        module.weight_hh_l0_reverse = module.weight_hh_l0
        module.double()
    assert len(list(ours.parameters())) == 6 and len(ours._flat_weights) == 8
    value = torch.randn(5, 2, 3, dtype=torch.float64)
    assert_all_close(run(ours, value), run(theirs, value))


def test_plain_tensor_as_weight() -> None:
    """The weight-drop pattern of AWD-LSTM: a raw parameter, and a tensor made from it each time."""
    theirs, ours = pair("LSTM", 3, 4, dtype=torch.float64)
    value = torch.randn(5, 2, 3, dtype=torch.float64)
    grads = []
    for module in (theirs, ours):
        raw = module.weight_hh_l0
        del module._parameters["weight_hh_l0"]
        module.register_parameter("weight_hh_l0_raw", nn.Parameter(raw.data))
        for scale in (0.5, 2.0):
            module.weight_hh_l0 = module.weight_hh_l0_raw * scale
            module(value)[0].sum().backward()
        grads.append([p.grad for p in module.parameters()])
    assert_all_close(grads[1], grads[0])


def test_deleted_weight() -> None:
    """The weight last seen is used, as in torch.nn; moving the module does not fail."""
    theirs, ours = pair("GRU", 3, 4)
    value = torch.randn(5, 2, 3)
    before = ours(value)
    for module in (theirs, ours):
        del module.weight_ih_l0
    assert_all_close(ours(value), theirs(value), tol=1e-6)
    assert_all_close(ours(value), before, tol=0)
    ours.cpu()


@pytest.mark.parametrize("name", CELLS)
@pytest.mark.parametrize("gone", ["bias_ih", "bias_hh"])
def test_cells_with_one_bias(gone: str, name: str) -> None:
    """The second bias of most cells is redundant, so people drop it. The other one counts."""
    theirs, ours = pair(name, 3, 4, dtype=torch.float64)
    for module in (theirs, ours):
        module.register_parameter(gone, None)
    value = torch.randn(2, 3, dtype=torch.float64)
    assert_all_close(run(ours, value), run(theirs, value))
    with torch.no_grad():
        assert_all_close(ours(value), theirs(value))
    for module in (theirs, ours):
        module.float()
    with torch.autocast("cpu", torch.bfloat16):
        assert_all_close(ours(value.float()), theirs(value.float()), tol=0.05)


def test_all_weights() -> None:
    module = fused_rnn.LSTM(3, 4, num_layers=2, bidirectional=True, proj_size=2)
    assert [len(group) for group in module.all_weights] == [5] * 4
    flat = [weight for group in module.all_weights for weight in group]
    for a, b, c in zip(flat, module.parameters(), module._flat_weights, strict=True):
        assert a is b is c


def test_flatten_parameters_changes_nothing() -> None:
    module = fused_rnn.GRU(3, 4)
    pointers = [p.data_ptr() for p in module.parameters()]
    assert module.flatten_parameters() is None
    assert pointers == [p.data_ptr() for p in module.parameters()]


# --- Calls ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LAYERS)
def test_packed_objects_are_handed_through(name: str) -> None:
    packed = pack_sequence([torch.randn(n, 3) for n in (2, 4, 3)], enforce_sorted=False)
    output, _ = getattr(fused_rnn, name)(3, 4, batch_first=True)(packed)
    assert isinstance(output, PackedSequence)
    for field in ("batch_sizes", "sorted_indices", "unsorted_indices"):
        assert getattr(output, field) is getattr(packed, field)


@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize("train", [False, True], ids=["infer", "train"])
def test_results_can_be_detached_in_place(train: bool, name: str) -> None:
    """As truncated backpropagation does it. Views refuse, and those of torch.nn are none."""
    kwargs = {} if name in CELLS else {"batch_first": True}
    value = torch.randn(2, 3) if name in CELLS else torch.randn(5, 2, 3)
    for dtype in (torch.float32, torch.bfloat16):
        module = getattr(fused_rnn, name)(3, 4, dtype=dtype, **kwargs)
        # Of any strides: not all of them take the same way.
        for given in (value.to(dtype), torch.stack([value, value], -1)[..., 0].to(dtype)):
            with torch.set_grad_enabled(train):
                outputs = flatten(module(given))
            for output in outputs:
                assert output.requires_grad == train and not output._is_view()
                assert not output.detach_().requires_grad


def test_types_of_results() -> None:
    value = torch.randn(5, 2, 3)
    output = fused_rnn.LSTM(3, 4)(value)
    assert type(output) is tuple and type(output[1]) is tuple
    assert type(fused_rnn.LSTMCell(3, 4)(value[0])) is tuple
    assert type(fused_rnn.GRU(3, 4)(input=value, hx=None)) is tuple
    assert type(fused_rnn.GRUCell(3, 4)(input=value[0], hx=None)) is Tensor


@pytest.mark.parametrize("name", LAYERS)
def test_quiet(name: str) -> None:
    """An ordinary call warns of nothing; torch.nn does of projections."""
    module = getattr(fused_rnn, name)(3, 4, **({"proj_size": 2} if name == "LSTM" else {}))
    no_warnings(lambda: module(torch.randn(5, 2, 3))[0].sum().backward())


def test_overridden_hooks_are_called() -> None:
    calls = []

    def spy(method: str) -> Any:
        def called(self: nn.Module, *args: Any) -> Any:
            calls.append(method)
            return getattr(fused_rnn.LSTM, method)(self, *args)

        return called

    methods = [
        "check_input",
        "check_forward_args",
        "permute_hidden",
        "get_expected_hidden_size",
        "get_expected_cell_size",
        "check_hidden_size",
    ]
    module = type("Spy", (fused_rnn.LSTM,), {method: spy(method) for method in methods})(3, 4)
    for value in (
        torch.randn(5, 2, 3),
        pack_padded_sequence(torch.randn(5, 2, 3), [3, 5], enforce_sorted=False),
    ):
        calls.clear()
        module(value)
        assert set(calls) == set(methods)


@pytest.mark.parametrize("name", CELLS)
def test_sparse_input(name: str) -> None:
    """Cells of torch.nn take bags of words as they are."""
    theirs, ours = pair(name, 30, 4, dtype=torch.float64)
    value = (torch.rand(2, 30, dtype=torch.float64) < 0.1).double().to_sparse()
    assert_all_close(run(ours, value), run(theirs, value))
    with torch.no_grad():
        assert_all_close(ours(value), theirs(value))


# --- Subclasses ----------------------------------------------------------------------------------


class Residual(fused_rnn.GRU):
    """As people write them: more parameters, forward wrapped, arguments passed on."""

    def __init__(self, size: int, **kwargs: Any) -> None:
        super().__init__(size, size, **kwargs)
        self.scale = nn.Parameter(torch.ones(size))

    def forward(self, input: Tensor, hx: Tensor | None = None) -> tuple[Tensor, Tensor]:
        self.flatten_parameters()
        output, h_n = super().forward(input, hx)
        return input + self.scale * output, h_n


def test_subclass() -> None:
    module = Residual(4, num_layers=2)
    assert list(module.state_dict())[-1] == "scale"
    value = torch.randn(5, 2, 4)
    plain = fused_rnn.GRU(4, 4, num_layers=2)
    plain.load_state_dict({k: v for k, v in module.state_dict().items() if k != "scale"})
    assert_all_close(module(value)[0], value + plain(value)[0], tol=1e-6)
    module(value)[0].sum().backward()
    assert module.scale.grad is not None
    assert_all_close(copy.deepcopy(module)(value), module(value), tol=0)
    assert "Residual(4, 4, num_layers=2)" in repr(module)


def test_names_of_the_package() -> None:
    assert set(CLASSES) < set(fused_rnn.__all__)
    assert all(hasattr(fused_rnn, name) for name in fused_rnn.__all__)
    assert fused_rnn.backend_info()["backend"] in ("native", "reference")
    assert fused_rnn.__version__
