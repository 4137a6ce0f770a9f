"""A plugin of pytest that writes down each outcome at once, as one JSON line.

GPU_CHECK_RECORD names the file, GPU_CHECK_SKIP a file with node ids that need not run (JSON).
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest

# An error of the driver spoils the CUDA context: all later tests of the process would fail.
_FATAL = ("CUDA error", "CUDA driver error", "CUBLAS_STATUS", "illegal memory access")


class Recorder:
    def __init__(self, path: Path) -> None:
        self._file = path.open("a", buffering=1)
        self._session: pytest.Session | None = None

    def _write(self, event: str, **facts: Any) -> None:
        self._file.write(json.dumps({"event": event, **facts}) + "\n")

    def pytest_sessionstart(self, session: pytest.Session) -> None:
        self._session = session

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self._write("broken", id=report.nodeid or "collection", message=report.longreprtext)

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        known = set(json.loads(Path(os.environ["GPU_CHECK_SKIP"]).read_text()))
        items[:] = [item for item in items if item.nodeid not in known]

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self._write("start", id=nodeid)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        # A test is passed by its call, failed by any phase, skipped by its setup or call.
        if report.when == "call" or not report.passed:
            text = report.longreprtext
            self._write(
                "end", id=report.nodeid, outcome=report.outcome, s=report.duration, message=text
            )
            if report.failed and self._session and any(word in text for word in _FATAL):
                self._session.shouldstop = "the CUDA context is spoilt"

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if not session.shouldstop:
            self._write("finish")


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(Recorder(Path(os.environ["GPU_CHECK_RECORD"])))


@pytest.fixture(autouse=True)
def seed() -> int:
    """For runs without tests/conftest.py, whose fixture of this name goes first."""
    value = int(os.environ.get("FUSED_RNN_TEST_SEED") or 0)
    if torch := sys.modules.get("torch"):  # tests that do without it start seconds earlier
        torch.manual_seed(value)
    return value
