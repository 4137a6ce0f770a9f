"""torch.nn's layer with what users put around it where it has no resets and no blocks.

Resets: the batch is split where states begin anew, the segments are padded to the longest and run
as a batch of more sequences, and their outputs are put back. Padded segments end in states of their
padding: c_n is not returned, h_n is the last output. Blocks: a whole matrix that is zero beside
them; the zeros have gradients, which a user would set to zero too, but here that is not timed.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence, unpad_sequence

from ..cases import Case
from ..problem import Problem, diagonal
from .modules import ModulePeer


class Split(nn.Module):
    """A layer of torch.nn, which takes ``reset`` [T, B]."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor, *, reset: Tensor) -> tuple[Tensor, Tensor]:
        steps, batch = reset.shape
        begins = reset.t().clone()
        begins[:, 0] = True
        starts = begins.flatten().nonzero().squeeze(1)
        lengths = starts.diff(append=starts.new_tensor([steps * batch]))
        segments = x.transpose(0, 1).flatten(0, 1).split(lengths.tolist())
        y, _ = self.layer(pad_sequence(list(segments)))
        # With time first, unpad_sequence transposes y itself in place: an error in the backward.
        rows = torch.cat(unpad_sequence(y.transpose(0, 1), lengths.cpu(), batch_first=True))
        y = rows.unflatten(0, (batch, steps)).transpose(0, 1)
        return y, y[-1:]


class Whole(nn.Module):
    """A layer of torch.nn whose W_hh is zero beside its blocks."""

    def __init__(self, layer: Any, blocks: int) -> None:
        super().__init__()
        self.layer, self.blocks = copy.deepcopy(layer), blocks
        rows, units = layer.weight_hh_l0.shape
        block = torch.ones(units // blocks, units // blocks)
        mask = torch.block_diag(*[block] * blocks).repeat(rows // units, 1)
        with torch.no_grad():
            self.layer.weight_hh_l0 *= mask.to(self.layer.weight_hh_l0)

    def forward(self, x: Tensor) -> Any:
        return self.layer(x)


class TorchNNAround(ModulePeer):
    name, title = "torch_nn_around", "torch.nn, around"
    devices = ("cpu", "cuda")
    has_between = frozenset({"resets", "blocks"})

    def refuses(self, case: Case) -> str | None:
        return None if len(case.between) == 1 else "is for resets or for blocks"

    def regime(self, case: Case) -> str | None:
        return "split and padded" if case.resets else "whole matrix"

    def module(self, problem: Problem) -> Any:
        case = problem.case
        return Split(problem.module) if case.resets else Whole(problem.module, case.blocks)

    def gradients(self, module: Any) -> dict[str, Any]:
        found = super().gradients(module.layer)
        if isinstance(module, Whole):
            found["d weight_hh_l0"] = diagonal(found["d weight_hh_l0"], module.blocks)
        return found


def peer() -> TorchNNAround:
    return TorchNNAround()
