"""Scans of the CUDA engine, for cells from Python whose update is affine: on a card, or emulated.

They are held to plain torch in float64, and to what launches of every step make of the numbers.
"""

from __future__ import annotations

import copy
import functools
import operator
import random
from typing import Any

import emulated
import pytest
import scan_cells
import torch
from helpers import Giving, assert_all_close, assert_no_worse, run
from problems import Problem, call, draw, make, on_reference, some_options, with_gradients
from torch import Tensor
from torch.utils._pytree import tree_map

import fused_rnn
from fused_rnn import build, zoo

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = [
    pytest.mark.parity,
    pytest.mark.skipif(not emulated.WANTED and DEVICE == "cpu", reason="about the CUDA engine"),
]

CELLS = ("zoo.MinGRU", "zoo.MinLSTM", "zoo.QRNN", *scan_cells.ALL)
OPTIONS = (
    *("lengths", "packed", "reset", "reset_to", "reset_to of each step", "return_states"),
    *("norm", "recompute"),
)
GATES = tuple("abcdefghijklmnop")


def name_of(cell: Any) -> str:
    return cell if isinstance(cell, str) else "-".join(cell.states)


@pytest.fixture(autouse=True)
def scan(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FUSED_RNN_VARIANT", "scan")
    if DEVICE == "cuda":
        monkeypatch.setattr(torch.backends.cudnn.rnn, "fp32_precision", "ieee")


def check(problem: Problem) -> None:
    def values() -> Any:
        torch.manual_seed(7)
        found = with_gradients(problem, call(problem))
        torch.manual_seed(7)
        with torch.no_grad():
            return found, call(problem)

    found, without = values()
    with on_reference():
        expected, _ = values()
    try:
        assert_all_close(found, expected, tol=1e-9)
        outputs = [expected[f"output {i}"] for i in range(len(without))]
        assert_all_close(without, outputs, tol=1e-9)
    except AssertionError as error:
        raise AssertionError(f"{problem.config}: {error}") from None


# T, B, I and H: chunks of one to seven steps, of which the last is there in part.
SIZES = ((1, 2, 3, 5, 9, 16, 31), (1, 2, 5), (1, 3), (1, 2, 17, 33))


@pytest.mark.skipif(not emulated.WANTED, reason="tensors of the CPU")
@pytest.mark.drawn(3)  # each is compiled
@pytest.mark.parametrize("cell", CELLS, ids=name_of)
def test_mixtures(cell: Any, seed: int) -> None:
    """In both directions, ragged, reset, with the states of all steps, with normalised gates."""
    rng = random.Random(f"{seed} {cell}")
    for _ in range(12):
        options = some_options(rng, 0.3, OPTIONS)
        check(make(draw(rng, options, cells=(cell,), sizes=SIZES)))


@pytest.mark.skipif(not emulated.WANTED, reason="tensors of the CPU")
def test_what_a_scan_cannot_do(seed: int) -> None:
    """An option that makes other states recurrent is done step by step."""
    rng = random.Random(seed)
    check(make(draw(rng, ("zoneout",), cells=CELLS, sizes=SIZES)))


def module_of(cell: Any, steps: int, batch: int, *sizes: int, **options: Any) -> Any:
    """A layer with what it is given for each step, and its input and states."""
    kind = getattr(zoo, cell.partition(".")[2]) if isinstance(cell, str) else cell.declare()
    layer, like = kind(*sizes, **options), {"dtype": options["dtype"]}
    given = {
        name: torch.rand(steps, batch, sizes[1], **like) for name in layer._family.declaration.given
    }
    x = torch.randn(steps, batch, sizes[0], **like)
    count = layer.num_layers * (1 + layer.bidirectional)
    states = [torch.rand(count, batch, sizes[1], **like) for _ in layer._family.declaration.states]
    hx: Any = tuple(states) if len(states) > 1 else states[0]
    return Giving(layer, given).to(DEVICE), *tree_map(lambda t: t.to(DEVICE), (x, hx))


def in_double(module: Any, x: Any, hx: Any, dtype: torch.dtype) -> Any:
    return run(copy.deepcopy(module).double(), *tree_map(Tensor.double, (x, hx)), dtype)


@pytest.mark.drawn(3)  # each is compiled
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("cell", CELLS, ids=name_of)
def test_as_good_as_steps(cell: Any, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """In another order of sums, which is the same in each call."""
    problem = module_of(cell, 50, 3, 5, 19, num_layers=2, bidirectional=True, dtype=dtype)
    found, again = run(*problem), run(*problem)
    assert all(torch.equal(value, again[name]) for name, value in found.items())
    monkeypatch.setenv("FUSED_RNN_VARIANT", "steps")
    steps, exact = run(*problem), in_double(*problem, dtype)
    assert_no_worse(found, steps, exact, 3 * 50)
    if dtype == torch.float32:
        assert any(not torch.equal(value, steps[name]) for name, value in found.items())


@fused_rnn.cell(gates=GATES)
def Sixteen(x: Any, r: Any, s: Any, p: Any) -> dict[str, Any]:
    others = functools.reduce(operator.add, (getattr(x, name) for name in GATES[1:]))
    return dict(h=torch.sigmoid(x.a) * s.h + 0.1 * others)


def test_more_gates_than_the_cache_holds() -> None:
    """Their products, and with them the scans, are of some steps at a time."""
    layer = Sixteen(3, 26, bidirectional=True, dtype=torch.float64).to(DEVICE)
    x = torch.randn(1100, 4, 3, dtype=torch.float64, device=DEVICE)
    hx = torch.randn(2, 4, 26, dtype=torch.float64, device=DEVICE)
    found = run(layer, x, hx)
    with on_reference():
        expected = run(layer, x, hx)
    assert_all_close(found, expected, tol=1e-9)


@pytest.mark.parametrize("batch", [0, 1])
def test_batches_of_none_and_of_one(batch: int) -> None:
    layer = zoo.QRNN(3, 4, dtype=torch.float64).to(DEVICE)
    x = torch.randn(70, batch, 3, dtype=torch.float64, device=DEVICE)
    found = run(layer, x)
    with on_reference():
        assert_all_close(found, run(layer, x), tol=1e-12)


@fused_rnn.cell(gates=("a",))
def Growing(x: Any, r: Any, s: Any, p: Any) -> dict[str, Any]:
    return dict(h=8 * s.h + x.a)


def test_states_that_stay_zero() -> None:
    """Where factors beyond 1 overflow together, but multiply nothing."""
    layer = Growing(1, 4, bias=False).to(DEVICE)
    x = torch.zeros(4000, 1, 1, device=DEVICE)
    x[-2:] = 1
    x.requires_grad_()
    y, _ = layer(x)
    weight = layer.weight_ih_l0.squeeze(1)
    torch.testing.assert_close(y[-2:, 0], torch.stack([weight, 9 * weight]))
    assert (y[:-2] == 0).all()
    y[1].sum().backward()
    assert (x.grad[2:] == 0).all() and torch.isfinite(x.grad[:2]).all()


@pytest.mark.skipif(not emulated.WANTED, reason="what the emulated runtime was asked is counted")
def test_launches_do_not_grow_with_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the plan chooses it, which it does of itself."""
    monkeypatch.delenv("FUSED_RNN_VARIANT")
    launches, counts = build.library("cpu").frnn_fake_count, []
    layer = zoo.MinGRU(3, 4)
    for steps in (40, 400):
        before = launches(b"Start")
        layer(torch.randn(steps, 2, 3, requires_grad=True))[0].sum().backward()
        counts.append(launches(b"Start") - before)
    assert counts[0] == counts[1] < 20
