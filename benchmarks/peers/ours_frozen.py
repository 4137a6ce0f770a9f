"""fused_rnn's layers after ``fused_rnn.freeze``: weights packed once, for inference."""

from __future__ import annotations

from typing import Any, ClassVar

import torch

from ..cases import Case
from ..problem import Problem
from .ours import Ours


class OursFrozen(Ours):
    name, title = "ours_frozen", "ours, frozen"
    packs: ClassVar[torch.dtype | None] = None  # what freeze() packs

    def refuses(self, case: Case) -> str | None:
        return "frozen layers do not train" if case.keeps else None

    def module(self, problem: Problem) -> Any:
        import fused_rnn

        return fused_rnn.freeze(super().module(problem), dtype=self.packs)


def peer() -> OursFrozen:
    return OursFrozen()
