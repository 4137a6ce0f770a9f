"""What can be known of the CUDA engine without a card: its plans, its index arithmetic.

Its results are tested by the whole suite with FUSED_RNN_TEST_ENGINE=emulated, its registers by
compile_gate.py, and on a card by test_cuda.py.
"""

from __future__ import annotations

import itertools
import random
import shutil
import subprocess
import sys
from pathlib import Path

import emulated
import pytest

from fused_rnn import build

ROOT = Path(__file__).resolve().parents[1]
pytestmark = pytest.mark.skipif(not shutil.which("c++"), reason="there is no compiler")

# Multiprocessors and bytes of second-level cache, from the vendor's data sheets.
CARDS = {
    "A100": (108, 40 << 20),
    "H100": (132, 50 << 20),
    "H200": (132, 60 << 20),
    "RTX 4090": (128, 72 << 20),
    "RTX 3060": (28, 3 << 20),
}
GATES = {"rnn": (1, 1), "gru": (3, 3), "lstm": (4, 4)}
STORAGES = {"float32": 0, "float64": 1, "bfloat16": 2, "float16": 3}
STEPS, GRAPH = 0, 1


def compiled(folder: Path, *sources: str, flags: tuple[str, ...] = ()) -> Path:
    program = folder / "program"
    command = [*build.find_compiler().command, "-std=c++17", "-O1", "-Wno-psabi", *flags]
    command += ["-Wno-unknown-pragmas", f"-I{build.CSRC}", f"-I{ROOT / 'tests/cpp'}"]
    done = subprocess.run(
        [*command, "-x", "c++", *(str(ROOT / s) for s in sources), "-o", str(program), "-pthread"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return program


@pytest.fixture(scope="module")
def plan(tmp_path_factory):
    """Plans for many problems: (card, cell, H, B, T, storage, dirs, ragged, training, force)."""
    program = compiled(
        tmp_path_factory.mktemp("plan"), "tests/cpp/plan_main.cpp", "csrc/cuda/plan.cpp"
    )

    def make(problems):
        lines = []
        for card, cell, hidden, batch, time, storage, dirs, ragged, training, force in problems:
            words = [*CARDS[card], *GATES[cell], hidden, batch, time, STORAGES[storage], dirs]
            lines.append(" ".join(map(str, [*words, int(ragged), int(training), force or "-"])))
        done = subprocess.run([program], input="\n".join(lines), capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        plans = done.stdout.splitlines()
        assert len(plans) == len(lines)
        return [
            tuple(map(int, line.split())) if not line.startswith("invalid") else line
            for line in plans
        ]

    return make


def test_plans_are_possible(plan):
    """Blocks that every card can launch, chunks that cover the sequence, streams that exist."""
    shapes = list(itertools.product((1, 65, 128, 1024, 8192), (1, 7, 256, 70000), (1, 9, 5000)))
    flags = itertools.product(CARDS, GATES, STORAGES, (1, 2), (False, True), (False, True))
    problems = [
        (card, cell, *random.choice(shapes), storage, dirs, ragged, training, None)
        for card, cell, storage, dirs, ragged, training in flags
        for _ in range(6)
    ]
    for problem, (variant, x, y, streams, chunk) in zip(problems, plan(problems), strict=True):
        _, _, hidden, _, time, _, dirs, *_ = problem
        assert variant in (STEPS, GRAPH), problem
        assert x % 32 == 0 and 32 <= x * y <= 256 and x < hidden + 32, problem
        assert 1 <= streams <= dirs, problem
        assert 1 <= chunk <= time, problem


def test_plans_of_known_shapes(plan):
    def one(card="H100", cell="lstm", H=512, B=64, T=256, storage="bfloat16", dirs=1, force=None):
        return plan([(card, cell, H, B, T, storage, dirs, False, True, force)])[0]

    # A single step is launched as it is; a sequence is worth a graph.
    assert one(T=1)[0] == STEPS and one(T=256)[0] == GRAPH
    # Two directions run side by side unless one fills the card.
    assert one(dirs=2)[3] == 2 and one(dirs=2, H=2048, B=512)[3] == 1 and one(dirs=1)[3] == 1
    assert one(dirs=2, H=1024, B=128)[3] == 2 and one("RTX 3060", dirs=2, H=1024, B=128)[3] == 1
    # Few units: small blocks, so that more multiprocessors have work. Many: large ones.
    assert one(B=1)[1:3] == (64, 1) and one(B=256, H=1024)[1:3] == (256, 1)
    # Short rows share a block.
    assert one(B=4096, H=32)[1:3] == (32, 8)
    # Gates that fit into half of the cache are computed for all steps at once.
    assert one(H=64, B=16, T=1000)[4] == 1000
    # Otherwise for as many steps as fill the card with their product.
    assert one(H=2048, B=256, T=1000)[4] == 4096 // 256


def test_variant_can_be_forced(plan):
    problem = ("A100", "gru", 128, 8, 100, "float32", 1, False, False)
    steps, graph, bad = plan([(*problem, "steps"), (*problem, "graph"), (*problem, "fast")])
    assert (steps[0], graph[0]) == (STEPS, GRAPH) and steps[1:] == graph[1:]
    assert bad == "invalid: FUSED_RNN_VARIANT is 'fast': use steps or graph"


def test_stays_in_bounds() -> None:
    """No kernel and no product of the engine reads or writes past a tensor or its workspace."""
    env = emulated.sanitizer("emulated-asan")
    if env is None:
        pytest.skip("this compiler has no address sanitizer")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/test_ops.py"]
    done = subprocess.run(
        [*command, "-k", "agrees_with_float64 or any_layout or only_wanted"],
        cwd=ROOT,
        env=env,
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]


def test_more_than_2_31_elements(tmp_path):
    sources = ["tests/cpp/index_main.cpp", "csrc/cuda/plan.cpp"]
    sources += [f"tests/cpp/{name}" for name in emulated.STAND_INS]
    program = compiled(tmp_path, *sources, flags=("-DFUSED_RNN_EMULATE",))
    done = subprocess.run([program], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, "ok\n"), done.stderr
