"""The fixtures of tests of the programs in examples/."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from programs import Run, results


@pytest.fixture
def one_thread() -> Iterator[None]:
    """For work so small that a second thread costs more than it does. Programs set the number of
    the process; the next test has its own again."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs a program as from a shell; returns its figures."""

    def run(program: ModuleType, *arguments: Any) -> dict[str, Any]:
        out = tmp_path / "deeper" / program.__name__  # a folder that is not there yet
        command = [program.__name__, "--out", out, "--threads", 1, *arguments]
        monkeypatch.setattr(sys, "argv", list(map(str, command)))
        program.main()
        return results(out, program.__name__)

    return run
