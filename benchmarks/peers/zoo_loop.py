"""A cell of fused_rnn.zoo as a loop over time in eager PyTorch: its own function on tensors.

W x is one product for all steps. It says what is right for these cells; that the functions are
those of the papers is tested against other loops (``tests/test_zoo.py``).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..cases import Case
from ..problem import Problem, module_arguments, module_class
from .modules import ModulePeer, copy_weights
from .ours import between


class ZooLoop(nn.Module):
    """A layer of the zoo on the plain torch path."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        from fused_rnn import reference

        self.layer, self.reference = layer, reference
        self.present = reference.present_bits(layer.cell, biases=layer.bias, projection=False)
        self.stages = reference.Stages(blocks=layer.between_steps.blocks)

    def forward(self, x: Tensor, state: Any = None, **given: Tensor) -> tuple[Tensor, Any]:
        layer = self.layer
        weights = [getattr(layer, name) for name in layer._flat_weights_names]
        if given:
            weights.append(torch.cat(list(given.values()), -1))
        y, h_n, others = self.reference.recurrent(
            layer.cell, x, None, None, weights, None, None, 1, 1, self.present, stages=self.stages
        )
        return y, h_n if others is None else (h_n, *others.split(layer.hidden_size, -1))


class ZooLoopPeer(ModulePeer):
    name, title = "zoo_loop", "eager loop"
    devices = ("cpu", "cuda")
    has_zoo = True
    has_between = frozenset({"blocks"})

    def refuses(self, case: Case) -> str | None:
        return None if case.zoo else "is for cells of the zoo"

    def gradients(self, module: Any) -> dict[str, Any]:
        return super().gradients(module.layer)

    def module(self, problem: Problem) -> Any:
        layer: Any = module_class(problem.case)
        arguments = module_arguments(problem.case) | between(problem.case)
        return ZooLoop(copy_weights(layer(**arguments), problem))


def peer() -> ZooLoopPeer:
    return ZooLoopPeer()
