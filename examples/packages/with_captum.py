"""captum: which steps of a sequence an LSTM's answer comes from, by integrated gradients.

A call is many forwards and backwards of a model in evaluation, where cuDNN refuses the backward and
our kernels do not.
"""

from __future__ import annotations

import copy

import torch
from captum.attr import IntegratedGradients
from measure import compare
from torch import Tensor, nn

import fused_rnn

BATCH, STEPS, INPUTS, UNITS = 4, 64, 32, 128


class Classifier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.LSTM(INPUTS, UNITS, batch_first=True, bidirectional=True)
        self.head = nn.Linear(2 * UNITS, 5)

    def forward(self, x: Tensor) -> Tensor:
        y, _ = self.rnn(x)
        return self.head(y.mean(1))


def main() -> None:
    theirs = Classifier().eval()
    ours = fused_rnn.replace(copy.deepcopy(theirs))
    x = torch.randn(BATCH, STEPS, INPUTS)

    def attributions(model: nn.Module) -> Tensor:
        return IntegratedGradients(model).attribute(x, target=1, n_steps=20).detach()

    compare({"torch.nn": lambda: attributions(theirs), "fused_rnn": lambda: attributions(ours)})


if __name__ == "__main__":
    main()
