"""tests/soak.py: it finds what is wrong, makes it smaller, and writes it down as a test."""

from __future__ import annotations

import ast
import os
import random
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import problems
import pytest
import random_cells
import soak
import torch
from helpers import native
from problems import Config
from random_cells import Drawn

from fused_rnn import ops

pytestmark = pytest.mark.unit
needs_kernels = pytest.mark.skipif(not native(), reason="about kernels")


@pytest.mark.parametrize("often", [0.1, 0.4])
def test_what_is_drawn_is_a_layer(often: float, seed: int) -> None:
    rng = random.Random(f"{seed} {often}")
    cells = [*problems.KINDS, *problems.ZOO, random_cells.by_chance(rng)]
    for _ in range(40):
        options = problems.some_options(rng, often)
        fitting = [c for c in cells if all(problems.can_have(c, o) for o in options)]
        config = problems.draw(rng, options, cells=fitting, dtypes=soak.DTYPES)
        assert config.fits, config
        assert problems.make(config).module.hidden_size == config.hidden_size
        assert eval(repr(config), vars(problems)) == config
        for simpler in soak.smaller(config):
            if simpler.fits:
                problems.make(simpler)


def test_a_few_calls(seed: int) -> None:
    rng = random.Random(seed)
    for _ in range(5):
        soak.check(soak.drawn("emulated", problems.KINDS, rng))


@needs_kernels
@pytest.mark.parametrize("dtype", ["float64", "bfloat16"])
def test_wrong_numbers_are_found(dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config = Config(
        cell="LSTM", hidden_size=9, time=4, batch=3, layout="lengths", dtype=dtype, seed=1
    )
    assert soak.check(config)
    right = ops.recurrent

    def wrong(*args: Any, **kwargs: Any) -> Any:
        y, *states = right(*args, **kwargs)
        first = torch.zeros_like(y)
        first.view(-1)[0] = 0.5
        return y + first, *states

    monkeypatch.setattr(ops, "recurrent", wrong)
    with pytest.raises(AssertionError, match="output 0: off by"):
        soak.check(config)


@pytest.mark.parametrize("factor, found", [(1.0, False), (4.0, True)], ids=["by luck", "worse"])
def test_errors_that_are_too_large_by_little(
    factor: float, found: bool, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    """Errors of kernels and of plain PyTorch are drawn, the former ``factor`` times as large.

    Of equal ones some 3 in 100 are more than twice the other.
    """

    def drawn(config: Config) -> soak.Results:
        rng = np.random.default_rng((seed, config.seed))
        exact = torch.ones(20, dtype=torch.float64)
        wrong = [exact + scale * 1e-4 * rng.lognormal(0.0, 0.26) for scale in (factor, 1.0)]
        values = [{"output 0": value.float()} for value in wrong]
        return soak.Results(config, True, *values, {"output 0": exact})

    monkeypatch.setattr(soak, "results", drawn)
    raised = 0
    for i in range(100):
        try:
            soak.check(Config(cell="LSTM", hidden_size=2, dtype="float32", seed=1000 * i))
        except AssertionError:
            raised += 1
    assert raised > 10 if found else raised == 0


def test_a_failure_is_made_smaller() -> None:
    rng = random.Random(0)
    big = problems.draw(rng, ("zoneout", "norm", "lengths", "reset_to"), sizes=problems.MIDDLE)
    big = replace(big, cell="LSTM", hidden_size=17, zoneout=(0.3, 0.2), blocks=1)

    def fails(config: Config) -> str:
        wrong = config.hidden_size > 2 and config.zoneout and config.reset
        return "AssertionError: off" if wrong else ""

    least = soak.minimised(big, "AssertionError: off by 3", fails)
    assert {**least.changed, "seed": 0} == {
        **Config(cell="LSTM", hidden_size=3, zoneout=(0.3, 0.2), reset="states").changed,
        "seed": 0,
    }
    other = soak.minimised(big, "TypeError: of another kind", fails)
    assert other == big


def test_a_failure_is_a_test(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(soak, "ROOT", tmp_path)
    monkeypatch.setattr(soak, "FOUND", tmp_path / "found")
    cell = random_cells.by_chance(random.Random(3))
    config = Config(cell=cell, hidden_size=3, norm="rms", norm_at=("input",), seed=4)
    env = {"FUSED_RNN_TEST_ENGINE": "emulated"}
    path = soak.written("emulated", config, 'E: a "text"\\', env)
    text = path.read_text()
    assert "FUSED_RNN_TEST_ENGINE='emulated' python -m pytest found/" in text
    (call,) = [n for n in ast.walk(ast.parse(text)) if isinstance(n, ast.Expr)
               and isinstance(n.value, ast.Call)]  # fmt: skip
    assert ast.unparse(call).startswith("check(Config(")
    space: dict[str, Any] = {"check": lambda found: found, "Config": Config, "Drawn": Drawn}
    assert eval(ast.unparse(call), space) == config


DIES = """
import os, pickle, sys
print("ERROR: AddressSanitizer: heap-buffer-overflow", file=sys.stderr)
pickle.load(sys.stdin.buffer)
os.abort()
"""


def test_a_process_that_dies_is_told_and_started_anew() -> None:
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    worker = soak.Worker([sys.executable, "-c", DIES], env)
    for _ in range(2):
        failure = worker.failure(Config())
        assert failure.startswith("Ended: by signal 6") and "heap-buffer-overflow" in failure
    worker.close()


USES = """
import pickle, sys

class Anything:
    pass

class Unpickler(pickle.Unpickler):
    def find_class(self, *name):  # without what they import
        return Anything

answers, calls, asked = sys.stdout.buffer, 0, 0
while True:
    try:
        question = Unpickler(sys.stdin.buffer).load()
    except EOFError:
        break
    calls += question is not None
    asked += question is None
    pickle.dump(MEMORY if question is None else (True, ""), answers)
    answers.flush()
"""


@pytest.mark.parametrize(
    "engine, memory, failures",
    [
        ("native", "100 * calls", 0),
        ("native", "100_000 * calls", 1),
        ("native", "(0, 0, 50, 40)[asked - 1] << 20", 0),
        ("cpu-asan", "100_000 * calls", 0),
    ],
)
def test_memory_that_grows(engine: str, memory: str, failures: int) -> None:
    said: list[str] = []
    worker = soak.Worker([sys.executable, "-c", USES.replace("MEMORY", memory)], dict(os.environ))
    watched = soak.Soak(engine, 1.0, 1, said.append)
    watched.watch(worker, 1, [Config()] * 20)
    worker.close()
    assert watched.found == failures == len(said)


@needs_kernels
@pytest.mark.slow
def test_the_program() -> None:
    command = [sys.executable, soak.__file__, "--minutes", "0.1", "--engines", "native"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0 and "0 failures" in done.stdout, done.stdout + done.stderr
