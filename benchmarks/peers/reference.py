"""fused_rnn's plain torch path: what a machine without a compiler runs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from ..cases import Case
from ..problem import Problem
from .modules import ModulePeer

_CELLS = {"lstm": "lstm", "gru": "gru", "rnn": "rnn_tanh", "rnn_relu": "rnn_relu"}


class Loop(nn.Module):
    """A stack of ``reference.layer`` over the parameters of a torch.nn module."""

    def __init__(self, case: Case, source: nn.RNNBase) -> None:
        super().__init__()
        from fused_rnn import functional, reference

        self.case = case
        self.cell, self.layer = _CELLS[case.cell], reference.layer
        for name, parameter in source.named_parameters():
            self.register_parameter(name, parameter)
        names = source._all_weights  # per layer and direction
        self.runs = [
            functional._named([getattr(self, name) for name in run], case.bias) for run in names
        ]

    def forward(self, x: Any, state: Any = None) -> tuple[Any, Any]:
        case, d = self.case, self.case.directions
        data, sizes = (x.data, x.batch_sizes) if isinstance(x, PackedSequence) else (x, None)
        batch = case.B
        if state is None:
            h = data.new_zeros(case.layers * d, batch, case.width)
            c = data.new_zeros(case.layers * d, batch, case.H) if case.cell == "lstm" else None
        else:
            h, c = state if case.cell == "lstm" else (state, None)
        hs: list[Tensor] = []
        cs: list[Tensor] = []
        for i in range(case.layers):
            part = slice(i * d, (i + 1) * d)
            data, h_n, c_n = self.layer(
                self.cell, data, h[part], None if c is None else c[part], self.runs[part], sizes
            )
            hs.append(h_n)
            if c_n is not None:
                cs.append(c_n)
        y: Any = data
        h_n = torch.cat(hs)
        c_n = torch.cat(cs) if cs else None
        if isinstance(x, PackedSequence):
            order = x.unsorted_indices
            y = x._replace(data=data)
            h_n, c_n = h_n[:, order], None if c_n is None else c_n[:, order]
        return y, h_n if c_n is None else (h_n, c_n)


class Reference(ModulePeer):
    name, title = "reference", "reference"
    devices = ("cpu", "cuda")

    def module(self, problem: Problem) -> Any:
        return Loop(problem.case, problem.module)


def peer() -> Reference:
    return Reference()
