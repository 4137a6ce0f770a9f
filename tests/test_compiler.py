"""The compiler of cells up to the header: traces, gradients, what is kept, and mistakes.

Nothing is compiled here; tests/test_custom.py does that.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import random_cells
import scan_cells
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from torch import Tensor

import fused_rnn
from fused_rnn import CellError, zoo
from fused_rnn.compiler import Compiled, Declaration, trace
from fused_rnn.compiler.graph import Node
from fused_rnn.custom.plain import Products, Values
from fused_rnn.reference import CELLS

pytestmark = pytest.mark.unit


def compiled(drawn: random_cells.Drawn) -> Compiled:
    d = Declaration("Drawn", drawn.gates, drawn.states, drawn.params, drawn.output, drawn.given)
    return Compiled(trace(drawn.fn, d, {}))


# --- The operations of a graph, on tensors ------------------------------------------------------

OPERATIONS: dict[str, Callable[..., Any]] = {
    **{name: getattr(torch, name) for name in "add sub mul div neg exp expm1 log log1p".split()},
    **{name: getattr(torch, name) for name in "sqrt sin cos erf abs sign sigmoid tanh".split()},
    **{name: getattr(torch, name) for name in "relu maximum minimum lt gt le ge eq ne".split()},
    "where": torch.where,
    "and": torch.logical_and,
    "or": torch.logical_or,
    "not": torch.logical_not,
    "softplus": lambda a: torch.logaddexp(a, torch.zeros_like(a)),
    "sigmoid_grad": lambda y: y * (1 - y),
    "tanh_grad": lambda y: 1 - y * y,
    "relu_backward": lambda g, y: torch.where(y <= 0, 0, g),
}


def evaluate(node: Node, known: dict[Node, Tensor]) -> Tensor:
    """The value, of known ones alone."""
    if node not in known:
        assert node.op != "input", f"{node} is not there"
        if node.op == "const":
            known[node] = torch.tensor(node.args[0], dtype=torch.float64)
        else:
            known[node] = OPERATIONS[node.op](*(evaluate(a, known) for a in node.operands))
    return known[node]


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(random_cells.cells())
def test_values_and_gradients(drawn: random_cells.Drawn) -> None:
    """As autograd of the function itself; the backward has no more than the tape."""
    cell = compiled(drawn)
    traced, tape, gradients = cell.trace, cell.tape, cell.gradients
    generator = torch.Generator().manual_seed(1)

    def draw() -> Tensor:
        return torch.randn(40, dtype=torch.float64, generator=generator).requires_grad_()

    gates_x = (*traced.gates_x, *drawn.given)
    kinds = {"x": gates_x, "r": traced.gates_h, "s": drawn.states, "p": drawn.params}
    values = {kind: {name: draw() for name in names} for kind, names in kinds.items()}
    x, s, p = (Values(list(values[k]), list(values[k].values())) for k in "xsp")
    # What an operand is multiplied to has no say here: its gates are values of their own.
    operands: dict[int, Tensor] = {}

    def product(gate: str) -> Callable[[Tensor], Tensor]:
        ends = itertools.accumulate(traced.products)
        number = sum(traced.gates_h.index(gate) >= end for end in ends)

        def made(operand: Tensor) -> Tensor:
            operands[number - 1] = operand
            return values["r"][gate]

        return made

    first = traced.products[0]
    own = {gate: values["r"][gate] for gate in traced.gates_h[:first]}
    others = {gate: product(gate) for gate in traced.gates_h[first:]}
    new = drawn.fn(x, Products(own, others, getattr(s, drawn.states[0])), s, p)
    inputs = {
        traced.input(kind, name): value.detach()
        for kind, named in values.items()
        for name, value in named.items()
    }
    forward = dict(inputs)
    for name, node in traced.new.items():
        torch.testing.assert_close(evaluate(node, forward), new[name], rtol=1e-9, atol=1e-10)

    assert operands.keys() == set(range(len(traced.operands)))
    for i, node in enumerate(traced.operands):
        found = evaluate(node, forward).expand_as(operands[i])
        torch.testing.assert_close(found, operands[i], rtol=1e-9, atol=1e-10)

    cotangents = {name: draw().detach() for name in drawn.states}
    of_operands = {str(i): draw().detach() for i in range(len(operands))}
    wanted = [value for named in values.values() for value in named.values()]
    found = torch.autograd.grad(
        [*(new[name] for name in drawn.states), *(operands[int(i)] for i in of_operands)],
        wanted,
        [*(cotangents[name] for name in drawn.states), *of_operands.values()],
        allow_unused=True,
    )
    known = {node: evaluate(node, forward) for node in tape.saved}
    known |= {n: v for n, v in inputs.items() if n.args[0] == "p"}
    known |= {traced.input("s", name): values["s"][name].detach() for name in tape.states}
    if tape.reads_new_h:
        known[traced.new[traced.recurrent]] = evaluate(traced.new[traced.recurrent], forward)
    known |= {traced.input("ds_new", name): value for name, value in cotangents.items()}
    known |= {traced.input("du", i): value for i, value in of_operands.items()}
    ours = [*gradients.gates_x, *gradients.gates_h, *gradients.states, *gradients.params]
    for node, value, theirs in zip(ours, wanted, found, strict=True):
        theirs = torch.zeros_like(value) if theirs is None else theirs
        got = evaluate(node, known).expand_as(theirs)
        # ATen has 1/6 of hardsigmoid's derivative in float32.
        torch.testing.assert_close(got, theirs, rtol=1e-7, atol=1e-7)
    assert cell.header == compiled(drawn).header and cell.name == compiled(drawn).name


# --- The header ---------------------------------------------------------------------------------


def peephole(x: Any, r: Any, s: Any, p: Any) -> dict[str, Any]:
    i = torch.sigmoid(x.i + r.i + p.p_i * s.c)
    f = torch.sigmoid(x.f + r.f + p.p_f * s.c)
    c = f * s.c + i * torch.tanh(x.g + r.g)
    o = torch.sigmoid(x.o + r.o + p.p_o * c)
    return dict(h=o * torch.tanh(c), c=c)


def of(fn: Callable[..., Any], gates: str, states: str = "h", params: str = "", **more: Any) -> Any:
    def words(text: str) -> list[str]:
        return text.split()

    cell = fused_rnn.cell(gates=words(gates), states=words(states), params=words(params), **more)
    return cell(fn)


def body(layer: Any, name: str) -> list[str]:
    """The statements of a function of the header."""
    text = layer.source().split(f"static void {name}(")[1].split("{\n", 1)[1].split("\n  }")[0]
    return [line.strip() for line in text.splitlines()]


def test_header_reads_like_one_by_hand() -> None:
    layer = of(peephole, "i f g o", "h c", "p_i p_f p_o")
    assert body(layer, "forward") == [
        "const V i = sigmoid(V(x[0] + h[0] + p[0] * s[1]));",
        "const V f = sigmoid(V(x[1] + h[1] + p[1] * s[1]));",
        "const V g = tanh(V(x[2] + h[2]));",
        "const V c = f * s[1] + i * g;",
        "const V o = sigmoid(V(x[3] + h[3] + p[2] * c));",
        "s_new[0] = o * tanh(c);",
        "s_new[1] = c;",
        "saved[0] = i, saved[1] = f, saved[2] = g, saved[3] = o;",
    ]
    assert body(layer, "backward") == [
        "const V i = saved[0], f = saved[1], g = saved[2], o = saved[3];",
        "const V c = f * s[1] + i * g;",
        "const V tanh_c = tanh(c);",
        "d[3] = ds_new[0] * tanh_c * sigmoid_grad(o);",
        "const V dc = ds_new[1] + ds_new[0] * o * tanh_grad(tanh_c) + d[3] * p[2];",
        "d[0] = dc * g * sigmoid_grad(i);",
        "d[1] = dc * s[1] * sigmoid_grad(f);",
        "d[2] = dc * i * tanh_grad(g);",
        "ds[0] = V{};",
        "ds[1] = dc * f + d[0] * p[0] + d[1] * p[1];",
        "dp[0] = d[0] * s[1];",
        "dp[1] = d[1] * s[1];",
        "dp[2] = d[3] * c;",
    ]
    facts = re.findall(r"static constexpr (.*);", layer.source())
    assert facts == [
        "int kX = 4, kH = 4, kStates = 2, kSaved = 4, kD = 4, kParams = 3",
        "int kDx[kX] = {0, 1, 2, 3}, kDh[kH] = {0, 1, 2, 3}",
        "int kReads = 0b10",
        'const char* kParamNames[kParams] = {"p_i", "p_f", "p_o"}',
    ]


def test_the_choices_of_the_headers_by_hand() -> None:
    def gru(x: Any, r: Any, s: Any, p: Any) -> dict[str, Any]:
        reset, z = torch.sigmoid(x.r + r.r), torch.sigmoid(x.z + r.z)
        n = torch.tanh(x.n + reset * r.n)
        return dict(h=n + z * (s.h - n))

    def rnn(x: Any, r: Any, s: Any, p: Any) -> dict[str, Any]:
        return dict(h=torch.relu(x.a + r.a))

    layer = of(gru, "r z n")
    assert "kSaved = 4, kD = 4;" in layer.source()
    assert "kDx[kX] = {0, 1, 2}, kDh[kH] = {0, 1, 3};" in layer.source()
    assert "saved[2] = h[2]" in body(layer, "forward")[-1]
    layer = of(rnn, "a")
    assert "kSaved = 0, kD = 1;" in layer.source() and "kReadsNewH = true" in layer.source()
    assert "d[0] = relu_backward(ds_new[0], h_new);" in body(layer, "backward")


def test_names_that_cpp_or_the_header_has() -> None:
    def double(x: Any, r: Any, s: Any, p: Any) -> dict[str, Any]:
        d = torch.sigmoid(x.int + r.int)
        exp = d * s.h + p.V
        return dict(h=torch.tanh(exp) * exp)

    layer = of(double, "int", params="V")
    assert "struct double_ : CellDefaults" in layer.source()
    assert "const V d_ = sigmoid(V(x[0] + h[0]));" in body(layer, "forward")
    assert any(line.startswith("const V exp_ = ") for line in body(layer, "forward"))


def test_explain() -> None:
    text = of(peephole, "i f g o", "h c", "p_i p_f p_o").explain()
    assert "states h, c, output h" in text and "p_i, p_f, p_o" in text
    assert "20 bytes per step, row and unit" in text
    assert "tanh(c): computed in the backward once more, which costs 0.6 of keeping it" in text
    assert "8 I + 8 H operations" in text


# --- Affine updates -----------------------------------------------------------------------------


def test_cells_of_the_zoo_with_affine_updates() -> None:
    found = {}
    for name in zoo.__all__:
        cell = CELLS[getattr(zoo, name).cell].source
        if cell.affine:
            found[name] = cell.affine.states
    assert found == {"QRNN": ["c"], "MinGRU": ["h"], "MinLSTM": ["h"]}


def test_affine_updates_in_the_header() -> None:
    assert body(zoo.QRNN, "affine") == [
        "using T = typename Lanes<V>::T;",
        "const V f = sigmoid(x[1]);",
        "by[0] = f;",
        "plus[0] = (T(1) - f) * tanh(x[0]);",
    ]
    assert "kAffine = 0b10;" in zoo.QRNN.source()
    assert "affine      the new c" in zoo.QRNN.explain()

    def both(x: Any, r: Any, s: Any, p: Any) -> dict[str, Any]:
        by, plus = torch.sigmoid(x.a), p.u * x.a
        return dict(h=torch.lerp(s.h, s.c, by), c=(plus - s.c) / 2)

    assert body(of(both, "a", "h c", "u"), "affine") == [
        "using T = typename Lanes<V>::T;",
        "const V by_ = sigmoid(x[0]);",
        "const V plus_ = p[0] * x[0];",
        "by[0] = T(1) - by_;",
        "by[1] = by_;",
        "by[2] = V{};",
        "by[3] = splat<V>(T(-0.5));",
        "plus[0] = V{};",
        "plus[1] = plus_ / T(2);",
    ]


@pytest.mark.parametrize(
    "new, is_affine",
    [
        ("x.a * s.h + x.b", True),
        ("s.h - s.h / x.a + 2", True),
        ("-(-s.h - x.a) * 3", True),
        ("torch.where(x.a > 0, s.h, x.b * s.h)", True),
        ("x.a * s.c + torch.tanh(x.b)", True),
        ("s.c + s.h - s.h", True),
        ("s.h * s.h", False),
        ("s.h * s.c", False),
        ("torch.tanh(s.h) + x.a", False),
        ("x.a / s.h", False),
        ("torch.where(s.h > 0, x.a, x.b)", False),
        ("torch.maximum(s.h, x.a)", False),
        ("abs(s.h)", False),
        ("x.a * s.h + r.b", False),
        ("x.a * s.h + s.d + s.c", False),
    ],
)
def test_which_updates_are_affine(new: str, is_affine: bool) -> None:
    """Of at most two states that are read."""
    text = f"def Drawn(x, r, s, p): return dict(h={new}, c=x.a * s.c + x.b, d=x.a + x.b)"
    cell = compiled(random_cells.Drawn(("a", "b"), ("h", "c", "d"), (), "h", (), text))
    assert (cell.affine is not None) == is_affine
    if is_affine:
        assert_affine(cell)


def assert_affine(cell: Compiled) -> None:
    """The new states are those of the function, of any numbers."""
    found, traced = cell.affine, cell.trace
    assert found is not None
    inputs = [node for node in traced.graph if node.op == "input"]
    known = {node: torch.randn(9, dtype=torch.float64) for node in inputs}
    states = [known[traced.input("s", name)] for name in found.states]
    free = {node: value for node, value in known.items() if node.args[0] in ("x", "p")}
    by = [evaluate(node, dict(free)) for node in found.by]
    for i, name in enumerate(found.states):
        rows = zip(by[i * len(states) : (i + 1) * len(states)], states, strict=True)
        new = sum((a * s for a, s in rows), evaluate(found.plus[i], dict(free)))
        torch.testing.assert_close(new, evaluate(traced.new[name], dict(known)))


@pytest.mark.parametrize("drawn", scan_cells.ALL, ids=lambda drawn: "-".join(drawn.states))
def test_affine_updates_of_larger_cells(drawn: random_cells.Drawn) -> None:
    assert_affine(compiled(drawn))


def test_hyperparameters_are_constants() -> None:
    def leaky(x: Any, r: Any, s: Any, p: Any, leak: float = 0.5, deep: bool = False) -> Any:
        n = torch.tanh(x.a + r.a)
        n = torch.tanh(n) if deep else n
        return dict(h=leak * s.h + (1 - leak) * n)

    layer = of(leaky, "a")
    assert "T(0.5) * s[0]" in layer.source()
    assert "T(0.25) * s[0]" in layer(3, 4, leak=0.25).source()
    assert layer(3, 4, leak=0.5).cell == layer.cell != layer(3, 4, deep=True).cell
    assert repr(layer(3, 4, leak=0.25)) == "leaky(3, 4, leak=0.25)"
    assert layer.Cell(3, 4, leak=0.0)(torch.zeros(2, 3)).shape == (2, 4)
    with pytest.raises(TypeError, match="leaky: unexpected keyword argument 'lek'.* leak, deep"):
        layer(3, 4, lek=1)


def test_whether_gates_are_read_by_their_sums() -> None:
    def gru(x: Any, r: Any, s: Any, p: Any) -> dict[str, Any]:
        z = torch.sigmoid(r.z + x.z)
        return dict(h=z * s.h + torch.tanh(x.n + z * r.n))

    assert CELLS[of(peephole, "i f g o", "h c", "p_i p_f p_o").cell].adds
    assert not CELLS[of(gru, "z n").cell].adds and not CELLS[zoo.QRNN.cell].adds


def test_the_state_of_the_product_is_one() -> None:
    def either(x: Any, r: Any, s: Any, p: Any, second: bool = False) -> dict[str, Any]:
        return dict(h=torch.tanh(x.a + r(s.c if second else s.h).a), c=s.c + s.h)

    layer = of(either, "a", "h c")
    with pytest.raises(CellError, match="depends on a hyperparameter: h or c"):
        layer(2, 3, second=True)


def test_threads_trace_side_by_side() -> None:
    def leaky(x: Any, r: Any, s: Any, p: Any, leak: float = 0.0) -> dict[str, Any]:
        n = s.h
        for _ in range(50):
            n = torch.tanh(n + leak * x.a)
        return dict(h=n + r.a)

    layer = of(leaky, "a")
    wanted = {leak: layer(2, 3, leak=leak).cell for leak in (0.5, 0.25, 0.125, 2.0)}
    layer._family._names.clear()
    with ThreadPoolExecutor(4) as pool:
        found = pool.map(lambda leak: layer(2, 3, leak=leak).cell, wanted)
    assert list(found) == list(wanted.values())


# --- Mistakes -----------------------------------------------------------------------------------

Step = Callable[[Any, Any, Any, Any], Any]


def _if(x: Any, r: Any, s: Any, p: Any) -> Any:
    return dict(h=x.a if x.a > 0 else s.h)  # here


def _and(x: Any, r: Any, s: Any, p: Any) -> Any:
    return dict(h=torch.where(x.a > 0 and s.h > 0, x.a, s.h))  # here


def _in_place(x: Any, r: Any, s: Any, p: Any) -> Any:
    c = x.a + r.a
    c += s.h  # here
    return dict(h=c)


OUTSIDE = torch.randn(3)
WEIGHT = torch.nn.Linear(3, 3)
MISTAKES: dict[str, tuple[Step, str]] = {
    "if": (_if, r"not known when the cell is compiled: use torch.where"),
    "and": (_and, r"use torch.where, and & \| ~ for and, or, not"),
    "sum": (lambda x, r, s, p: dict(h=torch.sum(x.a) + s.h), r"sum mixes units; .* elementwise"),
    "softmax": (lambda x, r, s, p: dict(h=F.softmax(x.a, -1) + s.h), r"softmax mixes units"),
    "layer_norm": (lambda x, r, s, p: dict(h=F.layer_norm(x.a, (3,))), r"layer_norm mixes units"),
    "max": (lambda x, r, s, p: dict(h=x.a.max() + s.h), r"max: these arguments are not for a cell"),
    "matmul": (lambda x, r, s, p: dict(h=x.a @ OUTSIDE), r"products .* are the layer's: make it a"),
    "linear": (lambda x, r, s, p: dict(h=WEIGHT(x.a)), r"linear: products .* make it a gate"),
    "missing": (lambda x, r, s, p: dict(q=x.a + s.h), r"returned q; states are h \(missing: h; no"),
    "no dict": (lambda x, r, s, p: x.a + s.h, r"returned Symbol; expected a dict of .* states h"),
    "gate": (lambda x, r, s, p: dict(h=x.q), r"no gate q; gates are a"),
    "state": (lambda x, r, s, p: dict(h=s.c), r"no state c; states are h"),
    "parameter": (lambda x, r, s, p: dict(h=p.c), r"no parameter c; there is none"),
    "shape": (lambda x, r, s, p: dict(h=x.a * x.a.shape[0]), r"\.shape: .* it has no shape"),
    "view": (lambda x, r, s, p: dict(h=x.a.view(-1)), r"\.view: .* it has no shape"),
    "element": (lambda x, r, s, p: dict(h=x.a[0]), r"one number per unit: it has no elements"),
    "rand": (lambda x, r, s, p: dict(h=torch.rand_like(x.a) + s.h), r"rand_like: randomness would"),
    "dropout": (lambda x, r, s, p: dict(h=F.dropout(x.a) + s.h), r"dropout: randomness would"),
    "in place": (_in_place, r"write c = c \+ \.\.\. in place of c \+= "),
    "sigmoid_": (lambda x, r, s, p: dict(h=x.a.sigmoid_()), r"sigmoid in place changes"),
    "inplace": (lambda x, r, s, p: dict(h=F.relu(x.a, inplace=True)), r"relu in place changes"),
    "outside": (lambda x, r, s, p: dict(h=x.a * OUTSIDE), r"a tensor from outside .* by .item\(\)"),
    "math": (lambda x, r, s, p: dict(h=math.exp(x.a)), r"use torch.exp and the like, not math.exp"),
    "item": (lambda x, r, s, p: dict(h=x.a.item()), r"use torch.exp and the like.* or .item\(\)"),
    "pow": (lambda x, r, s, p: dict(h=x.a**s.h), r"powers need a constant exponent: torch.exp\(b"),
    "cumsum": (lambda x, r, s, p: dict(h=torch.cumsum(x.a, 0)), r"cumsum mixes units"),
    "fft": (lambda x, r, s, p: dict(h=torch.fft.fft(x.a)), r"fft_fft is not among the elementwise"),
    "operand": (lambda x, r, s, p: dict(h=x.a + r(2.0).a), r"r\(\.\.\.\)\.a: expected a value"),
    "assign": (lambda x, r, s, p: setattr(s, "h", x.a), r"h cannot be assigned"),
    "where": (lambda x, r, s, p: dict(h=torch.where(x.a, x.a, s.h)), r"expected a comparison"),
    "type": (lambda x, r, s, p: dict(h=x.a.double() + s.h), r"\.double: .* the type of the layer"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_told_at_their_line(mistake: str) -> None:
    fn, message = MISTAKES[mistake]
    with pytest.raises(CellError, match=message) as caught:
        of(fn, "a")
    where = re.match(r"(.*):(\d+): ", str(caught.value))
    assert where and where[1] == __file__
    lines = open(__file__).read().splitlines()
    line = lines[int(where[2]) - 1]
    assert "# here" in line or f'"{mistake}"' in line


def test_values_are_of_one_run_of_the_function() -> None:
    kept = []

    def keeps(x: Any, r: Any, s: Any, p: Any) -> dict[str, Any]:
        kept.append(x.a)
        return dict(h=x.a + s.h)

    of(keeps, "a")
    with pytest.raises(CellError, match="no value outside of the function of its cell") as caught:
        kept[0] + 1
    assert str(caught.value).startswith(f"{__file__}:")


def _two_operands(x: Any, r: Any, s: Any, p: Any) -> Any:
    return dict(h=x.a + r(s.h).a + r(s.c).a, c=s.c)


def _two_values(x: Any, r: Any, s: Any, p: Any) -> Any:
    reset = torch.sigmoid(x.b)
    return dict(h=r.a + r(reset * s.h).a)


@pytest.mark.parametrize(
    "fn, declared, message",
    [
        (
            _two_operands,
            dict(gates="a", states="h c"),
            r"r.a is applied to s.h and to s.c: use two",
        ),
        (
            _two_values,
            dict(gates="a b"),
            r"r.a is applied to s.h and to \(sigmoid\(x.b\) \* s.h\): use two gates",
        ),
        (
            lambda x, r, s, p: dict(h=x.a + r(s.h > 0).a),
            dict(gates="a"),
            r"r\(...\).a: expected a value of the cell, such as s.h",
        ),
        (
            lambda x, r, s, p: dict(h=x.a + r(x.a).a),
            dict(gates="a"),
            "nothing recurs: neither a product r nor a state s",
        ),
        (
            lambda x, r, s, p: dict(h=x.a + r.a),
            dict(gates="a b"),
            "gate b is declared but not used",
        ),
        (
            lambda x, r, s, p: dict(h=x.a + r.a),
            dict(gates="a", params="tau"),
            "parameter tau is declared but not used",
        ),
        (lambda x, r, s, p: dict(h=x.a), dict(gates="a"), "nothing recurs"),
        (lambda x, r, s, p: dict(h=r.a), dict(gates="a"), "no gate reads the input"),
        (
            lambda x, r, s, p: dict(h=sum(getattr(x, f"g{i}") for i in range(17)) + s.h),
            dict(gates=" ".join(f"g{i}" for i in range(17))),
            "at most 16 gates with an input part, got g0, g1, .*, g16: more are not supported",
        ),
        (lambda x, r, s: dict(h=x.a), dict(gates="a"), r"expected the arguments x, r, s, p"),
        (lambda x, r, s, p, k: dict(h=x.a), dict(gates="a"), r"hyperparameters with defaults"),
        (peephole, dict(gates="i i"), "gates: expected different names"),
        (peephole, dict(gates="i 2"), "gates: expected names, got '2'"),
        (peephole, dict(gates="i", output="y"), "output: expected one of the states h, got 'y'"),
        (
            peephole,
            dict(gates="i", given=("i",)),
            "given: expected names that no gate has .* got 'i'",
        ),
        (
            peephole,
            dict(gates="i", given=("hx",)),
            "given: expected names .* of the call, got 'hx'",
        ),
        (
            lambda x, r, s, p: dict(h=x.a + r.a),
            dict(gates="a", given=("decay",)),
            "decay is given but not used: it is read as x.decay",
        ),
        (
            lambda x, r, s, p: dict(h=x.decay * s.h),
            dict(gates="a", given=("decay",)),
            "gate a is declared but not used",
        ),
    ],
)
def test_declarations(fn: Step, declared: Mapping[str, Any], message: str) -> None:
    with pytest.raises(CellError, match=message) as caught:
        of(fn, **declared)
    assert str(caught.value).startswith(f"{__file__}:")


def test_what_is_no_function() -> None:
    with pytest.raises(CellError, match="plain function, got Tanh"):
        fused_rnn.cell(gates=("a",))(torch.nn.Tanh())
