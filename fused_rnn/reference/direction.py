"""One direction of a layer, step by step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from .cells import Cell
from .products import matrix, product
from .stages import Stages
from .tensors import Weights


def run_direction(
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
    gates = _Gates(cell, weights, stages)
    gx = gates.of_input(x)
    steps = gx.unbind(0) if sizes is None else gx.split(sizes)  # step t: [b_t, G*H]
    counts = [g.shape[0] for g in steps]
    cuts = _cuts(stages.reset, counts, reverse=reverse)
    kept = _of_steps(stages.zoneout, counts)
    params = [weights[name] for name in cell.params]
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
        gx_t, gh_t, how = gates.of_step(steps[t], h_t)
        h_new, c_new = cell.step(gx_t, gh_t, h_t, c_t, *params, **how)
        if "w_hr" in weights:
            h_new = F.linear(h_new, weights["w_hr"])
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


class _Gates:
    """What the cell's step takes beside states and parameters, as the stages want it."""

    def __init__(self, cell: Cell, weights: Weights, stages: Stages) -> None:
        self.cell, self.weights, self.stages = cell, weights, stages
        self.w_hh = matrix(weights["w_hh"], stages.int8) if "w_hh" in weights else None
        self.b_ih, self.b_hh = weights.get("b_ih"), weights.get("b_hh")
        self.normalised = () if stages.norm is None else stages.norm.at
        self.functions: dict[str, Callable[..., Tensor]] = {}
        if stages.norm is not None and "cell" in self.normalised:
            self.functions["seen"] = partial(stages.norm, gain=weights["g_c"], shift=weights["s_c"])

    def of_input(self, x: Tensor) -> Tensor:
        """The part of the input in all steps, [T, B, G*H] or rows, by one product."""
        norm, w_ih = self.stages.norm, matrix(self.weights["w_ih"], self.stages.int8)
        bias_later = {"input", "sum"}.intersection(self.normalised)
        gx = product(x, w_ih, None if bias_later else self.b_ih)
        if norm is not None and "input" in self.normalised:
            gx = norm(gx, self.weights["g_ih"], self.b_ih)
        if self.cell.given:
            gx = torch.cat([gx, self.weights["given"][: len(gx)]], -1)
        return gx

    def of_step(
        self, gx: Tensor, h: Tensor
    ) -> tuple[Tensor, Tensor | None, dict[str, Callable[..., Tensor]]]:
        """gx, gh and the functions that the step asks for, of one step's gx and h [b, P]."""
        if self.w_hh is None:
            return gx, None, self.functions
        mask = None if self.stages.h_mask is None else self.stages.h_mask[: h.shape[0]]
        if self.cell.products:
            gate = partial(self._gate, mask)
            first = [gate(q, h) for q in range(self.cell.products[0])]
            gh = torch.cat(first, -1) if first else None
            return gx, gh, self.functions | {"product": gate}
        norm = self.stages.norm
        bias_later = {"recurrent", "sum"}.intersection(self.normalised)
        into = h if mask is None else h * mask
        gh = product(into, self.w_hh, None if bias_later else self.b_hh, self.stages.blocks)
        if norm is not None and "recurrent" in self.normalised:
            gh = norm(gh, self.weights["g_hh"], self.b_hh)
        if norm is not None and "sum" in self.normalised:
            gx = norm(gx + gh, self.weights["g"], self.b_ih)
            gh = torch.zeros_like(gx) if self.b_hh is None else self.b_hh.expand_as(gx)
        return gx, gh, self.functions

    def _gate(self, mask: Tensor | None, q: int, u: Tensor) -> Tensor:
        """Gate q alone, of any operand u [b, H], which ``mask`` multiplies."""
        assert self.w_hh is not None
        gates = self.cell.recurrent_gates
        bias = None if self.b_hh is None else self.b_hh.chunk(gates)[q]
        into = u if mask is None else u * mask
        return product(into, self.w_hh.chunk(gates)[q], bias, self.stages.blocks)


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
