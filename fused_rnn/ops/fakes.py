"""The shapes and types of the operators' results: their fakes."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.library
from torch import Tensor

from .. import reference
from .library import tape_of, tape_values, target_of
from .schemas import Inputs


class _Sizes(NamedTuple):
    """Of a call: sequences B, units H, width P of h and C of c, all rows of x."""

    batch: Any
    hidden: Any
    width: Any
    extra: Any
    rows: Any


def _sizes(i: Inputs) -> _Sizes:
    found, x = reference.CELLS[i.cell], i.x
    run = dict(zip(reference.present_names(i.cell, i.present), i.weights, strict=False))
    hidden = run["w_ih"].shape[0] // found.gates
    width = run["w_hh"].shape[1] * i.blocks if "w_hh" in run else hidden
    batch: Any
    if i.h0 is not None:
        batch = i.h0.shape[1]
    elif i.batch_sizes is None:
        batch = x.shape[1]
    else:  # a number that is in the data
        batch = torch.library.get_ctx().new_dynamic_size()
    rows = x.shape[0] if i.batch_sizes is not None else x.shape[0] * x.shape[1]
    return _Sizes(batch, hidden, width, (len(found.states) - 1) * hidden, rows)


def infer_fake(*inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
    i = Inputs(*inputs)
    n, x = _sizes(i), i.x
    runs, states = i.layers * i.directions, n.rows if i.every_state else n.batch
    y = x.new_empty((*x.shape[:-1], i.directions * n.width))
    return y, x.new_empty((runs, states, n.width)), x.new_empty((runs, states, n.extra))


def recomputed_fake(*inputs: Any) -> tuple[Tensor, ...]:
    i = Inputs(*inputs)
    y, h_n, c_n = infer_fake(*inputs)
    rows = y.numel() // max(y.shape[-1], 1)
    return y, h_n, c_n, i.x.new_empty((i.layers - 1, rows, y.shape[-1]))


def fake(*inputs: Any) -> tuple[Tensor, ...]:
    i = Inputs(*inputs)
    n, x, target = _sizes(i), i.x, target_of(i.x.device)
    tape, runs = tape_of(target, int(n.hidden), int(n.width)), i.layers * i.directions
    y, h_n, c_n, between = recomputed_fake(*inputs)
    hs = (runs, tape.hs_lead * n.batch + n.rows, tape.hs_row)
    saved = (runs, n.rows, tape_values(target, i.cell, i.present), tape.units)
    computing = torch.float64 if x.dtype == torch.float64 else torch.float32
    return (
        y,
        h_n,
        c_n,
        between,
        x.new_empty(hs, dtype=x.dtype if tape.hs_as_x else computing),
        x.new_empty(saved, dtype=computing),
    )


def pack_fake(*inputs: Any) -> Any:
    words = torch.library.get_ctx().new_dynamic_size()  # as many as the kernels want
    return inputs[1].new_empty(words, dtype=torch.int64)


def backward_fake(*arguments: Any) -> tuple[Any, ...]:
    _, _, _, _, _, _, needs, *inputs = arguments
    i = Inputs(*inputs)
    gradients = [
        i.x.new_empty(0) if t is None or number not in needs else t.new_empty(t.shape)
        for number, t in enumerate((i.x, i.h0, i.c0, *i.weights))
    ]
    return (*gradients[:3], gradients[3:])
