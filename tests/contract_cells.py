"""Cells from Python that tests/test_contract.py compiles beside those of tests/cells."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

import fused_rnn
from fused_rnn import zoo
from fused_rnn.build.sources import Cell
from fused_rnn.reference import CELLS


@fused_rnn.cell(gates=("a", "b", "c"), states=("h", "c"), params=("u",), output="c")
def Everything(x: Any, r: Any, s: Any, p: Any) -> dict[str, Any]:
    """All functions of core/math.h and all kinds of choices; without jumps, also of derivatives."""
    a, b, c = x.a + r.a, x.b + r.b, x.c
    v = torch.exp(torch.tanh(a)) - torch.expm1(-torch.abs(b) * torch.abs(b))
    w = torch.log1p(b.square()) / torch.sqrt(1 + c * c) + torch.erf(a) * torch.sin(b)
    w = w - torch.log(1.5 + torch.sign(a) * torch.tanh(a)) * torch.cos(c) + F.elu(a)
    apart = torch.maximum(a, p.u) - torch.minimum(a, p.u)
    order = (a > b) & ~(b <= c) | (a != a)
    w = w + torch.where(order, torch.tanh(F.relu(a - b).square() * (b - c).square()), 0.0)
    w = w + torch.tanh(apart * apart) + F.softplus(F.gelu(s.c))
    return dict(h=torch.tanh(w) * torch.sigmoid(s.h + v), c=0.5 * s.c + torch.tanh(v - w))


def headers(engine: str) -> dict[Cell, Any]:
    """With the layer of each. FastGRNN for the CPU alone: kernels that keep their weights take long
    to compile where CUDA is emulated, and tests/test_custom_cuda.py has a cell for these."""
    kept = () if engine.startswith("emulated") else (zoo.FastGRNN,)
    return {
        Cell(layer.cell, f"custom::{CELLS[layer.cell].source.type_name}", f"{layer.cell}.h"): layer
        for layer in (Everything, zoo.UnICORNN, *kept)
    }
