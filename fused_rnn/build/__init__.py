"""Builds and loads the native libraries: one for the CPU, and one for CUDA devices.

A library is looked for in this order, at its first use and never at import:

1. beside the package, compiled ahead of time by setup.py from the very sources that are here now;
2. in the cache folder, compiled by an earlier process;
3. compiled now, into the cache folder, once for all processes that wait for it;
4. nowhere: one warning says why and what to do, and the reference path does the work.

    version, messages     which fused_rnn and torch; errors with a remedy
    settings              the environment variables, all optional
    sources               csrc: its files, its lists of cells and of instruction sets
    tools                 compilers, nvcc, ninja
    target                the libraries, as data
    custom                those of single cells
    ninja, compiling      from sources to a library
    record, cache         what was compiled, where it is kept, who may build
    loading               find, build, load; what the first use came to
    report, trial         what is known about it all, and whether it works

setup.py loads this package by its path, without fused_rnn around it, and tests may do so where
there is no torch: nothing but the standard library is imported until a function needs more.
"""

from __future__ import annotations

from typing import Any

from . import ninja, record, report, settings
from .cache import Place, cache_dir, clean, locked
from .compiling import compile_library
from .loading import Libraries, State
from .messages import BuildError
from .ninja import Unit
from .settings import requested_backend
from .sources import CSRC, cells, levels, machine, source_files
from .target import AVX2, CPU, CUDA, TARGETS, TIERS, Target, cpu_variants
from .tools import Compiler, Tools, find_compiler, find_ninja, find_toolkit, max_jobs
from .version import TORCH_MIN, VERSION, check_torch_version

__all__ = [
    "AVX2",
    "CPU",
    "CSRC",
    "CUDA",
    "TARGETS",
    "TIERS",
    "TORCH_MIN",
    "VERSION",
    "BuildError",
    "Compiler",
    "Libraries",
    "Place",
    "State",
    "Target",
    "Tools",
    "Unit",
    "backend",
    "cache_dir",
    "cells",
    "check_torch_version",
    "clean",
    "compile_library",
    "cpu_variants",
    "direct_calls",
    "find_compiler",
    "find_ninja",
    "find_toolkit",
    "has_cell",
    "info",
    "levels",
    "libraries",
    "library",
    "locked",
    "machine",
    "max_jobs",
    "ninja",
    "record",
    "report",
    "requested_backend",
    "settings",
    "source_files",
    "state",
    "use",
]

libraries = Libraries()  # those of this process

backend = libraries.backend
library = libraries.library
state = libraries.state
use = libraries.use
direct_calls = libraries.direct_calls
has_cell = libraries.has_cell


def info() -> dict[str, Any]:
    """Facts about the libraries of this process, see ``report.facts_of``."""
    return report.facts_of(libraries)
