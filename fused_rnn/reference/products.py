"""Products with W_ih and W_hh: of numbers or of 8-bit integers, of whole matrices or of blocks."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Rows(NamedTuple):
    """Rows of numbers as ``scale * n``, n being whole numbers from -127 to 127.

    The scale of a row is its largest number in magnitude, divided by 127. A row below 1e-30 is
    zeros, and one with an infinity or NaN has the scale NaN. ``csrc/cpu/product/bytes.h`` has the
    same numbers.
    """

    numbers: Tensor  # [.., K] float64, in which products of them are exact
    scales: Tensor  # [.., 1] float32

    @classmethod
    def of(cls, rows: Tensor) -> Rows:
        largest = F.pad(rows.detach().abs(), (0, 1)).amax(-1, keepdim=True)  # of none, 0
        is_number = largest.isfinite()
        fits = is_number & (largest >= 1e-30)
        most = torch.full_like(largest, 127)  # by a number torch multiplies with its inverse
        factors = torch.where(fits, most / largest, 0)
        scales = torch.where(fits, largest / most, 0).masked_fill(~is_number, torch.nan)
        return cls(torch.where(fits, (rows * factors).round(), 0).double(), scales)

    def chunk(self, chunks: int) -> list[Rows]:
        each = zip(self.numbers.chunk(chunks), self.scales.chunk(chunks), strict=True)
        return [Rows(*both) for both in each]


Matrix = Tensor | Rows


def matrix(w: Tensor, int8: bool) -> Matrix:
    """The weights as ``product`` takes them."""
    return Rows.of(w) if int8 else w


def product(a: Tensor, w: Matrix, bias: Tensor | None, blocks: int = 1) -> Tensor:
    """a w^T + bias [.., G*H], w being block-diagonal if it has blocks."""
    if isinstance(w, Rows):
        left = Rows.of(a)
        sums = product(left.numbers, w.numbers, None, blocks)  # exact
        gates = sums.float() * left.scales * w.scales.squeeze(-1)
        return gates if bias is None else gates + bias
    if blocks == 1:
        return F.linear(a, w, bias)
    width = w.shape[1]
    each = w.unflatten(0, (-1, blocks, a.shape[1] // blocks))  # [G, blocks, units, width]
    gates = torch.einsum("bnk,gnuk->bgnu", a.unflatten(1, (blocks, width)), each).flatten(1)
    return gates if bias is None else gates + bias
