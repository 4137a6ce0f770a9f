"""Runs a suite: contenders in processes of their own take turns, round after round."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import worker
from .cases import Case, Item
from .floors import floor
from .limits import Probe, bandwidth, probe
from .machine import run_facts
from .results import Results, Row

ORACLE = "torch_nn"
START_TIMEOUT = 600  # of a contender: ours may have to be compiled first


@dataclass(frozen=True)
class Settings:
    threads: int
    rounds: int
    limit_s: float  # per row
    warm_s: float = 0.03
    sample_s: float = 0.05
    memory: bool = True


class Late(Exception):
    """A contender did not answer in time."""


class Failed(Exception):
    """A contender raised; the message is its error."""


class Contender:
    """A worker process, stopped but for the time it takes to answer."""

    _context = multiprocessing.get_context("forkserver")
    _context.set_forkserver_preload([worker.__name__])

    def __init__(self, name: str, threads: int) -> None:
        self.name = name
        self._connection, other = self._context.Pipe()
        self._process = self._context.Process(
            target=worker.serve, args=(other, name, threads), name=f"bench-{name}", daemon=True
        )
        self._process.start()
        other.close()

    def ask(self, command: str, *arguments: Any, timeout: float) -> Any:
        self._signal(signal.SIGCONT)
        try:
            self._connection.send((command, arguments))
            if not self._connection.poll(timeout):
                raise Late(f"no answer within {timeout:.3g} s")
            state, answer = self._connection.recv()
        except (EOFError, ConnectionError):
            raise Failed("its process died") from None
        finally:
            self._signal(signal.SIGSTOP)
        if state != "ok":
            raise Failed(answer)
        return answer

    def _signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError, TypeError):
            os.kill(self._process.pid, number)  # type: ignore[arg-type]

    def close(self) -> None:
        self._process.kill()
        self._process.join()
        self._connection.close()


class Field:
    """All contenders. One that was killed comes back as a new process at its next case."""

    def __init__(self, names: list[str], device: str, threads: int) -> None:
        self.device, self.threads = device, threads
        self.missing: dict[str, str] = {}
        self.versions: dict[str, str] = {}
        self._running: dict[str, Contender] = {}
        for name in names:
            try:
                about = self[name].ask("about", device, timeout=START_TIMEOUT)
            except (Late, Failed) as error:
                self.missing[name] = str(error)
                self.kill(name)
                continue
            self.versions |= about["versions"]
            if about["missing"]:
                self.missing[name] = about["missing"]
                self.kill(name)

    def __getitem__(self, name: str) -> Contender:
        if name not in self._running:
            self._running[name] = Contender(name, self.threads)
        return self._running[name]

    def kill(self, name: str) -> None:
        if contender := self._running.pop(name, None):
            contender.close()

    def close(self) -> None:
        for name in list(self._running):
            self.kill(name)


@contextlib.contextmanager
def field(names: list[str], device: str, threads: int) -> Iterator[Field]:
    os.environ["OMP_NUM_THREADS"] = str(threads)  # read by every pool that starts from here on
    made = Field(names, device, threads)
    try:
        yield made
    finally:
        made.close()


def run(
    items: list[Item],
    names: list[str],
    results: Results,
    settings: Settings,
    progress: Callable[[str, int], None] = lambda text, done: None,
) -> dict[str, str]:
    """Measure what ``results`` lacks. Returns which peers were missing, and why.

    ``progress`` is told what is under way, and how many rows are done with it.
    """
    device = items[0].case.device if items else "cpu"
    facts = run_facts()
    names_of = {item: [n for n in names if item.peers is None or n in item.peers] for item in items}
    todo = [
        item
        for item in items
        if not results.has(_key(item.case, settings), names_of[item], facts)
    ]
    progress("", len(items) - len(todo))
    if not todo:
        return {}
    progress("starting the contenders", 0)
    with probe(settings.threads) as tool, field(names, device, settings.threads) as contenders:
        dtypes = sorted({item.case.dtype for item in todo})
        progress("measuring the machine's limits", 0)
        facts["settings"] = vars(settings)
        facts["limits"] = measure_limits(tool, contenders, dtypes)
        facts["peers"] = contenders.versions
        results.runs.append(facts)
        for item in todo:
            row = {"key": _key(item.case, settings), "case": item.case.to_json()}
            row |= {"run": len(results.runs) - 1}
            row |= _measure(item.case, names_of[item], contenders, tool, facts, settings, progress)
            results.rows[row["key"]] = row
            results.save()
            progress("", 1)
        _forget_unused_runs(results)
        results.save()
        return contenders.missing


def _key(case: Case, settings: Settings) -> str:
    return f"{case.label} {settings.threads} threads"


def _forget_unused_runs(results: Results) -> None:
    used = sorted({row["run"] for row in results.rows.values()})
    results.runs = [results.runs[i] for i in used]
    for row in results.rows.values():
        row["run"] = used.index(row["run"])


def measure_limits(tool: Probe, contenders: Field, dtypes: list[str]) -> dict[str, Any]:
    found: dict[str, Any] = {"threads": contenders.threads, "gemm": {}}
    for dtype in dtypes:
        rates: dict[str, float | None] = {}
        with contextlib.suppress(Late, Failed):
            rates |= contenders[ORACLE].ask("gemm", dtype, contenders.device, timeout=START_TIMEOUT)
        if contenders.device == "cpu":
            rates["fma"] = tool.fma(dtype)
        found["gemm"][dtype] = rates
    # Weights on CUDA stay in registers or L2: their bandwidth is not what bounds a floor there.
    found["bandwidth"] = bandwidth(tool, contenders.threads) if contenders.device == "cpu" else []
    found["pulse"] = tool.pulse()
    found["probe"] = tool.problem
    return found


# --- one row -------------------------------------------------------------------------------------


def _measure(
    case: Case,
    names: list[str],
    contenders: Field,
    tool: Probe,
    facts: dict[str, Any],
    settings: Settings,
    progress: Callable[[str, int], None],
) -> Row:
    peers: dict[str, Any] = {
        name: {"missing": contenders.missing[name]} for name in names if name in contenders.missing
    }
    limit = floor(case, facts["limits"])
    row: Row = {"peers": peers}
    if limit:
        row["floor"] = {"s": limit.seconds, "bound": limit.bound}
    present = [name for name in names if name not in peers]

    def skip(reason: str) -> Row:
        return row | {"peers": peers | {name: {"skipped": reason} for name in present}}

    # Torch's own answer, then five calls to load and two to measure, of two contenders at least.
    if limit and (needs := 15 * limit.seconds) > settings.limit_s:
        return skip(f"needs {needs:.0f} s at the least, the limit is {settings.limit_s:g} s")

    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        expected = Path(folder) / "expected.pt"
        progress(f"{case.label}: what is right", 0)
        try:
            contenders[ORACLE].ask("expected", case, expected, timeout=settings.limit_s)
        except (Late, Failed) as error:
            contenders.kill(ORACLE)
            return skip(f"torch.nn could not say what is right: {error}")
        for name in present:
            progress(f"{case.label}: loading {name}", 0)
            peers[name] = _load(case, name, expected, contenders, settings)

    ready = [name for name in present if "call_s" in peers[name]]
    for name in ready:
        if 2 * peers[name]["call_s"] > settings.limit_s / 2:
            reason = f"a call takes {peers[name]['call_s']:.3g} s, the limit is "
            peers[name]["skipped"] = reason + f"{settings.limit_s:g} s a row"
    ready = [name for name in ready if "skipped" not in peers[name]]
    turns = {n: max(2 * peers[n]["call_s"], settings.warm_s + settings.sample_s) for n in ready}
    round_s = sum(turns.values()) + 0.01 * len(ready)
    rounds = max(1, min(settings.rounds, int(settings.limit_s / round_s))) if ready else 0
    for i in range(rounds):
        progress(f"{case.label}: round {i + 1} of {rounds}", 0)
        start = i % len(ready)
        for name in ready[start:] + ready[:start]:  # everybody follows somebody else
            if "failed" not in peers[name]:
                _take_turn(name, peers[name], contenders, tool, settings)
    for name in ready:
        if "failed" in peers[name]:  # rounds must stay complete, for the ratios' sake
            peers[name].pop("rounds", None)
        if settings.memory:
            progress(f"{case.label}: memory of {name}", 0)
            peers[name]["peak_bytes"] = _peak_memory(case, name, contenders, settings)
    return row


def _load(
    case: Case, name: str, expected: Path, contenders: Field, settings: Settings
) -> dict[str, Any]:
    try:
        return contenders[name].ask("load", case, expected, timeout=settings.limit_s)
    except Late:
        contenders.kill(name)
        return {"skipped": f"not ready within the limit of {settings.limit_s:g} s"}
    except Failed as error:
        contenders.kill(name)
        return {"failed": str(error)}


def _take_turn(
    name: str, record: dict[str, Any], contenders: Field, tool: Probe, settings: Settings
) -> None:
    pulse = tool.pulse()
    try:
        answer = contenders[name].ask(
            "turn",
            settings.warm_s,
            settings.sample_s,
            timeout=10 + 20 * record["call_s"],
        )
    except (Late, Failed) as error:
        contenders.kill(name)
        record["failed"] = f"in a round: {error}"
        return
    record.setdefault("rounds", []).append(answer["median_s"])
    record.setdefault("samples", []).append(answer["samples"])
    record.setdefault("pulse", []).append(pulse)


def _peak_memory(case: Case, name: str, contenders: Field, settings: Settings) -> int | None:
    alone = Contender(name, contenders.threads)
    try:
        return alone.ask("memory", case, timeout=settings.limit_s)
    except (Late, Failed):
        return None
    finally:
        alone.close()
