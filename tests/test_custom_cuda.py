"""Cells from Python on the CUDA engine, emulated: each in a library of its own beside the engine's,
compiled and registered as on a card. The same bits as a header by hand, and the function itself."""

from __future__ import annotations

import copy
from typing import Any

import emulated
import gate_cells
import pytest
import test_resident
import torch
from helpers import assert_all_close, assert_no_worse, flatten, run
from test_custom import (
    PRODUCTS,
    TOLERANCES,
    SevenGates,
    Swapped,
    agree,
    assert_resets_cut,
    giving,
    pair,
)
from torch.nn.utils.rnn import pack_sequence
from torch.utils._pytree import tree_map

import fused_rnn
from fused_rnn import ops, reference, zoo

pytestmark = [
    pytest.mark.parity,
    pytest.mark.skipif(not emulated.WANTED, reason="about the CUDA engine"),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_bits_are_those_of_the_header(dtype: torch.dtype) -> None:
    """Layers of both directions, padded and packed, and single steps without gradients."""
    ours, by_hand = pair("peephole", 5, 9, 2, bidirectional=True, dtype=dtype)
    inputs = [torch.randn(4, 3, 5, dtype=dtype)]
    inputs += [pack_sequence([torch.randn(n, 5, dtype=dtype) for n in (6, 3, 3, 1)])]
    for x in inputs:
        found, expected = run(ours, x), run(by_hand, x)
        assert all(torch.equal(found[key], value) for key, value in expected.items())
    step = torch.randn(1, 2, 5, dtype=dtype)
    with torch.no_grad():
        for a, b in zip(flatten(ours(step)), flatten(by_hand(step)), strict=True):
            assert torch.equal(a, b)


@pytest.mark.drawn(2)  # each is compiled
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize(
    "kind",
    [Swapped, SevenGates, zoo.MinGRU, zoo.SLSTM, zoo.FastGRNN, zoo.UnICORNN],
    ids=lambda kind: kind.__name__,
)
def test_agrees_with_the_function(kind: Any, dtype: torch.dtype) -> None:
    layer = kind(4, 17, 2, bidirectional=True, dtype=dtype)
    x = torch.randn(5, 3, 4, dtype=dtype)
    states = layer(x)[1]
    hx = tree_map(lambda s: torch.rand_like(s) + 0.5, states)
    agree(layer, x, hx, TOLERANCES[dtype])
    with torch.no_grad():
        expected = tree_map(lambda s: s.double(), layer.double()(x[:1].double()))
        found = layer.to(dtype)(x[:1])
        assert_all_close(tree_map(lambda s: s.double(), found), expected, tol=TOLERANCES[dtype])


def test_random_cells() -> None:
    """Those that compile_gate.py compiles for cards."""
    for kind in gate_cells.drawn(3):
        module, x, hx = giving(kind, (3, 4, 3, 5), torch.float64)
        agree(module, x, hx, 1e-6)  # of ATen's hardsigmoid


def test_what_happens_between_steps() -> None:
    """In the kernels, as the library says."""
    options = dict(norm="rms", zoneout=0.2, recurrent_dropout=0.3, weight_dropout=0.1, blocks=2)
    layer = Swapped(4, 64, 2, bidirectional=True, dtype=torch.float64, **options)
    x = torch.randn(6, 3, 4, dtype=torch.float64)
    hx = tree_map(torch.randn_like, layer.eval()(x)[1])
    stages = reference.Stages(
        zoneout=torch.zeros(4, 1, 128), blocks=2, norm=reference.Norm("rms", ("input",), 1e-5)
    )
    device = torch.device("cpu")
    assert ops.takes(stages, layer.cell, 64, device, train=False), "it has kernels with stages"
    agree(layer, x, hx, 1e-12)
    assert_resets_cut(Swapped(4, 9, dtype=torch.float64), x)


@pytest.mark.parametrize("variant", ["local", "cluster", "resident"])
def test_no_kernel_that_keeps_its_weights(variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Plans offer none that was not compiled."""
    monkeypatch.setenv("FUSED_RNN_VARIANT", variant)
    layer = zoo.FastGRNN(8, 32, dtype=torch.bfloat16)
    x = torch.randn(9, 8, 8, dtype=torch.bfloat16)
    agree(layer, x, torch.rand(1, 8, 32, dtype=torch.bfloat16), TOLERANCES[torch.bfloat16])


@pytest.fixture
def resident_cell(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A layer of a cell whose library has these kernels: four gates, three states."""
    monkeypatch.setenv("FUSED_RNN_RESIDENT_CELLS", "1")

    @fused_rnn.cell(gates=("i", "f", "g", "o"), states=("h", "c", "n"), params=("p",))
    def Resident(x: Any, r: Any, s: Any, p: Any) -> dict[str, Any]:
        f = torch.sigmoid(x.f + r.f + p.p * s.c)
        i = torch.sigmoid(x.i + r.i)
        n = f * s.n + i
        c = f * s.c + i * torch.tanh(x.g + r.g)
        return dict(h=torch.sigmoid(x.o + r.o) * torch.tanh(c / (1 + n * n)), c=c, n=n)

    return Resident


@pytest.mark.drawn(2)
@pytest.mark.parametrize("shape", test_resident.SHAPES[::3], ids=lambda s: "-".join(map(str, s)))
@pytest.mark.parametrize("dtype", test_resident.DTYPES, ids=str)
def test_kernels_that_keep_their_weights(
    shape: Any, dtype: torch.dtype, resident_cell: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where they are asked for; as good as a product in each step."""
    allow_tf32 = lambda x: x.dtype == torch.float32  # noqa: E731
    monkeypatch.setattr(ops, "_allow_tf32", allow_tf32)
    module = resident_cell(5, shape.hidden, bidirectional=shape.batch == 9, dtype=dtype)
    x = torch.randn(3, shape.batch, 5, dtype=dtype)
    directions = 2 if module.bidirectional else 1
    hx = tuple(torch.rand(directions, shape.batch, shape.hidden, dtype=dtype) for _ in range(3))
    ours, steps = test_resident.by_variant(shape, module, x, hx, monkeypatch)
    wide = tree_map(lambda t: t.double(), (x, hx))
    double = copy.deepcopy(module).double()
    exact = run(double, *wide, dtype)
    exact["inference"] = exact["output 0"]
    if dtype == torch.float32:  # operands rounded to 2^-11, where emulated steps round nothing
        assert_all_close({name: t.double() for name, t in ours.items()}, exact, tol=3e-3)
        if shape.variant == "resident":  # what fits in one block, is not said by its units
            assert any(not torch.equal(ours[name], steps[name]) for name in ours)
    else:
        assert_no_worse(ours, steps, exact, max(4 * shape.hidden, 3 * shape.batch))


@pytest.mark.drawn(2)
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("kind", [*PRODUCTS, zoo.OriginalGRU, zoo.MUT1], ids=lambda k: k.__name__)
def test_several_products_and_what_is_given(kind: Any, dtype: torch.dtype) -> None:
    module, x, hx = giving(kind, (3, 5, 4, 17), dtype)
    agree(module, x, hx, TOLERANCES[dtype])
    with torch.no_grad():  # a single step, for which nothing is kept
        step = {"input": x[:1], "hx": hx, **{name: v[:1] for name, v in module.given.items()}}
        found = module.layer(**step)
        expected = module.layer.double()(**tree_map(lambda t: t.double(), step))
        assert_all_close(tree_map(lambda t: t.double(), found), expected, tol=TOLERANCES[dtype])


@pytest.mark.parametrize("kind", PRODUCTS[:2], ids=lambda kind: kind.__name__)
def test_products_between_steps(kind: Any) -> None:
    options = dict(norm="rms", zoneout=0.2, recurrent_dropout=0.3, weight_dropout=0.1, blocks=2)
    module, x, hx = giving(kind, (3, 5, 4, 64), torch.float64, **options)
    agree(module, x, hx, 1e-12)
    agree(module.eval(), x, hx, 1e-12)


def test_what_the_library_knows() -> None:
    layer = zoo.MinLSTM(3, 4)
    layer(torch.zeros(2, 1, 3))
    known = reference.CELLS[layer.cell]
    assert ops.tensor_names("cpu", layer.cell) == known.tensors
    facts = ops.facts_of("cpu", layer.cell)
    assert (facts.gates_x, facts.gates_h) == (known.gates, known.recurrent_gates)
    assert fused_rnn.build.info()["backend"] == "native"
