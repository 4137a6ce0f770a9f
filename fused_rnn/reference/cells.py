"""What is to know of each cell, and its step in plain torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .stages import NORM_TENSORS

Step = Callable[..., tuple[Tensor, Tensor | None]]


@dataclass(frozen=True)
class Cell:
    """What is to know of a recurrent cell. ``csrc/cells`` says the same to the kernels.

    ``step(gx, gh, h, c, *params) -> (h_new, c_new)`` is pointwise in the batch and the unit:
    ``gx = x W_ih^T + b_ih`` is [B, gates * H], ``gh = h W_hh^T + b_hh`` [B, recurrent_gates * H] or
    None, ``h`` is [B, P], ``c`` [B, C] holds the other states or is None, and parameters are [H].
    Where ``shows_c``, the step takes ``seen``, a function: its output shows seen(c') for c'.
    What is ``given`` stands in gx behind the gates. Of a cell with ``products``, gh has the gates
    of the first, and the step takes ``product``, a function: of gate q and what this is of, u
    [B, H], it makes the part of u W_hh^T + b_hh, [B, H].
    """

    step: Step
    gates: int  # with a part of W_ih
    states: tuple[str, ...] = ("h",)
    params: tuple[str, ...] = ()
    output: int = 0  # the state that is the layer's output
    gates_h: int | None = None  # with a part of W_hh; None: all. With 0 there is no W_hh
    reads_h: bool = False  # whether the step reads h itself, beside its product with W_hh
    reads_new_h: bool = False  # whether the kernels' backward reads the new h
    adds: bool = True  # whether the step reads gx and gh by nothing but their sum
    shows_c: bool = False  # whether the output is a function of the new c
    given: tuple[str, ...] = ()  # what the caller gives for each step, one number per unit each
    products: tuple[int, ...] = ()  # if W_hh multiplies more than h: the gates of each product
    source: Any = None  # of a cell that is not in csrc/cells, what its header is made by

    @property
    def recurrent_gates(self) -> int:
        return self.gates if self.gates_h is None else self.gates_h

    @property
    def projectable(self) -> bool:
        """Whether h may be narrower than the cell: if it is the output, and goes into W_hh only."""
        reads = self.reads_h or self.reads_new_h or self.products
        return self.recurrent_gates > 0 and not reads and self.output == 0

    @property
    def tensors(self) -> tuple[str, ...]:
        """The names of all tensors that a direction of a layer may have, in their order."""
        return ("w_ih", "w_hh", "b_ih", "b_hh", "w_hr", *self.params)

    @property
    def norm_places(self) -> tuple[str, ...]:
        """Of NORM_TENSORS: what of this cell can be normalised."""
        has = {
            "input": True,
            "recurrent": self.recurrent_gates > 0 and not self.products,
            "sum": self.adds and self.recurrent_gates == self.gates,
            "cell": self.shows_c,
        }
        return tuple(place for place in NORM_TENSORS if has[place])


def _as_is(c: Tensor) -> Tensor:
    return c


def _rnn(activation: Callable[[Tensor], Tensor]) -> Step:
    def step(gx: Tensor, gh: Tensor, h: Tensor, c: None) -> tuple[Tensor, None]:
        """Elman 1990, "Finding structure in time".  ``h' = f(gx + gh)``, f = tanh or relu."""
        return activation(gx + gh), None

    return step


def _lstm(
    gx: Tensor, gh: Tensor, h: Tensor, c: Tensor, seen: Callable[[Tensor], Tensor] = _as_is
) -> tuple[Tensor, Tensor]:
    """Hochreiter & Schmidhuber 1997, with the forget gate of Gers, Schmidhuber & Cummins 2000.

    ``i, f, o = sigmoid(gx + gh)   g = tanh(gx + gh)   c' = f c + i g   h' = o tanh(c')``
    in the gate order i, f, g, o.
    """
    i, f, g, o = (gx + gh).chunk(4, -1)
    c = f.sigmoid() * c + i.sigmoid() * g.tanh()
    return o.sigmoid() * seen(c).tanh(), c


def _gru(gx: Tensor, gh: Tensor, h: Tensor, c: None) -> tuple[Tensor, None]:
    """Cho et al. 2014, arXiv:1406.1078, reset after the product, as in torch.nn and cuDNN.

    ``r, z = sigmoid(gx + gh)   n = tanh(gx + r gh)   h' = n + z (h - n)``
    in the gate order r, z, n.
    """
    x_r, x_z, x_n = gx.chunk(3, -1)
    h_r, h_z, h_n = gh.chunk(3, -1)
    r, z = (x_r + h_r).sigmoid(), (x_z + h_z).sigmoid()
    n = (x_n + r * h_n).tanh()
    return n + z * (h - n), None


def _peephole_lstm(
    gx: Tensor,
    gh: Tensor,
    h: Tensor,
    c: Tensor,
    p_i: Tensor,
    p_f: Tensor,
    p_o: Tensor,
    seen: Callable[[Tensor], Tensor] = _as_is,
) -> tuple[Tensor, Tensor]:
    """Gers & Schmidhuber 2000: ``_lstm``, whose gates see c (i, f) and c' (o) of their unit."""
    i, f, g, o = (gx + gh).chunk(4, -1)
    c = (f + p_f * c).sigmoid() * c + (i + p_i * c).sigmoid() * g.tanh()
    return (o + p_o * c).sigmoid() * seen(c).tanh(), c


def _block_gru(gx: Tensor, gh: Tensor, h: Tensor, c: None) -> tuple[Tensor, None]:
    """Hafner et al. 2023, arXiv:2301.04104 (DreamerV3).

    ``r = sigmoid(s)   c = tanh(r s)   u = sigmoid(s - 1)   h' = h + u (c - h)``, of s = gx + gh, in
    the gate order r, c, u.
    """
    r, a, u = (gx + gh).chunk(3, -1)
    return torch.lerp(h, (r.sigmoid() * a).tanh(), (u - 1).sigmoid()), None


CELLS: dict[str, Cell] = {
    "rnn_tanh": Cell(_rnn(torch.tanh), gates=1, reads_new_h=True),
    "rnn_relu": Cell(_rnn(torch.relu), gates=1, reads_new_h=True),
    "lstm": Cell(_lstm, gates=4, states=("h", "c"), shows_c=True),
    "gru": Cell(_gru, gates=3, reads_h=True, adds=False),
    "block_gru": Cell(_block_gru, gates=3, reads_h=True),
    "peephole_lstm": Cell(
        _peephole_lstm, gates=4, states=("h", "c"), params=("p_i", "p_f", "p_o"), shows_c=True
    ),
}
