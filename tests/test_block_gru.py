"""BlockGRU, against a loop written from the published equations of DreamerV3's recurrent unit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import assert_all_close
from torch import Tensor

import fused_rnn

pytestmark = pytest.mark.module

H, BLOCKS, EPS = 64, 2, 1e-3


def loop(rnn: Any, x: Tensor, h: Tensor, begins: Tensor) -> tuple[Tensor, Tensor]:
    """Hafner et al. 2023, one sequence and one block after the other: x [T, B, I], h [1, B, H]."""
    options, units = rnn.between_steps, H // rnn.between_steps.blocks
    w, r = rnn.weight_ih_l0, rnn.weight_hh_l0.view(3, options.blocks, units, units)
    b = rnn.bias_ih_l0 + rnn.bias_hh_l0
    columns, last = [], []
    for k in range(x.shape[1]):
        state, outputs = h[0, k], []
        for t in range(x.shape[0]):
            if begins[t, k]:
                state = torch.zeros_like(state)
            groups = state.split(units)
            product = [r[gate, n] @ group for gate in range(3) for n, group in enumerate(groups)]
            gates = w @ x[t, k] + torch.cat(product)
            if options.norm == "rms":
                gates = rnn.gain_l0 * gates / (gates.square().mean() + EPS).sqrt()
            reset, candidate, update = (gates + b).chunk(3)
            candidate = torch.tanh(torch.sigmoid(reset) * candidate)
            update = torch.sigmoid(update - 1)
            state = update * candidate + (1 - update) * state
            outputs.append(state)
        columns.append(torch.stack(outputs))
        last.append(state)
    return torch.stack(columns, 1), torch.stack(last)[None]


@pytest.mark.parametrize("norm", [None, "rms"])
@pytest.mark.parametrize("blocks", [1, BLOCKS])
def test_dreamers_recurrent_core(blocks: int, norm: str | None) -> None:
    """Outputs, the last state, and all gradients."""
    options: Any = {"norm": norm, "norm_at": ("sum",), "norm_eps": EPS} if norm else {}
    rnn = fused_rnn.BlockGRU(7, H, blocks=blocks, dtype=torch.float64, **options)
    x = torch.randn(9, 3, 7).double().requires_grad_()
    h = torch.randn(1, 3, H).double().requires_grad_()
    begins = torch.rand(9, 3) < 0.2
    begins[4, 1] = True
    begins[0, 0] = False  # somebody sees h
    with torch.no_grad():
        for name, parameter in rnn.named_parameters():
            if name.startswith("gain"):
                parameter.uniform_(0.5, 1.5)
    leaves = [x, h, *rnn.parameters()]
    found = []
    for y, h_n in (rnn(x, h, reset=begins), loop(rnn, x, h, begins)):
        weight = torch.linspace(-1, 1, y.numel()).to(y).view_as(y)
        gradients = torch.autograd.grad((y * weight).sum() + (h_n**2).sum(), leaves)
        found.append([y.detach(), h_n.detach(), *gradients])
    assert_all_close(*found, 1e-9)


def test_its_gates_see_only_the_sum() -> None:
    """Which is why both products may be normalised together, and why torch.nn has no such GRU."""
    fused_rnn.BlockGRU(4, 8, norm="layer", norm_at=("sum",))
    with pytest.raises(ValueError, match="norm_at"):
        fused_rnn.GRU(4, 8, norm="layer", norm_at=("sum",))
    with pytest.raises(ValueError, match="proj_size"):
        fused_rnn.BlockGRU(4, 8, proj_size=2)
