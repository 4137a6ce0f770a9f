"""torch.nn on CUDA, replayed from a CUDA graph: cuDNN's kernels without the host that starts them.

This is what a user gets from ``torch.cuda.CUDAGraph`` around a layer whose sizes and memory stay
the same. The gradients of training are part of the graph.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..cases import Case
from ..problem import Problem
from . import Prepared
from .torch_nn import TorchNN

Made = TypeVar("Made")
WARM_CALLS = 3  # handles, workspaces and what libraries find out at first


def captured(work: Callable[[], Made]) -> tuple[Callable[[], Any], Made]:
    """A replay of ``work`` on the card, and what it made: tensors that every replay fills anew."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(WARM_CALLS):
            work()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        made = work()
    return graph.replay, made


class TorchNNGraph(TorchNN):
    name, title = "torch_nn_graph", "torch.nn in a graph"
    devices = ("cuda",)
    has_cells = False

    def refuses(self, case: Case) -> str | None:
        return "one step carries its state to the next call" if case.carries else None

    def prepare(self, problem: Problem) -> Prepared:
        replay, made = captured(super().prepare(problem).results)

        def results() -> dict[str, Tensor]:
            replay()
            return made

        return Prepared(replay, results)


def peer() -> TorchNNGraph:
    return TorchNNGraph()
