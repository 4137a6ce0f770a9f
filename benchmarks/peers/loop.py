"""The loop over time that people write for what torch.nn does not have, in plain eager PyTorch.

It is written from the equations and shares no line with fused_rnn, so it also says what is right
for a case with resets, blocks or norm. W x is one product for all steps.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..cases import BETWEEN, Case
from ..problem import Problem
from .modules import ModulePeer

EPS = 1e-5

Function = Callable[[Tensor], Tensor]


def _lstm(gx: Tensor, gh: Tensor, state: tuple[Tensor, ...], seen: Function) -> tuple[Tensor, ...]:
    i, f, g, o = (gx + gh).chunk(4, 1)
    c = f.sigmoid() * state[1] + i.sigmoid() * g.tanh()
    return o.sigmoid() * seen(c).tanh(), c


def _gru(gx: Tensor, gh: Tensor, state: tuple[Tensor, ...], _: Function) -> tuple[Tensor, ...]:
    r, z = (gx + gh).chunk(3, 1)[:2]
    n = (gx.chunk(3, 1)[2] + r.sigmoid() * gh.chunk(3, 1)[2]).tanh()
    z = z.sigmoid()
    return ((1 - z) * n + z * state[0],)


def _rnn(activation: Function) -> Callable[..., tuple[Tensor, ...]]:
    return lambda gx, gh, state, seen: (activation(gx + gh),)


_STEPS: dict[str, Callable[..., tuple[Tensor, ...]]] = {
    "lstm": _lstm,
    "gru": _gru,
    "rnn": _rnn(torch.tanh),
    "rnn_relu": _rnn(torch.relu),
}


class PlainLoop(nn.Module):
    """One layer and direction of [T, B, I]."""

    def __init__(self, case: Case, weights: dict[str, Tensor]) -> None:
        super().__init__()
        self.case, self.step = case, _STEPS[case.cell]
        for name, weight in weights.items():
            self.register_parameter(name, nn.Parameter(weight))

    def weight(self, name: str) -> Tensor | None:
        return getattr(self, f"{name}_l0", None)

    def normalised(self, v: Tensor, gain: str, shift: Tensor | None) -> Tensor:
        weight = self.weight(gain)
        if self.case.norm == "layer":
            return F.layer_norm(v, v.shape[-1:], weight, shift, EPS)
        v = F.rms_norm(v, v.shape[-1:], weight, EPS)
        return v if shift is None else v + shift

    def gates(self, side: str) -> Function:
        """The function W x + b, or R h + b, normalised where the case says so."""
        weight, bias, blocks = getattr(self, f"weight_{side}_l0"), self.weight(f"bias_{side}"), 1
        if side == "hh":
            blocks = self.case.blocks
        if blocks > 1:  # one batched product: [n, B, H / n] with [n, H / n, G * H / n]
            units = self.case.H // blocks
            each = weight.unflatten(0, (-1, blocks, units)).permute(1, 3, 0, 2)
            matrix = each.flatten(2)

            def product(h: Tensor) -> Tensor:
                parts = torch.bmm(h.unflatten(1, (blocks, units)).transpose(0, 1), matrix)
                return parts.unflatten(2, (-1, units)).permute(1, 2, 0, 3).flatten(1)

        else:

            def product(h: Tensor) -> Tensor:
                return F.linear(h, weight)

        if self.case.norm:
            return lambda v: self.normalised(product(v), f"gain_{side}", bias)
        if blocks == 1:
            return lambda v: F.linear(v, weight, bias)
        return product if bias is None else lambda v: product(v) + bias

    def seen(self, c: Tensor) -> Tensor:
        """What an LSTM's output shows of c."""
        return self.normalised(c, "gain_c", self.weight("shift_c")) if self.case.norm else c

    def forward(
        self, x: Tensor, state: Any = None, *, reset: Tensor | None = None
    ) -> tuple[Tensor, Any]:
        if state is None:
            count = 2 if self.case.cell == "lstm" else 1
            states = (x.new_zeros(x.shape[1], self.case.H),) * count
        else:
            states = tuple(s[0] for s in (state if isinstance(state, tuple) else (state,)))
        anew = None if reset is None else reset.unsqueeze(-1).unbind(0)
        nothing, recurrent = x.new_zeros(()), self.gates("hh")
        ys = []
        for t, gx in enumerate(self.gates("ih")(x).unbind(0)):
            if anew is not None:
                states = tuple(torch.where(anew[t], nothing, s) for s in states)
            states = self.step(gx, recurrent(states[0]), states, self.seen)
            ys.append(states[0])
        last = tuple(s.unsqueeze(0) for s in states)
        return torch.stack(ys), last if len(last) > 1 else last[0]


class LoopPeer(ModulePeer):
    name, title = "loop", "loop"
    devices = ("cpu", "cuda")
    has_between = frozenset(BETWEEN)

    def refuses(self, case: Case) -> str | None:
        one = case.layers == case.directions == 1 and not (case.proj or case.ragged)
        return None if one else "is one padded layer and direction without projection"

    def module(self, problem: Problem) -> Any:
        return PlainLoop(problem.case, problem.weights)


def peer() -> LoopPeer:
    return LoopPeer()
