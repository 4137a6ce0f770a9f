"""examples/amplifier.py, in Python and in C++."""

from __future__ import annotations

import shutil

import pytest

for package in ("matplotlib", "tqdm", "numpy"):
    pytest.importorskip(package)

import amplifier  # noqa: E402
from programs import Run  # noqa: E402

pytestmark = [pytest.mark.examples, pytest.mark.usefixtures("one_thread")]
pytest_plugins = "program_fixtures"


def test_the_amplifier_is_learned_and_sounds_the_same_in_cpp(run: Run) -> None:
    sizes = ("--seconds", 8, "--batch", 8, "--steps", 150)
    figures = run(amplifier, *sizes)
    assert figures["error_held_out"] < figures["error_of_a_gain"] / 2
    if shutil.which("g++"):
        assert figures["apart_in_steps_of_16_bits"] <= 0.51  # half a step is rounding
        assert figures["microseconds_per_sample"] > 0
    again = run(amplifier, *sizes, "--resume")
    assert again["error_held_out"] == figures["error_held_out"]
