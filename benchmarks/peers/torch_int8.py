"""``torch.ao.quantization.quantize_dynamic``: torch.nn's layers with weights of 8 bits."""

from __future__ import annotations

import warnings
from typing import Any

import torch

from ..cases import Case
from ..problem import Problem
from .modules import ModulePeer, no_ragged


class TorchInt8(ModulePeer):
    name, title = "torch_int8", "quantize_dynamic"
    rounds_to = "int8"

    def absent(self) -> str | None:
        if not hasattr(torch.ao.quantization, "quantize_dynamic"):
            return "this torch has no quantize_dynamic"
        return None

    def versions(self) -> dict[str, str]:
        return {"torch": torch.__version__}

    def refuses(self, case: Case) -> str | None:
        if case.keeps:
            return "quantized layers do not train"
        if case.cell.startswith("rnn"):
            return "quantizes LSTM and GRU"
        if case.dtype != "float32" or case.proj or not case.bias:
            return "quantizes layers of float32 with biases and without projection"
        return no_ragged(case)

    def regime(self, case: Case) -> str | None:
        return torch.backends.quantized.engine

    def module(self, problem: Problem) -> Any:
        from torch.ao.quantization import quantize_dynamic

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it is deprecated
            # It looks at the children of a module.
            holder = torch.nn.ModuleDict({"rnn": problem.module})
            kinds = {type(problem.module)}
            return quantize_dynamic(holder, kinds, dtype=torch.qint8)["rnn"]


def peer() -> TorchInt8:
    return TorchInt8()
