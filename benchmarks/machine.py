"""Where and from what a figure comes: the machine, the versions, the sources."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import os
import platform
import subprocess
import time
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from . import limits

ROOT = Path(__file__).parent.parent

# Of the many flags, those that decide which kernels a library takes.
_TELLING = ("avx", "fma", "f16c", "amx", "sve", "asimd", "neon", "bf16", "i8mm", "vnni")

_STEERING = ("OMP_", "KMP_", "GOMP_", "MKL_", "ONEDNN_", "DNNL_", "ATEN_")
_STEERING += ("FUSED_RNN_BACKEND", "FUSED_RNN_CPU_CAPABILITY")


def machine(threads: int, device: str) -> dict[str, Any]:
    """Facts that do not change from run to run; results of two machines are never mixed."""
    info = _cpuinfo()
    flags = (info.get("flags") or info.get("Features") or "").split()
    facts: dict[str, Any] = {
        "cpu": info.get("model name") or platform.processor() or platform.machine(),
        "vendor": info.get("vendor_id", ""),
        "flags": sorted(flag for flag in flags if any(name in flag for name in _TELLING)),
        "cores": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count(),
        "caches": limits.caches(),
        "threads": threads,
        "system": f"{platform.system()} {platform.machine()}",
        "hypervisor": "hypervisor" in flags,
    }
    if device == "cuda":
        facts["gpu"] = _gpu()
    return facts


def run_facts() -> dict[str, Any]:
    """Facts of one run: when, and of what."""
    versions = {"python": platform.python_version()}
    for package in ("torch", "numpy", "onnx", "onnxruntime", "openvino"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": _git("rev-parse", "--short=12", "HEAD"),
        "changed": bool(_git("status", "--porcelain", "--", "csrc", "fused_rnn")),
        "source": source(),
        "versions": versions,
        "environment": {
            name: value
            for name, value in sorted(os.environ.items())
            if name.startswith(_STEERING) and name != "OMP_NUM_THREADS"  # we set that one
        },
    }


def source(root: Path = ROOT) -> str:
    """A fingerprint of all that a figure of ours depends on: the same sources, the same figure."""
    digest = hashlib.sha256()
    for folder, pattern in (("csrc", "**/*"), ("fused_rnn", "**/*.py")):
        for path in sorted((root / folder).glob(pattern)):
            if path.is_file():
                digest.update(str(path.relative_to(root)).encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def default_threads() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def busy(seconds: float = 0.1) -> float | None:
    """The part of all processors' time that somebody else takes while we sleep; None if unknown."""

    def ticks() -> tuple[int, int]:
        fields = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]
        numbers = [int(field) for field in fields]  # user, nice, system, idle, waiting, ...
        return sum(numbers) - numbers[3] - numbers[4], sum(numbers)

    try:
        used, total = ticks()
        time.sleep(seconds)
        used_after, total_after = ticks()
    except (OSError, ValueError):
        return None
    return (used_after - used) / max(1, total_after - total)


def _cpuinfo() -> dict[str, str]:
    """Of the first processor."""
    found: dict[str, str] = {}
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            name, colon, value = line.partition(":")
            if colon:
                found.setdefault(name.strip(), value.strip())
            elif found:
                break
    return found


def _git(*arguments: str) -> str:
    try:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True)
    except OSError:
        return ""
    return done.stdout.strip()


def _gpu() -> str:
    query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(query, capture_output=True, text=True).stdout.strip()
    except OSError:
        return ""
