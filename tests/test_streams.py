"""A single sequence in inference has loops of its own, with the bits of the loop for all others,
which a forward that keeps a tape takes."""

from __future__ import annotations

from typing import Any

import emulated
import pytest
import torch
from helpers import flatten, native
from torch import Tensor, nn

import fused_rnn
from fused_rnn.reference import CELLS

pytestmark = [
    pytest.mark.engine,
    pytest.mark.skipif(emulated.WANTED or not native(), reason="about the CPU's kernels"),
]

LAYERS: dict[str, type[nn.RNNBase]] = {
    "rnn_tanh": fused_rnn.RNN,
    "lstm": fused_rnn.LSTM,
    "gru": fused_rnn.GRU,
    "peephole_lstm": fused_rnn.PeepholeLSTM,
    "block_gru": fused_rnn.BlockGRU,
}
# Of one step, and of weights that are packed, which 2 to 16 steps do not repay; the other loop has
# another sum for a last chunk of one or two.
STEPS = (1, 17, 31, 32, 33, 64, 65, 128, 131, 300)


@fused_rnn.cell(gates=("r", "z", "n"), states=("c", "h"), output="c")
def Products(x: Any, r: Any, s: Any, p: Any) -> dict[str, Tensor]:
    reset, z = torch.sigmoid(x.r + r(s.h).r), torch.sigmoid(x.z + r(s.h).z)
    n = torch.tanh(x.n + r(reset * s.h).n)
    return dict(h=n + z * (s.h - n), c=s.c / 2 + n)


def both(module: nn.Module, x: Tensor, hx: Any) -> tuple[list[Tensor], list[Tensor]]:
    with torch.no_grad():
        alone = flatten(module(x, hx))
    return alone, [t.detach() for t in flatten(module(x, hx))]


def states_of(module: Any, like: Tensor) -> Any:
    runs, hidden = module.num_layers, module.hidden_size
    made = [torch.randn(runs, 1, hidden, dtype=like.dtype) for _ in range(2)]
    return tuple(made) if isinstance(module(like)[1], tuple) else made[0]


@pytest.mark.parametrize("units", [1, 3, 8, 16, 65])
@pytest.mark.parametrize("cell", [*LAYERS, "products"])
def test_bits(cell: str, units: int) -> None:
    assert cell == "products" or cell in CELLS
    dtypes = (torch.float32,) if cell == "products" else (torch.float32, torch.float64)
    for dtype in dtypes:
        for inputs in (1, 19):
            kind: Any = LAYERS.get(cell, Products)
            module = kind(inputs, units, 2, dtype=dtype)
            hx = states_of(module, torch.randn(2, 1, inputs, dtype=dtype))
            for steps in STEPS:
                x = torch.randn(steps, 1, inputs, dtype=dtype)
                for state in (None, hx):
                    alone, usual = both(module, x, state)
                    assert all(map(torch.equal, alone, usual)), (dtype, inputs, steps)


def test_bits_of_strided_inputs() -> None:
    module = fused_rnn.GRU(5, 9)
    wide = torch.randn(70, 3, 12)
    parts = [wide[:, 1:2, 2:7], wide[::2, :1, 5:10], wide[:, :1].expand(70, 1, 12)[..., :5]]
    parts.append(torch.randn(1, 1, 5).expand(40, 1, 5))
    for x in parts:
        alone, usual = both(module, x, None)
        assert all(map(torch.equal, alone, usual))
    first = fused_rnn.GRU(5, 9, batch_first=True)
    alone, usual = both(first, torch.randn(1, 50, 5), None)
    assert all(map(torch.equal, alone, usual))


def test_blocks_are_the_whole() -> None:
    """Wherever a sequence is cut, down to the shortest block that packs weights."""
    module = fused_rnn.LSTM(3, 20, 2)
    x = torch.randn(400, 1, 3)
    with torch.no_grad():
        whole = module(x)[0]
        state, parts, at = None, [], 0
        for steps in (17, 130, 129, 50, 74):
            y, state = module(x[at : at + steps], state)
            parts.append(y)
            at += steps
    assert at == len(x) and torch.equal(torch.cat(parts), whole)


def test_nan_and_infinity_go_on() -> None:
    module = fused_rnn.GRU(2, 8)
    x = torch.randn(40, 1, 2)
    x[20, 0, 1] = torch.nan
    x[10, 0, 0] = torch.inf
    alone, usual = both(module, x, None)
    assert torch.equal(alone[0].isnan(), usual[0].isnan()) and alone[0][20:].isnan().all()
    assert torch.equal(alone[0][:20], usual[0][:20])
