"""fused_rnn's plain torch path: what a machine without a compiler runs."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.nn.utils.rnn import PackedSequence

from ..cases import Case
from ..problem import Problem
from .modules import ModulePeer

_CELLS = {"lstm": "lstm", "gru": "gru", "rnn": "rnn_tanh", "rnn_relu": "rnn_relu"}


class Loop(nn.Module):
    """``reference.recurrent`` over the parameters of a torch.nn module."""

    def __init__(self, case: Case, source: nn.RNNBase) -> None:
        super().__init__()
        from fused_rnn import reference

        self.case = case
        self.cell, self.recurrent = _CELLS[case.cell], reference.recurrent
        for name, parameter in source.named_parameters():
            self.register_parameter(name, parameter)
        self.present = reference.present_bits(
            self.cell, biases=case.bias, projection=source.proj_size > 0
        )

    def forward(self, x: Any, state: Any = None) -> tuple[Any, Any]:
        case = self.case
        data, sizes = (x.data, x.batch_sizes) if isinstance(x, PackedSequence) else (x, None)
        h, c = state if isinstance(state, tuple) else (state, None)
        shape = (case.layers, case.directions, self.present)
        weights = list(self.parameters())
        y, h_n, c_n = self.recurrent(self.cell, data, h, c, weights, None, sizes, *shape)
        if isinstance(x, PackedSequence):
            order = x.unsorted_indices
            y = x._replace(data=y)
            h_n, c_n = h_n[:, order], None if c_n is None else c_n[:, order]
        return y, h_n if c_n is None else (h_n, c_n)


class Reference(ModulePeer):
    name, title = "reference", "reference"
    devices = ("cpu", "cuda")

    def module(self, problem: Problem) -> Any:
        return Loop(problem.case, problem.module)


def peer() -> Reference:
    return Reference()
