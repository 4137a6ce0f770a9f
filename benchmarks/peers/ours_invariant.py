"""fused_rnn's layers while the bits of a sequence are to be the same in any batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ..problem import Problem
from . import Prepared
from .ours import Ours


class OursInvariant(Ours):
    name, title = "ours_invariant", "ours, batch invariant"
    devices = ("cpu",)
    has_cells = False

    def prepare(self, problem: Problem) -> Prepared:
        prepared = super().prepare(problem)
        return Prepared(_invariant(prepared.call), _invariant(prepared.results))


def _invariant(run: Callable[[], Any]) -> Callable[[], Any]:
    def call() -> Any:
        # Nor does torch fill what is not initialised, which takes time and is no part of this.
        fills = torch.utils.deterministic.fill_uninitialized_memory
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False
        try:
            return run()
        finally:
            torch.use_deterministic_algorithms(False)
            torch.utils.deterministic.fill_uninitialized_memory = fills

    return call


def peer() -> OursInvariant:
    return OursInvariant()
