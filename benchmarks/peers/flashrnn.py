"""FlashRNN (NX-AI/flashrnn), CUDA: its fused kernels, with W x computed here by one product.

It is called with one head, which is torch.nn's layer. Its kernels are compiled per size, in the
first call.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..cases import Case
from ..problem import Problem
from .modules import ModulePeer, no_ragged

_FUNCTION = {"lstm": "lstm", "gru": "gru", "rnn": "elman"}


class OneHead(nn.Module):
    """torch.nn's parameters in FlashRNN's layouts, x [T, B, I]."""

    def __init__(self, problem: Problem) -> None:
        super().__init__()
        native: Any = problem.module
        case = problem.case
        self.case = case
        w, r, b = native.weight_ih_l0, native.weight_hh_l0, native.bias_ih_l0 + native.bias_hh_l0
        gates = r.detach().view(-1, case.H, case.H)
        if case.cell == "gru":  # recurrent gates n, r, z; biases of h_n, r, z, x_n
            gates = gates[[2, 0, 1]]
            b_r, b_z, _ = b.chunk(3)
            b = torch.cat([native.bias_hh_l0.chunk(3)[2], b_r, b_z, native.bias_ih_l0.chunk(3)[2]])
        self.w = nn.Parameter(w.detach().clone())
        self.r = nn.Parameter(gates[:, None].contiguous())  # [G, 1, H, H]
        self.b = nn.Parameter(b.detach().view(-1, 1, case.H).clone())

    def forward(self, x: Tensor) -> tuple[Tensor, Any]:
        from flashrnn import flashrnn

        case = self.case
        wx = F.linear(x, self.w).view(case.T, case.B, -1, 1, case.H).transpose(0, 1)  # [B,T,G,1,H]
        states, last = flashrnn(
            wx, self.r, self.b, function=_FUNCTION[case.cell], dtype=case.dtype
        )  # [S, B, T, 1, H], the last with T = 1
        y = states[0, :, :, 0].transpose(0, 1)
        final = tuple(state[:, 0, 0].unsqueeze(0) for state in last)
        return y, final if len(final) > 1 else final[0]


class FlashRNN(ModulePeer):
    name, title = "flashrnn", "FlashRNN"
    devices = ("cuda",)

    def absent(self) -> str | None:
        return None if find_spec("flashrnn") else "not installed: flashrnn"

    def refuses(self, case: Case) -> str | None:
        if case.cell not in _FUNCTION:
            return f"has no {case.cell}"
        if case.dtype == "float64":
            return "has no float64"
        if case.layers > 1 or case.bidirectional or case.proj or not case.bias:
            return "one layer and direction, with bias and without projection"
        if case.carries:
            return "made for sequences"
        return no_ragged(case)

    def gradients(self, module: Any) -> dict[str, Tensor]:
        return {"d weight_ih_l0": module.w.grad}

    def module(self, problem: Problem) -> Any:
        return OneHead(problem).to(problem.case.device)


def peer() -> FlashRNN:
    return FlashRNN()
