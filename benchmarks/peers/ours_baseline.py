"""fused_rnn of another checkout, to compare a change with: BENCHMARKS_BASELINE names its folder."""

from __future__ import annotations

import os
import sys

from .ours import Ours

VARIABLE = "BENCHMARKS_BASELINE"


class OursBaseline(Ours):
    name, title = "ours_baseline", "baseline"

    def absent(self) -> str | None:
        folder = os.environ.get(VARIABLE)
        if not folder:
            return f"{VARIABLE} names no checkout"
        # A contender has its process for itself.
        sys.path.insert(0, os.path.abspath(folder))
        import fused_rnn

        if not os.path.samefile(os.path.dirname(os.path.dirname(fused_rnn.__file__)), folder):
            return f"{VARIABLE}={folder} holds no fused_rnn, or another was imported first"
        return super().absent()


def peer() -> OursBaseline:
    return OursBaseline()
