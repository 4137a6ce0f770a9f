"""The library of one cell that is not in the registry, for one computing type.

It is compiled against the CPU's library, which has all that the cells share, for the instructions
of this machine alone. When it is loaded it enters itself there (csrc/core/params.h), and so needs
no more than to be loaded.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import record, tools
from .ninja import Unit
from .target import CPU, STRICT, TIERS, Target, cpu_variants
from .tools import Tools
from .version import VERSION

STEM = "cell"  # of the libraries and their records

_ENTERED = """
namespace {{
[[maybe_unused]] const bool entered =
    (frnn::AddCpuKernels("{name}", frnn::Storage::{storage}, frnn::k_{tier}_{name}_{scalar}), true);
}}
"""


@dataclass(frozen=True)
class CellTarget(Target):
    """``header`` is called for the text of the header, if it has to be compiled."""

    cell: str = ""
    type: str = ""  # in C++
    scalar: str = "float"
    tier: str = "generic"
    main: Path = Path()  # the CPU's library
    header: Callable[[], str] = str

    def source_hash(self) -> str:
        """The cell's name stands for what it computes."""
        facts = (
            self.cell,
            self.scalar,
            self.tier,
            str(self.main),
            record.read(self.main)["sha256"],
        )
        return hashlib.sha256(repr(facts).encode()).hexdigest()[:12]

    def units(self, folder: Path) -> list[Unit]:
        (folder / "cells").mkdir(exist_ok=True)
        file = f"{self.cell}.h"
        (folder / "cells" / file).write_text(self.header(), encoding="utf-8")
        words = {"name": self.cell, "type": f"custom::{self.type}", "header": file}
        words |= {"tier": self.tier, "scalar": self.scalar}
        text = (self.csrc / "cpu" / "instance.cpp.in").read_text(encoding="utf-8")
        for word, value in words.items():
            text = text.replace(f"@{word.upper()}@", value)
        storage = "kDouble" if self.scalar == "double" else "kFloat"
        source = folder / f"{self.cell}.cpp"
        source.write_text(text + _ENTERED.format(storage=storage, **words), encoding="utf-8")
        includes = ["-I.", f"-I{self.csrc}"]
        return [Unit(source, [*self.kernel_flags, *includes, *self.variants[0].flags])]

    def link(self) -> list[str]:
        return [str(self.main), "-shared", "-fopenmp", *STRICT]

    def facts(self) -> dict[str, Any]:
        return {"cells": [self.cell], "type": self.type, "scalar": self.scalar}

    def label(self, kinds: list[str]) -> str:
        return f"cell {self.type} ({self.scalar}, {', '.join(kinds)})"


@functools.lru_cache
def _tools(compiler: str | None, path: str | None) -> Tools:
    """Asked once: it runs the compiler."""
    return tools.for_cpu()


def _find_tools() -> Tools:
    return _tools(os.environ.get("CXX"), os.environ.get("PATH"))


def target_of(
    cell: str, type: str, scalar: str, header: Callable[[], str], main: Path, capability: str
) -> CellTarget:
    """``capability`` is what the CPU's library says that it uses of this machine."""
    tier = capability if capability in TIERS else list(TIERS)[-1]
    variants = [v for v in cpu_variants({tier: TIERS[tier]}) if v.words["scalar"] == scalar]
    inherited = {f.name: getattr(CPU, f.name) for f in dataclasses.fields(Target)}
    changed = {
        "name": f"{cell} {scalar}",
        "title": f"{type} ({scalar})",
        "stem": STEM,
        "ahead_of_time": "",
        "bindings": (),
        "variants": tuple(variants),
        "kinds": (tier,),
        "find_tools": _find_tools,
    }
    return CellTarget(
        **{**inherited, **changed},
        cell=cell,
        type=type,
        scalar=scalar,
        tier=tier,
        main=main,
        header=header,
    )


def found(caches: list[Path]) -> list[dict[str, Any]]:
    """The records of the libraries of cells in these folders, each with its ``library``."""
    return [
        {**facts, "library": path.with_suffix(".so")}
        for cache in caches
        for path in sorted(cache.glob(f"{VERSION}-*/{STEM}.json"))
        if (facts := record.read(path))
    ]
