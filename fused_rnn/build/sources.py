"""The C++ and CUDA sources: where they lie, and what their lists say of this machine."""

from __future__ import annotations

import platform
import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from .messages import BuildError

PACKAGE = Path(__file__).resolve().parents[1]
# In an installed wheel the sources lie inside the package, in a checkout beside it.
CSRC = PACKAGE / "csrc" if (PACKAGE / "csrc").is_dir() else PACKAGE.parent / "csrc"

SUFFIXES = {".h", ".cuh", ".cpp", ".def", ".in"}


def machine() -> str:
    """The kind of processor that this process runs on, by the name that compilers have for it.

    Systems have others: arm64 on macOS, AMD64 on Windows and BSD.
    """
    name = platform.machine().lower()
    return {"amd64": "x86_64", "arm64": "aarch64"}.get(name, name)


class Cell(NamedTuple):
    """One line of csrc/cells/registry.def."""

    name: str
    type: str
    header: str


def cells(csrc: Path = CSRC) -> list[Cell]:
    """The cells of the registry. Raises BuildError if there are none."""
    registry = csrc / "cells" / "registry.def"
    text = registry.read_text(encoding="utf-8") if registry.is_file() else ""
    line = r"^\s*CELL\(\s*(\w+)\s*,\s*([\w:]+)\s*,\s*([\w./]+)\s*\)"
    if found := re.findall(line, text, re.MULTILINE):
        return [Cell(*entry) for entry in found]
    raise BuildError(f"no cells were found in {registry}", "install fused_rnn anew")


def levels(csrc: Path = CSRC) -> list[str]:
    """What FUSED_RNN_CPU_CAPABILITY may name on this machine, from the least to the most."""
    found, here = [], True
    for line in (csrc / "cpu" / "levels.def").read_text(encoding="utf-8").splitlines():
        if other := re.match(r"#(?:el)?if defined\(__(\w+)__\)", line):
            here = other[1] == machine()
        elif line == "#endif":
            here = True
        elif here and (level := re.match(r"LEVEL\((\w+)\)", line)):
            found.append(level[1])
    return found


def source_files(csrc: Path = CSRC, wanted: Callable[[Path], bool] = bool) -> list[Path]:
    """Everything under csrc that a build may read, in a fixed order."""
    return sorted(
        path
        for path in csrc.rglob("*")
        if path.suffix in SUFFIXES and path.is_file() and wanted(path)
    )
