"""Modules around the numbers: arguments, parameters, calls, what people do to classes."""

from __future__ import annotations

import copy
import doctest
import inspect
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import CELL_CLASSES, CLASSES, LAYER_CLASSES, pair, some_input
from helpers import assert_all_close, flatten, run
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pack_sequence

import fused_rnn

pytestmark = pytest.mark.module

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


@pytest.mark.parametrize("name", LAYER_CLASSES)
def test_public_methods(name: str) -> None:
    public = {n for n in dir(getattr(nn, name)) if not n.startswith("__")}
    assert not {n for n in public if not hasattr(getattr(fused_rnn, name), n)}


def test_base_classes() -> None:
    """Dynamo refuses instances of nn.RNN, nn.LSTM and nn.GRU, so ours are none."""
    for name in LAYER_CLASSES:
        assert issubclass(getattr(fused_rnn, name), nn.RNNBase)
        assert not issubclass(getattr(fused_rnn, name), (nn.RNN, nn.LSTM, nn.GRU))
    for name in CELL_CLASSES:
        assert issubclass(getattr(fused_rnn, name), nn.RNNCellBase)


# --- Calls ---------------------------------------------------------------------------------------


def no_warnings(fn: Callable[[], Any]) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return fn()


@pytest.mark.parametrize("name", LAYER_CLASSES)
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
    kwargs = {} if name in CELL_CLASSES else {"batch_first": True}
    value = some_input(name)
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


@pytest.mark.parametrize("name", LAYER_CLASSES)
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


@pytest.mark.parametrize("name", CELL_CLASSES)
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
