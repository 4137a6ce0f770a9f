"""The mathematics of every cell in plain torch: oracle of the tests, and the path always there.

One pointwise step per cell (``CELLS``), one loop over time, and one over layers (``recurrent``).
Everything is differentiable torch without in-place writes, so autograd of any order, forward mode,
``vmap``, ``torch.func`` and any device work without more code. The native kernels (``ops/``)
answer the same call with the same results.

Sizes: L layers, D directions, T steps, B sequences, I inputs, H units, G gates, P width of h (H, or
less if projected), C width of all states beside h.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

# The tensors of one direction of a layer, by name: w_ih [G*H, I], w_hh [G*H, P], b_ih and b_hh
# [G*H], w_hr [P, H], the cell's parameters [H], and those of NORM_TENSORS. Some may be missing.
Weights = Mapping[str, Tensor]
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


# What is normalised, see ``Norm``, and the tensors of a direction that come with it: gains of all
# rows of W, [G*H], or of all units, [H], and shifts. They stand behind those of ``Cell.tensors``.
NORM_TENSORS: dict[str, tuple[str, ...]] = {
    "input": ("g_ih",),
    "recurrent": ("g_hh",),
    "sum": ("g",),
    "cell": ("g_c", "s_c"),
}


NORM_KINDS = ("layer", "rms")


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


# --- What happens between two steps --------------------------------------------------------------


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


# --- Which tensors there are ---------------------------------------------------------------------

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
    stages: Stages = NO_STAGES,
    every_state: bool = False,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Run a stack of layers over a whole sequence.

    Args:
        cell: one of ``CELLS``.
        x: [T, B, I], or packed rows [R, I] with ``batch_sizes``, both of any strides.
        h0: [L*D, B, P], layer-major; None for zeros.
        c0: [L*D, B, C], or None for zeros, and for a cell without states beside h.
        weights: the tensors of each layer and direction in turn, in the order of ``Cell.tensors``;
            then, for a cell that has it, what is given to all of them, [T, B, given * H], or rows.
        masks: [L-1, rows of x.., D*P], which multiply what a layer gives to the next, or None.
        batch_sizes: [T] int64 on the CPU, not increasing: rows of x that belong to each step.
        layers, directions: L and D; the second direction runs backwards in time.
        present: which of ``Cell.tensors`` there are, see ``present_bits``.
        recompute: the backward runs each layer again instead of keeping what it computed.
        stages: what happens between two steps.
        every_state: return the states after every step for the last ones.

    Returns:
        y [T, B, D*P] (packed: [R, D*P]), h_n [L*D, B, P] and c_n [L*D, B, C] or None. With
        ``every_state`` h_n and c_n have the rows of x, T*B or R of them, in the place of B.
    """
    runs = by_name(cell, present, weights)
    h0, c0 = initial_states(cell, x, h0, c0, weights, batch_sizes, present, stages.blocks)
    run_layer = _layer_again if recompute else _layer
    h_n, c_n = [], []
    for i in range(layers):
        part = slice(i * directions, (i + 1) * directions)
        c0_i = None if c0 is None else c0[part]
        own = stages.of_states(lambda t, part=part: t[..., part, :, :])  # type: ignore[misc]
        x, h, c = run_layer(cell, x, h0[part], c0_i, runs[part], batch_sizes, own, every_state)
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
    blocks: int = 1,
) -> tuple[Tensor, Tensor | None]:
    """The states given, or zeros; for the arguments of ``recurrent``."""
    others = len(CELLS[cell].states) - 1
    if h0 is not None and (c0 is not None or not others):
        return h0, c0
    runs, batch = count_runs(cell, present, weights), x.shape[1]
    if batch_sizes is not None:
        batch = batch_sizes[0]  # type: ignore[assignment]
    width, units = widths(cell, weights, present, blocks)
    if h0 is None:
        h0 = torch.zeros(runs, batch, width, dtype=x.dtype, device=x.device)
    if c0 is None and others:
        c0 = torch.zeros(runs, batch, others * units, dtype=x.dtype, device=x.device)
    return h0, c0


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
    stages: Stages,
    every_state: bool,
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
            stages.of_states(lambda t, d=d: t.select(-3, d).to(wide)),  # type: ignore[misc]
            every_state,
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
    stages: Stages,
    every_state: bool,
) -> Any:
    """``_layer``, but the backward runs the forward again instead of keeping what it computed."""
    names = list(runs[0])

    def call(x: Tensor, h0: Tensor, c0: Tensor | None, *flat: Tensor) -> Any:
        again = [
            dict(zip(names, flat[i : i + len(names)], strict=True))
            for i in range(0, len(flat), len(names))
        ]
        return _layer(cell, x, h0, c0, again, batch_sizes, stages, every_state)

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
    stages: Stages,
    every_state: bool,
    *,
    reverse: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Run over time from the states h [B, P], c [B, C]; return the outputs and the last states, or
    those of all rows."""
    w_hr, b_ih, b_hh = (weights.get(name) for name in ("w_hr", "b_ih", "b_hh"))
    params = [weights[name] for name in cell.params]
    norm, how = stages.norm, {}
    at = () if norm is None else norm.at
    w_ih = _matrix(weights["w_ih"], stages)
    w_hh = _matrix(weights["w_hh"], stages) if "w_hh" in weights else None
    # One product for all steps.
    gx = _product(x, w_ih, None if {"input", "sum"}.intersection(at) else b_ih)
    if norm is not None and "input" in at:
        gx = norm(gx, weights["g_ih"], b_ih)
    if norm is not None and "cell" in at:
        how["seen"] = partial(norm, gain=weights["g_c"], shift=weights["s_c"])
    if cell.given:
        gx = torch.cat([gx, weights["given"][: len(gx)]], -1)
    steps = gx.unbind(0) if sizes is None else gx.split(sizes)  # step t: [b_t, G*H]
    counts = [g.shape[0] for g in steps]
    cuts = _cuts(stages.reset, counts, reverse=reverse)
    kept = _of_steps(stages.zoneout, counts)
    outputs, hs, cs = [], [], []
    for t in reversed(range(len(steps))) if reverse else range(len(steps)):
        # Sequences are sorted by length, so the first b_t rows are running. The rows below keep
        # what they have: forwards the last state of a sequence that has ended, backwards the first
        # state of one that is still to begin.
        b = counts[t]
        h_t, c_t = h[:b], None if c is None else c[:b]
        if (cut := cuts[t]) is not None:
            place = t + 1 if reverse else t
            h_t, c_t = _begun_anew(cut, h_t, c_t, stages.reset_to, place)
        mask = None if stages.h_mask is None else stages.h_mask[:b]
        g, gh = steps[t], None
        if w_hh is not None and cell.products:
            product = partial(_gate, w_hh, b_hh, mask, stages.blocks, cell.recurrent_gates)
            how["product"] = product
            gates = [product(q, h_t) for q in range(cell.products[0])]
            gh = torch.cat(gates, -1) if gates else None
        elif w_hh is not None:
            late = {"recurrent", "sum"}.intersection(at)
            into = h_t if mask is None else h_t * mask
            gh = _product(into, w_hh, None if late else b_hh, stages.blocks)
            if norm is not None and "recurrent" in at:
                gh = norm(gh, weights["g_hh"], b_hh)
            if norm is not None and "sum" in at:
                g = norm(g + gh, weights["g"], b_ih)
                gh = torch.zeros_like(g) if b_hh is None else b_hh.expand_as(g)
        h_new, c_new = cell.step(g, gh, h_t, c_t, *params, **how)
        if w_hr is not None:
            h_new = F.linear(h_new, w_hr)
        if (z := kept[t]) is not None:
            h_new = torch.lerp(h_new, h_t, z[:, : h_t.shape[1]].expand_as(h_t))
            if c_t is not None and c_new is not None:
                c_new = torch.lerp(c_new, c_t, z[:, h_t.shape[1] :].expand_as(c_t))
        if cell.output == 0:
            outputs.append(h_new)
        elif c_new is not None:
            outputs.append(c_new.chunk(len(cell.states) - 1, -1)[cell.output - 1])
        hs.append(h_new)
        h = h_new if sizes is None else torch.cat([h_new, h[b:]])
        if c is not None and c_new is not None:
            cs.append(c_new)
            c = c_new if sizes is None else torch.cat([c_new, c[b:]])
    if reverse:
        for each in (outputs, hs, cs):
            each.reverse()
    y = torch.stack(outputs) if sizes is None else torch.cat(outputs)
    return (y, torch.cat(hs), torch.cat(cs) if cs else None) if every_state else (y, h, c)


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


def _matrix(w: Tensor, stages: Stages) -> Matrix:
    return Rows.of(w) if stages.int8 else w


def _product(a: Tensor, w: Matrix, bias: Tensor | None, blocks: int = 1) -> Tensor:
    """a w^T + bias [.., G*H], w being block-diagonal if it has blocks."""
    if isinstance(w, Rows):
        left = Rows.of(a)
        sums = _product(left.numbers, w.numbers, None, blocks)  # exact
        product = sums.float() * left.scales * w.scales.squeeze(-1)
        return product if bias is None else product + bias
    if blocks == 1:
        return F.linear(a, w, bias)
    width = w.shape[1]
    each = w.unflatten(0, (-1, blocks, a.shape[1] // blocks))  # [G, blocks, units, width]
    gates = torch.einsum("bnk,gnuk->bgnu", a.unflatten(1, (blocks, width)), each).flatten(1)
    return gates if bias is None else gates + bias


def _gate(
    w_hh: Matrix,
    b_hh: Tensor | None,
    mask: Tensor | None,
    blocks: int,
    gates: int,
    q: int,
    u: Tensor,
) -> Tensor:
    """Gate q alone, of any operand u [b, H], which ``mask`` multiplies."""
    bias = None if b_hh is None else b_hh.chunk(gates)[q]
    return _product(u if mask is None else u * mask, w_hh.chunk(gates)[q], bias, blocks)


def _cuts(reset: Tensor | None, counts: list[int], *, reverse: bool) -> list[Tensor | None]:
    """For each step t the rows [b_t, 1] whose states before it become zeros, or None."""
    if reset is None:
        return [None] * len(counts)
    steps = list(reset.reshape(-1)[: sum(counts)].split(counts))
    if reverse:  # the state before step t is that of t + 1, of as many rows as go on to there
        nothing = reset.new_zeros(counts[-1])
        steps = [
            F.pad(after, (0, count - len(after)))
            for after, count in zip([*steps[1:], nothing], counts, strict=True)
        ]
    return [step.unsqueeze(1) for step in steps]


def _begun_anew(
    cut: Tensor,
    h: Tensor,
    c: Tensor | None,
    to: tuple[Tensor, Tensor | None] | None,
    step: int,
) -> tuple[Tensor, Tensor | None]:
    """The states h [b, P] and c with those of ``to``, [B, ..] or [T, B, ..], in the rows cut."""
    if to is None:
        return h.masked_fill(cut, 0), None if c is None else c.masked_fill(cut, 0)
    if to[0].dim() == 3:  # past the end nothing is cut
        step = min(step, to[0].shape[0] - 1)
    own = [s if s is None or s.dim() == 2 else s[step] for s in to]
    b = h.shape[0]
    h = torch.where(cut, own[0][:b], h)  # type: ignore[index]
    return h, c if c is None else torch.where(cut, own[1][:b], c)  # type: ignore[index]


def _of_steps(rows: Tensor | None, counts: list[int]) -> Sequence[Tensor | None]:
    """The rows of each step; one row is that of all."""
    if rows is None or rows.shape[0] == 1:
        return [rows] * len(counts)
    return rows.split(counts)
