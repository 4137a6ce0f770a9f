"""The mathematics of every cell in plain torch: oracle of the tests, and the path always there.

One pointwise step per cell (``CELLS``) and one loop over time (``layer``). Everything is
differentiable torch without in-place writes, so autograd of any order, forward mode, ``vmap``,
``torch.func`` and any device work without more code. The native kernels (``ops.py``) answer the
same calls with the same results.

Sizes: T steps, B sequences, I inputs, H units, D directions, G gates, P width of h (H, or less if
projected), C width of all elementwise states.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

# One direction of one layer: weight_ih [G*H, I], weight_hh [G*H, P], bias_ih and bias_hh [G*H] or
# None, weight_hr [P, H] or None.
Weights = tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]
Step = Callable[[Tensor, Tensor, Tensor, Tensor | None], tuple[Tensor, Tensor | None]]


@dataclass(frozen=True)
class Cell:
    """What the loop needs to know of a recurrent cell.

    ``step(gx, gh, h, c) -> (h_new, c_new)`` is pointwise in the batch and the unit:
    ``gx = x W_ih^T + b_ih`` and ``gh = h W_hh^T + b_hh`` are [B, G*H], ``h`` is [B, P], and ``c``
    [B, C] holds the elementwise states or is None. ``mixes_h`` says whether the step reads ``h``
    itself, beside its product with W_hh.
    """

    step: Step
    mixes_h: bool = False


def _rnn(activation: Callable[[Tensor], Tensor]) -> Step:
    def step(gx: Tensor, gh: Tensor, h: Tensor, c: Tensor | None) -> tuple[Tensor, None]:
        """Elman 1990, "Finding structure in time".  ``h' = f(gx + gh)``, f = tanh or relu."""
        return activation(gx + gh), None

    return step


def _lstm(gx: Tensor, gh: Tensor, h: Tensor, c: Tensor | None) -> tuple[Tensor, Tensor]:
    """Hochreiter & Schmidhuber 1997, with the forget gate of Gers, Schmidhuber & Cummins 2000.

    ``i, f, o = sigmoid(gx + gh)   g = tanh(gx + gh)   c' = f c + i g   h' = o tanh(c')``
    in the gate order i, f, g, o.
    """
    assert c is not None, "the LSTM has a second state"
    i, f, g, o = (gx + gh).chunk(4, -1)
    c = f.sigmoid() * c + i.sigmoid() * g.tanh()
    return o.sigmoid() * c.tanh(), c


def _gru(gx: Tensor, gh: Tensor, h: Tensor, c: Tensor | None) -> tuple[Tensor, None]:
    """Cho et al. 2014, arXiv:1406.1078, reset after the product, as in torch.nn and cuDNN.

    ``r, z = sigmoid(gx + gh)   n = tanh(gx + r gh)   h' = n + z (h - n)``
    in the gate order r, z, n.
    """
    x_r, x_z, x_n = gx.chunk(3, -1)
    h_r, h_z, h_n = gh.chunk(3, -1)
    r, z = (x_r + h_r).sigmoid(), (x_z + h_z).sigmoid()
    n = (x_n + r * h_n).tanh()
    return n + z * (h - n), None


CELLS: dict[str, Cell] = {
    "rnn_tanh": Cell(_rnn(torch.tanh)),
    "rnn_relu": Cell(_rnn(torch.relu)),
    "lstm": Cell(_lstm),
    "gru": Cell(_gru, mixes_h=True),
}


def _wide(dtype: torch.dtype) -> torch.dtype:
    """16-bit types are computed in float32 and rounded once at the end."""
    return torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype


def layer(
    cell: str,
    x: Tensor,
    h0: Tensor,
    c0: Tensor | None,
    weights: Sequence[Weights],
    batch_sizes: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """One layer of D = ``len(weights)`` directions, the second running backwards in time.

    Args:
        x: [T, B, I], or packed rows [R, I] with ``batch_sizes``, both of any strides.
        h0: [D, B, P].
        c0: [D, B, C], or None for a cell without elementwise states.
        weights: one tuple for each direction.
        batch_sizes: [T] int64 on the CPU, not increasing: rows of x that belong to each step.

    Returns:
        y [T, B, D*P] (packed: [R, D*P]), h_n [D, B, P] and c_n [D, B, C] or None.
    """
    dtype = x.dtype
    wide = _wide(dtype)
    sizes = None
    if batch_sizes is not None:
        sizes = batch_sizes.tolist()
        if sizes != sorted(sizes, reverse=True) or sizes[0] != h0.shape[1] or sizes[-1] < 1:
            raise RuntimeError("batch_sizes: expected positive, not increasing, from B on")
        x = x[: sum(sizes)]  # as torch.nn: rows that belong to no step are left out
    ys, hs, cs = [], [], []
    for d, run in enumerate(weights):
        y, h, c = _direction(
            CELLS[cell].step,
            x.to(wide),
            h0[d].to(wide),
            None if c0 is None else c0[d].to(wide),
            [None if w is None else w.to(wide) for w in run],
            sizes,
            reverse=d == 1,
        )
        ys.append(y)
        hs.append(h)
        cs.append(c)
    c_n = None if c0 is None else torch.stack(cs).to(dtype)  # type: ignore[arg-type]
    return torch.cat(ys, -1).to(dtype), torch.stack(hs).to(dtype), c_n


def layer_recomputed(
    cell: str,
    x: Tensor,
    h0: Tensor,
    c0: Tensor | None,
    weights: Sequence[Weights],
    batch_sizes: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """``layer``, but the backward runs the forward again instead of keeping what it computed."""
    count = len(weights[0])

    def call(x: Tensor, h0: Tensor, c0: Tensor | None, *flat: Tensor | None) -> Any:
        runs: Any = [flat[i : i + count] for i in range(0, len(flat), count)]
        return layer(cell, x, h0, c0, runs, batch_sizes)

    # Tensors in a list would be held past autograd, which then could not see them change.
    flat = [w for run in weights for w in run]
    return checkpoint(call, x, h0, c0, *flat, use_reentrant=False, preserve_rng_state=False)


def _direction(
    step: Step,
    x: Tensor,
    h: Tensor,
    c: Tensor | None,
    weights: Sequence[Tensor | None],
    sizes: list[int] | None,
    *,
    reverse: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Run over time from the states h [B, P], c [B, C]; return the outputs and the last states."""
    w_ih, w_hh, b_ih, b_hh, w_hr = weights
    assert w_ih is not None and w_hh is not None
    gx = F.linear(x, w_ih, b_ih)  # one product for all steps
    steps = gx.unbind(0) if sizes is None else gx.split(sizes)  # step t: [b_t, G*H]
    outputs = []
    for g in reversed(steps) if reverse else steps:
        # Sequences are sorted by length, so the first b_t rows are running. The rows below keep
        # what they have: forwards the last state of a sequence that has ended, backwards the first
        # state of one that is still to begin.
        b = g.shape[0]
        h_t, c_t = h[:b], None if c is None else c[:b]
        h_new, c_new = step(g, F.linear(h_t, w_hh, b_hh), h_t, c_t)
        if w_hr is not None:
            h_new = F.linear(h_new, w_hr)
        outputs.append(h_new)
        h = h_new if sizes is None else torch.cat([h_new, h[b:]])
        if c is not None and c_new is not None:
            c = c_new if sizes is None else torch.cat([c_new, c[b:]])
    if reverse:
        outputs.reverse()
    return torch.stack(outputs) if sizes is None else torch.cat(outputs), h, c
