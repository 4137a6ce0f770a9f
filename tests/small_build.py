"""A tree of sources that compiles at once, for tests of building, caching and loading; libraries of
it: the CPU's own, and that of a cell from Python."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fused_rnn import build

ROOT = Path(__file__).resolve().parents[1]

SOURCES = {
    "cells/registry.def": "// CELL(not, a, cell)\nCELL(one, One, one.h)\nCELL(two, Two, one.h)\n",
    "cells/one.h": "struct One { enum { kValue = 1 }; };\nusing Two = One;\n",
    "cpu/instance.cpp.in": (
        '#include "cells/@HEADER@"\n'
        '#include "core/enter.h"\n'
        "namespace frnn { int k_@TIER@_@NAME@_@SCALAR@; }\n"
        "@SCALAR@ probe_@NAME@_@TIER@_@SCALAR@() { return @TYPE@::kValue; }\n"
    ),
    "cpu/gemm.cpp.in": "@SCALAR@ gemm_@TIER@_@SCALAR@() { return 3; }\n",
    "cpu/table.cpp": (
        "double probe_one_generic_double();\ndouble table() { return 2; }\n"
        'extern "C" __attribute__((visibility("default"))) const char* frnn_cpu_capability() {\n'
        '  return "generic";\n}\n'
    ),
    # What the library of a cell from Python asks for.
    "core/enter.h": (
        "namespace frnn {\nenum class Storage { kFloat, kDouble };\n"
        "inline void AddCpuKernels(const char*, Storage, int) {}\n}\n"
    ),
    "ops/cpu.cpp": "#include <torch/headeronly/version.h>\nint bound = TORCH_VERSION_MAJOR;\n",
    "ops/glibc.cpp": "int glibc;\n",
    "ops/direct.cpp": "#if __has_include(<Python.h>)\n#include <Python.h>\n#endif\nint direct;\n",
}


def load(folder: Path, **changes: Any) -> build.Libraries:
    """Libraries that have not been used yet, as a new process would have them."""
    return build.Libraries(
        replace(target, csrc=folder / "csrc", package=folder, **changes)
        for target in build.TARGETS.values()
    )


class OfCell:
    """The library of a cell in the place of the CPU's, which is in the folder ``main``."""

    header = "namespace custom { struct Probe { enum { kValue = 3 }; }; }"
    name = "cpu probe float"

    def __init__(self, folder: Path, **changes: Any) -> None:
        self.libraries = load(folder, **changes)
        (main,) = (folder / "main").glob("*/fused_rnn_native.so")
        self.libraries.use("cpu", main, self.libraries.targets["cpu"])

    def backend(self) -> str:
        has = self.libraries.has_cell("cpu", "probe", "Probe", "float", lambda: self.header)
        return "native" if has else "reference"

    def find(self) -> Any:
        return self.libraries.find(self.name)

    def state(self) -> Any:
        return self.libraries.state(self.name)

    def failure(self) -> build.BuildError | None:
        return self.libraries.failure(self.name)


KINDS = {"main": load, "cell": OfCell}

# ``libraries`` of a process, on the sources in the folder given.
LOADER = """
import sys
from pathlib import Path
from small_build import KINDS
folder = Path(sys.argv[1])
libraries = KINDS[sys.argv[2]](folder)
"""


def with_tests() -> dict[str, str]:
    """An environment in which all can be imported that can be here."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}


def key_of(libraries: build.Libraries, target: str = "cpu") -> str:
    made = libraries.targets[target]
    return made.cache_key(made.find_tools())


def compile_into(libraries: build.Libraries, cache: Path, key: str = "key", name: str = "") -> Path:
    return build.compile_library(libraries.targets["cpu"], build.Place(cache, key), name)


def facts_of(libraries: build.Libraries) -> dict[str, Any]:
    return build.report.facts_of(libraries)


def no_compiler(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (home / "empty").mkdir()
    monkeypatch.setenv("PATH", str(home / "empty"))


def fallback_message(libraries: Any) -> str:
    """Use the backend twice, expect the reference and one warning; return its text."""
    with pytest.warns(RuntimeWarning) as caught:
        assert libraries.backend() == "reference"
        assert libraries.backend() == "reference"
    assert len(caught) == 1
    text = str(caught[0].message)
    assert "python -m fused_rnn doctor" in text and "remedy: " in text
    return text


def run_afresh(*arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    """In an interpreter that has imported nothing."""
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env={**os.environ, **env},
        capture_output=True,
        text=True,
        timeout=120,
    )
