"""haste (lmnt-com/haste), CUDA: LSTM and GRU in fp32 and fp64, the input projection included."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

from torch import Tensor

from ..cases import Case
from ..problem import Problem
from .modules import ModulePeer, no_ragged


class Haste(ModulePeer):
    name, title = "haste", "haste"
    devices = ("cuda",)

    def absent(self) -> str | None:
        return None if find_spec("haste_pytorch") else "not installed: haste_pytorch"

    def refuses(self, case: Case) -> str | None:
        if case.cell not in ("lstm", "gru"):
            return f"has no {case.cell} of torch.nn's form"
        if case.dtype not in ("float32", "float64"):
            return f"has no {case.dtype}"
        if case.layers > 1 or case.bidirectional or case.proj or not case.bias:
            return "one layer and direction, with bias and without projection"
        if case.carries:
            return "takes no initial state in all its versions"
        return no_ragged(case)

    def gradients(self, module: Any) -> dict[str, Tensor]:
        return {}  # its gates stand in another order; d x is compared

    def module(self, problem: Problem) -> Any:
        import haste_pytorch

        case = problem.case
        layer = haste_pytorch.LSTM if case.cell == "lstm" else haste_pytorch.GRU
        native: Any = problem.module
        own: Any = layer(case.I, case.H).to(problem.dtype)
        own.from_native_weights(
            native.weight_ih_l0, native.weight_hh_l0, native.bias_ih_l0, native.bias_hh_l0
        )
        return own.to(case.device, problem.dtype).train(native.training)


def peer() -> Haste:
    return Haste()
