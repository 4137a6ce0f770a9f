"""Sums of many terms in float32: as accurate as those of torch.nn."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers import magnitude, map_tensors, run
from torch import nn

import fused_rnn
from fused_rnn import build

pytestmark = [
    pytest.mark.engine,
    pytest.mark.skipif(build.backend() != "native", reason="about the kernels"),
]

EPS = torch.finfo(torch.float32).eps


def errors(theirs: nn.RNNBase, x: torch.Tensor, h0: torch.Tensor) -> dict[str, tuple[float, float]]:
    """Of each gradient, ours and torch.nn's, in eps of its largest entry."""
    ours = fused_rnn.replace(copy.deepcopy(theirs))
    hx = (h0, torch.zeros_like(h0)) if isinstance(theirs, nn.LSTM) else h0
    doubles = map_tensors((x, hx), lambda t: t.double())
    exact = run(copy.deepcopy(theirs).double(), *doubles)
    found = [run(module, x, hx) for module in (ours, theirs)]

    def error(name: str, values: dict[str, torch.Tensor]) -> float:
        return magnitude(values[name].double() - exact[name]) / magnitude(exact[name]) / EPS

    names = [name for name in exact if name.startswith("d ")]
    return {name: (error(name, found[0]), error(name, found[1])) for name in names}


@pytest.mark.parametrize("kind", [nn.RNN, nn.LSTM, nn.GRU])
def test_gradients_of_weights_over_many_rows(kind: type[nn.RNNBase]) -> None:
    """32,000 rows: in one chain of sums the error of a weight's gradient is about 40 eps."""
    found = errors(kind(16, 33), torch.randn(1000, 32, 16), torch.randn(1, 32, 33))
    for name, (ours, theirs) in found.items():
        assert ours <= max(8, 2 * theirs), (name, ours, theirs)


@pytest.mark.parametrize("kind", [nn.RNN, nn.LSTM, nn.GRU])
def test_gradient_of_h0_in_a_wide_layer(kind: type[nn.RNNBase]) -> None:
    """In one chain of 1,024 products a gate the error is 11 to 27 eps."""
    found = errors(kind(16, 1024), torch.randn(1, 8, 16), torch.randn(1, 8, 1024))
    for name, (ours, theirs) in found.items():
        assert ours <= max(6, 2 * theirs), (name, ours, theirs)
