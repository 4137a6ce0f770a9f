"""fused_rnn's layers with ``recompute=True``: less memory between forward and backward."""

from __future__ import annotations

from ..cases import Case
from .ours import Ours


class OursRecompute(Ours):
    name, title = "ours_recompute", "ours, recompute"
    options = {"recompute": True}
    has_cells = False

    def refuses(self, case: Case) -> str | None:
        return None if case.phase in ("forward", "training") else "nothing is kept anyway"


def peer() -> OursRecompute:
    return OursRecompute()
