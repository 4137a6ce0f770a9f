"""The mathematics of every cell in plain torch: oracle of the tests, and the path always there.

One pointwise step per cell (``CELLS``), one loop over time, and one over layers (``recurrent``).
Everything is differentiable torch without in-place writes, so autograd of any order, forward mode,
``vmap``, ``torch.func`` and any device work without more code. The native kernels (``ops.py``)
answer the same call with the same results.

Sizes: L layers, D directions, T steps, B sequences, I inputs, H units, G gates, P width of h (H, or
less if projected), C width of all states beside h.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

# The tensors of one direction of a layer, by name: w_ih [G*H, I], w_hh [G*H, P], b_ih and b_hh
# [G*H], w_hr [P, H], and the cell's parameters [H]. Some may be missing.
Weights = Mapping[str, Tensor]
Step = Callable[..., tuple[Tensor, Tensor | None]]


@dataclass(frozen=True)
class Cell:
    """What is to know of a recurrent cell. ``csrc/cells`` says the same to the kernels.

    ``step(gx, gh, h, c, *params) -> (h_new, c_new)`` is pointwise in the batch and the unit:
    ``gx = x W_ih^T + b_ih`` is [B, gates * H], ``gh = h W_hh^T + b_hh`` [B, recurrent_gates * H] or
    None, ``h`` is [B, P], ``c`` [B, C] holds the other states or is None, and parameters are [H].
    """

    step: Step
    gates: int  # with a part of W_ih
    states: tuple[str, ...] = ("h",)
    params: tuple[str, ...] = ()
    output: int = 0  # the state that is the layer's output
    gates_h: int | None = None  # with a part of W_hh; None: all. With 0 there is no W_hh
    reads_h: bool = False  # whether the step reads h itself, beside its product with W_hh
    source: Any = None  # of a cell that is not in csrc/cells, what its header is made by

    @property
    def recurrent_gates(self) -> int:
        return self.gates if self.gates_h is None else self.gates_h

    @property
    def tensors(self) -> tuple[str, ...]:
        """The names of all tensors that a direction of a layer may have, in their order."""
        return ("w_ih", "w_hh", "b_ih", "b_hh", "w_hr", *self.params)


def _rnn(activation: Callable[[Tensor], Tensor]) -> Step:
    def step(gx: Tensor, gh: Tensor, h: Tensor, c: None) -> tuple[Tensor, None]:
        """Elman 1990, "Finding structure in time".  ``h' = f(gx + gh)``, f = tanh or relu."""
        return activation(gx + gh), None

    return step


def _lstm(gx: Tensor, gh: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    """Hochreiter & Schmidhuber 1997, with the forget gate of Gers, Schmidhuber & Cummins 2000.

    ``i, f, o = sigmoid(gx + gh)   g = tanh(gx + gh)   c' = f c + i g   h' = o tanh(c')``
    in the gate order i, f, g, o.
    """
    i, f, g, o = (gx + gh).chunk(4, -1)
    c = f.sigmoid() * c + i.sigmoid() * g.tanh()
    return o.sigmoid() * c.tanh(), c


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
    gx: Tensor, gh: Tensor, h: Tensor, c: Tensor, p_i: Tensor, p_f: Tensor, p_o: Tensor
) -> tuple[Tensor, Tensor]:
    """Gers & Schmidhuber 2000: ``_lstm``, whose gates see c (i, f) and c' (o) of their unit."""
    i, f, g, o = (gx + gh).chunk(4, -1)
    c = (f + p_f * c).sigmoid() * c + (i + p_i * c).sigmoid() * g.tanh()
    return (o + p_o * c).sigmoid() * c.tanh(), c


CELLS: dict[str, Cell] = {
    "rnn_tanh": Cell(_rnn(torch.tanh), gates=1),
    "rnn_relu": Cell(_rnn(torch.relu), gates=1),
    "lstm": Cell(_lstm, gates=4, states=("h", "c")),
    "gru": Cell(_gru, gates=3, reads_h=True),
    "peephole_lstm": Cell(_peephole_lstm, gates=4, states=("h", "c"), params=("p_i", "p_f", "p_o")),
}


# --- Which tensors there are ---------------------------------------------------------------------

BIASES, PROJECTION = 0b1100, 1 << 4  # the bits of b_ih and b_hh, and of w_hr


def present_bits(cell: str, *, biases: bool, projection: bool) -> int:
    """Bit i for tensor i of ``Cell.tensors``: those that a layer has."""
    known = CELLS[cell]
    matrices = 0b11 if known.recurrent_gates else 0b01
    vectors = BIASES & matrices << 2 if biases else 0
    params = (1 << len(known.params)) - 1
    return matrices | vectors | PROJECTION * projection | params << 5


def present_names(cell: str, present: int) -> list[str]:
    return [name for i, name in enumerate(CELLS[cell].tensors) if present >> i & 1]


def units_of(cell: str, present: int, weights: Sequence[Tensor]) -> tuple[Any, Any]:
    """H and P, as the tensors of the first layer have them."""
    run = dict(zip(present_names(cell, present), weights, strict=False))
    units = run["w_ih"].shape[0] // CELLS[cell].gates
    return units, run["w_hh"].shape[1] if "w_hh" in run else units


def by_name(cell: str, present: int, weights: Sequence[Tensor]) -> list[Weights]:
    """The flat tensors of each layer and direction by themselves."""
    names = present_names(cell, present)
    return [
        dict(zip(names, weights[i : i + len(names)], strict=True))
        for i in range(0, len(weights), len(names))
    ]


# --- Layers, time --------------------------------------------------------------------------------


def recurrent(
    cell: str,
    x: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    weights: Sequence[Tensor],
    masks: Tensor | None,
    batch_sizes: Tensor | None,
    layers: int,
    directions: int,
    present: int,
    recompute: bool = False,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Run a stack of layers over a whole sequence.

    Args:
        cell: one of ``CELLS``.
        x: [T, B, I], or packed rows [R, I] with ``batch_sizes``, both of any strides.
        h0: [L*D, B, P], layer-major; None for zeros.
        c0: [L*D, B, C], or None for zeros, and for a cell without states beside h.
        weights: the tensors of each layer and direction in turn, in the order of ``Cell.tensors``.
        masks: [L-1, rows of x.., D*P], which multiply what a layer gives to the next, or None.
        batch_sizes: [T] int64 on the CPU, not increasing: rows of x that belong to each step.
        layers, directions: L and D; the second direction runs backwards in time.
        present: which of ``Cell.tensors`` there are, see ``present_bits``.
        recompute: the backward runs each layer again instead of keeping what it computed.

    Returns:
        y [T, B, D*P] (packed: [R, D*P]), h_n [L*D, B, P] and c_n [L*D, B, C] or None.
    """
    runs = by_name(cell, present, weights)
    h0, c0 = initial_states(cell, x, h0, c0, weights, batch_sizes, present)
    run_layer = _layer_again if recompute else _layer
    h_n, c_n = [], []
    for i in range(layers):
        part = slice(i * directions, (i + 1) * directions)
        c0_i = None if c0 is None else c0[part]
        x, h, c = run_layer(cell, x, h0[part], c0_i, runs[part], batch_sizes)
        if masks is not None and i + 1 < layers:
            x = x * masks[i][: x.shape[0]]
        h_n.append(h)
        c_n.append(c)
    if layers == 1:
        return x, h_n[0], c_n[0]
    return x, torch.cat(h_n), None if c0 is None else torch.cat(c_n)  # type: ignore[arg-type]


def initial_states(
    cell: str,
    x: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    weights: Sequence[Tensor],
    batch_sizes: Tensor | None,
    present: int,
) -> tuple[Tensor, Tensor | None]:
    """The states given, or zeros; for the arguments of ``recurrent``."""
    others = len(CELLS[cell].states) - 1
    if h0 is not None and (c0 is not None or not others):
        return h0, c0
    runs, batch = len(weights) // present.bit_count(), x.shape[1]
    if batch_sizes is not None:
        batch = batch_sizes[0]  # type: ignore[assignment]
    units, width = units_of(cell, present, weights)
    if h0 is None:
        h0 = torch.zeros(runs, batch, width, dtype=x.dtype, device=x.device)
    if c0 is None and others:
        c0 = torch.zeros(runs, batch, others * units, dtype=x.dtype, device=x.device)
    return h0, c0


def _wide(dtype: torch.dtype) -> torch.dtype:
    """16-bit types are computed in float32 and rounded once at the end."""
    return torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype


def _layer(
    cell: str,
    x: Tensor,
    h0: Tensor,
    c0: Tensor | None,
    runs: Sequence[Weights],
    batch_sizes: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """One layer of D = ``len(runs)`` directions."""
    dtype = x.dtype
    wide = _wide(dtype)
    sizes = None
    if batch_sizes is not None:
        sizes = batch_sizes.tolist()
        if sizes != sorted(sizes, reverse=True) or sizes[0] != h0.shape[1] or sizes[-1] < 1:
            raise RuntimeError(
                f"batch_sizes: expected positive, not increasing, from {h0.shape[1]} on, "
                f"got {sizes}"
            )
        x = x[: sum(sizes)]  # as torch.nn: rows that belong to no step are left out
    ys, hs, cs = [], [], []
    for d, run in enumerate(runs):
        y, h, c = _direction(
            CELLS[cell],
            x.to(wide),
            h0[d].to(wide),
            None if c0 is None else c0[d].to(wide),
            {name: w.to(wide) for name, w in run.items()},
            sizes,
            reverse=d == 1,
        )
        ys.append(y)
        hs.append(h)
        cs.append(c)
    c_n = None if c0 is None else torch.stack(cs).to(dtype)  # type: ignore[arg-type]
    return torch.cat(ys, -1).to(dtype), torch.stack(hs).to(dtype), c_n


def _layer_again(
    cell: str,
    x: Tensor,
    h0: Tensor,
    c0: Tensor | None,
    runs: Sequence[Weights],
    batch_sizes: Tensor | None,
) -> Any:
    """``_layer``, but the backward runs the forward again instead of keeping what it computed."""
    names = list(runs[0])

    def call(x: Tensor, h0: Tensor, c0: Tensor | None, *flat: Tensor) -> Any:
        again = [
            dict(zip(names, flat[i : i + len(names)], strict=True))
            for i in range(0, len(flat), len(names))
        ]
        return _layer(cell, x, h0, c0, again, batch_sizes)

    # Tensors in a list would be held past autograd, which then could not see them change.
    flat = [run[name] for run in runs for name in names]
    return checkpoint(call, x, h0, c0, *flat, use_reentrant=False, preserve_rng_state=False)


def _direction(
    cell: Cell,
    x: Tensor,
    h: Tensor,
    c: Tensor | None,
    weights: Weights,
    sizes: list[int] | None,
    *,
    reverse: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Run over time from the states h [B, P], c [B, C]; return the outputs and the last states."""
    w_hh, b_hh, w_hr = weights.get("w_hh"), weights.get("b_hh"), weights.get("w_hr")
    params = [weights[name] for name in cell.params]
    gx = F.linear(x, weights["w_ih"], weights.get("b_ih"))  # one product for all steps
    steps = gx.unbind(0) if sizes is None else gx.split(sizes)  # step t: [b_t, G*H]
    outputs = []
    for g in reversed(steps) if reverse else steps:
        # Sequences are sorted by length, so the first b_t rows are running. The rows below keep
        # what they have: forwards the last state of a sequence that has ended, backwards the first
        # state of one that is still to begin.
        b = g.shape[0]
        h_t, c_t = h[:b], None if c is None else c[:b]
        gh = None if w_hh is None else F.linear(h_t, w_hh, b_hh)
        h_new, c_new = cell.step(g, gh, h_t, c_t, *params)
        if w_hr is not None:
            h_new = F.linear(h_new, w_hr)
        if cell.output == 0:
            outputs.append(h_new)
        elif c_new is not None:
            outputs.append(c_new.chunk(len(cell.states) - 1, -1)[cell.output - 1])
        h = h_new if sizes is None else torch.cat([h_new, h[b:]])
        if c is not None and c_new is not None:
            c = c_new if sizes is None else torch.cat([c_new, c[b:]])
    if reverse:
        outputs.reverse()
    return torch.stack(outputs) if sizes is None else torch.cat(outputs), h, c
