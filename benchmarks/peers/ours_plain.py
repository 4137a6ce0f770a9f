"""fused_rnn's layer as torch.nn has it, beside a case with resets, blocks or norm: what these cost,
or gain. It has other results, which are compared with those of torch.nn."""

from __future__ import annotations

from ..cases import Case
from .ours import Ours


class OursPlain(Ours):
    name, title = "ours_plain", "ours, plain"
    has_cells = False

    def refuses(self, case: Case) -> str | None:
        return None if case.between else "is plain anyway"

    def case(self, case: Case) -> Case:
        return case.plain


def peer() -> OursPlain:
    return OursPlain()
