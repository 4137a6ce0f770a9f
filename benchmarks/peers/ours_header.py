"""A cell of fused_rnn.zoo that is built in too: the same layer with the header written by hand."""

from __future__ import annotations

from typing import Any

from ..cases import Case
from ..problem import Problem, module_arguments
from .modules import copy_weights
from .ours import Ours

_BUILT_IN = ("PeepholeLSTM",)


class OursHeader(Ours):
    name, title = "ours_header", "ours, built in"
    has_cells = False

    def refuses(self, case: Case) -> str | None:
        return None if case.zoo in _BUILT_IN else "is for cells of the zoo that are built in"

    def module(self, problem: Problem) -> Any:
        import fused_rnn

        layer = getattr(fused_rnn, problem.case.zoo)
        return copy_weights(layer(**module_arguments(problem.case)), problem)


def peer() -> OursHeader:
    return OursHeader()
