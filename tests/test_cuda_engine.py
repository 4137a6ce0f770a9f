"""What can be known of the CUDA engine without a card: its plans, its index arithmetic.

Its results are tested by the whole suite with FUSED_RNN_TEST_ENGINE=emulated, its registers by
compile_gate.py, and on a card by test_cuda.py.
"""

from __future__ import annotations

import itertools
import random
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import emulated
import pytest
from bound import bound, needs_compiler

from fused_rnn import reference

ROOT = Path(__file__).resolve().parents[1]

pytestmark = [
    pytest.mark.compiling,
    needs_compiler,
]

# Multiprocessors, compute capability (major), bytes of second-level cache and of shared memory of a
# block, from the vendor's data sheets.
CARDS = {
    "V100": (80, 7, 6 << 20, 96 << 10),
    "A100": (108, 8, 40 << 20, 163 << 10),
    "H100": (132, 9, 50 << 20, 227 << 10),
    "H200": (132, 9, 60 << 20, 227 << 10),
    "RTX 4090": (128, 8, 72 << 20, 99 << 10),
    "RTX 3060": (28, 8, 3 << 20, 99 << 10),
    "RTX 3090": (82, 8, 6 << 20, 99 << 10),
    "RTX 5090": (170, 12, 96 << 20, 99 << 10),
    "B200": (148, 10, 126 << 20, 227 << 10),
}
STORAGES = ("float32", "float64", "bfloat16", "float16")
CELLS = ("rnn_tanh", "gru", "lstm")


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
    at_once: int | None = None  # blocks, if not one for each multiprocessor
    largest_cluster: int = 16
    kept: bool = True
    stages: bool = False
    norms: bool = False
    blocks: int = 1
    has_resident: bool = True
    gates: int | None = None  # of each part, if not the cell's
    affine: bool = False  # and then without a recurrent product


@pytest.fixture(scope="module")
def engine() -> Any:
    return bound("tests/cpp/bind_cuda_plan.cpp", "csrc/cuda/plan.cpp")


def plan(engine: Any, problem: Problem) -> Any:
    p, device = engine.Problem(), engine.Device()
    device.multiprocessors, device.major, device.l2_bytes, device.shared_bytes = CARDS[problem.card]
    p.gates_x = p.gates_h = problem.gates or reference.CELLS[problem.cell].gates
    if problem.affine:
        p.gates_h = 0
    for name in ("H", "B", "T", "dirs", "projected", "allow_tf32", "kept"):
        setattr(p, name, getattr(problem, name))
    for name in ("stages", "norms", "blocks", "has_resident", "affine"):
        setattr(p, name, getattr(problem, name))
    p.storage = getattr(engine.Storage, problem.storage)
    p.aligned = True
    at_once = device.multiprocessors if problem.at_once is None else problem.at_once

    def together(plan: Any) -> int:
        if plan.variant != engine.Variant.cluster:
            return at_once
        blocks = ceil(problem.H, 16 * plan.groups)
        if blocks > problem.largest_cluster:
            return 0
        # Of a large card some multiprocessors lie where a cluster has no place.
        return (at_once - at_once // 9) // blocks * blocks

    return engine.make_plan(device, p, problem.force, together)


def ceil(a: int, b: int) -> int:
    return -(-a // b)


def test_plans_are_possible(engine: Any) -> None:
    """Blocks that every card can launch, chunks that cover the sequence, streams that exist; for
    kernels that keep their weights, instances that exist, and blocks that fit on the card."""
    shapes = list(
        itertools.product((1, 24, 64, 65, 128, 1024, 8192), (1, 7, 256, 70000), (1, 9, 5000))
    )
    flags = itertools.product(CARDS, CELLS, STORAGES, (1, 2), *[(False, True)] * 2)
    problems = [
        Problem(card, cell, *random.choice(shapes), storage, *flags, force, kept=kept)
        for card, cell, storage, *flags in flags
        for force in (None, None, None, "resident", "cluster", "local")
        for kept in (False, True)
    ]
    problems += [
        problem._replace(affine=True, has_resident=False, force=force)
        for problem in problems[::6]
        for force in (None, "scan")
    ]
    variants, seen = engine.Variant, set()
    for problem in problems:
        found = plan(engine, problem)
        x, y = found.threads_x, found.threads_y
        assert x % 32 == 0 and 32 <= x * y <= 256 and x < problem.H + 32, problem
        assert 1 <= found.streams <= problem.dirs, problem
        assert 1 <= found.chunk_steps <= problem.T, problem
        seen.add(found.variant)
        if found.variant == variants.scan:
            assert problem.affine and 1 <= found.scan_length <= found.chunk_steps, problem
            chunks = ceil(found.chunk_steps, found.scan_length)
            assert (chunks - 1) ** 2 <= 2 * found.chunk_steps, problem
        if found.variant not in (variants.resident, variants.cluster, variants.local):
            continue
        multiprocessors, major, _, shared = CARDS[problem.card]
        size = {"float32": 4, "bfloat16": 2, "float16": 2}[problem.storage]  # never float64
        gates = reference.CELLS[problem.cell].gates
        assert major >= 8 and not problem.projected and problem.H * size % 16 == 0, problem
        assert size == 2 or problem.allow_tf32, problem
        assert (found.copies - 1) * found.tiles * 8 < problem.B <= found.copies * found.tiles * 8
        of_copy = ceil(problem.H, 16 * found.groups)
        if found.variant == variants.local:
            assert found.groups in (1, 2, 4, 8) and of_copy == 1, problem
            deep = ceil(16 * found.groups * size, 64)
            assert found.tiles == 1 and gates * found.groups * deep <= 12 * 8, problem
        elif found.variant == variants.cluster:
            assert major >= 9 and 2 <= of_copy <= 16, problem
            assert found.blocks * 8 * 64 >= problem.H * size, problem
            shape = (found.blocks, found.groups, found.tiles)
            assert shape in [(1, 2, 1), (1, 2, 2), (1, 4, 1), (2, 2, 1), (2, 2, 2)], problem
        else:
            assert found.blocks in (1, 2, 4, 8) and found.tiles in (1, 2, 4), problem
            assert found.blocks * 8 * 64 >= problem.H * size, problem
            assert gates * found.blocks * found.groups <= 16, problem
            blocks = of_copy * found.copies * problem.dirs
            assert blocks <= multiprocessors, problem
            assert 8192 * gates * found.groups * found.tiles <= shared, problem
    assert seen == set(variants.__members__.values())


def test_plans_of_known_shapes(engine: Any) -> None:
    def one(**arguments: Any) -> Any:
        return plan(engine, Problem(**arguments))

    def variant(**arguments: Any) -> str:
        return one(**arguments).variant.name

    def threads(**arguments: Any) -> tuple[int, int]:
        found = one(**arguments)
        return found.threads_x, found.threads_y

    def blocks(**arguments: Any) -> tuple[int, int, int]:
        found = one(**arguments)
        return found.groups, found.tiles, found.copies

    # A single step is launched as it is; a sequence is worth a graph, or one kernel.
    assert variant(T=1) == "steps"
    # Where nothing is kept of it, one kernel does it, of a few rows, as each four read the weights.
    assert variant(T=1, kept=False, B=16) == variant(T=1, kept=False, B=4, H=4096) == "one"
    assert variant(T=1, kept=False, B=17) == variant(T=1, kept=False, B=5, H=4096) == "steps"
    assert variant(T=1, kept=False, B=1, storage="float64") == "one"
    assert variant(T=1, kept=False, B=1, projected=True) == "steps"
    assert variant(T=2, kept=False, B=1, force="one") == "graph"
    assert variant(T=256) == "resident" and variant(T=256, storage="float64") == "graph"
    assert variant(B=16) == "cluster" and variant(B=16, T=7) == "graph"
    # Exact float32 products are no work for tensor cores, nor are large layers for registers.
    assert variant(storage="float32", H=256) == "cluster"
    assert variant(storage="float32", H=256, allow_tf32=False) == "graph"
    assert variant(H=2048) == "graph" and variant(H=2048, cell="rnn_tanh", B=16) == "resident"
    assert variant(card="V100") == "graph" and variant(projected=True) == "graph"
    # Small layers need one block for some rows of the batch, as far as their weights fit into it.
    for cell, most in (("rnn_tanh", 128), ("gru", 64), ("lstm", 64)):
        for storage in ("bfloat16", "float32"):
            units = 128 if storage == "bfloat16" and cell != "lstm" else most
            assert variant(cell=cell, H=units, storage=storage) == "local"
            assert variant(cell=cell, H=units + 8, storage=storage) == "cluster"
            assert variant(card="A100", cell=cell, H=units + 8, storage=storage) == "resident"
    # Rows that cannot be read 16 bytes at a time.
    assert variant(H=28) == "graph" and variant(H=28, storage="float32") == "local"
    # More rows of the batch: more copies, then more units in a block, then more rows.
    polled = {"force": "resident"}
    assert blocks(B=8, **polled) == (1, 1, 1) and blocks(B=32, **polled) == (1, 1, 4)
    assert blocks(B=64, **polled) == (2, 1, 8) and blocks(B=128, **polled) == (2, 2, 8)
    # Two directions run side by side unless one fills the card.
    steps = {"force": "graph", "dirs": 2}
    assert one(**steps).streams == 2 and one(**steps, H=2048, B=512).streams == 1
    assert one(force="graph").streams == 1 and one(**steps, H=1024, B=128).streams == 2
    assert one(**steps, card="RTX 3060", H=1024, B=128).streams == 1
    # Few units: small blocks, so that more multiprocessors have work. Many: large ones.
    assert threads(B=1) == (64, 1) and threads(B=256, H=1024) == (256, 1)
    # Short rows share a block.
    assert threads(B=4096, H=32) == (32, 8)
    # Gates that fit into half of the cache are computed for all steps at once.
    assert one(H=64, B=16, T=1000, force="graph").chunk_steps == 1000
    # Otherwise for as many steps as fill the card with their product.
    assert one(H=2048, B=256, T=1000).chunk_steps == 4096 // 256


def test_between_two_steps(engine: Any) -> None:
    """Kernels that have not what happens there are not chosen."""

    def variant(**arguments: Any) -> str:
        return plan(engine, Problem(**arguments)).variant.name

    one = {"T": 1, "B": 1, "kept": False}
    assert variant(**one) == "one"
    for more in ({"stages": True}, {"norms": True}, {"blocks": 8}):
        assert variant(**one, **more) == "steps"
    assert variant(B=16) == variant(B=16, blocks=8) == "cluster"
    assert variant(B=16, stages=True) == variant(H=64, B=16, stages=True) == "resident"
    assert variant(B=16, norms=True) == variant(B=16, stages=True, norms=True) == "graph"
    found = plan(engine, Problem(B=128, force="resident", stages=True))
    assert (found.groups, found.tiles) == (1, 4)  # where others have two groups


def test_scans(engine: Any) -> None:
    def one(**arguments: Any) -> Any:
        arguments = {"H": 256, "B": 4, "affine": True, "has_resident": False, **arguments}
        found = plan(engine, Problem(**arguments))
        return found.scan_length if found.variant.name == "scan" else found.variant.name

    # sqrt(2 T) chunks, so that there are half as many as two times their steps,
    assert one(T=200) == 10 and one(T=800) == 20 and one(T=801) == 21
    # unless they are very short, or the card is full before, with the threads of both directions.
    assert one(T=15) == "graph" and one(T=16) == one(T=32) == 8
    assert one(T=100, B=64) == 13 and one(T=100, B=64, dirs=2) == 16
    assert one(T=100, B=32, card="RTX 3060") == 34
    assert one(T=800, H=1024, B=64) == 32 and one(T=800, H=1024, B=128) == "graph"
    # What is normalised, reset or returned of each step changes nothing. None is forced on others.
    assert one(T=800, stages=True, norms=True) == 20
    assert one(T=800, affine=False) == one(T=800, affine=False, force="scan") == "graph"
    assert one(T=800, force="steps") == "steps" and one(T=800, force="resident") == "graph"
    assert one(T=1, kept=False, B=1) == "one" and one(T=1, kept=False, B=1, force="scan") == 1
    assert one(T=5, force="scan") == 2 and one(T=800, H=1024, B=512, force="scan") == 2
    assert one(T=800, B=0) == one(T=800, H=0, force="scan") == "graph"


def test_cells_that_lack_some_kernels(engine: Any) -> None:
    """Those from Python have none that keep their weights, and wide ones none of a single step."""

    def variant(**arguments: Any) -> str:
        return plan(engine, Problem(**arguments)).variant.name

    for force, units in itertools.product((None, "resident", "cluster", "local"), (32, 512)):
        assert variant(B=16, H=units, force=force, has_resident=False) == "graph"
    one = {"T": 1, "B": 1, "kept": False}
    assert variant(**one, gates=4) == "one" and variant(**one, gates=5) == "steps"


def test_blocks_that_cannot_be_there_at_once(engine: Any) -> None:
    """What the card has room for, less than its size says, decides."""

    def blocks(at_once: int, B: int, **arguments: Any) -> tuple[int, int, int] | str:
        arguments = {"force": "resident", **arguments}
        found = plan(engine, Problem(B=B, at_once=at_once, **arguments))
        shape = (found.groups, found.tiles, found.copies)
        return shape if found.variant.name == "resident" else found.variant.name

    # A copy is 32 blocks, or 16 that have twice the units each, and takes a tile of rows or two.
    assert blocks(132, 32) == (1, 1, 4) and blocks(64, 32) == (2, 1, 4)
    assert blocks(63, 32) == blocks(32, 32) == (2, 2, 2)
    assert blocks(31, 16) == (2, 2, 1) and blocks(31, 32) == "graph"
    assert blocks(15, 1) == blocks(0, 1, force=None) == "graph"
    # Local kernels wait for nobody.
    assert blocks(0, 64, H=32, force=None) == "local"


def test_clusters(engine: Any) -> None:
    def one(H: int, B: int, **arguments: Any) -> tuple[str, int, int, int]:
        found = plan(engine, Problem(H=H, B=B, **arguments))
        return found.variant.name, found.groups, found.tiles, found.copies

    # Blocks of 32 units; where that are more clusters than there can be, larger ones, or more rows.
    assert one(256, 16) == ("cluster", 2, 1, 2) and one(512, 16) == ("cluster", 2, 1, 2)
    assert one(256, 200) == ("cluster", 4, 1, 25) and one(512, 100) == ("cluster", 2, 2, 7)
    # More than 16 blocks are no cluster, nor are more than the card takes.
    assert one(520, 16)[0] == one(264, 16, storage="float32")[0] == "resident"
    assert one(512, 16, largest_cluster=8)[0] == "resident"
    assert one(256, 16, largest_cluster=8)[0] == "cluster"
    assert one(256, 16, largest_cluster=4) == ("cluster", 4, 1, 2)
    assert one(256, 16, card="RTX 4090")[0] == one(256, 16, card="A100")[0] == "resident"
    assert one(256, 16, card="RTX 5090")[0] == one(256, 16, card="B200")[0] == "cluster"
    # Clusters need not be on the card at the same time, but when they take turns, polling may be
    # faster, and at last a product and a kernel per step.
    assert one(512, 8, at_once=17)[0] == "cluster" and one(512, 8, at_once=15)[0] == "graph"
    assert one(512, 128) == ("resident", 2, 2, 8) and one(512, 1000)[0] == "graph"
    assert one(512, 1000, force="cluster") == ("cluster", 2, 2, 63)
    # As test_resident.py has them.
    for storage, cell in itertools.product(("bfloat16", "float32"), CELLS):
        forced = {"storage": storage, "cell": cell, "force": "cluster"}
        few = {**forced, "at_once": 2}
        assert one(40, 9, **forced) == ("cluster", 2, 1, 2)
        assert one(136, 3, **forced) == ("cluster", 2, 1, 1)
        assert one(48, 13, **few) == ("cluster", 2, 2, 1)
        assert one(72, 9, **few) == ("cluster", 4, 1, 2)


def test_small_shared_memory(engine: Any) -> None:
    """Shapes that take 128 KB on a large card become others on one with 99 KB a block."""
    cards = ("RTX 3060", "RTX 3090", "RTX 4090", "RTX 5090")
    seen = set()
    for size in itertools.product(cards, CELLS, (64, 128, 256, 512), (1, 16, 64, 128)):
        found = plan(engine, Problem(*size, force="resident"))
        if found.variant == engine.Variant.resident:
            gates = reference.CELLS[size[1]].gates
            assert 8192 * gates * found.groups * found.tiles <= 99 << 10, size
            seen.add(size[0])
    assert seen == set(cards)
    # Of two groups by two tiles; else of more copies than fit the card.
    large = plan(engine, Problem("H200", H=512, B=96, force="resident"))
    assert (large.groups, large.tiles, large.copies) == (2, 2, 6)
    small = plan(engine, Problem("RTX 5090", H=512, B=96, force="resident"))
    assert small.variant == engine.Variant.graph


def test_variant_can_be_forced(engine: Any) -> None:
    def forced(force: str, H: int = 32) -> Any:
        return plan(engine, Problem("A100", "gru", H, 8, 100, "float16", force=force))

    found = {name: forced(name) for name in ("steps", "graph", "resident", "local")}
    found["cluster"] = plan(engine, Problem(H=264, force="cluster"))
    found["one"] = plan(engine, Problem(B=1, T=1, kept=False, force="one"))
    found["scan"] = plan(engine, Problem(affine=True, force="scan"))
    assert all(plan.variant.name == name for name, plan in found.items())
    for name in ("threads_x", "threads_y", "streams", "chunk_steps", "copies"):
        assert getattr(found["steps"], name) == getattr(found["graph"], name)
    message = "'fast': use steps, graph, scan, one, resident, cluster or local"
    with pytest.raises(ValueError, match=message):
        forced("fast")
    assert forced("local", H=129).variant.name == forced("cluster").variant.name == "graph"


@pytest.mark.slow  # minutes of compiling
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
            "(agrees_with_float64 or any_layout or only_wanted or (as_steps and packed and bfloat))"
            + "".join(f" and not {cell}" for cell in emulated.ALIKE),
        ],
        cwd=ROOT,
        env=env,
        capture_output=True,
        text=True,
        timeout=1800,
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]


def emulation(name: str) -> Any:
    stand_ins = [f"tests/cpp/{name}" for name in emulated.STAND_INS]
    return bound(f"tests/cpp/{name}.cpp", *stand_ins, flags=["-DFUSED_RNN_EMULATE"])


def test_block_that_does_not_come() -> None:
    """Those that wait for it end, say so, and give NaN from the step on that needs it."""
    kernels = emulation("bind_cuda_patience")
    assert kernels.forward() == (1, [0, 1, 1, 1])
    assert kernels.backward() == (1, [1, 1, 1, 0])


@pytest.mark.parametrize("size", [2, 4])
def test_banks_of_local_kernels(size: int) -> None:
    """What lanes read or write at once in shared memory is in different banks, or in one word."""
    local_place = emulation("bind_cuda_patience").local_place
    unit = 16 // size  # elements that a lane reads at once

    def conflicts(width: int, elements: list[tuple[int, int]]) -> int:
        words = {local_place(size, width, row, k) * size // 4 for row, k in elements}
        return len(words) - len({word % 32 for word in words})

    for width in range(unit, 4 * 32 + 1, unit):
        places = {local_place(size, width, row, k) for row in range(8) for k in range(width)}
        assert len(places) == 8 * width and max(places) < 8 * (width + 128 // size)
        for k in range(0, width - 4 * unit + 1, 4 * unit):  # eight lanes: two rows of a block of k
            for row in (0, 2, 4, 6):
                block = itertools.product((row, row + 1), range(k, k + 4 * unit))
                assert conflicts(width, list(block)) == 0
        for k in range(0, width - 7, 8):  # a warp: 8 units of every other row
            for rows in (range(0, 8, 2), range(1, 8, 2)):
                assert conflicts(width, list(itertools.product(rows, range(k, k + 8)))) == 0


def test_more_than_2_31_elements() -> None:
    steps = emulation("bind_cuda_steps")
    # A matrix whose second row begins there.
    rows = [[1.0, 2.0, 3.0], [10.0, 11.0, 12.0]]
    assert steps.copied(rows, stride=2**31 + 8) == rows
    # A layer that has as many gates: the workspace counts them all.
    T, B, H = 1000, 700, 1024
    gates = T * B * reference.CELLS["lstm"].gates * H
    least = 2 * gates * 4  # two directions, in float
    assert gates > 2**31
    assert least <= steps.backward_workspace(T=T, B=B, I=8, H=H, dirs=2) <= 1.1 * least
