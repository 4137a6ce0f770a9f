"""The choices of the CPU engine by shape, cell and machine (csrc/cpu/plan.h)."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from bound import bound, needs_compiler

from fused_rnn import reference

pytestmark = [
    pytest.mark.compiling,
    needs_compiler,
]

STORAGES = {"float32": 4, "float64": 8, "bfloat16": 4, "float16": 4}  # bytes of the computing type
UNITS = ("none", "vectors", "tiles", "fixed_tiles")
# Fields that change sums.
FORWARD = ("tiled", "w_ih", "w_hh", "x_cut", "h_cut")
BACKWARD = ("tiled", "w_ih", "w_hh", "dx_rows", "cut", "d_cut", "grad_cut", "d_grad_cut")


@pytest.fixture(scope="module")
def engine() -> Any:
    return bound("tests/cpp/bind_cpu_plan.cpp", "csrc/cpu/plan.cpp")


def problem(engine: Any, cell: str = "lstm", recurrent: bool = True, **given: Any) -> Any:
    """Of a cell of the library; not ``recurrent``: as if it had no W_hh."""
    facts = {"B": 32, "T": 50, "I": 256, "H": 256, "threads": 2, "vector_bytes": 64} | given
    p = engine.Problem()
    storage = facts.pop("storage", "float32")
    for name, value in facts.items():
        setattr(p, name, value)
    p.storage = getattr(engine.Storage, storage)
    p.scalar_bytes = STORAGES[storage]
    p.rows = facts.get("rows", p.T * p.B)
    p.Hout = facts.get("Hout", p.H)
    p.gates_x = reference.CELLS[cell].gates
    p.gates_h = p.gates_x * recurrent
    p.panel_vecs = 2 if p.gates_h <= 2 else 1
    p.panels = -(-p.H // (p.panel_vecs * p.vector_bytes // p.scalar_bytes))
    return p


def machine(engine: Any, unit: str = "none", crowded: bool = False) -> Any:
    m = engine.Machine()
    m.unit = getattr(engine.MatrixUnit, unit)
    m.cores, m.crowded, m.l2_bytes = 8, crowded, 2 << 20
    return m


def forward(engine: Any, unit: str = "none", crowded: bool = False, **given: Any) -> Any:
    return engine.plan_forward(problem(engine, **given), machine(engine, unit, crowded))


def backward(engine: Any, unit: str = "none", crowded: bool = False, **given: Any) -> Any:
    return engine.plan_backward(problem(engine, **given), machine(engine, unit, crowded))


def test_plans_are_possible(engine: Any) -> None:
    """Threads that own panels, rows that cover a step, tiles only where they are compiled in."""
    sizes = [(1, 1), (1, 300), (2, 7), (7, 40), (33, 20), (300, 5)]
    widths = [(1, 1), (8, 33), (65, 96), (256, 256), (1000, 1024)]
    cells = [("rnn_tanh", True), ("gru", True), ("lstm", True), ("gru", False)]
    machines = [(unit, machine(engine, unit)) for unit in UNITS]
    every = itertools.product(cells, STORAGES, (16, 32, 64), sizes, widths, machines)
    for (cell, recurrent), storage, vector_bytes, (B, T), (I, H), (unit, m) in every:  # noqa: E741
        p = problem(
            engine, cell, recurrent, storage=storage, vector_bytes=vector_bytes, B=B, T=T, I=I, H=H
        )  # fmt: skip
        seen = []
        for threads in (1, 2, 64):
            p.threads = threads
            seen.append((engine.plan_forward(p, m), engine.plan_backward(p, m)))
            for plan in seen[-1]:
                assert 1 <= plan.threads <= min(threads, p.panels)
                assert (plan.is_short, plan.tiled) == (seen[-1][0].is_short, seen[-1][0].tiled)
            f, b = seen[-1]
            assert b.threads >= f.threads  # there are two products for one
            assert B <= f.gates_rows <= B * T
            if f.w_ih == engine.Packing.each_use:  # each panel is used once
                assert f.gates_rows == B * T and not f.tiled
        # What changes sums does not depend on threads.
        for names, plans in zip((FORWARD, BACKWARD), zip(*seen, strict=True), strict=True):
            assert len({tuple(getattr(plan, name) for name in names) for plan in plans}) == 1
        assert f.w_hh != engine.Packing.each_use
        if engine.Packing.turned in (f.w_ih, f.w_hh):  # one step of one block of rows
            assert T == 1 and B <= 64 and not f.tiled
        assert engine.Packing.turned not in (b.w_ih, b.w_hh)
        if engine.Packing.each_use in (b.w_ih, b.w_hh):
            assert T == 1 and b.dx_rows == B and not b.tiled
        if f.tiled:
            assert unit != "none" and vector_bytes == 64 and storage != "float64"
            # A product is an even number of tiles wide, and vectors have panels of their own.
            assert (1 + f.paired) * p.panel_vecs * p.gates_x % 2 == 0
            assert (1 + f.paired) * p.panel_vecs * p.gates_h % 2 == 0
            plain = storage == "float32"
            for cut in (f.x_cut, f.h_cut, b.cut):
                wanted = {"bfloat16": ["one"], "float16": ["two"]}.get(storage, ["three", "fixed"])
                assert cut.name in wanted and (cut.name != "fixed" or unit == "fixed_tiles")
            assert b.d_cut == (b.cut if plain else engine.Cut.two)
            # Both sides of a product are digits, or neither is.
            fixed = engine.Cut.fixed
            assert (b.cut == fixed) == (b.d_cut == fixed)
            assert (b.grad_cut == fixed) == (b.d_grad_cut == fixed)
            if b.grad_cut == fixed:  # what balances it is measured for the recurrent product
                assert b.cut == fixed and p.gates_h > 0
        else:
            assert not f.paired
        if storage in ("bfloat16", "float16"):  # vectors cannot read them
            assert f.w_ih != engine.Packing.none and f.w_hh != engine.Packing.none
            assert engine.Packing.none not in (b.w_ih, b.w_hh)
            assert engine.Packing.turned not in (f.w_ih, f.w_hh)


def test_further_operands_are_multiplied_on_vectors(engine: Any) -> None:
    for plan in (forward, backward):
        assert plan(engine, "fixed_tiles").tiled
        assert not plan(engine, "fixed_tiles", operands=True).tiled


def test_threads(engine: Any) -> None:
    def threads(crowded: bool = False, **given: Any) -> int:
        return forward(engine, crowded=crowded, threads=64, **given).threads

    # A step of one row: 16 panels are there, but a barrier costs as much as 4096 multiply-adds.
    assert threads(B=1, H=256) == 8 and threads(B=1, H=32) == 1
    assert threads(B=32, H=256) == 16 and threads(B=1, H=64) == 2
    # A call so small that a team takes longer to start.
    assert threads(B=1, T=1, I=64, H=64) == 1
    small = {"cell": "rnn_tanh", "B": 1, "T": 1}  # a backward has two products for one
    assert forward(engine, **small).threads == 1 and backward(engine, **small).threads == 2
    # Nobody waits in steps without a recurrent product.
    assert (
        threads(cell="gru", recurrent=False, B=1, T=1000) == 8
        and threads(cell="rnn_tanh", B=1, T=1000) == 4
    )
    # Beside other programs one fewer, in a short call.
    assert threads(T=10, H=64, crowded=True) == threads(T=10, H=64) - 1
    assert threads(T=500, crowded=True) == threads(T=500)
    # Narrow vectors do less while a team starts.
    narrow, wide = ({"B": 1, "T": 1, "I": 64, "H": 96, "vector_bytes": n} for n in (16, 64))
    assert threads(**narrow) > 1 and threads(**wide) == 1
    # A vector multiplies four times as many bytes as floats.
    assert threads(B=1, H=64, bytes=True) == 1 and threads(B=4, H=64, bytes=True) == 2
    assert forward(engine, threads=1).threads == 1
    # Who has no core for each thread does not spin.
    assert [forward(engine, threads=n).spins for n in (1, 8, 9)] == [2000, 2000, 0]


def test_weights_are_packed_where_it_pays(engine: Any) -> None:
    Packing = engine.Packing

    def packing(**given: Any) -> tuple[Any, Any]:
        plan = forward(engine, **given)
        return plan.w_ih, plan.w_hh

    # A decoding step reads weights as they lie, in float and double.
    assert packing(B=1, T=1) == packing(B=1, T=1, storage="float64") == (Packing.none,) * 2
    assert packing(B=1, T=1, storage="bfloat16") == (Packing.each_use, Packing.once)
    # So do few rows in all; longer rows of W a little longer.
    assert packing(B=16, T=1) == (Packing.none,) * 2
    assert packing(B=16, T=1, I=64) == (Packing.turned, Packing.none)
    # More rows of a single step are turned instead, if they are fewer than those of W and fill
    # vectors.
    assert packing(B=32, T=1) == packing(B=64, T=1) == packing(B=30, T=1) == (Packing.turned,) * 2
    assert packing(B=65, T=1) == packing(B=20, T=1) == (Packing.each_use, Packing.once)
    assert packing(cell="rnn_tanh", B=64, T=1, H=100) == (Packing.each_use, Packing.once)
    assert packing(B=32, T=1, storage="bfloat16") == (Packing.each_use, Packing.once)
    # And long sequences of one row, in vectors of a whole line.
    assert packing(B=1, T=32)[1] == Packing.none and packing(B=1, T=33)[1] == Packing.once
    assert packing(B=1, T=300, H=512)[1] == Packing.none
    assert packing(B=1, T=300, H=512, vector_bytes=32)[1] == Packing.once
    assert packing(B=2, T=32, H=512)[1] == Packing.none
    assert packing(B=1, T=32, H=500)[1] == Packing.once  # no whole vectors
    # What is packed already is read, whatever the shape.
    for shape in (dict(B=1, T=1), dict(B=32, T=1), dict(B=1, T=300, H=512), dict(B=64, T=100)):
        for storage in STORAGES:
            assert packing(packed=True, storage=storage, **shape) == (Packing.given,) * 2
            bytes_ = dict(packed=True, bytes=True, storage=storage, **shape)
            assert not forward(engine, UNITS[-1], **bytes_).tiled
    # In any batch the same: never over lanes, on tiles or in several chains.
    for shape in (dict(B=1, T=1), dict(B=32, T=1), dict(B=1, T=300, H=512), dict(B=64, T=100)):
        plan = forward(engine, UNITS[-1], invariant=True, **shape)
        assert plan.one_chain and not plan.tiled
        assert {plan.w_ih, plan.w_hh} <= {Packing.each_use, Packing.once}
        assert not forward(engine, **shape).one_chain
    # One chunk of steps needs each panel of W_ih once.
    assert packing(B=32, T=4)[0] == Packing.each_use and packing(B=32, T=5)[0] == Packing.once
    assert forward(engine, B=32, T=5).gates_rows == 128
    assert forward(engine, B=200, T=5).gates_rows == 200

    def columns(**given: Any) -> tuple[Any, Any]:
        plan = backward(engine, **given)
        return plan.w_ih, plan.w_hh

    assert columns(B=3, T=4) == (Packing.none,) * 2
    assert columns(B=13, T=4) == (Packing.once,) * 2
    assert columns(B=1, T=1, storage="float16") == (Packing.once,) * 2
    # In the backward one step uses each weight once, for all rows. It is read as it lies if it
    # stays in the second-level cache: rows of 4 KB are in the same sets, of 2 KB in twice as many.
    assert columns(B=13, T=1) == columns(B=256, T=1) == (Packing.none,) * 2
    assert columns(B=257, T=1) == (Packing.once,) * 2
    assert columns(B=64, T=1, H=512, I=1024) == (Packing.each_use, Packing.none)
    assert columns(B=64, T=1, H=512, I=1000)[0] == Packing.none
    assert columns(B=64, T=1, H=1024, I=512) == (Packing.each_use,) * 2
    assert columns(B=64, T=1, H=512, vector_bytes=32)[1] == Packing.each_use
    assert columns(B=13, T=1, storage="bfloat16") == (Packing.each_use,) * 2
    assert backward(engine, B=256, T=1).dx_rows == 256


def test_tiles_are_used_where_they_pay(engine: Any) -> None:
    def tiled(unit: str, **given: Any) -> bool:
        return forward(engine, unit, **given).tiled

    # A bfloat16 is its own part: any shape, also on vectors that multiply it.
    assert tiled("vectors", storage="bfloat16", B=1, T=1)
    assert not tiled("none", storage="bfloat16")
    assert not tiled("vectors") and not tiled("vectors", storage="float16")
    # Floats need so many rows per step, and in all; fixed point fewer.
    assert tiled("tiles", B=16) and not tiled("tiles", B=15)
    assert tiled("tiles", H=128, B=24) and not tiled("tiles", H=128, B=23)
    assert not tiled("tiles", B=16, T=15)
    assert tiled("tiles", storage="float16", B=8) and not tiled("tiles", storage="float16", B=7)
    for H, batch in ((64, 24), (96, 12), (256, 8), (512, 4), (1024, 1)):
        assert tiled("fixed_tiles", H=H, B=batch, T=300)
        assert batch == 1 or not tiled("fixed_tiles", H=H, B=batch - 1, T=300)
    assert not tiled("fixed_tiles", storage="float64")
    # More rows are computed ahead: W_ih and W_hh evict each other.
    assert forward(engine, "tiles").gates_rows == 512
    assert backward(engine, "tiles").dx_rows == 2 * backward(engine).dx_rows
    assert backward(engine, T=10).dx_rows == 48 and backward(engine).dx_rows == 96
    # One gate of one vector: two panels make an even number of tiles.
    paired = [forward(engine, "tiles", cell=c).paired for c in ("rnn_tanh", "gru", "lstm")]
    assert paired == [False, True, False]
    # Shallow products are no work for digits, deep ones are.
    plan = forward(engine, "fixed_tiles", I=95, H=96)
    assert (plan.x_cut, plan.h_cut) == (engine.Cut.three, engine.Cut.fixed)


def test_tiles_of_vectors_fit_in_registers(engine: Any) -> None:
    sets = {"generic": (16, 16), "neon": (16, 32), "avx2": (32, 16), "avx512": (64, 32)}
    for (vector_bytes, registers), nv in itertools.product(sets.values(), (1, 2, 3, 4)):
        vectors = engine.Vectors(vector_bytes, registers)
        rows = engine.tile_rows(vectors, nv)
        assert 1 <= rows <= 12
        # The sums, beside one row of the right side and a value, or all values and one vector.
        assert rows * nv + min(nv + 1, rows + 1) <= registers
        for m in range(1, rows + 1):
            chains = engine.chains(vectors, m, nv)
            assert chains in (1, 2, 4) and (chains == 1 or chains * m * nv <= registers)
            # Results must not depend on how columns are cut into tiles.
            if nv <= engine.tile_vecs(vectors):
                assert chains == engine.chains(vectors, m, 1)


def test_depth_of_tiles(engine: Any) -> None:
    """A pair of right blocks of about the first-level cache is cut in two."""
    assert engine.depth_at_once(9, 30 << 10) == 9
    assert engine.depth_at_once(9, 40 << 10) == 5
    assert engine.depth_at_once(9, 80 << 10) == 9
