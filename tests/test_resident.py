"""CUDA kernels that keep their weights for a whole sequence: on a card, or emulated.

They are held to what the variant with a product per step makes of the same numbers. `resident`
kernels share the units among blocks, which are a cluster in those of `cluster`; `local` ones have
them all in one. And a kernel for a single step.
"""

from __future__ import annotations

import copy
from typing import Any, NamedTuple

import emulated
import pytest
import torch
from cases import LAYERS, OWN_LAYERS, Case
from helpers import Named, assert_all_close, assert_no_worse, flatten, leave_kink, map_tensors, run
from torch import Tensor

import fused_rnn
from fused_rnn import ops

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = [
    pytest.mark.parity,
    pytest.mark.skipif(not emulated.WANTED and DEVICE == "cpu", reason="about the CUDA engine"),
]

CELLS = [cell for cell in (*LAYERS, *OWN_LAYERS) if cell != "lstm_proj"]
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


class Shape(NamedTuple):
    """``multiprocessors`` of an emulated card: with few, blocks take more units and rows."""

    variant: str
    hidden: int
    batch: int
    multiprocessors: int = 132


# What the engine makes of them is in tests/test_cuda_engine.py; here is one of each kind.
SHAPES = [
    Shape("resident", 32, 9),  # two blocks, two copies
    Shape("resident", 144, 3),  # nine blocks
    Shape("resident", 24, 9),  # part of a block
    Shape("resident", 16, 27, 1),  # four tiles of rows
    Shape("resident", 32, 13, 1),  # two groups of units, two tiles
    Shape("local", 16, 1),
    Shape("local", 24, 9),  # part of a block, two copies
    Shape("local", 32, 3),
    Shape("local", 40, 3),  # four groups of units
    Shape("local", 72, 9),  # eight, of which TF32 has one gate only
    Shape("cluster", 40, 9),  # two blocks, of which one is there in part, two copies
    Shape("cluster", 48, 13, 2),  # two tiles
    Shape("cluster", 72, 9, 2),  # four groups
    Shape("cluster", 136, 3),  # five blocks
]


@pytest.fixture(autouse=True)
def tf32(monkeypatch: pytest.MonkeyPatch) -> None:
    """float32 products may be rounded, or float32 would be no work for tensor cores."""
    if DEVICE == "cpu":
        monkeypatch.setattr(ops, "_allow_tf32", lambda x: x.dtype == torch.float32)
    else:
        monkeypatch.setattr(torch.backends.cudnn.rnn, "fp32_precision", "tf32")


def by_variant(
    shape: Shape, module: Any, x: Any, hx: Any, monkeypatch: pytest.MonkeyPatch
) -> tuple[Named, Named]:
    """What the variant of this shape makes of a training step, and what `graph` does."""
    monkeypatch.setenv("FUSED_RNN_EMULATE_MULTIPROCESSORS", str(shape.multiprocessors))
    results = []
    for variant in (shape.variant, "graph"):
        monkeypatch.setenv("FUSED_RNN_VARIANT", variant)
        results.append(run(module, x, hx))
        with torch.no_grad():
            results[-1]["inference"] = first(module(x, hx)).detach()
    return results[0], results[1]


def first(output: Any) -> Tensor:
    y = output[0]
    return y if isinstance(y, Tensor) else y.data


@pytest.mark.drawn(200)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("layout", ["padded", "packed"])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "-".join(map(str, s)))
def test_as_good_as_steps(
    shape: Shape, layout: str, cell: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = Case(
        cell,
        hidden_size=shape.hidden,
        batch=shape.batch,
        time=3,
        layout=layout,
        bidirectional=layout == "packed" or shape.batch == 9,
        bias=shape.hidden != 24,
        hx=shape.batch != 13,
    )
    _, module = case.modules(dtype)
    module = module.to(DEVICE)
    x, hx = case.inputs(dtype)
    x, hx = x.to(DEVICE), map_tensors(hx, lambda t: t.to(DEVICE))
    if cell == "rnn_relu":
        x, hx = leave_kink([module], x, hx)
    ours, steps = by_variant(shape, module, x, hx, monkeypatch)
    double = copy.deepcopy(module).double()
    wide = map_tensors((x, hx), lambda t: t.double())
    exact = run(double, *wide, dtype)
    exact["inference"] = exact["output 0"]
    if dtype == torch.float32:  # operands rounded to 2^-11, where emulated steps round nothing
        assert_all_close({name: t.double() for name, t in ours.items()}, exact, tol=3e-3)
    else:
        assert_no_worse(ours, steps, exact, max(4 * shape.hidden, case.batch * case.time))


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize(
    ("inputs", "hidden", "batch"), [(5, 7, 1), (16, 40, 5), (16, 33, 3), (1000, 8, 4)]
)
def test_one_step(
    inputs: int,
    hidden: int,
    batch: int,
    cell: str,
    dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of sizes that are, and are not, read 16 bytes at a time; more than a warp reads at once."""
    case = Case(
        cell,
        input_size=inputs,
        hidden_size=hidden,
        batch=batch,
        time=1,
        layout="packed" if batch == 3 else "padded",
        bidirectional=batch != 1,
        bias=batch != 4,
        hx=batch != 3,
    )
    _, module = case.modules(dtype)
    module = module.to(DEVICE)
    x, hx = case.inputs(dtype)
    x, hx = x.to(DEVICE), map_tensors(hx, lambda t: t.to(DEVICE))

    def infer(variant: str, module: Any, *inputs: Any) -> Named:
        monkeypatch.setenv("FUSED_RNN_VARIANT", variant)
        with torch.no_grad():
            return {str(i): t for i, t in enumerate(flatten(module(*inputs)))}

    double = copy.deepcopy(module).double()
    exact = infer("steps", double, *map_tensors((x, hx), lambda t: t.double()))
    ours, steps = infer("one", module, x, hx), infer("steps", module, x, hx)
    assert_no_worse(ours, steps, exact, inputs + hidden)


@pytest.mark.parametrize("variant", ["resident", "cluster", "local"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nan_is_not_waited_for(
    dtype: torch.dtype, variant: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The words that mean "not written yet" are NaNs: those of users must not look like them."""
    monkeypatch.setenv("FUSED_RNN_VARIANT", variant)
    size = 40 if variant == "cluster" else 32
    module = fused_rnn.GRU(4, size).to(DEVICE, dtype)
    ones = torch.full((size,), -1, dtype=torch.int32 if dtype == torch.float32 else torch.int16)
    h = torch.zeros(1, 3, size, dtype=dtype)
    h[0, 1] = ones.view(dtype)
    x = torch.randn(5, 3, 4, dtype=dtype)
    x[2, 2] = float("nan")
    x, h = x.to(DEVICE).requires_grad_(), h.to(DEVICE).requires_grad_()
    y, _ = module(x, h)
    y.sum().backward()
    assert y[:, 0].isfinite().all() and y[:, 1].isnan().all()
    assert y[:2, 2].isfinite().all() and y[2:, 2].isnan().all()
    assert x.grad is not None and x.grad[:, 0].isfinite().all() and x.grad[:, 1].isnan().all()


@pytest.mark.parametrize("variant", ["resident", "local"])
def test_weights_that_are_not_aligned(variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows at odd addresses cannot be read 16 bytes at a time: they go another way."""
    module = fused_rnn.RNN(4, 32).to(DEVICE, torch.bfloat16)
    x = torch.randn(4, 3, 4, dtype=torch.bfloat16, device=DEVICE)
    monkeypatch.setenv("FUSED_RNN_VARIANT", "graph")
    with torch.no_grad():
        expected = module(x)[0]
        memory = torch.empty(32 * 32 + 1, dtype=torch.bfloat16, device=DEVICE)
        moved = memory[1:].view(32, 32).copy_(module.weight_hh_l0)
        del module.weight_hh_l0
        module.weight_hh_l0 = moved
        monkeypatch.setenv("FUSED_RNN_VARIANT", variant)
        assert torch.equal(module(x)[0], expected)


@pytest.mark.parametrize("variant", ["resident", "cluster", "local"])
def test_long_and_empty(variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """More lengths than one launch carries (they are its arguments); no sequences at all."""
    monkeypatch.setenv("FUSED_RNN_VARIANT", variant)
    size = 40 if variant == "cluster" else 16
    module = fused_rnn.LSTM(3, size).to(DEVICE, torch.float16)
    x = torch.randn(500, 2, 3, dtype=torch.float16, device=DEVICE)
    with torch.no_grad():
        packed = torch.nn.utils.rnn.pack_padded_sequence(x, [500, 3])
        (y, _), (h, c) = module(packed)[0][:2], module(packed)[1]
        whole, (h_0, c_0) = module(x[:, :1])
        part, (h_1, c_1) = module(x[:3, 1:])
        assert torch.equal(y[[0, 2, 4, *range(6, 503)]], whole[:, 0])
        assert torch.equal(y[[1, 3, 5]], part[:, 0])
        assert torch.equal(h, torch.cat([h_0, h_1], 1)) and torch.equal(c, torch.cat([c_0, c_1], 1))
        assert module(x[:, :0])[0].shape == (500, 0, size)
