"""C++ that tests call: compiled once for as long as its sources stay as they are, and bound with
pybind11 where Python calls it (tests/cpp/bind_*.cpp)."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import sysconfig
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch.utils.cpp_extension import include_paths

from fused_rnn import build
from fused_rnn.build import Unit

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "build"  # of all that is compiled for tests
needs_compiler = pytest.mark.skipif(not shutil.which("c++"), reason="there is no compiler")


def digest_of(sources: Sequence[Path], facts: str = "") -> str:
    digest = hashlib.sha256(facts.encode())
    for path in sources:
        digest.update(path.read_bytes())
    return f"-{digest.hexdigest()[:12]}"


def compiled(
    name: str,
    sources: Sequence[Path],
    units: Callable[[Path], list[Unit]],
    link_flags: Sequence[str],
) -> Path:
    """``name`` in a folder of ``build/``, from there if it was made of the same before.

    ``sources`` are all files that are read, ``units`` those to compile, in a folder of their own.
    """
    tools = build.CPU.find_tools()
    with tempfile.TemporaryDirectory() as folder:
        flags = [unit.flags for unit in units(Path(folder))]
    digest = digest_of(sources, repr([flags, link_flags, torch.__version__, tools.found]))
    made = FOLDER / f"{Path(name).stem}{digest}" / name
    if not made.is_file():
        made.parent.mkdir(parents=True, exist_ok=True)
        build.ninja.write(made.parent, tools.commands, units(made.parent), link_flags, "made")
        build.ninja.run(build.find_ninja(), made.parent, made.parent / "log")
        os.replace(made.parent / "made", made)
    return made


def library(
    *sources: str | tuple[str, ...], flags: Sequence[str] = (), link_flags: Sequence[str] = ()
) -> Path:
    """A library, named like its first source, of files of the repository; some with flags."""
    flags = ["-std=c++17", "-O0", "-fPIC", "-Wno-psabi", "-Wno-unknown-pragmas", *flags]
    flags += [f"-I{build.CSRC}", f"-I{ROOT / 'tests/cpp'}"]
    for folder in (*include_paths(), sysconfig.get_path("include")):  # torch brings pybind11
        flags += ["-isystem", folder]
    split = [(source,) if isinstance(source, str) else source for source in sources]
    units = [Unit(ROOT / path, [*flags, *own]) for path, *own in split]
    headers = [p for f in (build.CSRC, ROOT / "tests/cpp") for p in sorted(f.rglob("*.*h"))]
    name = f"{units[0].source.stem}.so"
    read = [*(unit.source for unit in units), *headers]
    return compiled(name, read, lambda _: units, ["-shared", *link_flags])


def bound(*sources: str | tuple[str, ...], flags: Sequence[str] = ()) -> ModuleType:
    """``library``, a pybind11 module."""
    made = library(*sources, flags=("-fvisibility=hidden", *flags))
    spec = importlib.util.spec_from_file_location(made.stem, made)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
