"""The harness's contenders, with what this check asks of them besides: errors against float64,
variants of ours, names and times of kernels.

A contender is named ``PEER`` or ``ours/VARIANT``. ``NAME profiled`` is another process of the same:
a profiler slows a process in which it has ever run.
"""

from __future__ import annotations

import gc
import os
import signal
import sys
import warnings
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import problem, runner, worker
from ..cases import GATES, Case
from ..peers.ours import Ours
from ..peers.torch_nn_graph import captured
from ..problem import sample
from .rows import Clock

PROFILED = " profiled"
START_S = 300  # ours may have to be built first


class Problem(problem.Problem):
    """Drawn on the device: fast there, and the same in every process."""

    def __init__(self, case: Case) -> None:
        with torch.device(case.device):
            super().__init__(case)
        self.lengths = self.lengths.cpu()

    def exact(self) -> Problem:
        """In float64, from the numbers as the case's dtype has rounded them."""
        self.dtype = torch.float64
        self.module.double()
        self.padded, self.cotangent = self.padded.double(), self.cotangent.double()
        self.h, self.c = self.h.double(), None if self.c is None else self.c.double()
        return self


class Worker(worker.Worker):
    def about(self, device: str) -> dict[str, Any]:
        about = super().about(device)
        if isinstance(self.peer, Ours) and not about["missing"]:
            from fused_rnn import build  # that of the checkout which the peer is of

            build.backend(device)  # builds, or raises
        return about

    def expected(self, case: Case, path: Path) -> None:
        """Write down what is right, in float64: this is asked of torch.nn."""
        torch.save(sample(self.peer.prepare(Problem(case).exact()).results()), path)
        self._free()

    def load(self, case: Case, expected: Path) -> dict[str, Any]:
        """Prepare a case, and say how far its results are off and how long a call takes."""
        self.call = None
        self._free()
        if refused := self.peer.refuses(case):
            return {"refused": refused}
        self.clock = worker._cuda_clock if case.device == "cuda" else worker._cpu_clock
        prepared = self.peer.prepare(Problem(case))
        first_s = self.clock(prepared.call, 1)
        errors = relative_errors(sample(prepared.results()), torch.load(expected))
        self.estimate = min(self.clock(prepared.call, 1) for _ in range(2))
        self.call = prepared.call
        return {
            "first_s": first_s,
            "call_s": self.estimate,
            "errors": errors,
            "regime": self.peer.regime(case),
        }

    def time(self, case: Case) -> float:
        """Seconds of a call, unchecked."""
        self._free()
        self.clock = worker._cuda_clock if case.device == "cuda" else worker._cpu_clock
        self.call = self.peer.prepare(Problem(case)).call
        self.estimate = min(self.clock(self.call, 1) for _ in range(3))
        return self.turn(0.02, 0.1)["median_s"]

    def kernels(self, case: Case) -> list[tuple[str, int, float]]:
        """Name, launches and microseconds of each kernel of one call; on a CPU, of operators."""
        from torch.autograd import DeviceType
        from torch.profiler import ProfilerActivity, profile

        self._free()
        cuda = case.device == "cuda"
        call = self.peer.prepare(Problem(case)).call
        call()
        call()
        activity = ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU
        with profile(activities=[activity]) as profiler:
            call()
            if cuda:
                torch.cuda.synchronize()
        events = [
            (e.key, e.count, e.self_device_time_total if cuda else e.self_cpu_time_total)
            for e in profiler.key_averages()
            if not cuda or e.device_type == DeviceType.CUDA  # not the calls that launch them
        ]
        return sorted((e for e in events if e[2] > 0), key=lambda e: -e[2])

    def product(self, case: Case) -> float:
        """Seconds of one step's recurrent product, h [B, H] by W_hh^T [H, GH]: mean of T of them,
        on CUDA in one graph, so without gaps of the host.
        """
        self._free()
        dtype, sizes = getattr(torch, case.dtype), (case.H, GATES[case.cell] * case.H)
        h = torch.randn(case.B, case.H, dtype=dtype, device=case.device)
        w = torch.randn(sizes, dtype=dtype, device=case.device)
        out = h.new_empty(case.B, sizes[1])

        def call() -> None:
            for _ in range(case.T):
                torch.mm(h, w, out=out)

        self.clock, self.call = worker._cpu_clock, call
        call()
        if case.device == "cuda":
            self.clock, (self.call, _) = worker._cuda_clock, captured(call)
        self.estimate = self.clock(self.call, 1)
        return self.turn(0.02, 0.05)["median_s"] / case.T

    def _free(self) -> None:
        gc.collect()
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()


def relative_errors(found: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, float]:
    """By result, the largest difference as a part of the largest entry."""
    errors = {}
    for name, tensor in found.items():
        right = expected[name]
        if tensor.shape != right.shape:
            raise ValueError(f"{name}: sizes {tuple(tensor.shape)} instead of {tuple(right.shape)}")
        errors[name] = float((tensor - right).abs().max() / right.abs().max().clamp_min(1e-30))
    return errors


def serve(connection: Connection, name: str) -> None:
    """Answer commands until the other end is closed. The target of the process."""
    worker.die_with_parent()
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    if name.endswith(PROFILED):
        os.dup2(nowhere, sys.stderr.fileno())  # where the profiler tells that it is there
    warnings.simplefilter("ignore")
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    peer, _, variant = name.removesuffix(PROFILED).partition("/")
    os.environ["FUSED_RNN_BACKEND"] = "native"  # never the reference path unnoticed
    if variant and variant != "plan":
        os.environ["FUSED_RNN_VARIANT"] = variant
    torch.backends.cudnn.allow_tf32 = True  # torch's default; ours follows it
    own = Worker(peer)
    gc.freeze()  # imports: no garbage that each row would have to look through
    while True:
        try:
            command, arguments = connection.recv()
        except EOFError:
            return
        try:
            connection.send(("ok", getattr(own, command)(*arguments)))
        except Exception as error:
            connection.send(("failed", f"{type(error).__name__}: {error}"[:600]))


class Contender(runner.Contender):
    def __init__(self, name: str) -> None:
        self.name = name
        self._connection, other = self._context.Pipe()
        self._process = self._context.Process(target=serve, args=(other, name), daemon=True)
        self._process.start()
        other.close()

    def close(self, grace_s: float = 2) -> None:
        """Like the harness's, but a process that the driver holds in the kernel is left behind."""
        self._connection.close()
        self._signal(signal.SIGCONT)
        self._process.join(grace_s)
        self._process.kill()
        self._process.join(10)


class Contenders:
    """Processes by name, started when they are asked for the first time, and after a failure."""

    def __init__(self, clock: Clock, threads: int) -> None:
        os.environ["OMP_NUM_THREADS"] = str(threads)  # read by every pool that starts from here on
        self.clock = clock
        self._running: dict[str, Contender] = {}

    def ask(self, name: str, command: str, *arguments: Any, limit_s: float) -> Any:
        """Raises runner.Late or runner.Failed; the process is then gone."""
        if name not in self._running:
            self._running[name] = Contender(name)
            limit_s += 30  # imports, the start of CUDA
        try:
            limit_s = self.clock.limit(limit_s)
            return self._running[name].ask(command, *arguments, timeout=limit_s)
        except (runner.Late, runner.Failed):
            self._running.pop(name).close(grace_s=0)
            raise

    def missing(self, name: str, device: str) -> str | None:
        """Why it cannot run here, or None."""
        try:
            return self.ask(name, "about", device, limit_s=START_S)["missing"]
        except (runner.Late, runner.Failed) as error:
            return str(error)

    def __enter__(self) -> Contenders:
        return self

    def __exit__(self, *_: object) -> None:
        for contender in self._running.values():
            contender.close()
