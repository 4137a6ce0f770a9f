"""The library of one cell that is not in the registry, for one type.

It is compiled against the library of its device, which has all that the cells share: on the CPU for
a computing type and for the instructions of this machine alone, on CUDA for a type in memory, and
with the kernels that keep their weights only if asked for: they take minutes to compile. When it is
loaded it enters itself there (csrc/core/params.h), and so needs no more than to be loaded.
"""

from __future__ import annotations

import ctypes
import dataclasses
import functools
import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import record, settings, tools
from .ninja import Unit
from .target import TIERS, Target, Variant, cpu_variants, filled
from .tools import Tools
from .version import VERSION

STEM = "cell"  # of the libraries and their records

# How it enters itself, by the folder of its engine: a function and its kernels.
_ENTRY = {
    "cpu": ("AddCpuKernels", "k_{tier}_{name}_{scalar}"),
    "cuda": ("AddCudaKernels", "k_cuda_{name}_{storage}"),
}
_STORAGE = {"float": "kFloat", "double": "kDouble", "bfloat16": "kBFloat16", "half": "kHalf"}
_ENTERED = """
namespace {{
[[maybe_unused]] const bool entered =
    (frnn::{add}("{name}", frnn::Storage::{storage}, frnn::{kernels}), true);
}}
"""


@dataclass(frozen=True)
class CellTarget(Target):
    """``header`` is called for the text of the header, if it has to be compiled."""

    cell: str = ""
    type: str = ""  # in C++
    kind: str = "float"  # see kind_of
    engine: str = "cpu"  # the folder of csrc
    main: Path = Path()  # the library of the device
    header: Callable[[], str] = str

    def source_hash(self) -> str:
        """The cell's name stands for what it computes."""
        made = record.read(self.main).get("sha256")  # that of a test has its hash in its path
        facts = (self.cell, self.variants[0].name, str(self.main), made, *self.own_flags())
        return hashlib.sha256(repr(facts).encode()).hexdigest()[:12]

    def units(self, folder: Path) -> list[Unit]:
        (folder / "cells").mkdir(exist_ok=True)
        file = f"{self.cell}.h"
        (folder / "cells" / file).write_text(self.header(), encoding="utf-8")
        variant = self.variants[0]
        words = {"name": self.cell, "type": f"custom::{self.type}", "header": file}
        words |= variant.words
        (template,) = (self.csrc / self.engine).glob("instance.*.in")
        add, kernels = _ENTRY[self.engine]
        entered = _ENTERED.format(
            add=add,
            name=self.cell,
            storage=_STORAGE[self.kind],
            kernels=kernels.format(**words),
        )
        source = folder / f"{self.cell}{Path(template.stem).suffix}"
        source.write_text(filled(template, words) + entered, encoding="utf-8")
        own = (*variant.flags, *self.own_flags())
        flags = (*self.kernel_flags, "-I.", f"-I{self.csrc}", *own)
        return [Unit(source, flags, self.rule)]

    def own_flags(self) -> tuple[str, ...]:
        steps_only = self.engine == "cuda" and not settings.flag("FUSED_RNN_RESIDENT_CELLS")
        return ("-DFRNN_STEPS_ONLY",) if steps_only else ()

    def link(self) -> list[str]:
        return [str(self.main), *self.link_flags]

    def facts(self) -> dict[str, Any]:
        return {"cells": [self.cell], "type": self.type, "scalar": self.kind}

    def label(self, kinds: list[str]) -> str:
        return f"cell {self.type} ({self.kind}, {', '.join(kinds)})"


@functools.lru_cache
def _tools(find: Callable[[], Tools], *environment: str | None) -> Tools:
    """Asked once: it runs the compilers."""
    return find()


def _find_tools(find: Callable[[], Tools]) -> Tools:
    return _tools(find, *map(os.environ.get, tools.ASKED))


def kind_of(device: Target, storage: str) -> str:
    """Which type a library of a cell is for that takes tensors of ``storage``.

    The CPU computes 16-bit types in float.
    """
    if device.name == "cpu" and storage != "double":
        return "float"
    return storage


def _variant(device: Target, library: ctypes.CDLL, kind: str) -> Variant:
    if device.name != "cpu":
        return next(variant for variant in device.variants if variant.name == kind)
    find = library.frnn_cpu_capability  # what it uses of this machine
    find.restype = ctypes.c_char_p
    capability: str = find().decode()
    tier = capability if capability in TIERS else list(TIERS)[-1]
    variants = cpu_variants({tier: TIERS[tier]})
    return next(variant for variant in variants if variant.words["scalar"] == kind)


def target_of(
    device: Target,
    library: ctypes.CDLL,
    main: Path,
    name: str,
    cell: str,
    type: str,
    kind: str,
    header: Callable[[], str],
) -> CellTarget:
    """``library``, at ``main``, is that of the device, and loaded."""
    variant = _variant(device, library, kind)
    inherited = {f.name: getattr(device, f.name) for f in dataclasses.fields(Target)}
    changed = {
        "name": name,
        "title": f"{type} ({kind})" if device.name == "cpu" else f"{type} ({kind}, {device.title})",
        "stem": STEM,
        "ahead_of_time": "",
        "bindings": (),
        "variants": (variant,),
        "kinds": tuple(variant.words[word] for word in ("tier",) if word in variant.words),
        "find_tools": functools.partial(_find_tools, device.find_tools),
    }
    return CellTarget(
        **{**inherited, **changed},
        cell=cell,
        type=type,
        kind=kind,
        engine=device.name,
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
