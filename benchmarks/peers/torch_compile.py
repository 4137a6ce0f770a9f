"""``torch.compile`` of the loop over time written in plain torch: what one gets without kernels.

The loop is unrolled into one graph, so compiling takes seconds per ten steps.
"""

from __future__ import annotations

from typing import Any

from ..cases import Case
from ..problem import Problem
from .modules import no_ragged
from .reference import Reference
from .zoo_loop import ZooLoopPeer


class Compiled(Reference):
    name, title = "torch_compile", "compile"
    has_zoo = True

    def refuses(self, case: Case) -> str | None:
        return no_ragged(case)

    def gradients(self, module: Any) -> dict[str, Any]:
        return super().gradients(getattr(module, "layer", module))

    def module(self, problem: Problem) -> Any:
        loop = ZooLoopPeer().module(problem) if problem.case.zoo else super().module(problem)
        loop.compile(dynamic=False)
        return loop


def peer() -> Compiled:
    return Compiled()
