"""Our layer as fused_rnn.export_cpp writes it, compiled with the flags of its CMakeLists.txt."""

from __future__ import annotations

import ctypes
import tempfile
from pathlib import Path
from typing import Any

from ..cases import Case
from ..problem import Problem
from . import Peer, Prepared, stream
from .ours import Ours

FLAGS = ("-O3", "-march=native", "-mtune=generic", "-fno-math-errno", "-fno-trapping-math")


class OursExported(Peer):
    name, title = "ours_exported", "exported"

    def refuses(self, case: Case) -> str | None:
        return stream.refuses(case)

    def prepare(self, problem: Problem) -> Prepared:
        import fused_rnn

        layer: Any = Ours().module(problem)
        with tempfile.TemporaryDirectory() as folder:
            written = fused_rnn.export_cpp(layer, Path(folder), name="net")
            source = (written / "net.cpp").read_text()
            # One text, which the library is known by.
            for included in ("net.h", "net_weights.inc"):
                text = (written / included).read_text()
                source = source.replace(f'#include "{included}"', text)
        library = stream.compiled(source, FLAGS)
        library.net_create.restype = ctypes.c_void_p
        library.net_reset.argtypes = [ctypes.c_void_p]
        state = library.net_create()
        return stream.prepared(
            problem, library.net_process, state, library.net_reset, problem.case.H
        )


def peer() -> OursExported:
    return OursExported()
