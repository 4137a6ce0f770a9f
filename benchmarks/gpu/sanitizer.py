"""Part sanitizer: the smallest layers of all cells under compute-sanitizer.

memcheck sees accesses out of bounds, in our kernels and in those that we call; racecheck, hazards
in shared memory, in our kernels only. The caching allocator hides the bounds of tensors and is off.
All runs go on at once: most of their time is the start of the tool, which takes one core.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import product

from .rows import Clock, Row, Rows, Settings, output, say
from .smallest import CELLS

TOOL = "compute-sanitizer"
LIMIT_S = 120
TOOLS = {
    "memcheck": ["--leak-check", "no"],
    "racecheck": ["--kernel-regex", "kns=frnn"],
}
VARIANTS = ("resident", "cluster", "local", "steps")
ENVIRONMENT = {"FUSED_RNN_BACKEND": "native", "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}


def measure(settings: Settings, rows: Rows, clock: Clock) -> None:
    if settings.device == "cuda" and not shutil.which(TOOL):
        return say(f"{TOOL} is not here")
    cells = CELLS[:1] if settings.tiny else CELLS
    runs = list(product(VARIANTS[:1] if settings.tiny else VARIANTS, TOOLS))

    def row(run: tuple[str, str]) -> None:
        rows.do(" ".join(run), clock, lambda: _run(*run, settings.device, cells, clock))

    with ThreadPoolExecutor(len(runs)) as pool:
        list(pool.map(row, runs))


def _run(variant: str, tool: str, device: str, cells: Sequence[str], clock: Clock) -> Row:
    command = [sys.executable, "-m", "benchmarks.gpu.smallest", device, *cells]
    if device == "cuda":
        command = [TOOL, "--tool", tool, "--error-exitcode", "9", *TOOLS[tool], *command]
    environment = {**ENVIRONMENT, "FUSED_RNN_VARIANT": variant}
    text = output(command, clock.limit(LIMIT_S), environment, errors=True)
    summary = [line.strip("= ") for line in text.splitlines() if "SUMMARY" in line]
    return {"summary": summary[-1] if summary else "no sanitizer on this device"}


def table(rows: Rows) -> list[str]:
    return [f"{key}: {row['summary']}" for key, row in rows.good().items()]
