"""fused_rnn's own layers, as a user has them: the module, with autograd and dispatch."""

from __future__ import annotations

from typing import Any, ClassVar

from ..cases import BETWEEN, Case
from ..problem import Problem, module_arguments, module_class
from .modules import ModulePeer, copy_weights


class Ours(ModulePeer):
    name, title = "ours", "ours"
    devices = ("cpu", "cuda")
    has_cells = has_zoo = True
    has_between = frozenset(BETWEEN)
    options: ClassVar[dict[str, Any]] = {}  # of the constructor, beside those of torch.nn

    def absent(self) -> str | None:
        # Builds the library if need be: that is no part of anybody's first call.
        import fused_rnn

        info = fused_rnn.backend_info()
        return None if info["backend"] == "native" else f"native kernels off: {info['reason']}"

    def versions(self) -> dict[str, str]:
        import fused_rnn

        return {"fused_rnn": fused_rnn.__version__}

    def module(self, problem: Problem) -> Any:
        import fused_rnn

        if fused_rnn.build.backend(problem.case.device) != "native":
            raise RuntimeError(f"no native kernels on {problem.case.device}")
        kind = module_class(problem.case)
        layer: Any = kind if problem.case.zoo else getattr(fused_rnn, kind.__name__)
        arguments = module_arguments(problem.case) | between(problem.case) | self.options
        return copy_weights(layer(**arguments), problem)


def between(case: Case) -> dict[str, Any]:
    """The constructor's arguments for ``case.between``; resets are given to the call."""
    return ({"blocks": case.blocks} if case.blocks > 1 else {}) | (
        {"norm": case.norm} if case.norm else {}
    )


def peer() -> Ours:
    return Ours()
