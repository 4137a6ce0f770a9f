"""What kernels read in the place of weights, made of them once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from . import ops
from .between import NOTHING, BetweenSteps
from .reference import Stages, present_names


class Packed(NamedTuple):
    """What a call is given beside its weights if they are packed."""

    tensor: Tensor | None = None  # of ``pack``, for the engine that can read it
    int8: bool = False  # products are of 8-bit integers, unless a gradient is wanted


NOT_PACKED = Packed()


def pack(
    cell: str,
    weights: Sequence[Tensor],
    *,
    num_layers: int,
    bidirectional: bool,
    present: int,
    between: BetweenSteps = NOTHING,
    dtype: torch.dtype | None = None,
) -> Tensor | None:
    """The ``Packed.tensor`` of calls with these weights; None if no kernel takes any. ``dtype``, in
    the place of float32: as of ``freeze``."""
    if dtype is torch.int8:
        _check_sums(cell, weights, present)
    stages = Stages(blocks=between.blocks, norm=between.norm_of_call())
    directions = 2 if bidirectional else 1
    return ops.pack(cell, weights, num_layers, directions, present, stages, dtype)


def _check_sums(cell: str, weights: Sequence[Tensor], present: int) -> None:
    most = 2**16  # times 127 times 255, where the left side has no sign
    names = present_names(cell, present)
    for i, w in enumerate(weights):
        if names[i % len(names)] in ("w_ih", "w_hh") and w.shape[1] > most:
            raise ValueError(
                f"dtype: torch.int8 is for at most {most} inputs and units, whose products it sums "
                f"up in 32 bits, got {w.shape[1]}"
            )
