"""Part sanitizer: the smallest layers of each cell under compute-sanitizer.

memcheck sees accesses out of bounds, in our kernels and in those that we call; racecheck, hazards
in shared memory, in our kernels only. The caching allocator hides the bounds of tensors and is off.
"""

from __future__ import annotations

import shutil
import sys
from itertools import product

from .rows import Clock, Row, Rows, Settings, output

LIMIT_S = 120
CELLS = ("lstm", "gru", "rnn")
TOOLS = {
    "memcheck": ["--leak-check", "no"],
    "racecheck": ["--kernel-regex", "kns=frnn"],
}
VARIANTS = ("resident", "local", "steps")
ENVIRONMENT = {"FUSED_RNN_BACKEND": "native", "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}


def measure(settings: Settings, rows: Rows, clock: Clock) -> None:
    most = 1 if settings.tiny else None
    for variant, tool, cell in product(VARIANTS[:most], TOOLS, CELLS[:most]):
        key = f"{tool} {cell} {variant}"
        rows.do(
            key,
            clock,
            lambda v=variant, t=tool, c=cell: _run(v, t, c, settings.device, clock),
        )


def _run(variant: str, tool: str, cell: str, device: str, clock: Clock) -> Row:
    command = [sys.executable, "-m", "benchmarks.gpu.smallest", cell, device]
    if device == "cuda":
        sanitizer = shutil.which("compute-sanitizer")
        if sanitizer is None:
            raise FileNotFoundError("compute-sanitizer")
        command = [sanitizer, "--tool", tool, "--error-exitcode", "9", *TOOLS[tool], *command]
    environment = {**ENVIRONMENT, "FUSED_RNN_VARIANT": variant}
    text = output(command, clock.limit(LIMIT_S), environment, errors=True)
    summary = [line.strip("= ") for line in text.splitlines() if "SUMMARY" in line]
    return {"summary": summary[-1] if summary else "no sanitizer on this device"}


def table(rows: Rows) -> list[str]:
    return [f"{key}: {row['summary']}" for key, row in rows.good().items()]
