"""Part baseline: ours, and ours of another checkout, in turns, in microseconds per step.

BENCHMARKS_BASELINE names the folder of that checkout; without it there is nothing to do. Results of
both are checked against float64 as in part peers, and torch.nn takes part for what it says of them.
"""

from __future__ import annotations

import os
from pathlib import Path

from .. import machine
from ..cases import Case
from ..peers.ours_baseline import VARIABLE
from ..results import geometric_mean
from .contender import Contenders
from .rows import Clock, Row, Rows, Settings
from .versus import BOTH, ORACLE, SLOW, absent, compare, ratios

OURS, BEFORE = "ours/plan", "ours_baseline/plan"


def checkout() -> Path | None:
    folder = os.environ.get(VARIABLE)
    return Path(folder).resolve() if folder else None


def cases(settings: Settings) -> list[Case]:
    """A kernel that shares its weights among few and among all multiprocessors, one of a single
    block, and TF32.
    """
    if settings.tiny:
        sizes = [("lstm", "float32", 8, 2)]
    else:
        sizes = [
            ("lstm", "bfloat16", 512, 16),
            ("lstm", "bfloat16", 1024, 64),
            ("rnn", "float32", 128, 16),
            ("lstm", "bfloat16", 32, 16),
            ("gru", "float16", 512, 16),
        ]
    T = 4 if settings.tiny else 256
    return [
        Case(cell, B, T, H, phase=phase, dtype=dtype, device=settings.device)
        for cell, dtype, H, B in sizes
        for phase in BOTH
    ]


def measure(settings: Settings, rows: Rows, clock: Clock) -> None:
    folder = checkout()
    if folder is None:
        return
    source = machine.source(folder)
    by_key = {f"{case.label} against {source}": case for case in cases(settings)}
    todo = rows.left(by_key)
    if not todo or clock.over:
        return
    with Contenders(clock, threads=1) as contenders:
        names = [ORACLE, OURS, BEFORE]
        missing = absent(names, names, settings.device, contenders)
        for key in todo:
            rows.do(key, clock, lambda c=by_key[key]: _row(c, source, missing, contenders))


def _row(case: Case, source: str, missing: dict[str, str | None], contenders: Contenders) -> Row:
    return {"baseline": source} | compare(case, missing, list(missing), contenders)


def table(rows: Rows) -> list[str]:
    found = {key: ratios(row, BEFORE)["plan"] for key, row in rows.good().items()}
    if not found:
        return []
    lines = [
        f"ours against the baseline: {len(found)} rows, geometric mean "
        f"{geometric_mean(list(found.values())):.2f}, below {SLOW}: "
        f"{sum(ratio < SLOW for ratio in found.values())}"
    ]
    for key in sorted(found, key=found.__getitem__):
        us = {name: peer["us"] for name, peer in rows.rows[key]["peers"].items()}
        lines.append(
            f"  {found[key]:5.2f}  {key}: {us[OURS]:.3g} us a step, baseline {us[BEFORE]:.3g}, "
            f"torch.nn {us[ORACLE]:.3g}"
        )
    return lines
