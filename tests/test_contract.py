"""What the contract of a cell allows beyond the cells of the package, on both engines.

tests/cells has a cell without a recurrent matrix and one whose output is not the state that goes
through W_hh. The package's own build compiles them, in the place of its cells, and no engine knows.
"""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import emulated
import pytest
import torch
from helpers import assert_all_close
from torch import Tensor

from fused_rnn import build, ops, reference


def _light(gx: Tensor, gh: None, h: Tensor, c: Tensor, p: Tensor) -> tuple[Tensor, Tensor]:
    x, f, r = gx.chunk(3, -1)
    f = (f + p * c).sigmoid()
    c = x + f * (c - x)
    return r.sigmoid() * c.tanh(), c


def _swapped(gx: Tensor, gh: Tensor, h: Tensor, rest: Tensor) -> tuple[Tensor, Tensor]:
    c, count = rest.chunk(2, -1)
    h, c = reference._lstm(gx, gh, h, c)
    return h, torch.cat([c, count + 1], -1)


CELLS = {
    "light": reference.Cell(_light, gates=3, states=("h", "c"), params=("p",), recurrent=False),
    "swapped": reference.Cell(_swapped, gates=4, states=("h", "c", "count"), output=1),
}

inside = pytest.mark.skipif(not emulated.ENGINE.endswith("-contract"), reason="in a process below")


@pytest.fixture(autouse=True)
def known(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, cell in CELLS.items():
        monkeypatch.setitem(reference.CELLS, name, cell)


@pytest.mark.skipif(bool(emulated.ENGINE) or build.backend() != "native", reason="needs a compiler")
@pytest.mark.parametrize("engine", ["cpu", "emulated"])
def test_on(engine: str, seed: int) -> None:
    own = {"FUSED_RNN_TEST_ENGINE": f"{engine}-contract", "FUSED_RNN_TEST_SEED": str(seed)}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", __file__]
    done = subprocess.run(command, env=os.environ | own, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]


def arguments(
    cell: str,
    T: int,
    B: int,
    I: int,  # noqa: E741
    H: int,
    L: int,
    D: int,
    dtype: Any,
    lengths: Any,
) -> tuple[list[Any], tuple[Any, ...]]:
    """(x, h0, c0, *weights), and what stands behind the weights."""
    known = CELLS[cell]
    present = reference.present_bits(cell, biases=True, projection=False)

    def draw(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(*shape, dtype=torch.float64) * scale).to(dtype).requires_grad_()

    batch_sizes = None
    x = draw(T, B, I)
    if lengths:
        batch_sizes = torch.tensor([sum(n > t for n in lengths) for t in range(T)])
        x = draw(sum(lengths), I)
    others = len(known.states) - 1
    weights = []
    for run in range(L * D):
        inputs = I if run < D else D * H
        shapes = {"w_ih": (known.gates * H, inputs), "w_hh": (known.gates * H, H)}
        shapes |= dict.fromkeys(("b_ih", "b_hh"), (known.gates * H,))
        weights += [
            draw(*shapes.get(name, (H,)), scale=H**-0.5)
            for name in reference.present_names(cell, present)
        ]
    states = [draw(L * D, B, H), draw(L * D, B, others * H)]
    return [x, *states, *weights], (None, batch_sizes, L, D, present)


SIZES = [
    dict(T=5, B=3, I=4, H=6, L=1, D=1, lengths=None),
    dict(T=1, B=1, I=3, H=17, L=2, D=2, lengths=None),
    dict(T=4, B=4, I=33, H=65, L=2, D=2, lengths=[4, 4, 2, 1]),
    dict(T=6, B=33, I=48, H=96, L=1, D=2, lengths=None),
]


@inside
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("sizes", SIZES, ids=lambda s: "".join(f"{k}{v}" for k, v in s.items()))
@pytest.mark.parametrize("cell", CELLS)
def test_cells(cell: str, sizes: dict[str, Any], dtype: torch.dtype, threads: int) -> None:
    tensors, rest = arguments(cell, dtype=dtype, **sizes)
    torch.set_num_threads(threads)
    results = []
    for run in (ops.recurrent, reference.recurrent):
        leaves = [t.detach().clone().requires_grad_() for t in tensors]
        x, h0, c0, *weights = leaves
        outputs = run(cell, x, h0, c0, weights, *rest)
        generator = torch.Generator().manual_seed(1)
        torch.autograd.backward(
            outputs, [torch.randn(o.shape, generator=generator).to(o) for o in outputs]
        )
        # Not h0 without a recurrent matrix: nothing reads it, which the engines call zero.
        grads = [torch.zeros_like(t) if t.grad is None else t.grad for t in leaves]
        results.append([o.detach() for o in outputs] + grads)
        with torch.no_grad():
            results[-1] += run(cell, x, None, None, weights, *rest)
    tol = {torch.float64: 1e-12, torch.float32: 1e-4, torch.bfloat16: 0.06}[dtype]
    assert_all_close(*results, tol=tol)


@inside
def test_names() -> None:
    assert ops.tensor_names("cpu", "light") == CELLS["light"].tensors
    assert ops._facts("cpu", "swapped").extra_states == 2


@inside
def test_what_they_refuse() -> None:
    tensors, (masks, sizes, L, D, present) = arguments("swapped", **SIZES[0], dtype=torch.float64)
    x, h0, c0, *weights = tensors
    w_hr = torch.randn(3, 6, dtype=torch.float64)
    with pytest.raises(RuntimeError, match="w_hr: this cell .* no projection"):
        bits = present | reference.PROJECTION
        torch.ops.fused_rnn.recurrent_infer(
            "swapped", x, h0, c0, [*weights, w_hr], masks, sizes, L, D, bits, False
        )
    tensors, (masks, sizes, L, D, present) = arguments("light", **SIZES[0], dtype=torch.float64)
    x, h0, c0, *weights = tensors
    with pytest.raises(RuntimeError, match="there is no w_hh"):
        torch.ops.fused_rnn.recurrent_infer(
            "light", x, h0, c0, [weights[0], *weights], masks, sizes, L, D, present | 2, False
        )
