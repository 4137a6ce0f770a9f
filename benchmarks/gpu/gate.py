"""Part gate: the budget of registers of every kernel, held by the compiler that is here."""

from __future__ import annotations

import sys

from .rows import ROOT, Clock, Row, Rows, Settings, last_lines, output

LIMIT_S = 240


def measure(settings: Settings, rows: Rows, clock: Clock) -> None:
    if settings.device == "cuda":
        rows.do("compile gate", clock, lambda: _gate(clock))


def _gate(clock: Clock) -> Row:
    gate = ROOT / "tests" / "compile_gate.py"
    if not gate.is_file():
        raise FileNotFoundError(gate.relative_to(ROOT))
    text = output([sys.executable, str(gate)], clock.limit(LIMIT_S), errors=True)
    return {"output": last_lines(text, 40)}


def table(rows: Rows) -> list[str]:
    return [last_lines(row["output"], 1) for row in rows.good().values()]
