"""A contender's process: it holds one peer, prepares cases, and times itself when it has the turn.

All contenders fork from one server that has imported torch and done nothing else, so each has its
own thread pools and they start fast. Between turns the runner stops the process (SIGSTOP), because
the pools of OpenMP, ONNX Runtime and OpenVINO go on spinning after a call and would slow the next.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import resource
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from . import limits, peers
from .cases import Case
from .problem import Problem, mismatch, sample


def serve(connection: Connection, name: str, threads: int) -> None:
    """Answer commands until the other end is closed. The target of the process."""
    die_with_parent()
    # What libraries print belongs to nobody's table.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    warnings.simplefilter("ignore")
    torch.set_num_threads(threads)
    worker = Worker(name)
    while True:
        try:
            command, arguments = connection.recv()
        except EOFError:
            return
        try:
            connection.send(("ok", getattr(worker, command)(*arguments)))
        except Exception as error:
            text = f"{type(error).__name__}: {error}".splitlines()[0]
            connection.send(("failed", text[:300]))


class Worker:
    """The commands. A peer that refuses answers ``{"refused": why}``."""

    def __init__(self, name: str) -> None:
        self.peer = peers.load(name)
        self.call: Callable[[], Any] | None = None
        self.clock = _cpu_clock
        self.estimate = 0.0  # seconds of a call

    def about(self, device: str) -> dict[str, Any]:
        """Whether the peer can run here, and its versions."""
        missing = self.peer.missing(device)
        return {
            "title": self.peer.title,
            "missing": missing,
            "versions": {} if missing else self.peer.versions(),
        }

    def gemm(self, dtype: str, device: str) -> dict[str, float | None]:
        return limits.gemm_rates(dtype, device)

    def expected(self, case: Case, path: Path) -> None:
        """Write down what is right: this is asked of ``runner.oracle``."""
        prepared = self.peer.prepare(Problem(case))
        torch.save(sample(prepared.results()), path)

    def load(self, case: Case, expected: Path) -> dict[str, Any]:
        """Prepare a case, check its results, and see how long first and later calls take."""
        self.call = None  # frees what the last case held
        gc.collect()
        if refused := self.peer.refuses_at_all(case):
            return {"refused": refused}
        self.clock = _cuda_clock if case.device == "cuda" else _cpu_clock
        case = self.peer.case(case)
        problem = Problem(case)
        start = time.perf_counter()
        prepared = self.peer.prepare(problem)
        prepare_s = time.perf_counter() - start
        first_s = self.clock(prepared.call, 1)
        found = sample(prepared.results())
        precision = self.peer.rounds_to or case.dtype
        if wrong := mismatch(found, torch.load(expected), precision):
            return {"refused": f"wrong results: {wrong}", "wrong": True}
        self.estimate = min(self.clock(prepared.call, 1) for _ in range(2))
        report: dict[str, Any] = {
            "prepare_s": prepare_s,
            "first_s": first_s,
            "call_s": self.estimate,
            "checked": sorted(found),
            "regime": self.peer.regime(case),
        }
        if case.keeps:
            report["saved_bytes"] = _saved_bytes(prepared.call, problem)
        self.call = prepared.call
        return report

    def turn(self, warm_s: float, sample_s: float) -> dict[str, Any]:
        """Warm up, then time for so long: at least one call, unless a single one takes longer."""
        assert self.call is not None
        call, clock = self.call, self.clock
        gc.disable()
        try:
            # A call shorter than the clock can see is repeated within one sample.
            repeats = max(1, round(100e-6 / max(self.estimate, 1e-7)))
            end = time.perf_counter() + warm_s
            while True:
                clock(call, repeats)
                if time.perf_counter() >= end:
                    break
            samples: list[float] = []
            end = time.perf_counter() + sample_s
            while not samples or (time.perf_counter() < end and len(samples) < 10_000):
                samples.append(clock(call, repeats))
        finally:
            gc.enable()
        return {"median_s": statistics.median(samples), "samples": len(samples)}

    def memory(self, case: Case) -> int:
        """Peak bytes of preparing nothing but this case and calling it: for a fresh process.

        On CUDA, of the allocator; on a CPU, resident memory, so with all that libraries keep.
        """
        # Imports and thread pools are not what is asked for: a tiny case brings them in first.
        case = self.peer.case(case)
        tiny = replace(
            case, B=1, T=min(case.T, 2), H=8 * case.blocks, I=8, proj=4 if case.proj else 0
        )
        self.peer.prepare(Problem(tiny)).call()
        gc.collect()
        _trim()
        before = _resident()
        problem = Problem(case)
        prepared = self.peer.prepare(problem)
        if case.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
            prepared.call()
            torch.cuda.synchronize()
            return torch.cuda.max_memory_allocated()
        gc.collect()
        _trim()
        reset = _reset_peak()  # building a session or a graph takes more than having it
        prepared.call()
        prepared.call()
        return (_peak() if reset else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024) - (
            before
        )


# --- clocks: seconds per call of so many in a row ------------------------------------------------


def _cpu_clock(call: Callable[[], Any], repeats: int) -> float:
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - start) / repeats


def _cuda_clock(call: Callable[[], Any], repeats: int) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    for _ in range(repeats):
        call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3 / repeats


# --- memory --------------------------------------------------------------------------------------


def _saved_bytes(call: Callable[[], Any], problem: Problem) -> int:
    """What autograd keeps for the backward, without parameters and input, which live anyway."""
    own = {p.untyped_storage().data_ptr() for p in problem.module.parameters()}
    own.add(problem.padded.untyped_storage().data_ptr())
    seen: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        leaf = tensor.is_leaf and tensor.requires_grad  # a drop-in's own parameters, packed input
        if storage.data_ptr() not in own and not leaf:
            seen[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        call()
    return sum(seen.values())


def _status(field: str) -> int:
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(field):
                return int(line.split()[1]) * 1024
    return 0


def _resident() -> int:
    return _status("VmRSS")


def _peak() -> int:
    return _status("VmHWM")


def _reset_peak() -> bool:
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
        return True
    return False


def _trim() -> None:
    """Give freed memory back, or it would hide what is allocated next."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def die_with_parent() -> None:
    """A stopped process does not see its pipe close."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(1, 9)  # PR_SET_PDEATHSIG, SIGKILL
