"""The environment variables of the package: which there are, and what they may be.

FUSED_RNN_BACKEND         auto (default), native (raise rather than fall back) or reference
FUSED_RNN_BATCH_INVARIANT 1: on the CPU the bits of a sequence are the same in any batch, as under
                          torch.use_deterministic_algorithms(True)
FUSED_RNN_CACHE_DIR       where libraries are kept; default $XDG_CACHE_HOME/fused_rnn or
                          ~/.cache/fused_rnn
FUSED_RNN_MAX_JOBS        compilers at once; default one per core, with 2 GB of memory each
FUSED_RNN_LOCK_TIMEOUT    seconds to wait for another process whose build does not get on;
                          default 600
FUSED_RNN_VERBOSE         1 shows the compiler's commands and output
FUSED_RNN_CPU_CAPABILITY  one of csrc/cpu/levels.def: use less than the processor has
FUSED_RNN_CUDA_ARCH       compute capabilities to compile for, such as "80 90a"; default those of
                          the devices here
FUSED_RNN_RESIDENT_CELLS  1: libraries of cells from Python have the CUDA kernels that keep their
                          weights, too, and take minutes to compile
FUSED_RNN_VARIANT         how a layer runs on CUDA, in place of the plan's choice (csrc/cuda/plan.h)
FUSED_RNN_SKIP_EXT        1: setup.py compiles nothing ahead of time
FUSED_RNN_REQUIRE_EXT     1: setup.py fails where it cannot compile ahead of time
CXX                       the compiler; default c++, g++ or clang++
CUDA_HOME                 the CUDA toolkit, whose nvcc is used; default that of the nvcc on PATH

FUSED_RNN_TEST_* and FUSED_RNN_EMULATE_* belong to the tests.
"""

from __future__ import annotations

import os
import re

from .messages import listed
from .sources import levels
from .version import VERSION

BACKENDS = ("auto", "native", "reference")
PREFIX, FOR_TESTS = "FUSED_RNN_", ("FUSED_RNN_TEST_", "FUSED_RNN_EMULATE_")


def _number(text: str) -> str:
    try:
        return "" if float(text) >= 0 else "a number that is not negative"
    except ValueError:
        return "a number"


def _choice(text: str, *choices: str) -> str:
    return "" if text in choices else listed(choices)


def _anything(text: str) -> str:
    return ""


def _architectures(text: str) -> str:
    fine = all(re.fullmatch(r"\d+[af]?", word) for word in text.split())
    return "" if fine else 'compute capabilities, such as "80 90a"'


# What may be said of a value: what to use instead, or nothing if it is fine.
RULES = {
    "FUSED_RNN_BACKEND": lambda text: _choice(text, *BACKENDS),
    "FUSED_RNN_BATCH_INVARIANT": lambda text: _choice(text, "0", "1"),
    "FUSED_RNN_CACHE_DIR": _anything,
    "FUSED_RNN_CPU_CAPABILITY": lambda text: _choice(text, *levels()),
    "FUSED_RNN_CUDA_ARCH": _architectures,
    "FUSED_RNN_LOCK_TIMEOUT": _number,
    "FUSED_RNN_MAX_JOBS": _number,
    "FUSED_RNN_REQUIRE_EXT": lambda text: _choice(text, "0", "1"),
    "FUSED_RNN_RESIDENT_CELLS": lambda text: _choice(text, "0", "1"),
    "FUSED_RNN_SKIP_EXT": lambda text: _choice(text, "0", "1"),
    "FUSED_RNN_VARIANT": _anything,  # csrc/cuda/plan.cpp refuses what it does not know
    "FUSED_RNN_VERBOSE": lambda text: _choice(text, "0", "1"),
}


def read(name: str) -> str:
    """The value of a variable, "" if it is not set. Raises ValueError that says what may be."""
    text = os.environ.get(name, "")
    if text and (instead := RULES[name](text)):
        raise ValueError(f"{name} is {text!r}: use {instead}")
    return text


def number(name: str, default: float) -> float:
    return float(read(name) or default)


def flag(name: str) -> bool:
    return read(name) == "1"


def requested_backend() -> str:
    """FUSED_RNN_BACKEND: auto, native or reference. Raises ValueError for anything else."""
    return read("FUSED_RNN_BACKEND") or "auto"


def given() -> dict[str, str]:
    """The variables of this package that are set."""
    return {name: value for name, value in os.environ.items() if name.startswith(PREFIX)}


def check() -> None:
    """Raise ValueError for a variable that does not exist or has a value that cannot be."""
    for name in given():
        if name in RULES:
            read(name)
        elif not name.startswith(FOR_TESTS):
            raise ValueError(
                f"{name} is no setting of fused_rnn {VERSION}; there are {', '.join(RULES)}"
            )
