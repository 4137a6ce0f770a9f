"""torchrl's modules, with its associative ``scan`` over the steps in place of splitting."""

from __future__ import annotations

from .torchrl import TorchRL


class TorchRLScan(TorchRL):
    name, title = "torchrl_scan", "torchrl, scan"
    backend = "scan"
    needs = ("torchrl", "tensordict", "hoptorch")


def peer() -> TorchRLScan:
    return TorchRLScan()
