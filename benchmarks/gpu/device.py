"""Part device: what a step costs before any arithmetic, and where the time of our steps goes.

``latency.cu`` measures barriers, latencies, launches and rates; it is compiled here for the card.
The shares of a step come from the profiler (times of kernels) and from an unprofiled process (time
of a call): what no kernel accounts for is the gap between launches.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..cases import Case
from .contender import PROFILED, Contenders
from .rows import ROOT, Clock, Row, Rows, Settings, output

SOURCE = Path(__file__).with_name("latency.cu")
LATENCIES = ("clusters", "barrier", "oneway", "exchange", "broadcast", "launch", "mma")
COMPILE_S, LATENCY_S, SHARE_S = 120, 60, 30
STEPS = "ours/steps"


def measure(settings: Settings, rows: Rows, clock: Clock) -> None:
    if settings.device == "cuda":
        _latencies(rows, clock)
    todo = [case for case in _shared(settings) if not rows.done(_key(case))]
    if not todo or clock.over:
        return
    with Contenders(clock, threads=1) as contenders:
        for case in todo:
            rows.do(_key(case), clock, lambda c=case: _share(c, contenders))


# --- latencies -----------------------------------------------------------------------------------


def _latencies(rows: Rows, clock: Clock) -> None:
    todo = [name for name in LATENCIES if not rows.done(name)]
    if not todo or clock.over:
        return
    with tempfile.TemporaryDirectory(prefix="gpu_check-") as folder:
        program = Path(folder) / "latency"
        rows.rows.pop(SOURCE.name, None)  # the program of an earlier run is gone
        rows.do(SOURCE.name, clock, lambda: _compile(program, clock))
        if not rows.done(SOURCE.name):
            return
        for name in todo:
            rows.do(name, clock, lambda n=name: _latency(program, n, clock))


def _compile(program: Path, clock: Clock) -> Row:
    command = [sys.executable, "-c", "import torch; print(*torch.cuda.get_device_capability())"]
    major, minor = output(command, clock.limit(COMPILE_S)).split()
    arch = f"sm_{major}{minor}" + ("a" if int(major) >= 9 else "")
    compile_latency(program, arch, clock.limit(COMPILE_S))
    return {"arch": arch}


def compile_latency(program: Path, arch: str, limit_s: float) -> None:
    flags = ["-std=c++17", "-O3", f"-arch={arch}", f"-I{ROOT / 'csrc'}"]
    output(["nvcc", *flags, "-o", str(program), str(SOURCE)], limit_s, errors=True)


def _latency(program: Path, name: str, clock: Clock) -> Row:
    text = output([str(program), name], clock.limit(LATENCY_S))
    return {"figures": [json.loads(line) for line in text.splitlines()]}


# --- shares of a step ----------------------------------------------------------------------------


def _shared(settings: Settings) -> list[Case]:
    if settings.tiny:
        return [Case("lstm", B=2, T=4, H=8, device=settings.device)]
    first = Case("lstm", B=16, T=128, H=512, dtype="bfloat16", device=settings.device)
    forward = [
        first,
        replace(first, H=128, I=128),
        replace(first, B=64),
        replace(first, H=1024, I=1024, B=64),
        replace(first, dtype="float32"),
        replace(first, cell="gru"),
        replace(first, cell="rnn"),
    ]
    return forward + [replace(case, phase="training") for case in forward]


def _key(case: Case) -> str:
    return f"step of {case.label}"


def _share(case: Case, contenders: Contenders) -> Row:
    """Microseconds per step, by what takes them."""
    kernels = contenders.ask(STEPS + PROFILED, "kernels", case, limit_s=SHARE_S)
    product_s = contenders.ask(STEPS, "product", case, limit_s=SHARE_S)
    call_s = contenders.ask(STEPS, "time", case, limit_s=SHARE_S)
    parts: dict[str, float] = defaultdict(float)
    for name, launches, us in kernels:
        parts[_kind(name, launches, case.T)] += us / case.T
    call = call_s * 1e6 / case.T
    return {
        "case": case.to_json(),
        "call_us": call,
        "parts_us": dict(parts),
        "gap_us": call - sum(parts.values()),
        "product_alone_us": product_s * 1e6,
        "launches_per_step": sum(launches for _, launches, _ in kernels) / case.T,
        "kernels": [[name[:90], count, us / case.T] for name, count, us in kernels[:6]],
    }


def _kind(name: str, launches: int, T: int) -> str:
    """Of a kernel. Fewer launches than a pass has steps are outside of them: the product with W_ih,
    say, which is one for all steps. A backward has no product behind its first step.
    """
    if launches < T - 1:
        return "outside"
    return "gates" if "frnn::" in name else "products"


# --- the table -----------------------------------------------------------------------------------


def table(rows: Rows) -> list[str]:
    lines = []
    for key, row in rows.good().items():
        if "figures" in row:
            lines += _figures(key, row["figures"])
        elif "call_us" in row:
            parts = ", ".join(f"{name} {us:.3g}" for name, us in row["parts_us"].items())
            lines.append(
                f"{key}: {row['call_us']:.3g} us = {parts}, gaps {row['gap_us']:.3g}; "
                f"product alone {row['product_alone_us']:.3g}"
            )
    return lines


def _figures(name: str, figures: list[dict[str, Any]]) -> list[str]:
    """One line per kind and unit: the setting of each figure, and the figure."""
    lines: dict[str, list[str]] = defaultdict(list)
    for figure in figures:
        setting = {k: v for k, v in figure.items() if k not in ("kind", "unit", "value", "error")}
        value = f"{figure['value']:.4g}" if "value" in figure else f"({figure['error']})"
        shown = ",".join(f"{k}{v}" for k, v in setting.items())
        lines[f"{name} {figure['kind']}, {figure['unit']}"].append(f"{shown}: {value}")
    return [f"{kind}: " + "  ".join(found) for kind, found in lines.items()]
