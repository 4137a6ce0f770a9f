"""Who judges results: what ``assert_no_worse`` lets pass, and what happens to the rest."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import TooFar, assert_no_worse

pytestmark = pytest.mark.unit


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_errors_that_pass_and_errors_that_do_not(dtype: torch.dtype) -> None:
    exact = {"y": torch.linspace(-1, 1, 101, dtype=torch.float64)}
    ulp = torch.finfo(dtype).eps
    theirs = {"y": (exact["y"] + 10 * ulp).to(dtype)}
    for error, expected in ((18, None), (40, TooFar), (200, AssertionError)):
        ours = {"y": (exact["y"] + error * ulp).to(dtype)}
        if expected is None:
            assert_no_worse(ours, theirs, exact, terms=1)
        else:
            with pytest.raises(expected) as raised:
                assert_no_worse(ours, theirs, exact, terms=1)
            assert type(raised.value) is expected, raised.value


def test_the_worst_of_several_counts() -> None:
    exact = {name: torch.zeros(20, dtype=torch.float64) for name in "abc"}
    theirs = {name: torch.full((20,), 1e-3) for name in "abc"}
    ours = {
        name: torch.full((20,), value) for name, value in zip("abc", (1e-3, 4e-3, 1.0), strict=True)
    }
    with pytest.raises(AssertionError, match="^c: off") as raised:
        assert_no_worse(ours, theirs, exact, terms=1)
    assert type(raised.value) is AssertionError


CALLS = """
import collections, pytest, torch
from helpers import TooFar

seen = collections.defaultdict(list)

@pytest.mark.parametrize("off", ["1", "13", "134", "12345", "1!"])
def test_call(off, seed):
    numbers, number = seen[off], torch.rand(()).item()
    assert number not in numbers
    numbers.append(number)
    if str(len(numbers)) in off:
        raise TooFar("y")
    assert "!" not in off
"""


def test_little_has_to_be_so_again(tmp_path: Path) -> None:
    """In two of four more calls with other numbers; a failure of another kind is one at once."""
    file = tmp_path / "test_calls.py"
    file.write_text(CALLS)
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-m", "pytest", "-rA", "-p", "conftest", "-p", "no:cacheprovider"]
    command += [str(file)]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    passed = re.findall(r"^PASSED .*\[(.*)\]", done.stdout, re.M)
    failed = re.findall(r"^FAILED .*\[(.*)\]", done.stdout, re.M)
    assert (passed, failed) == (["1", "13"], ["134", "12345", "1!"]), done.stdout + done.stderr
    assert "by luck: y" in done.stdout and "2 warnings" in done.stdout
