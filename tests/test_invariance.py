"""torch.use_deterministic_algorithms(True) on the CPU: the bits of a sequence do not depend on who
else is in the batch, nor on its place there, on padding, packing, or calls over parts of it."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from helpers import cpu_engine_only, native
from torch import Tensor
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import fused_rnn

pytestmark = [
    pytest.mark.engine,
    pytest.mark.skipif(not native(), reason="about the native kernels"),
    cpu_engine_only,
]

LAYERS: dict[str, dict[str, Any]] = {
    "RNN": {},
    "GRU": {"num_layers": 2},
    "LSTM": {"bidirectional": True},
    "LSTM-projected": {"proj_size": 5},
    "LSTM-normalised": {"norm": "layer"},
    "GRU-blocks": {"blocks": 2},
    "PeepholeLSTM": {},
}
# Of the batch, steps, inputs and units: products in one chain and in several, of few rows and of
# more than a block of them, in vectors and past their end.
SIZES = [(1, 5, 3, 7), (2, 9, 17, 33), (7, 1, 65, 64), (33, 4, 5, 128), (70, 3, 300, 20)]


@pytest.fixture(autouse=True)
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def layer_of(name: str, inputs: int, hidden: int, dtype: torch.dtype) -> Any:
    if name.endswith("blocks"):
        hidden = 64 * -(-hidden // 64)  # in whole blocks of vectors
    kind, options = getattr(fused_rnn, name.partition("-")[0]), LAYERS[name]
    return kind(inputs, hidden, dtype=dtype, **options)


def states_of(layer: Any, batch: int) -> Any:
    """Of all sequences, random."""
    with torch.no_grad():
        last = layer(torch.zeros(1, batch, layer.input_size, dtype=layer.weight_ih_l0.dtype))[1]
    return tuple(map(torch.randn_like, last)) if isinstance(last, tuple) else torch.randn_like(last)


def part(states: Any, rows: Any) -> Any:
    return tuple(s[:, rows] for s in states) if isinstance(states, tuple) else states[:, rows]


def trained(layer: Any, x: Tensor, states: Any, dy: Tensor) -> list[Tensor]:
    """Outputs, last states, and the gradients of the input and of the first states."""
    x = x.clone().requires_grad_()
    pair = states if isinstance(states, tuple) else (states,)
    pair = tuple(s.clone().requires_grad_() for s in pair)
    y, last = layer(x, pair if isinstance(states, tuple) else pair[0])
    grads = torch.autograd.grad(y, (x, *pair), dy)
    lasts = last if isinstance(last, tuple) else (last,)
    return [t.detach() for t in (y, *lasts, *grads)]


@pytest.mark.drawn(12)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("name", LAYERS)
def test_who_else_is_there(
    name: str, sizes: tuple[int, ...], dtype: torch.dtype, seed: int
) -> None:
    batch, steps, inputs, hidden = sizes
    layer = layer_of(name, inputs, hidden, dtype)
    x, states = torch.randn(steps, batch, inputs, dtype=dtype), states_of(layer, batch)
    dy = torch.randn_like(layer(x)[0])
    whole = trained(layer, x, states, dy)
    with torch.no_grad():
        y, last = layer(x, states)
        lasts = last if isinstance(last, tuple) else (last,)
        assert all(torch.equal(a, b) for a, b in zip((y, *lasts), whole, strict=False))
    rng = random.Random(f"{seed} {name} {sizes}")
    for count in {1, 2, 3, batch}:
        rows = torch.tensor(rng.sample(range(batch), min(count, batch)))
        few = trained(layer, x[:, rows], part(states, rows), dy[:, rows])
        for found, expected in zip(few, whole, strict=True):
            assert torch.equal(found, expected[:, rows]), (rows, found.shape)


@pytest.mark.drawn(6)
@pytest.mark.parametrize("sizes", SIZES[:4], ids=str)
@pytest.mark.parametrize("name", LAYERS)
def test_padding_packing_and_parts(name: str, sizes: tuple[int, ...], seed: int) -> None:
    batch, steps, inputs, hidden = sizes
    layer = layer_of(name, inputs, hidden, torch.float32).eval()
    x, states = torch.randn(steps, batch, inputs), states_of(layer, batch)
    rng = random.Random(f"{seed} {name} {sizes}")
    lengths = [rng.randint(1, steps) for _ in range(batch)]
    lengths[rng.randrange(batch)] = steps
    with torch.no_grad():
        padded, last = layer(x, states, lengths=lengths)
        packed, last_packed = layer(
            pack_padded_sequence(x, torch.tensor(lengths), enforce_sorted=False), states
        )
        assert torch.equal(pad_packed_sequence(packed)[0], padded)
        for a, b in zip(last, last_packed, strict=True):
            assert torch.equal(a, b)
        for row, length in enumerate(lengths):
            rows = slice(row, row + 1)
            y, _ = layer(x[:length, rows], part(states, rows))
            assert torch.equal(y, padded[:length, rows]), row
        if not layer.bidirectional and layer.num_layers == 1:
            y, _ = layer(x, states)
            parts, carried, at = [], states, 0
            while at < steps:
                count = rng.randint(1, steps - at)
                of_part, carried = layer(x[at : at + count], carried)
                parts.append(of_part)
                at += count
            assert torch.equal(torch.cat(parts), y)


def test_cells_of_one_step() -> None:
    """Beside layers, and in batches."""
    for batch in (1, 2, 40):
        cell = fused_rnn.LSTMCell(19, 33)
        layer = fused_rnn.LSTM(19, 33)
        layer.load_state_dict({f"{n}_l0": p for n, p in cell.state_dict().items()})
        x, h, c = torch.randn(batch, 19), torch.randn(batch, 33), torch.randn(batch, 33)
        with torch.no_grad():
            together = cell(x, (h, c))
            for row in range(batch):
                rows = slice(row, row + 1)
                alone = cell(x[rows], (h[rows], c[rows]))
                assert all(torch.equal(a, b[rows]) for a, b in zip(alone, together, strict=True))
            y, _ = layer(x[None], (h[None], c[None]))
            assert torch.equal(y[0], together[0])


def test_frozen_layers() -> None:
    layer = fused_rnn.GRU(20, 40)
    x = torch.randn(6, 5, 20)
    frozen = fused_rnn.freeze(layer)
    with torch.no_grad():
        whole = frozen(x)[0]
        for row in range(5):
            assert torch.equal(frozen(x[:, row : row + 1])[0], whole[:, row : row + 1])


CODE = """
import torch, fused_rnn
layer, x = fused_rnn.LSTM(30, 50), torch.randn(20, 9, 30)
with torch.no_grad():
    alone = torch.cat([layer(x[:, i : i + 1])[0] for i in range(9)], 1)
    print(torch.equal(alone, layer(x)[0]))
"""


@pytest.mark.parametrize("asked", ["0", "1"])
def test_by_the_environment(asked: str) -> None:
    """Which can tell: without, one sequence is summed in other chains."""
    env = {**os.environ, "FUSED_RNN_BATCH_INVARIANT": asked}
    done = subprocess.run([sys.executable, "-c", CODE], env=env, capture_output=True, text=True)
    assert done.stdout == f"{asked == '1'}\n", done.stderr
