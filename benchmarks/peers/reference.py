"""fused_rnn's plain torch path: what a machine without a compiler runs."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from ..cases import BETWEEN, Case
from ..problem import Problem
from .modules import ModulePeer

_CELLS = {"lstm": "lstm", "gru": "gru", "rnn": "rnn_tanh", "rnn_relu": "rnn_relu"}


class Loop(nn.Module):
    """``reference.recurrent`` over the weights of a problem, in their order."""

    def __init__(self, case: Case, weights: dict[str, Tensor]) -> None:
        super().__init__()
        from fused_rnn import reference

        self.case = case
        self.cell, self.recurrent = _CELLS[case.cell], reference.recurrent
        for name, weight in weights.items():
            self.register_parameter(name, nn.Parameter(weight))
        at = reference.CELLS[self.cell].norm_places if case.norm else ()
        at = tuple(place for place in at if place != "sum")
        self.stages = reference.Stages(
            blocks=case.blocks, norm=reference.Norm(case.norm, at) if case.norm else None
        )
        self.present = reference.present_bits(
            self.cell, biases=case.bias, projection=case.proj > 0, norm_at=at
        )

    def forward(self, x: Any, state: Any = None, *, reset: Any = None) -> tuple[Any, Any]:
        case = self.case
        data, sizes = (x.data, x.batch_sizes) if isinstance(x, PackedSequence) else (x, None)
        h, c = state if isinstance(state, tuple) else (state, None)
        shape = (case.layers, case.directions, self.present)
        weights = list(self.parameters())
        stages = self.stages._replace(reset=reset)
        y, h_n, c_n = self.recurrent(
            self.cell, data, h, c, weights, None, sizes, *shape, stages=stages
        )
        if isinstance(x, PackedSequence):
            order = x.unsorted_indices
            y = x._replace(data=y)
            h_n, c_n = h_n[:, order], None if c_n is None else c_n[:, order]
        return y, h_n if c_n is None else (h_n, c_n)


class Reference(ModulePeer):
    name, title = "reference", "reference"
    devices = ("cpu", "cuda")
    has_between = frozenset(BETWEEN)

    def module(self, problem: Problem) -> Any:
        return Loop(problem.case, problem.weights)


def peer() -> Reference:
    return Reference()
