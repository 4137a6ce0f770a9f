"""What peers share that are compiled for one case, and called through C for a block of frames."""

from __future__ import annotations

import ctypes
import hashlib
import platform
import shutil
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..cases import Case
from ..problem import Problem
from . import Prepared

MADE = Path("out/benchmarks/compiled")  # libraries, by what they were made of
# The instruction set of this machine, and its widest vectors.
X86 = platform.machine().lower() in ("x86_64", "amd64")
NATIVE = ("-march=native", *["-mprefer-vector-width=512"] * X86)


def refuses(case: Case) -> str | None:
    if not case.carries or case.B > 1:
        return "blocks of one stream only"
    if case.phase == "decode":
        return "its streams begin with zeros"
    if case.bidirectional or case.proj or case.ragged:
        return "one direction without projection"
    return None if case.dtype == "float32" else f"has no {case.dtype}"


def compiled(source: str, flags: Sequence[str], facts: str = "") -> ctypes.CDLL:
    """A library of one file of C++, from where it was made before if it was."""
    compiler = shutil.which("g++") or "c++"
    command = [compiler, "-std=c++17", *flags, "-fPIC", "-shared", "-x", "c++", "-"]
    made = hashlib.sha256("\n".join([source, facts, *command]).encode()).hexdigest()[:16]
    library = MADE / f"{made}.so"
    if not library.is_file():
        MADE.mkdir(parents=True, exist_ok=True)
        new = library.with_suffix(".new")
        subprocess.run([*command, "-o", str(new)], input=source, text=True, check=True)
        new.replace(library)
    return ctypes.CDLL(str(library.resolve()))


def prepared(
    problem: Problem, process: Any, state: int, reset: Callable[[int], Any], outputs: int
) -> Prepared:
    """Of a function ``process(state, x, y, frames)``, called as Python calls C."""
    case = problem.case
    x = problem.padded.contiguous()
    y = torch.empty(case.T, 1, outputs)
    arguments = (
        ctypes.c_void_p(state),
        ctypes.c_void_p(x.data_ptr()),
        ctypes.c_void_p(y.data_ptr()),
        ctypes.c_size_t(case.T),
    )

    def call(x: Tensor = x) -> Tensor:  # which lives as long as the call
        process(*arguments)
        return y

    def results() -> dict[str, Tensor]:
        reset(state)
        call()
        return {"y": call().clone()}  # of the second block: the state was carried

    return Prepared(call, results)
