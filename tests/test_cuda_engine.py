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
from typing import NamedTuple

import emulated
import pytest

from fused_rnn import build

ROOT = Path(__file__).resolve().parents[1]
pytestmark = pytest.mark.skipif(not shutil.which("c++"), reason="there is no compiler")

# Multiprocessors, compute capability (major), bytes of second-level cache and of shared memory of a
# block, from the vendor's data sheets.
CARDS = {
    "V100": (80, 7, 6 << 20, 96 << 10),
    "A100": (108, 8, 40 << 20, 163 << 10),
    "H100": (132, 9, 50 << 20, 227 << 10),
    "H200": (132, 9, 60 << 20, 227 << 10),
    "RTX 4090": (128, 8, 72 << 20, 99 << 10),
    "RTX 3060": (28, 8, 3 << 20, 99 << 10),
}
GATES = {"rnn": (1, 1), "gru": (3, 3), "lstm": (4, 4)}
STORAGES = {"float32": 0, "float64": 1, "bfloat16": 2, "float16": 3}
STEPS, GRAPH, RESIDENT, LOCAL = range(4)


class Plan(NamedTuple):
    variant: int
    threads_x: int
    threads_y: int
    streams: int
    chunk_steps: int
    blocks: int
    groups: int
    tiles: int
    copies: int


class Problem(NamedTuple):
    card: str = "H100"
    cell: str = "lstm"
    H: int = 512
    B: int = 64
    T: int = 256
    storage: str = "bfloat16"
    dirs: int = 1
    projected: bool = False
    allow_tf32: bool = True
    force: str | None = None


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
def plans(tmp_path_factory):
    """The plans for many problems; what MakePlan throws, as text."""
    program = compiled(
        tmp_path_factory.mktemp("plan"), "tests/cpp/plan_main.cpp", "csrc/cuda/plan.cpp"
    )

    def make(problems):
        lines = []
        for p in problems:
            words = [*CARDS[p.card], *GATES[p.cell], p.H, p.B, p.T, STORAGES[p.storage], p.dirs]
            words += [int(p.projected), int(p.allow_tf32), p.force or "-"]
            lines.append(" ".join(map(str, words)))
        done = subprocess.run([program], input="\n".join(lines), capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        answers = done.stdout.splitlines()
        assert len(answers) == len(lines)
        return [
            Plan(*map(int, line.split())) if not line.startswith("invalid") else line
            for line in answers
        ]

    return make


def ceil(a: int, b: int) -> int:
    return -(-a // b)


def test_plans_are_possible(plans):
    """Blocks that every card can launch, chunks that cover the sequence, streams that exist; for
    kernels that keep their weights, instances that exist, and blocks that fit on the card."""
    shapes = list(
        itertools.product((1, 24, 64, 65, 128, 1024, 8192), (1, 7, 256, 70000), (1, 9, 5000))
    )
    flags = itertools.product(CARDS, GATES, STORAGES, (1, 2), *[(False, True)] * 2)
    problems = [
        Problem(card, cell, *random.choice(shapes), storage, *flags, force)
        for card, cell, storage, *flags in flags
        for force in (None, None, None, "resident", "local")
    ]
    seen = set()
    for problem, found in zip(problems, plans(problems), strict=True):
        x, y = found.threads_x, found.threads_y
        assert x % 32 == 0 and 32 <= x * y <= 256 and x < problem.H + 32, problem
        assert 1 <= found.streams <= problem.dirs, problem
        assert 1 <= found.chunk_steps <= problem.T, problem
        seen.add(found.variant)
        if found.variant not in (RESIDENT, LOCAL):
            continue
        multiprocessors, major, _, shared = CARDS[problem.card]
        size = {"float32": 4, "bfloat16": 2, "float16": 2}[problem.storage]  # never float64
        gates = GATES[problem.cell][1]
        assert major >= 8 and not problem.projected and problem.H * size % 16 == 0, problem
        assert size == 2 or problem.allow_tf32, problem
        assert (found.copies - 1) * found.tiles * 8 < problem.B <= found.copies * found.tiles * 8
        if found.variant == LOCAL:
            assert found.groups in (1, 2) and problem.H <= 16 * found.groups, problem
        else:
            assert found.blocks in (1, 2, 4, 8) and found.tiles in (1, 2, 4), problem
            assert found.blocks * 8 * 64 >= problem.H * size, problem
            assert gates * found.blocks * found.groups <= 16, problem
            blocks = ceil(problem.H, 16 * found.groups) * found.copies * problem.dirs
            assert blocks <= multiprocessors, problem
            assert 8192 * gates * found.groups * found.tiles <= shared, problem
    assert seen == {STEPS, GRAPH, RESIDENT, LOCAL}


def test_plans_of_known_shapes(plans):
    def one(**arguments) -> Plan:
        return plans([Problem(**arguments)])[0]

    # A single step is launched as it is; a sequence is worth a graph, or one kernel.
    assert one(T=1).variant == STEPS
    assert one(T=256).variant == RESIDENT and one(T=256, storage="float64").variant == GRAPH
    # Exact float32 products are no work for tensor cores, nor are large layers for registers.
    assert one(storage="float32", H=256).variant == RESIDENT
    assert one(storage="float32", H=256, allow_tf32=False).variant == GRAPH
    assert one(H=2048).variant == GRAPH and one(H=2048, cell="rnn", B=16).variant == RESIDENT
    assert one(card="V100").variant == GRAPH and one(projected=True).variant == GRAPH
    # Small layers need one block for some rows of the batch.
    assert one(H=32, storage="float32").variant == LOCAL and one(H=40).variant == RESIDENT
    # Rows that cannot be read 16 bytes at a time.
    assert one(H=28).variant == GRAPH and one(H=28, storage="float32").variant == LOCAL
    # More rows of the batch: more copies, then more units in a block, then more rows.
    assert one(B=8)[-3:] == (1, 1, 1) and one(B=32)[-3:] == (1, 1, 4)
    assert one(B=64)[-3:] == (2, 1, 8) and one(B=128)[-3:] == (2, 2, 8)
    # Two directions run side by side unless one fills the card.
    steps = {"force": "graph", "dirs": 2}
    assert one(**steps).streams == 2 and one(**steps, H=2048, B=512).streams == 1
    assert one(force="graph").streams == 1 and one(**steps, H=1024, B=128).streams == 2
    assert one(**steps, card="RTX 3060", H=1024, B=128).streams == 1
    # Few units: small blocks, so that more multiprocessors have work. Many: large ones.
    assert one(B=1)[1:3] == (64, 1) and one(B=256, H=1024)[1:3] == (256, 1)
    # Short rows share a block.
    assert one(B=4096, H=32)[1:3] == (32, 8)
    # Gates that fit into half of the cache are computed for all steps at once.
    assert one(H=64, B=16, T=1000, force="graph").chunk_steps == 1000
    # Otherwise for as many steps as fill the card with their product.
    assert one(H=2048, B=256, T=1000).chunk_steps == 4096 // 256


def test_variant_can_be_forced(plans):
    problem = Problem("A100", "gru", 32, 8, 100, "float16")
    words = ("steps", "graph", "resident", "local", "fast")
    *found, bad = plans([problem._replace(force=word) for word in words])
    assert [plan.variant for plan in found] == [STEPS, GRAPH, RESIDENT, LOCAL]
    assert found[0][1:] == found[1][1:]
    assert bad == "invalid: FUSED_RNN_VARIANT is 'fast': use steps, graph, resident or local"
    assert plans([problem._replace(H=65, force="local")])[0].variant == GRAPH


def test_stays_in_bounds() -> None:
    """No kernel and no product of the engine reads or writes past a tensor or its workspace."""
    env = emulated.sanitizer("emulated-asan")
    if env is None:
        pytest.skip("this compiler has no address sanitizer")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    command += ["tests/test_ops.py", "tests/test_resident.py", "-k"]
    done = subprocess.run(
        [
            *command,
            "agrees_with_float64 or any_layout or only_wanted"
            " or (as_steps and packed and bfloat and not relu)",  # which reads what tanh reads
        ],
        cwd=ROOT,
        env=env,
        capture_output=True,
        text=True,
        timeout=1800,
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]


def test_more_than_2_31_elements(tmp_path):
    sources = ["tests/cpp/index_main.cpp", "csrc/cuda/plan.cpp"]
    sources += [f"tests/cpp/{name}" for name in emulated.STAND_INS]
    program = compiled(tmp_path, *sources, flags=("-DFUSED_RNN_EMULATE",))
    done = subprocess.run([program], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, "ok\n"), done.stderr
