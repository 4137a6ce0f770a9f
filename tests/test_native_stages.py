"""What happens between two steps, in the native kernels: against the reference, alone and mixed.

``test_stages`` has the options in modules, against plain loops.
"""

from __future__ import annotations

import random
from typing import Any
from unittest import mock

import emulated
import pytest
import torch
from cases import KERNELS
from test_norm import PLACES, sizes
from torch import Tensor

import fused_rnn
from fused_rnn import build, ops, reference, segments

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
pytestmark = [
    pytest.mark.parity,
    pytest.mark.skipif(build.backend() != "native", reason="tests of the native library"),
]


@pytest.fixture(autouse=True)
def exact_products(monkeypatch: pytest.MonkeyPatch) -> None:
    if DEVICE.type == "cuda":
        monkeypatch.setattr(torch.backends.cudnn.rnn, "fp32_precision", "ieee")


STAGES = ("reset", "zoneout", "h_mask", "every_state", "blocks", "norm")


def problem(
    rng: random.Random,
    cell: str,
    names: tuple[str, ...],
    dtype: torch.dtype,
    units: int | None = None,
    projects: bool = True,
) -> Any:
    """The arguments of a call with these stages, and those of it that have gradients."""
    layers, directions = rng.choice([(1, 1), (1, 2), (2, 2)])
    blocks = rng.choice([2, 3]) if "blocks" in names else 1
    if blocks > 1:
        units = 32 * blocks
    elif units is None:
        units = rng.choice([1, 5, 33])
    at: tuple[str, ...] = ()
    if "norm" in names:
        has = set(reference.CELLS[cell].norm_places)
        at = rng.choice([place for place in PLACES if set(place) <= has])
    projects &= cell.endswith("lstm") and units > 1 and not {"blocks", "zoneout"} & set(names)
    width = units // 2 if projects and rng.random() < 0.4 else units
    time, batch = rng.choice([(1, 3), (6, 2), (9, 5), (3, 17), (4, 27)])
    present = reference.present_bits(
        cell, biases=rng.random() < 0.8, projection=width < units, norm_at=at
    )

    def draw(*shape: int) -> Tensor:
        scale = min(0.4, shape[-1] ** -0.5) if len(shape) == 2 else 0.4
        return torch.randn(*shape, dtype=torch.float64).mul(scale).to(dtype).requires_grad_()

    weights, runs = [], layers * directions
    for number in range(runs):
        inputs = 4 if number < directions else directions * width
        shapes = sizes(cell, units, inputs, width, blocks)
        for name in reference.present_names(cell, present):
            weights.append(draw(*shapes.get(name, (units,))))
    counts, x = None, draw(time, batch, 4)
    if rng.random() < 0.5:
        rest = [rng.randint(1, batch) for _ in range(time - 1)]
        counts = torch.tensor(sorted([batch, *rest], reverse=True))
        x = draw(int(counts.sum()), 4)
    states = len(reference.CELLS[cell].states)
    h0 = draw(runs, batch, width)
    c0 = draw(runs, batch, (states - 1) * units) if states > 1 else None
    stages = reference.Stages(blocks=blocks)
    rows = x.shape[:-1].numel()
    if "reset" in names:
        stages = stages._replace(reset=torch.rand(x.shape[:-1]) < rng.choice([0.1, 0.5]))
    if "zoneout" in names:
        kept = torch.full((runs, rows, states * units), 0.3, dtype=dtype).bernoulli()
        stages = stages._replace(zoneout=kept)
        if not reference.CELLS[cell].reads_new_h and rng.random() < 0.3:
            stages = stages._replace(zoneout=torch.rand(runs, 1, states * units).to(dtype))
    if "h_mask" in names:
        # Of 2 and 0 it would double h, and its roundings, at every step.
        stages = stages._replace(h_mask=1.25 * torch.full_like(h0, 0.8).detach().bernoulli())
    if at:
        stages = stages._replace(norm=reference.Norm(rng.choice(["layer", "rms"]), at, 0.1))
    shape = (None, counts, layers, directions, present, rng.random() < 0.3)
    return [x, h0, c0, *weights], (*shape, stages, "every_state" in names)


def run(
    engine: Any, cell: str, tensors: list[Tensor | None], rest: Any, dtype: torch.dtype
) -> list[Tensor]:
    """Outputs and gradients, computed on DEVICE."""
    own = [None if t is None else t.detach().to(DEVICE, dtype).requires_grad_() for t in tensors]
    *first, stages, every_state = rest
    stages = stages.of_states(lambda t: t.to(DEVICE, dtype))
    if stages.reset is not None:
        stages = stages._replace(reset=stages.reset.to(DEVICE))
    x, h0, c0, *weights = own
    rest = (*first, stages, every_state)
    outputs = [o for o in engine.recurrent(cell, x, h0, c0, weights, *rest) if o is not None]
    generator = torch.Generator().manual_seed(1)
    draw = lambda o: torch.randn(o.shape, generator=generator, dtype=torch.float64)  # noqa: E731
    grads = [draw(o).to(DEVICE, dtype) for o in outputs]
    there = [t for t in own if t is not None]
    return [t.cpu() for t in (*outputs, *torch.autograd.grad(outputs, there, grads))]


def check(
    cell: str, names: tuple[str, ...], dtype: torch.dtype, rng: random.Random, **shape: Any
) -> int:
    """The number of layers."""
    tensors, rest = problem(rng, cell, names, dtype, **shape)
    print(cell, names, tensors[0].shape, *rest[:-2])
    stages = rest[-2]
    units = tensors[1].shape[2]
    assert ops.takes(stages, cell, units, DEVICE, train=True)
    layers: int = rest[2]
    exact = run(reference, cell, tensors, rest, torch.float64)
    ours, theirs = run(ops, cell, tensors, rest, dtype), exact
    if dtype.itemsize == 2:
        # As torch computes, by operations that each round. The reference rounds once, at the end.
        with mock.patch.object(reference.layers, "_wide", lambda dtype: dtype):
            theirs = run(reference, cell, tensors, rest, dtype)
    for found, other, want in zip(ours, theirs, exact, strict=True):
        size = want.norm().clamp_min(want.numel() ** 0.5)
        limit = {torch.float64: 1e-11, torch.float32: 2e-5}.get(dtype, 0.03)
        if shape and dtype == torch.float32:
            limit = 3e-3  # operands rounded to 2^-11
        if want.numel() < 16 and dtype != torch.float64:
            limit *= 4  # sums of many rows, of which little may be left
        limit = max(limit, 2 * float((other.double() - want).norm() / size))
        error = float((found.double() - want).norm() / size)
        assert error < limit, (error, limit, want.shape, float(want.norm()))
    return layers


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", STAGES)
@pytest.mark.parametrize("cell", KERNELS)
def test_alone(cell: str, name: str, dtype: torch.dtype, seed: int) -> None:
    if cell == "rnn_relu" and dtype == torch.bfloat16:  # any rounding may flip its derivative
        return
    rng = random.Random(f"{seed} {cell} {name} {dtype}")
    for _ in range(3):
        check(cell, (name,), dtype, rng)


@pytest.mark.parametrize("times", range(20))
@pytest.mark.parametrize("cell", KERNELS)
def test_mixed(cell: str, times: int, seed: int) -> None:
    rng = random.Random(f"{seed} {cell} {times}")
    names = tuple(name for name in STAGES if rng.random() < 0.6)
    check(cell, names, rng.choice([torch.float64, torch.float32]), rng)


@pytest.mark.drawn(48)
@pytest.mark.skipif(not emulated.WANTED, reason="what the emulated runtime was asked is counted")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("times", range(8))
@pytest.mark.parametrize("cell", KERNELS)
def test_in_persistent_kernels(
    cell: str, times: int, dtype: torch.dtype, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One launch forward, one backward, for each layer; of one or more tiles of rows."""
    if cell == "rnn_relu":  # any rounding may flip its derivative
        return
    rng = random.Random(f"{seed} {cell} {times} {dtype}")
    monkeypatch.setattr(ops, "_allow_tf32", lambda x: x.dtype == torch.float32)
    monkeypatch.setenv("FUSED_RNN_VARIANT", "resident")
    monkeypatch.setenv("FUSED_RNN_EMULATE_MULTIPROCESSORS", str(rng.choice([132, 12])))
    own = STAGES[:4]
    names = (own[times],) if times < 4 else tuple(name for name in STAGES[:5] if rng.random() < 0.6)
    launches = build.library("cpu").frnn_fake_count
    before = launches(b"together")
    layers = check(cell, names, dtype, rng, units=rng.choice([16, 24, 40]), projects=False)
    assert launches(b"together") - before >= 2 * layers


@pytest.mark.parametrize("name", STAGES)
def test_modules_take_the_kernels(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither plain torch, nor a batch in segments, nor whole matrices instead of blocks."""

    def never(*_: Any) -> Any:
        raise AssertionError("another way")

    monkeypatch.setattr(segments, "run", never)
    monkeypatch.setattr(reference, "recurrent", never)
    monkeypatch.setattr(reference, "without_blocks", never)
    options: dict[str, dict[str, Any]] = {
        "zoneout": {"zoneout": 0.3},
        "h_mask": {"recurrent_dropout": 0.3},
        "blocks": {"blocks": 2},
        "norm": {"norm": "layer"},
    }
    module = fused_rnn.LSTM(3, 64, bidirectional=True, **options.get(name, {})).to(DEVICE)
    given: dict[str, Any] = {"return_states": name == "every_state"}
    if name == "reset":
        given["reset"] = torch.rand(5, 2, device=DEVICE) < 0.4
    module(torch.randn(5, 2, 3, device=DEVICE), **given)[0].sum().backward()


@pytest.mark.skipif(not emulated.WANTED, reason="about what the emulated runtime is asked")
def test_graphs_read_what_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a graph was captured with is read anew each time; other memory is another graph."""
    library = build.library("cpu")
    monkeypatch.setenv("FUSED_RNN_VARIANT", "graph")
    torch.manual_seed(0)
    x, weights = torch.randn(6, 2, 4, dtype=torch.float64), []
    present = reference.present_bits("gru", biases=True, projection=False)
    shapes = sizes("gru", 5, 4, 5, 1)
    for name in reference.present_names("gru", present):
        weights.append(torch.randn(shapes[name], dtype=torch.float64))
    reset = torch.zeros(6, 2, dtype=torch.bool)
    mask = torch.ones(1, 2, 5, dtype=torch.float64)
    zones = torch.zeros(1, 12, 5, dtype=torch.float64)
    stages = reference.Stages(reset=reset, zoneout=zones, h_mask=mask)
    arguments = ("gru", x, None, None, weights, None, None, 1, 1, present, False, stages)
    wanted = library.frnn_fake_count(b"Launch") + 3
    with torch.no_grad():
        for _ in range(500):  # until they lie in the same memory often enough
            reset.copy_(torch.rand(6, 2) < 0.3)
            mask.copy_(torch.rand(1, 2, 5))
            zones.copy_(torch.rand(1, 12, 5))
            want = reference.recurrent(*arguments)[0]
            assert (ops.recurrent(*arguments)[0] - want).abs().max() < 1e-12
            if library.frnn_fake_count(b"Launch") >= wanted:
                break
        assert library.frnn_fake_count(b"Launch") >= wanted
        other = (*arguments[:-1], stages._replace(reset=~reset))
        want = reference.recurrent(*other)[0]
        assert (ops.recurrent(*other)[0] - want).abs().max() < 1e-12
