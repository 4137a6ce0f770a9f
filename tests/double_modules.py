"""Small modules in float64, torch.nn's and ours, and inputs for them."""

from __future__ import annotations

from typing import Any

import torch
from cases import pair
from helpers import flatten
from torch import Tensor, nn

LAYERS = ["RNN", "LSTM", "GRU"]


def is_cell(name: str) -> bool:
    return name.endswith("Cell")


def value(name: str, dtype: torch.dtype = torch.float64, **kwargs: Any) -> Tensor:
    """An input for a (3, 4) module: T = 5, B = 2."""
    shape = (2, 3) if is_cell(name) else (5, 2, 3)
    return torch.randn(shape, dtype=dtype, **kwargs)


def first(result: Any) -> Tensor:
    return flatten(result)[0]


def double_pair(name: str, **kwargs: Any) -> tuple[nn.Module, nn.Module]:
    return pair(name, 3, 4, dtype=torch.float64, **kwargs)


class Mixed(nn.Module):
    """Layers, a cell, and what stands between them in a model."""

    def __init__(self, library: Any) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(10, 3), nn.Linear(4, 2)
        self.lstm = library.LSTM(3, 4, num_layers=2, bidirectional=True, batch_first=True)
        self.gru, self.cell = library.GRU(8, 4), library.GRUCell(8, 4)

    def forward(self, tokens: Tensor) -> Tensor:
        output, (h, _) = self.lstm(self.embedding(tokens))
        _, h_n = self.gru(output.transpose(0, 1), h[:1])
        return self.head(self.cell(output[:, -1], h_n[0]))
