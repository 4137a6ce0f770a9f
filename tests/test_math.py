"""Gate functions: largest error in ulp against long double, and the special values.

The sweep (tests/cpp/math_sweep.cpp) is compiled for every vector width there is.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from bound import bound, needs_compiler

from fused_rnn import build

pytestmark = [
    pytest.mark.compiling,
    needs_compiler,
]

# What csrc/core/math.h states.
BOUND = 3.0
EXACT = {"abs", "sign", "maximum", "minimum", "sqrt"}

TIERS = {
    "scalar": ([], set()),
    "generic": (["-DWIDTH=16"], set()),
    "avx2": (["-DWIDTH=32", "-mavx2", "-mfma"], {"avx2", "fma"}),
    "avx512": (
        ["-DWIDTH=64", "-mavx512f", "-mavx512dq", "-mavx512vl", "-mavx512bw", "-mfma"],
        {"avx512f", "avx512vl"},
    ),
}


def cpu_flags() -> set[str]:
    if build.machine() != "x86_64":  # under an emulator the file is about the machine that it is on
        return set()
    try:
        return set(Path("/proc/cpuinfo").read_text().split("flags", 1)[1].split("\n", 1)[0].split())
    except (OSError, IndexError):
        return set()


@pytest.fixture(scope="module")
def math() -> Any:
    """A function for each instruction set of this machine."""
    here = [tier for tier, (_, needed) in TIERS.items() if needed <= cpu_flags()]
    base = ["-O2", "-fno-math-errno", "-fno-trapping-math"]
    # Each in a namespace of its own, or the linker would take one function for all.
    sweeps = [
        ("tests/cpp/math_sweep.cpp", *base, *TIERS[tier][0], f"-DTIER={tier}", f"-Dfrnn={tier}_")
        for tier in here
    ]
    names = " ".join(f"TIER({tier})" for tier in here)
    return bound("tests/cpp/bind_math.cpp", *sweeps, flags=[f"-DTIERS={names}"])


@pytest.mark.drawn(2)
@pytest.mark.parametrize("tier", TIERS)
def test_gate_functions(tier: str, math: Any) -> None:
    if not hasattr(math, tier):
        pytest.skip(f"this machine has no {tier}")
    found = getattr(math, tier)()
    assert len(found) == (2 if tier == "scalar" else 4)
    for sweep in found:
        assert sweep.special, f"{sweep.type}: inf, NaN, zero or overflow wrong"
        assert len(sweep.errors) == 17
        for name, error in sweep.errors.items():
            most = 0.5 if name in EXACT else BOUND
            assert error <= most, f"{sweep.type} {name}: {error} ulp"
