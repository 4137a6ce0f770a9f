"""The shapes and types of the operators' results: their fakes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.library
from torch import Tensor

from .. import reference
from .library import tape_of, tape_values, target_of


def _computing(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


class _Sizes(NamedTuple):
    """Of a call: sequences B, units H, width P of h and C of c, all rows of x."""

    batch: Any
    hidden: Any
    width: Any
    extra: Any
    rows: Any


def _sizes(
    cell: str,
    x: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    weights: Sequence[Tensor],
    batch_sizes: Tensor | None,
    present: int,
    blocks: int,
) -> _Sizes:
    found = reference.CELLS[cell]
    run = dict(zip(reference.present_names(cell, present), weights, strict=False))
    hidden = run["w_ih"].shape[0] // found.gates
    width = run["w_hh"].shape[1] * blocks if "w_hh" in run else hidden
    batch: Any
    if h0 is not None:
        batch = h0.shape[1]
    elif batch_sizes is None:
        batch = x.shape[1]
    else:  # a number that is in the data
        batch = torch.library.get_ctx().new_dynamic_size()
    rows = x.shape[0] if batch_sizes is not None else x.shape[0] * x.shape[1]
    return _Sizes(batch, hidden, width, (len(found.states) - 1) * hidden, rows)


def infer_fake(
    cell: str,
    x: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    weights: Sequence[Tensor],
    masks: Tensor | None,
    batch_sizes: Tensor | None,
    reset: Tensor | None,
    zoneout: Tensor | None,
    h_mask: Tensor | None,
    layers: int,
    directions: int,
    present: int,
    blocks: int,
    norm: int,
    norm_eps: float,
    every_state: bool,
    allow_tf32: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    n = _sizes(cell, x, h0, c0, weights, batch_sizes, present, blocks)
    runs, states = layers * directions, n.rows if every_state else n.batch
    y = x.new_empty((*x.shape[:-1], directions * n.width))
    return y, x.new_empty((runs, states, n.width)), x.new_empty((runs, states, n.extra))


def recomputed_fake(cell: str, x: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    y, h_n, c_n = infer_fake(cell, x, *rest)
    layers, rows = rest[8], y.numel() // max(y.shape[-1], 1)
    return y, h_n, c_n, x.new_empty((layers - 1, rows, y.shape[-1]))


def fake(cell: str, x: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    h0, c0, weights, _, batch_sizes, _, _, _, layers, directions, present, blocks, *_ = rest
    n, target = _sizes(cell, x, h0, c0, weights, batch_sizes, present, blocks), target_of(x.device)
    tape, runs, dtype = tape_of(target, int(n.hidden), int(n.width)), layers * directions, x.dtype
    y, h_n, c_n, between = recomputed_fake(cell, x, *rest)
    hs = (runs, tape.hs_lead * n.batch + n.rows, tape.hs_row)
    saved = (runs, n.rows, tape_values(target, cell, present), tape.units)
    hs_dtype = dtype if tape.hs_as_x else _computing(dtype)
    return (
        y,
        h_n,
        c_n,
        between,
        x.new_empty(hs, dtype=hs_dtype),
        x.new_empty(saved, dtype=_computing(dtype)),
    )


def backward_fake(*arguments: Any) -> tuple[Any, ...]:
    needs, (_, x, h0, c0, weights, *_) = arguments[6], arguments[7:]
    gradients = [
        x.new_empty(0) if t is None or i not in needs else t.new_empty(t.shape)
        for i, t in enumerate((x, h0, c0, *weights))
    ]
    return (*gradients[:3], gradients[3:])
