"""Part build: the library is built, and what was built, with what and for what is written down.

Libraries that a later part needs are built beside it, and beside the parts that follow: the CPU's,
and those of the checkout that BENCHMARKS_BASELINE names. Who needs one that is under way waits.
"""

from __future__ import annotations

import atexit
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..machine import run_facts
from . import baseline
from .rows import ROOT, Clock, Row, Rows, Settings, kill, last_lines, output

BUILD_S, FACTS_S = 300, 60
NATIVE = {"FUSED_RNN_BACKEND": "native"}


def measure(settings: Settings, rows: Rows, clock: Clock) -> None:
    if not clock.over:
        for folder, device in needed_later(settings):
            _begin(folder, device)

    def child(what: str, limit_s: float) -> Row:
        command = [sys.executable, "-m", "benchmarks.gpu.facts", what, settings.device]
        text = output(command, clock.limit(limit_s), env=NATIVE, errors=True)
        return json.loads(text.splitlines()[-1])

    rows.do("device", clock, lambda: child("device", FACTS_S))
    rows.do("tools", clock, lambda: _tools(clock))
    rows.rows.pop("library", None)  # it may have been built on another machine
    rows.do("library", clock, lambda: child("library", BUILD_S))


def needed_later(settings: Settings) -> Iterator[tuple[Path, str]]:
    """Checkouts, and the type of device that a library of theirs is for."""
    for folder in filter(None, (ROOT, baseline.checkout())):
        for device in dict.fromkeys((settings.device, "cpu")):
            if (folder, device) != (ROOT, settings.device):
                yield folder, device


def _begin(folder: Path, device: str) -> None:
    """Build a library in the background, on half of the processors and behind all else there."""
    jobs = os.environ.get("FUSED_RNN_MAX_JOBS") or str(max(1, (os.cpu_count() or 1) // 2))
    program = f"import os; os.nice(10); from fused_rnn import build; build.backend({device!r})"
    process = subprocess.Popen(
        [sys.executable, "-c", program],  # which imports what lies in its working directory
        cwd=folder,
        env={**os.environ, **NATIVE, "FUSED_RNN_MAX_JOBS": jobs, "PYTHONPATH": str(folder)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,  # whoever needs the library is told why there is none
        start_new_session=True,
    )
    atexit.register(kill, process)


def _tools(clock: Clock) -> Row:
    """Versions: the last line of what each tool says of itself."""
    found: Row = {"run": run_facts()}
    for command in (
        ["nvcc", "--version"],
        ["ninja", "--version"],
        ["compute-sanitizer", "--version"],
        ["nvidia-smi", "--query-gpu=name,driver_version,clocks.max.sm,power.limit", "--format=csv"],
    ):
        if shutil.which(command[0]):
            found[command[0]] = last_lines(output(command, clock.limit(FACTS_S), errors=True), 1)
    return found


def table(rows: Rows) -> list[str]:
    good = rows.good()
    lines = []
    if device := good.get("device"):
        properties: dict[str, Any] = device.get("properties", {})
        shown = {k: v for k, v in device.items() if isinstance(v, (str, int))}
        wanted = ("multi_processor_count", "total_memory", "L2_cache_size", "major", "minor")
        shown |= {name: properties[name] for name in wanted if name in properties}
        lines.append(", ".join(f"{k} {v}" for k, v in shown.items() if k != "source"))
    if tools := good.get("tools"):
        lines.append(
            ", ".join(f"{k}: {v}" for k, v in tools.items() if isinstance(v, str) and k != "source")
        )
    if library := good.get("library"):
        lines.append(f"library: {library['backend']} in {library['seconds']:.1f} s")
        if cuda := library["doctor"].get("cuda"):
            lines.append(f"cuda: {cuda}")
    return lines
