"""Which tensors a layer has, and which is which in the flat list of them all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from .cells import CELLS
from .stages import NORM_TENSORS, Stages

# The tensors of one direction of a layer, by name: w_ih [G*H, I], w_hh [G*H, P], b_ih and b_hh
# [G*H], w_hr [P, H], the cell's parameters [H], and those of NORM_TENSORS. Some may be missing.
Weights = Mapping[str, Tensor]

BIASES, PROJECTION = 0b1100, 1 << 4  # the bits of b_ih and b_hh, and of w_hr


def _all_tensors(cell: str) -> list[str]:
    return [*CELLS[cell].tensors, *(name for names in NORM_TENSORS.values() for name in names)]


def present_bits(cell: str, *, biases: bool, projection: bool, norm_at: Sequence[str] = ()) -> int:
    """Bit i for tensor i of ``Cell.tensors``, then NORM_TENSORS: those that a layer has."""
    known = CELLS[cell]
    matrices = 0b11 if known.recurrent_gates else 0b01
    vectors = BIASES & matrices << 2 if biases else 0
    params = (1 << len(known.params)) - 1
    found = matrices | vectors | PROJECTION * projection | params << 5
    if norm_at:
        there = {name for place in norm_at for name in NORM_TENSORS[place]}
        found |= sum((name in there) << i for i, name in enumerate(_all_tensors(cell)))
    return found


def present_names(cell: str, present: int) -> list[str]:
    return [name for i, name in enumerate(_all_tensors(cell)) if present >> i & 1]


def present_norms(cell: str, present: int) -> tuple[str, ...]:
    """The places of NORM_TENSORS that are among the tensors present."""
    names = present_names(cell, present)
    return tuple(place for place, tensors in NORM_TENSORS.items() if tensors[0] in names)


def by_name(cell: str, present: int, weights: Sequence[Tensor]) -> list[Weights]:
    """The flat tensors of each layer and direction by themselves; what is given is of all."""
    names, of_all = present_names(cell, present), {}
    if CELLS[cell].given:
        *weights, of_all["given"] = weights
    return [
        dict(zip(names, weights[i : i + len(names)], strict=True)) | of_all
        for i in range(0, len(weights), len(names))
    ]


def count_runs(cell: str, present: int, weights: Sequence[Tensor]) -> int:
    """L*D."""
    return (len(weights) - bool(CELLS[cell].given)) // present.bit_count()


def widths(cell: str, weights: Sequence[Tensor], present: int, blocks: int = 1) -> tuple[int, int]:
    """P and H."""
    run = dict(zip(present_names(cell, present), weights, strict=False))
    units = run["w_ih"].shape[0] // CELLS[cell].gates
    return run["w_hh"].shape[1] * blocks if "w_hh" in run else units, units


def without_blocks(
    cell: str, weights: Sequence[Tensor], present: int, stages: Stages
) -> tuple[list[Tensor], Stages]:
    """The same layers with whole matrices W_hh [G*H, P], which are zero beside the blocks."""
    names, n = present_names(cell, present), stages.blocks

    def whole(w_hh: Tensor) -> Tensor:
        blocks = w_hh.unflatten(0, (-1, n, w_hh.shape[1]))  # [G, n, units of a block, columns]
        return (
            torch.diag_embed(blocks.movedim(1, -1))
            .permute(0, 3, 1, 4, 2)
            .reshape(w_hh.shape[0], -1)
        )

    return [
        whole(w) if names[i % len(names)] == "w_hh" else w for i, w in enumerate(weights)
    ], stages._replace(blocks=1)
