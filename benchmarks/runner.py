"""Runs a suite: contenders in processes of their own take turns, round after round."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import worker
from .cases import Case, Item
from .floors import floor
from .limits import Probe, bandwidth, probe
from .machine import busy, run_facts
from .peers import load as load_peer
from .results import Results, Row, beside, case_of

ORACLE = "torch_nn"  # who says what is right
LOOP = "loop"  # who says it for what torch.nn does not have
ZOO_LOOP = "zoo_loop"  # and for cells that it does not have
START_TIMEOUT = 600  # of a contender: ours may have to be compiled first


@dataclass(frozen=True)
class Settings:
    threads: int
    rounds: int
    limit_s: float  # per row
    warm_s: float = 0.03
    sample_s: float = 0.05
    memory: bool = True
    busy: int = 0  # processes of others, beside whoever has the turn
    busy_share: float = 1.0  # of its core's time that each of them takes


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

    def close(self, grace_s: float = 2) -> None:
        """Let it end by itself, so that libraries clean up; not for long."""
        self._connection.close()
        self._signal(signal.SIGCONT)
        self._process.join(grace_s)
        self._process.kill()
        self._process.join()


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
            contender.close(grace_s=0)

    def close(self) -> None:
        for contender in self._running.values():
            contender.close()


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
        if not results.has(_key(item.case, settings), names_of[item], facts, settings.limit_s)
    ]
    progress("", len(items) - len(todo))
    if not todo:
        return {}
    progress("starting the contenders", 0)
    with (
        probe(settings.threads) as tool,
        field(names, device, settings.threads) as contenders,
        neighbours(settings.busy, settings.busy_share),
    ):
        dtypes = sorted({item.case.dtype for item in todo})
        progress("measuring the machine's limits", 0)
        facts["settings"] = vars(settings)
        facts["limits"] = measure_limits(tool, contenders, dtypes)
        facts["peers"] = contenders.versions
        results.runs.append(facts)
        for item in todo:
            row: Row = {"key": _key(item.case, settings), "case": item.case.to_json()}
            row |= {"run": len(results.runs) - 1}
            row |= _measure(item.case, names_of[item], contenders, tool, facts, settings, progress)
            results.rows[row["key"]] = row
            results.save()
            progress("", 1)
        # The machine has its moods: a limit is the best that was seen, early or late.
        progress("measuring the machine's limits again", 0)
        _raise_limits(facts["limits"], measure_limits(tool, contenders, dtypes))
        for row in results.rows.values():
            if row["run"] == len(results.runs) - 1:
                row |= _floor(case_of(row), facts["limits"])
        _forget_unused_runs(results)
        results.save()
        return contenders.missing


def _key(case: Case, settings: Settings) -> str:
    return f"{case.label} {settings.threads} threads{beside(vars(settings))}"


def _take(share: float) -> None:
    """That part of a core, in turns of about the length that a scheduler gives."""
    worker.die_with_parent()
    period = 0.01
    while True:
        begun = time.perf_counter()
        while time.perf_counter() - begun < share * period:
            pass
        if share < 1:
            time.sleep((1 - share) * period)


@contextlib.contextmanager
def neighbours(count: int, share: float = 1.0) -> Iterator[None]:
    """Programs of somebody else, which want a core each, or a share of one."""
    spinning = [
        multiprocessing.Process(target=_take, args=(share,), daemon=True) for _ in range(count)
    ]
    for process in spinning:
        process.start()
    try:
        yield
    finally:
        for process in spinning:
            process.kill()
            process.join()


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


def _raise_limits(limits: dict[str, Any], later: dict[str, Any]) -> None:
    for dtype, rates in later["gemm"].items():
        known = limits["gemm"][dtype]
        known |= {way: max(rate, known.get(way) or 0) for way, rate in rates.items() if rate}
    for level, again in zip(limits["bandwidth"], later["bandwidth"], strict=False):
        level["gb_per_s"] = max(level["gb_per_s"], again["gb_per_s"])


def oracle(case: Case) -> str:
    return ZOO_LOOP if case.zoo else LOOP if case.between else ORACLE


def _floor(case: Case, limits: dict[str, Any]) -> Row:
    found = floor(case, limits)
    return {"floor": {"s": found.seconds, "bound": found.bound}} if found else {}


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
    row: Row = {"peers": peers} | _floor(case, facts["limits"])
    present = [name for name in names if name not in peers]

    def skip(reason: str) -> Row:
        return row | {"peers": peers | {name: {"skipped": reason} for name in present}}

    # Torch's own answer, then five calls to load and two to measure, of two contenders at least.
    needs = 15 * row["floor"]["s"] if "floor" in row else 0
    if needs > settings.limit_s:
        return skip(f"needs {needs:.0f} s at the least, the limit is {settings.limit_s:g} s a row")

    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        expected: dict[Case, Path] = {}  # what is right, by the case that a contender runs
        for name in present:
            own = load_peer(name).case(case)
            if own not in expected:
                progress(f"{own.label}: what is right", 0)
                path, judge = Path(folder) / f"{len(expected)}.pt", oracle(own)
                try:
                    contenders[judge].ask("expected", own, path, timeout=settings.limit_s)
                except (Late, Failed) as error:
                    contenders.kill(judge)
                    return skip(f"{judge} could not say what is right: {error}")
                expected[own] = path
            progress(f"{case.label}: loading {name}", 0)
            peers[name] = _load(case, name, expected[own], contenders, settings)

    ready = _within_limit([name for name in present if "call_s" in peers[name]], peers, settings)
    others = [busy()]  # everybody here is stopped
    _play(case, ready, peers, contenders, tool, settings, progress)
    others.append(busy())
    row["busy"] = max((share for share in others if share is not None), default=None)
    for name in ready if settings.memory else ():
        progress(f"{case.label}: memory of {name}", 0)
        peers[name]["peak_bytes"] = _peak_memory(case, name, contenders, settings)
    return row


def _within_limit(names: list[str], peers: dict[str, Any], settings: Settings) -> list[str]:
    """Those that can take a turn of one warm-up and one sample; the others are told why not."""
    for name in names:
        if 4 * peers[name]["call_s"] > settings.limit_s:
            reason = f"a call takes {peers[name]['call_s']:.3g} s"
            peers[name]["skipped"] = f"{reason}, the limit is {settings.limit_s:g} s a row"
    return [name for name in names if "skipped" not in peers[name]]


def _play(
    case: Case,
    names: list[str],
    peers: dict[str, Any],
    contenders: Field,
    tool: Probe,
    settings: Settings,
    progress: Callable[[str, int], None],
) -> None:
    """As many rounds as were asked for and fit into the limit, at least one."""
    turns = (max(2 * peers[n]["call_s"], settings.warm_s + settings.sample_s) for n in names)
    round_s = sum(turn + 0.01 for turn in turns)
    rounds = max(1, min(settings.rounds, int(settings.limit_s / round_s))) if names else 0
    for i in range(rounds):
        progress(f"{case.label}: round {i + 1} of {rounds}", 0)
        start = i % len(names)
        for name in names[start:] + names[:start]:  # everybody follows somebody else
            if "failed" not in peers[name]:
                _take_turn(name, peers[name], contenders, tool, settings)
    for name in names:
        if "failed" in peers[name]:  # ratios need all rounds
            peers[name].pop("rounds", None)


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
    timeout = 10 + 20 * record["call_s"]
    try:
        answer = contenders[name].ask("turn", settings.warm_s, settings.sample_s, timeout=timeout)
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
