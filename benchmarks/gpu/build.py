"""Part build: the library is built, and what was built, with what and for what is written down."""

from __future__ import annotations

import json
import shutil
import sys
from typing import Any

from ..machine import run_facts
from .rows import ROOT, Clock, Row, Rows, Settings, last_lines, output

BUILD_S, GATE_S, FACTS_S = 300, 240, 60


def measure(settings: Settings, rows: Rows, clock: Clock) -> None:
    def child(what: str, limit_s: float) -> Row:
        command = [sys.executable, "-m", "benchmarks.gpu.facts", what, settings.device]
        text = output(command, clock.limit(limit_s), env={"FUSED_RNN_BACKEND": "native"})
        return json.loads(text.splitlines()[-1])

    rows.do("device", clock, lambda: child("device", FACTS_S))
    rows.do("tools", clock, lambda: _tools(clock))
    rows.do("library", clock, lambda: child("library", BUILD_S))
    if settings.device == "cuda":
        rows.do("compile gate", clock, lambda: _gate(clock))


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


def _gate(clock: Clock) -> Row:
    gate = ROOT / "tests" / "compile_gate.py"
    if not gate.is_file():
        raise FileNotFoundError(gate.relative_to(ROOT))
    text = output([sys.executable, str(gate)], clock.limit(GATE_S), errors=True)
    return {"output": last_lines(text, 40)}


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
    if gate := good.get("compile gate"):
        lines.append(f"compile gate: {last_lines(gate['output'], 1)}")
    return lines
