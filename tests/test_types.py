"""Type checkers see what a call gives, and help() what a constructor takes."""

from __future__ import annotations

import importlib.util
import inspect
import os
import pydoc
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest

import fused_rnn

pytestmark = pytest.mark.compiling

CALLS = Path(__file__).with_name("typed_calls.py")
CHECKERS = {
    "mypy": ["--strict", "--follow-imports=silent", "--python-version=3.10"],
    "pyright": ["--pythonpath", sys.executable, "--pythonversion=3.10"],  # strict by the file
}


@pytest.mark.drawn(1)
@pytest.mark.parametrize("checker", CHECKERS)
def test_calls(checker: str) -> None:
    """Strictly: a mark on a line that cannot work, where it would be no error, is one."""
    if importlib.util.find_spec(checker) is None:
        pytest.skip(f"there is no {checker}")
    found = subprocess.run(
        [sys.executable, "-m", checker, *CHECKERS[checker], str(CALLS)],
        cwd=CALLS.parent,
        env=os.environ | {"PYTHONPATH": str(CALLS.parent.parent)},
        capture_output=True,
        text=True,
    )
    assert found.returncode == 0, found.stdout + found.stderr


@pytest.mark.parametrize("name", ["RNN", "LSTM", "GRU", "PeepholeLSTM", "BlockGRU"])
def test_help_shows_arguments(name: str) -> None:
    """Those between two steps by their names, and those of a call."""
    layer = getattr(fused_rnn, name)
    shown = pydoc.render_doc(layer, renderer=pydoc.plaintext)
    options = {f.name: f.default for f in fields(fused_rnn.BetweenSteps)}
    given = inspect.signature(layer).parameters
    assert {n: given[n].default for n in options} == options and "options" not in given
    assert f"blocks: 'int' = {options['blocks']}" in shown and "lengths: " in shown


def test_a_subclass_shows_its_own_arguments() -> None:
    class Mine(fused_rnn.LSTM):
        def __init__(self, size: int) -> None:
            super().__init__(size, size)

    assert list(inspect.signature(Mine).parameters) == ["size"]
