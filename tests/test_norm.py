"""Normalised products in the native kernels: against the reference, and what they must not change.

``test_stages`` has the option in modules, against plain loops.
"""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from cases import KERNELS
from helpers import assert_close, cpu_engine_only
from torch import Tensor

from fused_rnn import build, ops, reference

pytestmark = [
    pytest.mark.parity,
    pytest.mark.skipif(build.backend() != "native", reason="tests of the native library"),
]

PLACES = [("input",), ("recurrent",), ("input", "recurrent"), ("sum",)]
PLACES += [("cell",), ("recurrent", "cell"), ("input", "recurrent", "cell"), ("sum", "cell")]


def sizes(cell: str, units: int, inputs: int, width: int, blocks: int) -> dict[str, Any]:
    rows, rows_h = (
        n * units for n in (reference.CELLS[cell].gates, reference.CELLS[cell].recurrent_gates)
    )
    shapes = {"w_ih": (rows, inputs), "w_hh": (rows_h, width // blocks), "w_hr": (width, units)}
    gains = {"b_ih": rows, "b_hh": rows_h, "g_ih": rows, "g_hh": rows_h, "g": rows}
    return {**shapes, **{name: (n,) for name, n in gains.items()}}


def problem(rng: random.Random, cell: str, at: tuple[str, ...], dtype: torch.dtype) -> Any:
    """The arguments of a call, and those of it that have gradients."""
    layers, directions = rng.choice([(1, 1), (1, 2), (2, 2)])
    blocks = rng.choice([1, 1, 2])
    units = 64 if blocks > 1 else rng.choice([1, 5, 16, 33, 100])
    projected = cell == "lstm" and blocks == 1 and units > 1 and rng.random() < 0.3
    width = units // 2 if projected else units
    time, batch = rng.choice([(1, 3), (7, 2), (12, 33), (3, 70)])
    present = reference.present_bits(
        cell, biases=rng.random() < 0.8, projection=projected, norm_at=at
    )

    def draw(*shape: int) -> Tensor:
        # Larger matrices would make what rounding does grow from step to step.
        scale = min(0.4, shape[-1] ** -0.5) if len(shape) == 2 else 0.4
        return torch.randn(*shape, dtype=torch.float64).mul(scale).to(dtype).requires_grad_()

    weights = []
    for run in range(layers * directions):
        inputs = 6 if run < directions else directions * width
        shapes = sizes(cell, units, inputs, width, blocks)
        for name in reference.present_names(cell, present):
            weights.append(draw(*shapes.get(name, (units,))))
    counts, x = None, draw(time, batch, 6)
    if rng.random() < 0.4:
        counts = torch.tensor(
            sorted([batch, *(rng.randint(1, batch) for _ in range(time - 1))], reverse=True)
        )
        x = draw(int(counts.sum()), 6)
    h0 = draw(layers * directions, batch, width)
    c0 = draw(layers * directions, batch, units) if "lstm" in cell else None
    norm = reference.Norm(rng.choice(["layer", "rms"]), at, 0.1)
    rows, runs = x.shape[:-1].numel(), layers * directions
    reset = torch.rand(x.shape[:-1]) < 0.1 if rng.random() < 0.5 else None
    zoneout = h_mask = None
    if not projected and rng.random() < 0.4:
        states = len(reference.CELLS[cell].states)
        one_for_all = rng.random() < 0.5 and not cell.startswith("rnn")
        zoneout = torch.rand(runs, 1 if one_for_all else rows, states * units)
        zoneout = (zoneout if one_for_all else zoneout.round()).to(dtype)
    if rng.random() < 0.3:
        h_mask = (torch.rand(runs, batch, width) < 0.8).to(dtype)
    stages = reference.Stages(reset=reset, zoneout=zoneout, h_mask=h_mask, blocks=blocks, norm=norm)
    rest = (None, counts, layers, directions, present, rng.random() < 0.3, stages)
    return [x, h0, c0, *weights], (*rest, rng.random() < 0.5)


def run(
    engine: Any, cell: str, tensors: list[Tensor | None], rest: Any, dtype: torch.dtype
) -> list[Tensor]:
    """Outputs and gradients."""
    own = [None if t is None else t.detach().to(dtype).requires_grad_() for t in tensors]
    x, h0, c0, *weights = own
    *rest, stages, every_state = rest
    rest = (*rest, stages.of_states(lambda t: t.to(dtype)), every_state)
    outputs = [o for o in engine.recurrent(cell, x, h0, c0, weights, *rest) if o is not None]
    generator = torch.Generator().manual_seed(1)
    grads = [
        torch.randn(o.shape, generator=generator, dtype=torch.float64).to(dtype) for o in outputs
    ]
    there = [t for t in own if t is not None]
    return [*outputs, *torch.autograd.grad(outputs, there, grads)]


CASES = [
    (cell, at)
    for cell in KERNELS
    for at in PLACES
    if set(at) <= set(reference.CELLS[cell].norm_places)
]


@cpu_engine_only
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("cell, at", CASES)
def test_agrees_with_the_reference(
    cell: str, at: tuple[str, ...], dtype: torch.dtype, seed: int
) -> None:
    rng = random.Random(f"{seed} {cell} {at} {dtype}")
    torch.manual_seed(rng.randrange(1 << 30))
    for _ in range(3):
        tensors, rest = problem(rng, cell, at, dtype)
        print(cell, at, tensors[0].shape, rest)
        stages = rest[-2]
        units = tensors[1].shape[2]
        assert ops.takes(stages, cell, units, torch.device("cpu"), train=True)
        exact = [t.detach() for t in run(reference, cell, tensors, rest, torch.float64)]
        found, theirs = (
            [
                float((t.detach().double() - want).norm() / want.norm().clamp_min(1e-2))
                for t, want in zip(run(engine, cell, tensors, rest, dtype), exact, strict=True)
            ]
            for engine in (ops, reference)
        )
        # A row of one number has no spread. Where its gradient is zero, rounding leaves some eps of
        # each of 200 summands, or 2e-7 beside gradients of 10: that much is granted, and not less.
        limit = 1e-11 if dtype == torch.float64 else max(2e-4, *theirs)
        assert max(found) < limit, (found, theirs)


@cpu_engine_only
@pytest.mark.parametrize(
    "cell, at",
    [
        ("lstm", ("input", "recurrent")),
        ("lstm", ("input", "recurrent", "cell")),
        ("peephole_lstm", ("cell",)),
        ("rnn_tanh", ("sum",)),
    ],
)
def test_bits_do_not_depend_on_threads(cell: str, at: tuple[str, ...]) -> None:
    torch.manual_seed(0)
    present = reference.present_bits(cell, biases=True, projection=False, norm_at=at)
    shapes = sizes(cell, 200, 30, 200, 1)
    names = reference.present_names(cell, present)
    weights = [torch.randn(shapes.get(name, (200,))) * 0.2 for name in names]
    norm = reference.Norm("layer", at)
    rest = (None, None, 1, 1, present, False, reference.Stages(norm=norm), False)
    tensors = [torch.randn(9, 24, 30), torch.randn(1, 24, 200), None, *weights]
    if "lstm" in cell:
        tensors[2] = torch.randn(1, 24, 200)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(run(ops, cell, tensors, rest, torch.float32))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


@cpu_engine_only
def test_a_large_mean_costs_no_digits() -> None:
    """All is of distances from near the mean: products of about 1000 that differ by about 1."""
    torch.manual_seed(0)
    at = ("input",)
    present = reference.present_bits("rnn_tanh", biases=False, projection=False, norm_at=at)
    w_ih = torch.randn(300, 2) * 0.5 + torch.tensor([1000.0, 0.0])
    weights = [w_ih, torch.randn(300, 300) * 0.01, torch.ones(300)]
    x = torch.cat([torch.ones(4, 5, 1), torch.randn(4, 5, 1)], -1)
    stages = reference.Stages(norm=reference.Norm("layer", at))
    rest = (None, None, 1, 1, present, False, stages)
    found = ops.recurrent("rnn_tanh", x, None, None, weights, *rest)[0]
    wide = [w.double() for w in weights]
    exact = reference.recurrent("rnn_tanh", x.double(), None, None, wide, *rest)[0]
    plain = reference.recurrent("rnn_tanh", x, None, None, weights, *rest)[0]
    error, theirs = ((y.double() - exact).abs().max() for y in (found, plain))
    assert error <= theirs


@cpu_engine_only
@pytest.mark.parametrize(
    "cell, at", [("gru", ("input", "recurrent")), ("lstm", ("input", "recurrent", "cell"))]
)
def test_operators_are_sound(cell: str, at: tuple[str, ...]) -> None:
    """Schema, fakes and autograd of a call with all kinds of gains."""
    torch.manual_seed(0)
    present = reference.present_bits(cell, biases=True, projection=False, norm_at=at)
    shapes = sizes(cell, 5, 3, 5, 1)
    names = reference.present_names(cell, present)
    weights = [
        torch.randn(shapes.get(n, (5,)), dtype=torch.float64, requires_grad=True) for n in names
    ]
    x = torch.randn(4, 2, 3, dtype=torch.float64, requires_grad=True)
    arguments = (cell, x, None, None, weights, *(None,) * 5, 1, 1, present)
    for name in ("recurrent", "recurrent_recomputed"):
        op = getattr(torch.ops.fused_rnn, name).default
        torch.library.opcheck(op, (*arguments, 1, 1, 1e-3, False, False))
    y = ops.recurrent(
        *(cell, x, None, None, weights, None, None, 1, 1, present),
        stages=reference.Stages(norm=reference.Norm("layer", at, 1e-3)),
    )[0]
    (dx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    second = torch.autograd.grad(dx.square().sum(), weights)
    again = reference.recurrent(
        *(cell, x, None, None, weights, None, None, 1, 1, present),
        stages=reference.Stages(norm=reference.Norm("layer", at, 1e-3)),
    )[0]
    (dx,) = torch.autograd.grad(again.square().sum(), x, create_graph=True)
    for ours, theirs in zip(second, torch.autograd.grad(dx.square().sum(), weights), strict=True):
        assert_close(ours, theirs)


@pytest.mark.parametrize(
    "cell, at, norm, message",
    [
        ("gru", ("sum",), 1, "g: expected without g_ih and g_hh, of a cell that reads sums alone"),
        ("lstm", ("sum", "input"), 1, "g: expected without g_ih and g_hh"),
        ("gru", ("cell",), 1, "g_c, s_c: expected both or none, of a cell whose output shows a"),
        ("lstm", ("cell",), 0, "weights: expected 4 for each of 1 layers"),
        ("lstm", ("input",), 0, "weights: expected 4 for each of 1 layers"),
        ("lstm", ("input",), 3, "norm: expected 0, 1 or 2, and norm_eps from 0 on, got 3"),
    ],
)
def test_refused(cell: str, at: tuple[str, ...], norm: int, message: str) -> None:
    present = reference.present_bits(cell, biases=True, projection=False, norm_at=at)
    shapes = sizes(cell, 5, 3, 5, 1)
    names = reference.present_names(cell, present)
    weights = [torch.ones(shapes.get(name, (5,))) for name in names]
    arguments = (cell, torch.ones(4, 2, 3), None, None, weights, *(None,) * 5, 1, 1, present)
    with pytest.raises(RuntimeError, match=message):
        torch.ops.fused_rnn.recurrent_infer(*arguments, 1, norm, 1e-3, False, False)


@pytest.mark.parametrize("cell", KERNELS)
def test_library_and_reference_agree_on_what_is_shown(cell: str) -> None:
    """kShows of csrc/cells, and ``shows_c``."""
    assert bool(ops.facts_of("cpu", cell).shows) == reference.CELLS[cell].shows_c
