"""torch.nn: oneDNN's fused LSTM and torch's own loops on a CPU, cuDNN on CUDA."""

from __future__ import annotations

from typing import Any

import torch

from ..cases import Case
from ..problem import Problem
from .modules import ModulePeer


class TorchNN(ModulePeer):
    name, title = "torch_nn", "torch.nn"
    devices = ("cpu", "cuda")
    has_cells = True

    def versions(self) -> dict[str, str]:
        cudnn = torch.backends.cudnn.version()
        return {"torch": torch.__version__} | ({"cudnn": str(cudnn)} if cudnn else {})

    def regime(self, case: Case) -> str | None:
        if case.loops:
            return "cells"
        return cudnn_regime(case) if case.device == "cuda" else cpu_regime(case)

    def module(self, problem: Problem) -> Any:
        return problem.module


def cpu_regime(case: Case) -> str:
    """ATen gives oneDNN a padded LSTM without projection, and loops over all else itself."""
    fused = case.cell == "lstm" and not case.ragged and not case.proj
    return "oneDNN" if fused and case.dtype in ("float32", "bfloat16") else "native loop"


def cudnn_regime(case: Case) -> str:
    """The algorithm ATen asks cuDNN for, by its get_algo's rules (torch 2.13, sm_80 and up)."""
    tf32 = ", tf32" if case.dtype == "float32" and torch.backends.cudnn.allow_tf32 else ""
    if case.proj or case.ragged or case.dtype == "float64":
        return "cuDNN standard" + tf32
    small = 192 if case.carries or case.phase == "inference" else 128
    if case.cell.startswith("rnn"):
        small *= 2
    if case.H <= small:
        return "cuDNN persistent, small H" + tf32
    persistent = (
        case.dtype == "float16"
        and case.layers == case.directions == 1
        and case.H <= 1024
        and case.H % 128 == case.I % 128 == 0
        and case.B % 8 == 0
        and case.B <= 128
        and (case.cell == "lstm" or (case.cell != "gru" and (case.B < 96 or case.H < 896)))
    )
    return ("cuDNN persistent" if persistent else "cuDNN standard") + tf32


def peer() -> TorchNN:
    return TorchNN()
