"""Autocast: the numbers, and the types of results."""

from __future__ import annotations

import copy
import itertools
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import CELLS, CLASSES, Case, pair, small
from double_modules import double_pair, first, is_cell, value
from helpers import assert_all_close, error, flatten, half_ulp, magnitude
from torch import Tensor
from torch.nn.utils.rnn import pack_padded_sequence

pytestmark = pytest.mark.parity


@pytest.mark.parametrize("state_dtype", [None, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("input_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", ["padded", "packed"])
@pytest.mark.parametrize("case", small(num_layers=2, hidden_size=9), ids=lambda c: c.cell)
def test_autocast(case: Case, layout: str, input_dtype: torch.dtype, state_dtype: Any) -> None:
    """The dtypes of torch.nn, float32 gradients, and errors no larger."""
    case = Case(**{**vars(case), "layout": layout, "hx": state_dtype is not None})
    theirs, ours = case.modules(torch.float32)
    x, hx = case.inputs(torch.float32)
    exact = copy.deepcopy(theirs).double()
    x = x.to(input_dtype)
    hx = hx if hx is None else tuple(h.to(state_dtype) for h in flatten(hx))
    hx = hx[0] if hx is not None and len(hx) == 1 else hx
    truth = flatten(exact(x.double(), None if hx is None else tuple_or_one(hx, Tensor.double)))
    with torch.autocast("cpu", torch.bfloat16):
        actual = flatten(ours(x, hx))
        try:
            expected = flatten(theirs(x, hx))
        except RuntimeError as failure:  # a processor for which oneDNN has no LSTM in bfloat16
            assert "could not create a primitive" in str(failure)
            assert {o.dtype for o in actual} == {torch.bfloat16}
            pytest.skip("torch.nn cannot do this here")
    results = truth, expected, actual
    assert [o.dtype for o in actual] == [o.dtype for o in expected]
    for outputs in results:
        sum(o.to(torch.promote_types(o.dtype, torch.float32)).sum() for o in outputs).backward()
    assert all(p.grad.dtype == torch.float32 for p in ours.parameters())
    if case.cell != "rnn_relu":  # whose gradient jumps where rounding moves a unit over zero
        for outputs, module in zip(results, (exact, theirs, ours), strict=True):
            outputs.extend(p.grad for p in module.parameters())
    # Twice torch.nn's error, and two roundings of the largest value to bfloat16 for luck.
    for mine, other, true in zip(actual, expected, truth, strict=True):
        bound = 2 * error(other, true) + 2 * half_ulp(torch.bfloat16, magnitude(true))
        assert error(mine, true) <= bound


def tuple_or_one(hx: Any, fn: Callable[[Tensor], Tensor]) -> Any:
    return fn(hx) if isinstance(hx, Tensor) else tuple(map(fn, hx))


@pytest.mark.parametrize("state_dtype", [None, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("input_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("cell", CELLS)
def test_autocast_of_cells(cell: str, input_dtype: torch.dtype, state_dtype: Any) -> None:
    name, kwargs = CELLS[cell]
    theirs, ours = pair(name, 5, 7, **kwargs)
    x, h = torch.randn(3, 5).to(input_dtype), torch.randn(3, 7)
    hx = None
    if state_dtype is not None:
        hx = (h.to(state_dtype),) * 2 if cell == "lstm" else h.to(state_dtype)
    with torch.autocast("cpu", torch.bfloat16):
        actual, expected = flatten(ours(x, hx)), flatten(theirs(x, hx))
    assert_all_close(actual, expected, tol=0.05)
    actual[0].float().sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in ours.parameters())


# Steps, sequences (None: no such dimension), and the lengths of what is packed.
FORMS: dict[str, tuple[int, int | None, list[int] | None]] = {
    "padded": (3, 2, None),
    "one sequence": (3, 1, None),
    "no sequence": (3, 0, None),
    "one step": (1, 2, None),
    "unbatched": (3, None, None),
    "packed": (3, 2, [3, 2]),
    "packed, equally long": (3, 2, [3, 3]),
    "packed, one sequence": (3, 1, [3]),
    "packed, one step": (1, 2, [1, 1]),
}
AUTOCAST_LAYERS: list[tuple[str, dict[str, Any]]] = [
    ("RNN", {}),
    ("GRU", {}),
    ("LSTM", {}),
    ("LSTM", {"proj_size": 2}),
]
AUTOCAST_CASES = [(name, settings, form) for name, settings in AUTOCAST_LAYERS for form in FORMS]
AUTOCAST_CASES += [
    ("LSTM", {"batch_first": True, "num_layers": 2, "bidirectional": True}, form)
    for form in ("padded", "no sequence", "packed", "packed, equally long")
]
AUTOCAST_CASES += [
    (name, {}, form) for name in CLASSES if is_cell(name) for form in list(FORMS)[:5]
]


@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "name, settings, form", AUTOCAST_CASES, ids=lambda v: "-".join(v) if isinstance(v, dict) else v
)
def test_autocast_dtypes(name: str, settings: dict[str, Any], form: str, low: torch.dtype) -> None:
    """All dtypes of inputs and states, with and without gradients: torch.nn's results."""
    theirs, ours = pair(name, 3, 4, **settings)
    time, batch, lengths = FORMS[form]
    batches = [] if batch is None else [batch]
    x_shape = batches if is_cell(name) else [time, *batches]
    h_shape = c_shape = [*batches, 4]
    if not is_cell(name):
        runs = theirs.num_layers * (1 + theirs.bidirectional)
        h_shape, c_shape = [runs, *batches, theirs.proj_size or 4], [runs, *batches, 4]
        if theirs.batch_first and batch is not None and lengths is None:
            x_shape.reverse()
    compared = 0
    dtypes = [torch.float32, torch.bfloat16, torch.float16]
    for x_dtype, state_dtype in itertools.product(dtypes, [None, *dtypes]):
        x: Any = torch.randn(*x_shape, 3).to(x_dtype)
        if lengths is not None:
            x = pack_padded_sequence(x, torch.tensor(lengths))
        hx: Any = None
        if state_dtype is not None:
            hx = torch.randn(h_shape).to(state_dtype)
            if name.startswith("LSTM"):
                hx = hx, torch.randn(c_shape).to(state_dtype)
        for training in (True, False):
            with torch.autocast("cpu", low), torch.set_grad_enabled(training):
                actual = flatten(ours(x, hx))
                try:
                    expected = flatten(theirs(x, hx))
                except RuntimeError as failure:  # states mixed with each other, or no such LSTM
                    words = "Unexpected floating ScalarType", "could not create a primitive"
                    assert any(word in str(failure) for word in words), failure
                    continue
            compared += 1
            assert_all_close(actual, expected, tol=0.05)
    if not compared:
        pytest.skip("torch.nn cannot do this here")


def test_autocast_without_onednn() -> None:
    theirs, ours = pair("LSTM", 3, 4)
    x = value("LSTM", torch.float32)
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with torch.backends.mkldnn.flags(enabled=enabled):
                actual = flatten(ours(x))
                try:
                    expected = flatten(theirs(x))
                except RuntimeError as failure:
                    assert "could not create a primitive" in str(failure)
                    continue
        assert_all_close(actual, expected, tol=0.05)


def test_autocast_leaves_double_alone() -> None:
    for name in CLASSES:
        _, ours = double_pair(name)
        x = value(name)
        with torch.autocast("cpu", torch.bfloat16):
            assert_all_close(ours(x), ours(x))
            assert first(ours(x)).dtype == torch.float64
            with pytest.raises(RuntimeError, match="must have the same dtype"):
                ours(x.float())
