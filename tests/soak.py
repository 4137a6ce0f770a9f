"""``make soak``: random layers and calls for an hour, on kernels and in plain PyTorch.

    python tests/soak.py --minutes 5 --engines native,emulated,cpu-asan

Everything that ``problems`` can draw, of the package's cells, the zoo's and random ones, is
compared with the reference in float64. An engine is "native", with sets of instructions that are
drawn, or one of ``emulated``, some of which have sanitizers. Each has a process that computes, and
may crash or hang; every ten minutes another one, of other cells, before whose end calls are
repeated: memory that grows then is a failure, but where a sanitizer holds it back. A failure is
made smaller and becomes a test in tests/found.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import hashlib
import itertools
import os
import pickle
import random
import re
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import emulated
import problems
import random_cells
import torch
from helpers import Named, assert_all_close, assert_no_worse, resident
from problems import Config
from random_cells import Drawn

from fused_rnn import build, reference

ROOT = Path(__file__).resolve().parents[1]
FOUND = ROOT / "tests" / "found"
DTYPES = ("float64", "float32", "bfloat16", "float16")
CHAPTER = 600.0  # seconds of one process
PATIENCE = 1800.0  # seconds of one call, in which cells may be compiled
MIB = 1 << 20
LEAK = MIB // 2  # of each of two repetitions of calls that the process has done before
REPEATED = 20  # calls
ENOUGH = 5  # failures of one engine
DRAWS = 32  # of other numbers, where kernels are worse by little

# --- In the process that computes -----------------------------------------------------------------


def check(config: Config) -> bool:
    """Raise AssertionError where kernels and plain PyTorch differ; return whether kernels did it.

    In one of thousands of calls kernels are worse by luck: in short types, and where a layer makes
    roundings large, as a norm over two units does. But then plain PyTorch is worse than kernels as
    often. So where they are not far off, other numbers are drawn, and both are counted.
    """
    call = results(config)
    try:
        call.judge()
        return call.native
    except TooFar as error:
        worse = theirs_worse = 0
        for i in range(DRAWS):
            other = results(replace(config, seed=config.seed + 1 + i))
            worse += other.too_far()
            theirs_worse += other.theirs_too_far()
        if worse > 2 * theirs_worse + DRAWS // 8:
            raise
        print(f"by luck, {worse} and {theirs_worse} of {DRAWS}: {error}: {config}")
        return call.native


class TooFar(AssertionError):
    """By little."""


@dataclass
class Results:
    """Of one call: outputs with and without gradients, and gradients."""

    config: Config
    native: bool  # whether kernels did it
    found: Named
    theirs: Named  # of plain PyTorch
    exact: Named  # in float64

    @property
    def terms(self) -> int:
        config = self.config
        return max(4 * config.hidden_size, config.input_size, config.batch * config.time)

    def judge(self) -> None:
        if self.config.dtype == "float64":
            # ATen has 1/6 of hardsigmoid's derivative in float32.
            tol = 1e-6 if isinstance(self.config.cell, Drawn) else 1e-9
            return assert_all_close(self.found, self.exact, tol)
        assert_no_worse(self.found, self.theirs, self.exact, self.terms, more=4.0)
        try:
            assert_no_worse(self.found, self.theirs, self.exact, self.terms)
        except AssertionError as error:
            raise TooFar(str(error)) from None

    def too_far(self) -> bool:
        try:
            self.judge()
            return False
        except TooFar:
            return True

    def theirs_too_far(self) -> bool:
        """What ``too_far`` says where plain PyTorch and kernels change places."""
        try:
            assert_no_worse(self.theirs, self.found, self.exact, self.terms)
            return False
        except AssertionError:
            return True


def results(config: Config) -> Results:
    """Called again, kernels give the same."""
    torch.set_num_threads(config.threads)
    problem, draws = problems.make(config), problems.Draws(config.seed)

    def run(p: problems.Problem) -> Named:
        with draws.used():
            return problems.with_gradients(p, problems.call(p), getattr(torch, config.dtype))

    asked, plain = [], reference.recurrent

    def noticed(*args: Any, **kwargs: Any) -> Any:
        asked.append(args)
        return plain(*args, **kwargs)

    try:
        reference.recurrent = noticed
        found = run(problem)
    finally:
        reference.recurrent = plain
    for name, value in run(problem).items():
        assert torch.equal(value.nan_to_num(), found[name].nan_to_num()), f"{name}: not as before"
    with problems.on_reference():
        exact = run(problem.to(torch.float64))
        theirs = exact if config.dtype == "float64" else run(problem)
    with draws.used(), torch.no_grad():
        outputs = problems.call(problem)
    for i, output in enumerate(outputs):
        name = f"output {i} without gradients"
        found[name] = output
        theirs[name], exact[name] = theirs[f"output {i}"], exact[f"output {i}"]
    return Results(config, not asked, found, theirs, exact)


def memory() -> int:
    """Bytes in memory once all is given back that can be."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return resident()


def serve() -> None:
    """Answer questions from standard input: configs by (whether on kernels, what is wrong), None by
    the memory in use."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what others print is no answer
    warnings.simplefilter("error", RuntimeWarning)
    if emulated.ENGINE:
        emulated.use()
    while True:
        try:
            question = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        answer: Any
        if question is None:
            answer = memory()
        else:
            try:
                answer = check(question), ""
            except Exception as error:
                traceback.print_exc()
                answer = False, f"{type(error).__name__}: {error}"
        pickle.dump(answer, answers)
        answers.flush()


# --- Around it ------------------------------------------------------------------------------------


class Worker:
    """The process, started anew when it has ended."""

    def __init__(self, command: Sequence[str], env: dict[str, str]) -> None:
        self.command, self.env = command, env
        self.errors = tempfile.TemporaryFile("w+")
        self.process: subprocess.Popen[bytes] | None = None

    def ask(self, question: Config | None) -> Any:
        """Its answer; a string about its end where there is none."""
        if self.process is None:
            self.process = subprocess.Popen(
                self.command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self.errors,
                env=self.env,
                cwd=ROOT,
            )
        timer = threading.Timer(PATIENCE, self.process.kill)
        timer.start()
        assert self.process.stdin and self.process.stdout
        try:
            pickle.dump(question, self.process.stdin)
            self.process.stdin.flush()
            return pickle.load(self.process.stdout)
        except (EOFError, OSError):
            code, last = self.process.wait(), self.said()
            self.process = None
            end = f"signal {-code}" if code < 0 else f"exit code {code}"
            late = "" if timer.is_alive() else f" after {PATIENCE:g} s"
            return f"Ended: by {end}{late}: {last}"
        finally:
            timer.cancel()

    def failure(self, config: Config) -> str:
        """What is wrong with it, "" if nothing is."""
        answer = self.ask(config)
        return answer if isinstance(answer, str) else answer[1]

    def said(self) -> str:
        """The last lines of its errors; of a sanitizer, those that say what."""
        self.errors.seek(0)
        lines = self.errors.read().splitlines()[-200:]
        told = [line for line in lines if "Sanitizer" in line or "runtime error" in line]
        return "\n".join(told[:1] + lines[-3:])

    def close(self) -> None:
        if self.process:
            self.process.communicate()
        self.errors.close()


def started(engine: str, rng: random.Random) -> Worker:
    """A process for the engine. A set of instructions is drawn."""
    env = {**os.environ, "FUSED_RNN_BACKEND": "native"}
    if engine.endswith("-asan"):
        found = emulated.sanitizer(engine)
        if found is None:
            sys.exit(f"{engine}: this compiler has no address sanitizer")
        env |= found
    elif engine != "native":
        env["FUSED_RNN_TEST_ENGINE"] = engine
    if not engine.startswith("emulated"):
        env["FUSED_RNN_CPU_CAPABILITY"] = rng.choice(build.levels())  # at most
    env["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return Worker([sys.executable, "-u", __file__, "--serve"], env)


def drawn(engine: str, cells: Sequence[str | Drawn], rng: random.Random) -> Config:
    chance = rng.random()
    if engine == "native":
        sizes = problems.LARGE if chance < 0.1 else problems.MIDDLE
    else:
        sizes = problems.MIDDLE if chance < 0.4 else problems.SMALL
    options = problems.some_options(rng, 0.15)
    fitting = [c for c in cells if all(problems.can_have(c, o) for o in options)]
    return problems.draw(rng, options, cells=fitting, sizes=sizes, dtypes=DTYPES)


def memory_of(worker: Worker) -> int:
    """Bytes; 0 if it has ended."""
    used = worker.ask(None)
    return used if isinstance(used, int) else 0


@dataclass
class Soak:
    """What one engine does, and what comes of it."""

    engine: str
    seconds: float
    seed: int
    say: Callable[[str], None]
    found: int = 0
    known: set[str] = field(default_factory=set)  # what failures say, but for numbers

    def run(self) -> int:
        """The number of failures."""
        rng, end = random.Random(f"{self.seed} {self.engine}"), time.monotonic() + self.seconds
        while time.monotonic() < end and self.found < ENOUGH:
            self.chapter(rng, min(end, time.monotonic() + CHAPTER))
        return self.found

    def chapter(self, rng: random.Random, end: float) -> None:
        """One process, with cells of its own beside those of the package."""
        few = 1 if self.engine.startswith("emulated") else 3
        cells = [*problems.KINDS, *rng.sample(problems.ZOO, few)]
        cells += [random_cells.by_chance(rng, most=20) for _ in range(few - few // 2)]
        worker, done, on_kernels = started(self.engine, rng), 0, 0
        # Each cell in each type first, so that all libraries are there.
        first = [
            problems.draw(rng, cells=[cell], dtypes=[dtype]) for cell in cells for dtype in DTYPES
        ]
        right: list[Config] = []
        before = 0
        while (time.monotonic() < end or not done) and self.found < ENOUGH:
            config = first.pop() if first else drawn(self.engine, cells, rng)
            answer = worker.ask(config)
            done += 1
            if isinstance(answer, str) or answer[1]:
                self.report(worker, config, answer if isinstance(answer, str) else answer[1])
                right.clear()
                continue
            on_kernels += answer[0]
            right.append(config)
            if not first and not before:
                before = memory_of(worker)
        level = worker.env.get("FUSED_RNN_CPU_CAPABILITY", "")
        own = ", ".join(c if isinstance(c, str) else "random" for c in cells[len(problems.KINDS) :])
        memory = self.watch(worker, before, right[-REPEATED:])
        self.say(
            f"{self.engine} {level}: {done} calls, {on_kernels} all on kernels; with {own}; "
            f"memory {memory}; failures so far {self.found}"
        )
        worker.close()

    def watch(self, worker: Worker, before: int, configs: Sequence[Config]) -> str:
        """What became of the memory, ``before`` new calls and in calls that are repeated."""
        after, rounds = memory_of(worker), list[int]()
        for _ in range(3):
            for config in configs:
                worker.ask(config)
            rounds.append(memory_of(worker))
        # What leaks does in every round. In new calls, caches fill: plans, workspaces, what
        # libraries compiled. Sanitizers hold back what is freed, so growth says nothing under them.
        grown = min(later - earlier for earlier, later in itertools.pairwise(rounds))
        if grown > LEAK and not self.engine.endswith("-asan"):
            self.found += 1
            self.say(f"{self.engine}: FAILED: memory grows: {before}, {after}, then {rounds}")
        grew = f"{grown / MIB:.2f} MB more"
        return f"{before // MIB} to {after // MIB} MB, in each round of calls repeated {grew}"

    def report(self, worker: Worker, config: Config, failure: str) -> None:
        words = re.sub(r"\d+", "", failure.partition("\n")[0])
        if words in self.known:
            return
        self.known.add(words)
        self.found += 1
        self.say(f"{self.engine}: FAILED: {failure}\n  {config}\n  making it smaller")
        least = minimised(config, failure, worker.failure)
        path = written(self.engine, least, worker.failure(least) or failure, worker.env)
        self.say(f"{self.engine}: {least}\n  {path.relative_to(ROOT)} has it as a test")


# --- A failure as a test --------------------------------------------------------------------------

TOGETHER = (("norm", "norm_at", "norm_eps"), ("num_layers", "dropout", "dropout_over_time"))


def smaller(config: Config) -> Iterator[Config]:
    """Configs that are simpler in one way, the simplest first."""
    least, own = Config(), ("cell", "dtype", "seed")
    names = [name for name in config.changed if name not in own]
    groups = [group for group in TOGETHER if set(group) & set(names)]
    for group in (*groups, *((name,) for name in names)):
        yield replace(config, **{name: getattr(least, name) for name in group})
    for name in ("time", "batch", "num_layers", "input_size", "hidden_size"):
        size = getattr(config, name)
        for less in sorted({2, 3, 4, size // 4, size // 2, 3 * size // 4, size - 1}):
            if 1 < less < size:
                yield replace(config, **{name: less})


def minimised(
    config: Config, failure: str, fails: Callable[[Config], str], tries: int = 200
) -> Config:
    """The simplest that fails in the same way that was found in so many tries."""
    way = failure.partition(":")[0]
    while True:
        for simpler in smaller(config):
            if not simpler.fits or simpler == config:
                continue
            tries -= 1
            if tries < 0:
                return config
            if fails(simpler).partition(":")[0] == way:
                config = simpler
                break
        else:
            return config


TEST = '''"""Found by tests/soak.py: {failure}

    {command}
"""

import pytest
from problems import Config
from random_cells import Drawn  # noqa: F401
from soak import check

pytestmark = pytest.mark.parity


def test_it() -> None:
    check(
        {config}
    )
'''


def written(engine: str, config: Config, failure: str, env: dict[str, str]) -> Path:
    """The file of a test that fails on this engine."""
    digest = hashlib.sha256(f"{engine} {config}".encode()).hexdigest()[:8]
    path = FOUND / f"test_{engine.replace('-', '_')}_{digest}.py"
    names = ("FUSED_RNN_TEST_ENGINE", "FUSED_RNN_CPU_CAPABILITY", "LD_PRELOAD", "ASAN_OPTIONS")
    given = " ".join(f"{name}='{env[name]}'" for name in names if env.get(name))
    command = f"{given} python -m pytest {path.relative_to(ROOT)}".strip()
    text = TEST.format(
        failure=failure.replace("\\", "/").replace('"""', "'''"), command=command, config=config
    )
    FOUND.mkdir(exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--engines", default="native,emulated")
    parser.add_argument("--seed", type=int, default=int.from_bytes(os.urandom(4), "little"))
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        return serve()
    engines, begin, lock = arguments.engines.split(","), time.monotonic(), threading.Lock()

    def say(text: str) -> None:
        with lock:
            print(f"[{(time.monotonic() - begin) / 60:5.1f} min] {text}", flush=True)

    say(f"{arguments.minutes:g} minutes on {', '.join(engines)}; --seed {arguments.seed}")
    soaks = [Soak(e, 60 * arguments.minutes, arguments.seed, say) for e in engines]
    with ThreadPoolExecutor(len(soaks)) as pool:
        failures = sum(pool.map(Soak.run, soaks))
    say(f"{failures} failures")
    sys.exit(int(failures > 0))


if __name__ == "__main__":
    main()
