"""Recurrent layers as plain loops over layers, directions, sequences and steps, written from the
equations of ``docs/between-steps.md`` and of the papers named there: what a layer with all its
options has to give, however it is computed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pack_padded_sequence


def is_pair(module: Any) -> bool:
    return "LSTM" in module.mode


def directions(module: Any) -> int:
    return 2 if module.bidirectional else 1


def widths(module: Any) -> list[int]:
    """Of h, and of c where there is one."""
    return [module.proj_size or module.hidden_size, module.hidden_size][: 1 + is_pair(module)]


@dataclass
class Draws:
    """The random numbers of a call; None where there are none."""

    weights: list[Tensor] | None = None  # of each run, like weight_hh
    between: Tensor | None = None  # [L-1, T, B, D*P]
    h: Tensor | None = None  # [L*D, B, P]
    zoneout: list[Tensor] | None = None  # of h and c, [L*D, T, B, H]

    def to(self, dtype: torch.dtype) -> Draws:
        def cast(value: Any) -> Any:
            if isinstance(value, list):
                return [cast(v) for v in value]
            return None if value is None else value.to(dtype)

        return Draws(*map(cast, (self.weights, self.between, self.h, self.zoneout)))


def draw(module: Any, T: int, B: int, lengths: list[int] | None, dtype: torch.dtype) -> Draws:
    """What a call draws from torch's generator in this state, in the order in which it does.

    Numbers for each row of a batch are drawn for its valid steps alone, time first and the longest
    sequences first, where it has lengths.
    """
    steps = module.between_steps
    found = Draws()
    runs, width = module.num_layers * directions(module), widths(module)[0]
    order = list(range(B))
    rows = [(t, b) for t in range(T) for b in order]
    if lengths is not None:
        counts = torch.tensor([max(n, 1) for n in lengths])
        packed = pack_padded_sequence(torch.zeros(T, B, 1), counts, enforce_sorted=False)
        order = packed.sorted_indices.tolist()
        rows = [(t, b) for t, n in enumerate(packed.batch_sizes.tolist()) for b in order[:n]]

    def placed(values: Tensor) -> Tensor:
        """[.., T, B, n] of [.., rows, n]."""
        out = values.new_zeros(*values.shape[:-2], T, B, values.shape[-1])
        for i, (t, b) in enumerate(rows):
            out[..., t, b, :] = values[..., i, :]
        return out

    if not module.training:
        return found
    if steps.weight_dropout:
        found.weights = [
            F.dropout(torch.ones_like(p), steps.weight_dropout)
            for name, p in module.named_parameters()
            if name.startswith("weight_hh")
        ]
    if module.dropout and module.num_layers > 1:
        ones = torch.ones(
            B if steps.dropout_over_time else len(rows), directions(module) * width, dtype=dtype
        )
        masks = [F.dropout(ones, module.dropout) for _ in range(module.num_layers - 1)]
        if steps.dropout_over_time:
            masks = [torch.stack([m[order.index(b)] for _, b in rows]) for m in masks]
        found.between = placed(torch.stack(masks))
    if steps.recurrent_dropout:
        drawn = F.dropout(torch.ones(runs, B, width, dtype=dtype), steps.recurrent_dropout)
        found.h = torch.stack([drawn[:, order.index(b)] for b in range(B)], 1)
    if any(rates(module)):
        p = torch.cat([torch.full((module.hidden_size,), r, dtype=dtype) for r in rates(module)])
        kept = placed(torch.bernoulli(p.expand(runs, len(rows), -1)))
        found.zoneout = list(kept.split(module.hidden_size, -1))
    return found


def rates(module: Any) -> list[float]:
    """Of zoneout, for h and c."""
    given = module.between_steps.zoneout
    both = list(given) if isinstance(given, tuple) else [given, given]
    return both[: 1 + is_pair(module)]


def normalised(module: Any, v: Tensor) -> Tensor:
    """Ba et al. 2016, section 3; Zhang & Sennrich 2019, equation 4."""
    eps, n = module.between_steps.norm_eps, len(v)
    if module.between_steps.norm == "layer":
        mean = v.sum() / n
        return (v - mean) / torch.sqrt(((v - mean) ** 2).sum() / n + eps)
    return v / torch.sqrt((v**2).sum() / n + eps)


def dense(w: Tensor, units: int, blocks: int) -> Tensor:
    """[G*H, H] of [G*H, H / blocks]: row q*H + u has its numbers at the units of u's block."""
    size = units // blocks
    rows = []
    for i, row in enumerate(w):
        block = i % units // size
        rows.append(F.pad(row, (block * size, units - (block + 1) * size)))
    return torch.stack(rows)


def one_step(
    module: Any, run: str, r: Tensor, x: Tensor, h_in: Tensor, h: Tensor, c: Any
) -> tuple[Tensor, Any]:
    """The cell on one row: x [I], states [H]; ``h_in`` is h as it goes into R."""
    at = module.between_steps.places
    own = lambda name: getattr(module, f"{name}_{run}")  # noqa: E731
    wx, rh = own("weight_ih") @ x, r @ h_in
    b_ih, b_hh = (own("bias_ih"), own("bias_hh")) if module.bias else (0.0, 0.0)
    if "input" in at:
        wx = own("gain_ih") * normalised(module, wx)
    if "recurrent" in at:
        rh = own("gain_hh") * normalised(module, rh)
    if "sum" in at:
        wx, rh = own("gain") * normalised(module, wx + rh), torch.zeros_like(rh)
    a, b = wx + b_ih, rh + b_hh
    if module.mode == "RNN_TANH":
        return torch.tanh(a + b), None
    if module.mode == "RNN_RELU":
        return torch.relu(a + b), None
    if module.mode == "GRU":
        (a_r, a_z, a_n), (b_r, b_z, b_n) = a.chunk(3), b.chunk(3)
        reset, z = torch.sigmoid(a_r + b_r), torch.sigmoid(a_z + b_z)
        return (1 - z) * torch.tanh(a_n + reset * b_n) + z * h, None
    if module.mode == "BLOCK_GRU":
        reset, candidate, update = (a + b).chunk(3)
        update = torch.sigmoid(update - 1)
        return update * torch.tanh(torch.sigmoid(reset) * candidate) + (1 - update) * h, None
    i, f, g, o = (a + b).chunk(4)
    peephole = module.mode == "PEEPHOLE_LSTM"
    if peephole:
        i, f = i + own("p_i") * c, f + own("p_f") * c
    c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
    if peephole:
        o = o + own("p_o") * c
    shown = own("gain_c") * normalised(module, c) + own("shift_c") if "cell" in at else c
    h = torch.sigmoid(o) * torch.tanh(shown)
    return own("weight_hr") @ h if module.proj_size else h, c


def run(
    module: Any,
    x: Tensor,
    hx: list[Tensor],
    lengths: list[int] | None = None,
    reset: Tensor | None = None,
    reset_to: list[Tensor] | None = None,
    draws: Draws | None = None,
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """The layer on x [T, B, I] from the states hx, [L*D, B, n] each.

    Returns y [T, B, D*P], the last states, and the states after each step, [L*D, T, B, n] each,
    which are 0 past the end of a sequence. ``reset_to`` is one state, like hx, or has T in front.
    """
    T, B = x.shape[:2]
    steps, draws = module.between_steps, draws or Draws()
    counts = [T] * B if lengths is None else lengths
    last: list[list[Tensor]] = [[] for _ in hx]  # each [B, n]
    every: list[list[Tensor]] = [[] for _ in hx]  # each [T, B, n]
    for layer in range(module.num_layers):
        outputs = []
        for d in range(directions(module)):
            k = layer * directions(module) + d
            run = f"l{layer}{'_reverse' * d}"
            r = getattr(module, f"weight_hh_{run}")
            if draws.weights is not None:
                r = r * draws.weights[k]
            if steps.blocks > 1:
                r = dense(r, module.hidden_size, steps.blocks)
            ends, rows = [], []  # of each sequence
            for b in range(B):
                states = [s[k, b] for s in hx]
                after: list[Any] = [[torch.zeros_like(s) for s in states] for _ in range(T)]
                for t in reversed(range(counts[b])) if d else range(counts[b]):
                    # The place of a reset is between its step and the one before.
                    cut = t + 1 if d else t
                    if reset is not None and cut < counts[b] and reset[cut, b]:
                        if reset_to is None:
                            states = [torch.zeros_like(s) for s in states]
                        else:
                            states = [s[k, b] if s.dim() == 3 else s[cut, k, b] for s in reset_to]
                    h = states[0]
                    c = states[1] if len(states) > 1 else None
                    h_in = h if draws.h is None else h * draws.h[k, b]
                    new = [
                        s for s in one_step(module, run, r, x[t, b], h_in, h, c) if s is not None
                    ]
                    for i, p in enumerate(rates(module)):
                        z: Any = p if draws.zoneout is None else draws.zoneout[i][k, t, b]
                        if p:
                            new[i] = z * states[i] + (1 - z) * new[i]
                    states = new
                    after[t] = new
                ends.append(states)
                rows.append(after)
            for i in range(len(hx)):
                last[i].append(torch.stack([states[i] for states in ends]))
                every[i].append(
                    torch.stack([torch.stack([rows[b][t][i] for b in range(B)]) for t in range(T)])
                )
            outputs.append(every[0][-1])
        x = torch.cat(outputs, -1)
        if draws.between is not None and layer + 1 < module.num_layers:
            x = x * draws.between[layer]
    return x, [torch.stack(s) for s in last], [torch.stack(s) for s in every]
