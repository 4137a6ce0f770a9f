"""torchrl: an LSTM over a batch of trajectories in which episodes begin anywhere (``is_init``).

torchrl's module splits the batch there, pads the pieces and puts their outputs together again. It
runs on our kernels after ``replace``; it asks whether its layer is torch.nn's, hence
``keep_isinstance``. A module of a few lines around ``reset=`` takes the batch as it is, which saves
all of that.
"""

from __future__ import annotations

import copy

import torch
from measure import compare
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import Tensor, nn
from torchrl.modules import LSTMModule, set_recurrent_mode

import fused_rnn

BATCH, STEPS, INPUTS, UNITS = 32, 64, 32, 128


class Memory(nn.Module):
    """The outputs of an LSTM whose states begin anew where an episode does."""

    def __init__(self, lstm: fused_rnn.LSTM) -> None:
        super().__init__()
        self.lstm = lstm

    def forward(self, x: Tensor, is_init: Tensor) -> Tensor:
        y, _ = self.lstm(x, reset=is_init.squeeze(-1))
        return y


def main() -> None:
    keys = {"in_keys": ["x", "h", "c"], "out_keys": ["y", ("next", "h"), ("next", "c")]}
    theirs = LSTMModule(input_size=INPUTS, hidden_size=UNITS, **keys)
    swapped = fused_rnn.replace(copy.deepcopy(theirs), keep_isinstance=True)
    memory = Memory(fused_rnn.replace(copy.deepcopy(theirs.lstm)))
    ours = TensorDictModule(memory, in_keys=["x", "is_init"], out_keys=["y"])

    is_init = torch.rand(BATCH, STEPS, 1) < 0.03
    is_init[:, 0] = True
    zeros = torch.zeros(BATCH, STEPS, 1, UNITS)
    data = {"x": torch.randn(BATCH, STEPS, INPUTS), "is_init": is_init, "h": zeros, "c": zeros}
    batch = TensorDict(data, [BATCH, STEPS])

    def train(module: nn.Module) -> Tensor:
        y = module(batch.clone())["y"]
        y.square().mean().backward()
        return y.detach()

    with set_recurrent_mode(True):
        compare(
            {
                "LSTMModule": lambda: train(theirs),
                "LSTMModule, replaced": lambda: train(swapped),
                "Memory with reset": lambda: train(ours),
            }
        )


if __name__ == "__main__":
    main()
