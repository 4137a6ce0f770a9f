"""What may happen to the states between two steps, beside the cell."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor

# What is normalised, see ``Norm``, and the tensors of a direction that come with it: gains of all
# rows of W, [G*H], or of all units, [H], and shifts. They stand behind those of ``Cell.tensors``.
NORM_TENSORS: dict[str, tuple[str, ...]] = {
    "input": ("g_ih",),
    "recurrent": ("g_hh",),
    "sum": ("g",),
    "cell": ("g_c", "s_c"),
}

NORM_KINDS = ("layer", "rms")


@dataclass(frozen=True)
class Norm:
    """What is normalised in each step, row by row: Ba, Kiros & Hinton 2016, arXiv:1607.06450.

    kind: "layer", ``(v - mean(v)) / sqrt(var(v) + eps)``, or "rms" (Zhang & Sennrich 2019,
        arXiv:1910.07467), ``v / sqrt(mean(v^2) + eps)``.
    at: places of NORM_TENSORS. In "input" v is x W_ih^T, in "recurrent" h W_hh^T, in "sum" both
        together, each with all gates and before biases, and ``gain * normalised v`` takes its
        place. In "cell" it is c, as the output shows it: ``g_c * normalised c + s_c``.
    """

    kind: str
    at: tuple[str, ...]
    eps: float = 1e-5

    def __call__(self, v: Tensor, gain: Tensor, shift: Tensor | None) -> Tensor:
        """``gain * normalised v + shift``."""
        if self.kind == "layer":
            return F.layer_norm(v, v.shape[-1:], gain, shift, self.eps)
        scaled = gain * (v * (v.square().mean(-1, keepdim=True) + self.eps).rsqrt())
        return scaled if shift is None else scaled + shift


class Stages(NamedTuple):
    """What happens to the states beside the cell, in every layer and direction.

    reset: [T, B] (packed: [R]) bool. Where true, the states before that step become zeros. The
        second direction is cut at the same places: between that step and the one before it.
    reset_to: the states h and c that they become instead of zeros, [L*D, B, P] and [L*D, B, C] or,
        for each step, [T, L*D, B, ..]. The native kernels do not know it.
    zoneout: [L*D, rows or 1, S*H], the fraction z in [0, 1] of its old value that a unit keeps in a
        step, for each of the S states: ``s' + z (s - s')`` takes the place of the cell's s'. Not
        with a projection.
    h_mask: [L*D, B, P], which multiplies h where it goes into W_hh.
    blocks: W_hh is block-diagonal of so many blocks, and has P / blocks columns: row q*H + u
        multiplies the h of u's block.
    norm: what is normalised; the weights then have the tensors of it.
    int8: products with W_ih and W_hh are those of 8-bit integers, see ``Rows``. The native kernels
        do so where they have such weights packed.
    """

    reset: Tensor | None = None
    reset_to: tuple[Tensor, Tensor | None] | None = None
    zoneout: Tensor | None = None
    h_mask: Tensor | None = None
    blocks: int = 1
    norm: Norm | None = None
    int8: bool = False

    @property
    def nothing(self) -> bool:
        """Whether a layer is as torch.nn has it."""
        if self.blocks > 1 or self.norm is not None or self.int8:
            return False
        return self.reset is None and self.zoneout is None and self.h_mask is None

    def of_states(self, fn: Callable[[Tensor], Tensor]) -> Stages:
        """With what ``fn`` makes of all tensors that are about states, [.., L*D, rows, ..]."""

        def made(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else fn(tensor)

        to = self.reset_to and (fn(self.reset_to[0]), made(self.reset_to[1]))
        return self._replace(reset_to=to, zoneout=made(self.zoneout), h_mask=made(self.h_mask))


NO_STAGES = Stages()
