"""Part tests: every test of the CUDA engine is a row.

One process runs them while it can. A test that hangs or brings the process down is written down as
such, and another process goes on behind it; so it does after an error that spoils a CUDA context.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from .rows import ROOT, Clock, Rows, Settings, kill, last_lines, say

BUILD_S = 300  # until the first test of all is over: the library may have to be built
START_S = 60  # until a later process is at its first test: imports, on a machine that is busy


def measure(settings: Settings, rows: Rows, clock: Clock) -> None:
    for key in [key for key in rows.rows if "::" not in key]:
        del rows.rows[key]  # no test, but why there were none
    tried: set[str] = set()  # in this run; what fails is for the next one
    while not clock.over:
        finished, now = _session(settings, rows, clock, tried)
        if finished or not now:
            return
        tried |= now


def _session(
    settings: Settings, rows: Rows, clock: Clock, tried: set[str]
) -> tuple[bool, set[str]]:
    """Run what is left in one process: whether it came to its end, and what it tried."""
    with tempfile.TemporaryDirectory(prefix="gpu_check-") as name:
        folder = Path(name)
        record, skip, log = (folder / part for part in ("record", "skip", "log"))
        record.touch()
        skip.write_text(json.dumps([*rows.good(), *tried]))
        command = [sys.executable, "-m", "pytest", *settings.tests, "-q", "--tb=short"]
        command += ["-p", "benchmarks.gpu.recorder", "-p", "no:cacheprovider"]
        if find_spec("hypothesis") is None:
            command.append("--noconftest")  # tests/conftest.py imports it
        variables = {"GPU_CHECK_RECORD": str(record), "GPU_CHECK_SKIP": str(skip)}
        with log.open("w") as sink, record.open() as events:
            process = subprocess.Popen(
                command,
                cwd=ROOT,
                env={**os.environ, **variables},
                stdout=sink,
                stderr=sink,
                text=True,
                start_new_session=True,
            )
            try:
                session = _Session(rows, not tried and not settings.built, settings.stall_s)
                while process.poll() is None and not session.hangs and not clock.over:
                    session.read(events.read())
                    time.sleep(0.05)
            finally:
                kill(process)
            session.read(events.read())
        if not clock.over and not session.finished:
            session.blame(
                f"no sign of life for {session.limit_s:.0f} s"
                if session.hangs
                else f"{last_lines(log.read_text(errors='replace'))}\n"
                f"the process died, exit code {process.returncode}"
            )
        return session.finished, session.tried


class _Session:
    """What the recorder in a process of pytest has told so far."""

    def __init__(self, rows: Rows, builds: bool, stall_s: float) -> None:
        """Whether its first test may have to build, and the seconds that any other may take."""
        self.rows, self.builds, self.stall_s = rows, builds, stall_s
        self.limit_s: float = BUILD_S if builds else START_S  # between two signs of life
        self.tried: set[str] = set()
        self.running: str | None = None
        self.finished = False
        self._begun = ""  # a line whose end is not written yet
        self._heard = time.monotonic()

    @property
    def hangs(self) -> bool:
        return time.monotonic() - self._heard > self.limit_s

    def read(self, text: str) -> None:
        *lines, self._begun = (self._begun + text).split("\n")
        for line in lines:
            self._heard = time.monotonic()
            event: dict[str, Any] = json.loads(line)
            kind = event["event"]
            if kind == "finish":
                self.finished = True
            elif kind == "start":
                self.running = event["id"]
                self.tried.add(self.running)
                if not self.builds:
                    self.limit_s = self.stall_s
            else:
                self._put(event)

    def _put(self, event: dict[str, Any]) -> None:
        self.running, self.limit_s, self.builds = None, self.stall_s, False
        key, message = event["id"], last_lines(event["message"])
        if event["event"] == "broken" or event["outcome"] == "failed":
            self.rows.put(key, {"error": message})
            say(f"{key}: {last_lines(message, 1)}")
        else:
            reason = {"reason": last_lines(message, 1)} if message else {}
            self.rows.put(key, {"outcome": event["outcome"], "took_s": event["s"]} | reason)

    def blame(self, why: str) -> None:
        """The test that ran at the end, if one did."""
        key = self.running or ("start of pytest" if not self.tried else None)
        if key:
            self.rows.put(key, {"error": why})
            say(f"{key}: {why}")


def table(rows: Rows) -> list[str]:
    outcomes = [row.get("outcome", "failed") for row in rows.current().values()]
    counts = {name: outcomes.count(name) for name in ("passed", "skipped", "failed")}
    return [", ".join(f"{number} {name}" for name, number in counts.items())]
