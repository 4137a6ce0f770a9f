"""What the machine could do, measured in the same run as the contenders.

``Probe`` is a small C program (``probe.c``), compiled here: fork and barrier latency beside every
figure, multiply-adds on registers, reading from each level of memory. GEMM rates are measured in a
contender's process, through torch.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

SOURCE = Path(__file__).with_name("probe.c")
_FMA = {"float32": "fma32", "float64": "fma64"}
# What the probe is compiled for: the instructions that fused_rnn is held to, if it is.
_FLAGS = {"generic": ["-mtune=native"], "avx2": ["-mavx2", "-mfma", "-mtune=native"]}


class Probe:
    """The running program; every method answers None where no compiler could make it."""

    def __init__(self, threads: int) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="bench-probe-")
        self.problem: str | None = None
        self._process: subprocess.Popen[str] | None = None
        compilers = (os.environ.get("CC"), "cc", "gcc", "clang")
        compiler = next((c for c in compilers if c and shutil.which(c)), None)
        if compiler is None:
            self.problem = "no C compiler"
            return
        binary = Path(self._folder.name) / "probe"
        capability = _FLAGS.get(os.environ.get("FUSED_RNN_CPU_CAPABILITY", ""), ["-march=native"])
        flags = ["-std=gnu11", "-O3", *capability, "-fopenmp", f"-DTHREADS={threads}"]
        made = subprocess.run(
            [compiler, *flags, str(SOURCE), "-o", str(binary)], capture_output=True, text=True
        )
        if made.returncode:
            self.problem = f"{compiler}: {made.stderr.strip().splitlines()[:1]}"
            return
        self._process = subprocess.Popen(
            [binary], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self._process.send_signal(signal.SIGSTOP)

    def _ask(self, command: str) -> list[float] | None:
        """Like a contender, the program runs only while it has the turn."""
        if self._process is None:
            return None
        assert self._process.stdin and self._process.stdout
        self._process.send_signal(signal.SIGCONT)
        try:
            self._process.stdin.write(command + "\n")
            self._process.stdin.flush()
            return [float(word) for word in self._process.stdout.readline().split()] or None
        finally:
            self._process.send_signal(signal.SIGSTOP)

    def pulse(self) -> list[float] | None:
        """[fork, barrier] in microseconds."""
        return self._ask("pulse")

    def fma(self, dtype: str) -> float | None:
        """GFLOP/s; None for 16-bit types, whose instructions differ from CPU to CPU."""
        found = self._ask(_FMA[dtype]) if dtype in _FMA else None
        return found[0] if found else None

    def read(self, size: int) -> float | None:
        found = self._ask(f"read {size}")
        return found[0] if found else None

    def close(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
        self._folder.cleanup()


@contextlib.contextmanager
def probe(threads: int) -> Iterator[Probe]:
    made = Probe(threads)
    try:
        yield made
    finally:
        made.close()


def caches() -> dict[str, int]:
    """Bytes of a core's data caches by name, as the system tells them."""
    found = {}
    for index in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        with contextlib.suppress(OSError, ValueError):
            if (index / "type").read_text().strip() != "Instruction":
                level = (index / "level").read_text().strip()
                size = (index / "size").read_text().strip()
                found[f"L{level}"] = int(size.removesuffix("K")) * 1024
    return found


def bandwidth(tool: Probe, threads: int) -> list[dict[str, Any]]:
    """GB/s of all threads reading their own parts, from the nearest level to the farthest.

    ``capacity`` is the largest part per thread that counts as lying there, None for any.
    """
    levels: list[dict[str, Any]] = []
    sizes = caches()
    for name in ("L1", "L2", "L3"):
        if name not in sizes:
            continue
        capacity = sizes[name] // (threads if name == "L3" else 1)
        # L3 is shared with others, and huge on some machines: a few times L2 is surely beyond L2.
        size = min(capacity // 2, 8 * sizes["L2"]) if name == "L3" else capacity // 2
        if rate := tool.read(size):
            levels.append(
                {"name": name, "capacity": capacity * 0.9, "bytes": size, "gb_per_s": rate}
            )
    size = min(max(2 * sizes.get("L3", 0), 256 << 20), _free_memory() // 4) // threads
    if rate := tool.read(size):
        levels.append({"name": "DRAM", "capacity": None, "bytes": size, "gb_per_s": rate})
    return levels


def _free_memory() -> int:
    with contextlib.suppress(OSError):
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable"):
                return int(line.split()[1]) * 1024
    return 1 << 30


# --- GEMM ----------------------------------------------------------------------------------------

# [M, K] x [K, N]: a step of a large batch, and all steps at once.
_PRODUCTS = ((64, 1024, 4096), (1024, 1024, 4096), (3200, 512, 2048))


def gemm_rates(dtype: str, device: str) -> dict[str, float | None]:
    """The best GFLOP/s of each way of multiplying; None where a way does not exist."""
    import torch

    kind = getattr(torch, dtype)
    rates: dict[str, float | None] = {}

    def measure(name: str, make: Callable[[Any, Any], Callable[[], Any]]) -> None:
        best = 0.0
        try:
            for m, k, n in _PRODUCTS:
                x = torch.randn(m, k).to(device, kind)
                w = torch.randn(n, k).to(device, kind)
                best = max(best, 2.0 * m * k * n / _best_seconds(make(x, w), device))
        except (RuntimeError, AttributeError, NotImplementedError):
            best = 0.0
        rates[name] = best / 1e9 or None

    def mm(x: Any, w: Any) -> Callable[[], Any]:
        w = w.t().contiguous()
        return lambda: torch.mm(x, w)

    def onednn(x: Any, w: Any) -> Callable[[], Any]:
        packed = torch.ops.mkldnn._reorder_linear_weight(w, x.shape[0])
        linear = torch.ops.mkldnn._linear_pointwise
        return lambda: linear(x, packed, None, "none", [], "")

    with torch.no_grad():
        measure("mm", mm)
        if device == "cuda" and dtype == "float32":  # what cuDNN's layers use by default
            with _tf32():
                measure("mm tf32", mm)
        if device == "cpu":
            measure("oneDNN", onednn)
        rates["ours"] = _our_rate(kind, device)
    return rates


@contextlib.contextmanager
def _tf32() -> Iterator[None]:
    import torch

    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def _our_rate(kind: Any, device: str) -> float | None:
    """Ours has no product of its own to call: a whole layer of a large batch stands for it."""
    import torch

    import fused_rnn

    if fused_rnn.backend_info()["backend"] != "native":
        return None
    batch, steps, hidden = 128, 10, 1024
    layer = fused_rnn.RNN(hidden, hidden, device=device, dtype=kind)
    x = torch.randn(steps, batch, hidden).to(device, kind)
    return 4.0 * steps * batch * hidden**2 / _best_seconds(lambda: layer(x), device) / 1e9


def _best_seconds(call: Callable[[], Any], device: str) -> float:
    """Of some 0.2 s: a limit is the best that was seen."""
    import torch

    def synchronize() -> None:
        if device == "cuda":
            torch.cuda.synchronize()

    call()
    best = float("inf")
    end = time.perf_counter() + 0.2
    while time.perf_counter() < end:
        synchronize()
        start = time.perf_counter()
        call()
        synchronize()
        best = min(best, time.perf_counter() - start)
    return best
