"""Cells from Python on compiled kernels: the same bits as the headers by hand, random cells against
the function itself, and layers that are like all others."""

from __future__ import annotations

import copy
import dataclasses
import io
import os
import pickle
import subprocess
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import emulated
import forked
import pytest
import random_cells
import torch
from helpers import (
    Giving,
    assert_all_close,
    assert_library_agrees,
    compile_quickly,
    error,
    flatten,
    leaves,
    magnitude,
    native,
    run,
)
from hypothesis import HealthCheck, Phase, given, settings
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pack_sequence, pad_packed_sequence
from torch.utils._pytree import tree_map
from torch.utils.flop_counter import FlopCounterMode

import fused_rnn
from fused_rnn import CellError, build, ops, reference, zoo
from fused_rnn.reference import CELLS

pytestmark = pytest.mark.compiling

needs_kernels = pytest.mark.skipif(
    bool(emulated.ENGINE) or not native(), reason="about the CPU's kernels"
)


@fused_rnn.cell(gates=("i", "f", "g", "o"), states=("h", "c"), params=("p_i", "p_f", "p_o"))
def Peephole(x: Any, r: Any, s: Any, p: Any) -> dict[str, Tensor]:
    i = torch.sigmoid(x.i + r.i + p.p_i * s.c)
    f = torch.sigmoid(x.f + r.f + p.p_f * s.c)
    c = f * s.c + i * torch.tanh(x.g + r.g)
    o = torch.sigmoid(x.o + r.o + p.p_o * c)
    return dict(h=o * torch.tanh(c), c=c)


@fused_rnn.cell(gates=("i", "f", "g", "o"), states=("h", "c"))
def LSTM(x: Any, r: Any, s: Any, p: Any) -> dict[str, Tensor]:
    i = torch.sigmoid(x.i + r.i)
    f = torch.sigmoid(x.f + r.f)
    c = f * s.c + i * torch.tanh(x.g + r.g)
    return dict(h=torch.sigmoid(x.o + r.o) * torch.tanh(c), c=c)


@fused_rnn.cell(gates=("r", "z", "n"))
def GRU(x: Any, r: Any, s: Any, p: Any) -> dict[str, Tensor]:
    reset = torch.sigmoid(x.r + r.r)
    z = torch.sigmoid(x.z + r.z)
    n = torch.tanh(x.n + reset * r.n)
    return dict(h=n + z * (s.h - n))


@fused_rnn.cell(gates=("a",))
def Tanh(x: Any, r: Any, s: Any, p: Any) -> dict[str, Tensor]:
    return dict(h=torch.tanh(x.a + r.a))


@fused_rnn.cell(gates=("a",))
def Relu(x: Any, r: Any, s: Any, p: Any) -> dict[str, Tensor]:
    return dict(h=torch.relu(x.a + r.a))


@fused_rnn.cell(
    gates=("i", "f", "g", "o"), states=("c", "h", "count"), params=dict(tau=0.5), output="h"
)
def Swapped(x: Any, r: Any, s: Any, p: Any, leak: float = 1.0) -> dict[str, Any]:
    """The product is of the second state, which is the output; a third counts."""
    r = r(s.h)
    c = torch.sigmoid(x.f + r.f) * s.c + torch.sigmoid(x.i + r.i) * torch.tanh(x.g + r.g)
    c = leak * c + (1 - leak) * p.tau
    return dict(c=c, h=torch.sigmoid(x.o + r.o) * torch.tanh(p.tau * c), count=s.count + 1)


BY_HAND: dict[str, tuple[Any, Callable[..., Any]]] = {
    "peephole": (Peephole, fused_rnn.PeepholeLSTM),
    "lstm": (LSTM, fused_rnn.LSTM),
    "gru": (GRU, fused_rnn.GRU),
    "tanh": (Tanh, fused_rnn.RNN),
    "relu": (Relu, lambda *args, **kwargs: fused_rnn.RNN(*args, nonlinearity="relu", **kwargs)),
}


def pair(name: str, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
    """A layer from Python and one by hand, with the same parameters."""
    ours, by_hand = (kind(*args, **kwargs) for kind in BY_HAND[name])
    ours.load_state_dict(by_hand.state_dict())
    return ours, by_hand


@pytest.fixture(autouse=True)
def compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """As users have them, those whose bits are compared, and random cells."""
    compare = [kind.cell for kind, _ in BY_HAND.values()]
    compile_quickly(monkeypatch, but=lambda cell: cell in compare or cell.startswith("drawn"))


TOLERANCES = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 0.06}


def agree(module: Any, x: Any, hx: Any, tol: float) -> None:
    """Kernels and the function itself."""

    def again() -> dict[str, Any]:
        torch.manual_seed(1)
        return run(module, x, hx)

    ours, layer = again(), getattr(module, "layer", module)
    assert ops.has_cell("cpu", layer.cell, layer.weight_ih_l0.dtype)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ops, "supports", lambda *_: False)
        plain = again()
    for key, value in plain.items():
        expected = torch.zeros_like(ours[key]) if value is None else value
        bound = tol * max(1.0, magnitude(expected))
        assert error(ours[key], expected) <= bound, (key, error(ours[key], expected))


# --- Against the headers by hand ----------------------------------------------------------------


@needs_kernels
@pytest.mark.drawn(1)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", BY_HAND)
def test_bits_are_those_of_the_headers(name: str, dtype: torch.dtype) -> None:
    for B, T, I, H in [(5, 7, 20, 48), (1, 3, 4, 33), (33, 2, 8, 7)]:  # noqa: E741
        ours, by_hand = pair(name, I, H, 2, bidirectional=True, dtype=dtype)
        x = torch.randn(T, B, I, dtype=dtype)
        found, expected = run(ours, x), run(by_hand, x)
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            assert torch.equal(found[key], value), (key, error(found[key], value))
        with torch.no_grad():
            for a, b in zip(flatten(ours(x)), flatten(by_hand(x)), strict=True):
                assert torch.equal(a, b)


@needs_kernels
def test_packed_recomputed_and_projected() -> None:
    ours, by_hand = pair("peephole", 4, 9, 2, bidirectional=True, proj_size=3, recompute=True)
    x = pack_sequence([torch.randn(n, 4) for n in (6, 3, 3, 1)])
    found, expected = run(ours, x), run(by_hand, x)
    assert all(torch.equal(found[key], value) for key, value in expected.items())
    padded = torch.randn(6, 4, 4)
    for a, b in zip(
        *(flatten(m(padded, lengths=[6, 0, 2, 3])) for m in (ours, by_hand)), strict=True
    ):
        assert torch.equal(a, b)


# --- More than the cells of the package have ----------------------------------------------------


@fused_rnn.cell(gates=("a", "b", "c", "d", "e", "f", "g"))
def SevenGates(x: Any, r: Any, s: Any, p: Any) -> dict[str, Tensor]:
    ups = torch.sigmoid(x.a + r.a) + torch.tanh(x.b + r.b) * torch.sin(x.c - r.c)
    downs = torch.sigmoid(x.d * r.d) * torch.tanh(x.e + 0.5 * r.e)
    mix = torch.sigmoid(x.f + r.f + r.g)
    return dict(h=torch.tanh(mix * ups - downs + x.g) + 0.1 * s.h)


@needs_kernels
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("sizes", [(3, 5, 4, 17), (1, 1, 3, 64), (33, 4, 40, 96)], ids=str)
def test_many_gates(sizes: tuple[int, ...], dtype: torch.dtype) -> None:
    batch, steps, inputs, hidden = sizes
    layer = SevenGates(inputs, hidden, 2, bidirectional=True, dtype=dtype)
    x = torch.randn(steps, batch, inputs, dtype=dtype)
    agree(layer, x, torch.randn(4, batch, hidden, dtype=dtype), TOLERANCES[dtype])


@fused_rnn.cell(
    gates=("n", "q", "m"), states=("h", "c"), given=("e", "f"), params=("p",), output="c"
)
def ThreeProducts(x: Any, r: Any, s: Any, p: Any) -> dict[str, Tensor]:
    """The last gate is of a function of the one before, the first of the second state."""
    a = torch.tanh(x.n + r(s.c).n + x.f)
    b = torch.sigmoid(r(a * s.h).q + x.e)
    c = torch.tanh(x.m + r(b * s.h + p.p * s.c).m) + 0.5 * s.c
    return dict(h=b * torch.tanh(c), c=c)


def giving(kind: Any, sizes: tuple[int, ...], dtype: torch.dtype, **own: Any) -> Any:
    """A layer with what it is given, x and hx, of [T, B, ..]."""
    batch, steps, inputs, hidden = sizes
    layer = kind(inputs, hidden, 2, bidirectional=True, dtype=dtype, **own)
    given = {
        name: torch.rand(steps, batch, hidden, dtype=dtype)
        for name in layer._family.declaration.given
    }
    x = torch.randn(steps, batch, inputs, dtype=dtype)
    states = tuple(
        torch.randn(4, batch, hidden, dtype=dtype) for _ in layer._family.declaration.states
    )
    return Giving(layer, given), x, states if len(states) > 1 else states[0]


PRODUCTS = (ThreeProducts, zoo.GRUD, zoo.MultiplicativeLSTM)


@needs_kernels
@pytest.mark.drawn(3)
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("sizes", [(3, 5, 4, 17), (1, 1, 3, 64), (33, 4, 40, 96)], ids=str)
@pytest.mark.parametrize("kind", PRODUCTS, ids=lambda kind: kind.__name__)
def test_products_and_what_is_given(kind: Any, sizes: tuple[int, ...], dtype: torch.dtype) -> None:
    module, x, hx = giving(kind, sizes, dtype)
    agree(module, x, hx, TOLERANCES[dtype])
    module.layer.recompute = True
    agree(module, x, hx, TOLERANCES[dtype])
    found = []
    for threads in (1, 3):
        torch.set_num_threads(threads)
        found.append(run(module, x, hx))
    for key, value in found[0].items():
        assert torch.equal(found[1][key], value), key


@needs_kernels
@pytest.mark.parametrize("kind", (*PRODUCTS[:2], zoo.LEM), ids=lambda kind: kind.__name__)
def test_products_between_steps(kind: Any) -> None:
    options = dict(norm="rms", zoneout=0.2, recurrent_dropout=0.3, weight_dropout=0.1, blocks=2)
    module, x, hx = giving(kind, (3, 5, 4, 64), torch.float64, **options)
    assert module.layer.between_steps.norm_at == ("input",)
    agree(module, x, hx, 1e-12)
    agree(module.eval(), x, hx, 1e-12)


@needs_kernels
@pytest.mark.parametrize("kind", PRODUCTS[:2], ids=lambda kind: kind.__name__)
def test_layouts_of_what_is_given(kind: Any) -> None:
    """It is cut, padded and packed as x is."""
    module, x, hx = giving(kind, (3, 6, 4, 9), torch.float64)
    layer, given, counts = module.layer, dict(module.given), [6, 1, 4]
    with torch.no_grad():
        y, last = layer(x, hx, lengths=counts, **given)
        packed, given_rows = (
            pack_padded_sequence(t, counts, enforce_sorted=False)
            for t in (x, torch.cat(list(given.values()), -1))
        )
        rows = dict(zip(given, given_rows.data.chunk(len(given), -1), strict=True))
        of_rows, last_of_rows = layer(packed, hx, **rows)
        assert_all_close(pad_packed_sequence(of_rows)[0], y, tol=1e-14)
        assert_all_close(last_of_rows, last, tol=1e-14)
        as_packed = {name: given_rows._replace(data=value) for name, value in rows.items()}
        assert_all_close(layer(packed, hx, **as_packed)[0].data, of_rows.data, tol=0)
        for b, count in enumerate(counts):
            own = {name: value[:count, b] for name, value in given.items()}
            alone, end = layer(x[:count, b], tree_map(lambda s, b=b: s[:, b], hx), **own)
            assert_all_close(alone, y[:count, b], tol=1e-13)
            assert_all_close(end, tree_map(lambda s, b=b: s[:, b], last), tol=1e-13)
        layer.batch_first = True
        turned = {name: value.transpose(0, 1) for name, value in given.items()}
        again, _ = layer(x.transpose(0, 1), hx, lengths=counts, **turned)
        assert_all_close(again.transpose(0, 1), y, tol=1e-14)


@needs_kernels
@pytest.mark.parametrize("to", [None, "states"])
@pytest.mark.parametrize("kind", [zoo.GRUD, zoo.OriginalGRU], ids=lambda kind: kind.__name__)
def test_resets_and_what_is_given(kind: Any, to: str | None) -> None:
    """Each segment is a sequence of its own."""
    module, x, hx = giving(kind, (3, 6, 4, 9), torch.float64)
    layer, given = module.layer, dict(module.given)
    reset = torch.rand(6, 3) < 0.4
    anew = torch.randn_like(hx) if to else torch.zeros_like(hx)
    more = {"reset_to": anew} if to else {}
    y, _, states = layer(x, hx, reset=reset, return_states=True, **more, **given)
    for b in range(3):
        alone = {name: value[:, b] for name, value in given.items()}
        to_own = {"reset_to": anew[:, b]} if to else {}
        first = layer(x[:, b], hx[:, b], reset=reset[:, b], **to_own, **alone)
        assert_all_close(first[0], y[:, b], tol=1e-13)
        # The forward direction of the first layer, which sees nothing of the other.
        h, seen = hx[0, b], []
        cell = kind.Cell(4, 9, dtype=torch.float64)
        cell.load_state_dict(
            {n.removesuffix("_l0"): p for n, p in layer.state_dict().items() if n.endswith("_l0")}
        )
        for t in range(6):
            h = anew[0, b] if reset[t, b] else h
            h = cell(x[t, b], h, **{n: v[t, b] for n, v in given.items()})
            seen.append(h)
        assert_all_close(torch.stack(seen), states[0, :, b], tol=1e-13)


def test_mistakes_of_what_is_given() -> None:
    layer, decay = zoo.GRUD(3, 4), torch.rand(5, 2, 4)
    x = torch.randn(5, 2, 3)
    mistakes: list[tuple[Any, str, dict[str, Any]]] = [
        (TypeError, r"GRUD: decay: expected a tensor \[5, 2, 4\].*, got NoneType", {}),
        (ValueError, r"expected \[5, 2, 4\], got \[2, 5, 4\]", {"decay": decay.transpose(0, 1)}),
        (ValueError, r"expected torch.float32.*got torch.float64", {"decay": decay.double()}),
        (TypeError, "unexpected keyword argument 'dcay'; given for each step is", {"dcay": x}),
    ]
    for kind, message, named in mistakes:
        with pytest.raises(kind, match=message):
            layer(x, **named)
    with pytest.raises(TypeError, match=r"GRUD.Cell: decay: expected a tensor \[2, 4\]"):
        zoo.GRUD.Cell(3, 4)(x[0])
    with pytest.raises(TypeError, match="unexpected keyword argument 'decay'"):
        Tanh.Cell(3, 4)(x[0], decay=decay[0])
    with pytest.raises(ValueError, match="proj_size"):
        zoo.MultiplicativeLSTM(3, 4, proj_size=2)
    with pytest.raises(ValueError, match=r"norm_at: expected some of \('input',\)"):
        zoo.OriginalGRU(3, 4, norm="layer", norm_at=("recurrent",))
    empty = layer(x[:0].transpose(0, 1).reshape(5, 0, 3), decay=decay[:, :0])
    assert empty[0].shape == (5, 0, 4)


@pytest.mark.parametrize("name", ["native", "reference"])
def test_what_is_given_compiles_into_one_graph(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if name == "reference":
        monkeypatch.setattr(ops, "supports", lambda *_: False)
    module, x, hx = giving(zoo.GRUD, (2, 5, 3, 4), torch.float64)
    torch._dynamo.reset()
    fast = torch.compile(module, backend="aot_eager", fullgraph=True)
    ours, plain = run(fast, x, hx), run(module, x, hx)
    ours = {key.replace("_orig_mod.", ""): v for key, v in ours.items()}
    assert_all_close(ours, plain, tol=1e-12)


def test_transforms_of_what_is_given() -> None:
    module, x, hx = giving(zoo.GRUD, (2, 3, 2, 3), torch.float64)
    decay = module.given["decay"].detach()

    def call(decay: Tensor) -> Tensor:
        return module.layer(x, hx, decay=decay)[0]

    tangent = torch.randn_like(decay)
    _, forward = torch.func.jvp(call, (decay,), (tangent,))
    reverse = torch.autograd.functional.jacobian(call, decay, vectorize=True)
    assert_all_close(forward, torch.einsum("abcdef,def->abc", reverse, tangent), tol=1e-12)
    narrow, x, hx = module.float(), x.float(), hx.float()
    with torch.autocast("cpu"):
        low = narrow(x, hx)[0]
    assert error(low, narrow(x, hx)[0]) < 0.05


def test_flops_of_what_is_given() -> None:
    """Products with matrices are counted, and it is none."""
    layer = zoo.GRUD(3, 4)
    x = pack_sequence([torch.randn(n, 3) for n in (5, 2)])
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        layer(x, decay=torch.rand(7, 4))
    assert counter.get_total_flops() == 2 * 7 * (3 * 4 * 3 + 3 * 4 * 4)


# --- Random cells -------------------------------------------------------------------------------


@needs_kernels
@settings(
    max_examples=2,
    deadline=None,
    database=None,
    derandomize=True,  # so that libraries are found in the cache
    phases=[Phase.generate],  # to shrink would compile again and again
    suppress_health_check=list(HealthCheck),
)
@given(random_cells.cells(most=20))
def test_random_cells(drawn: random_cells.Drawn) -> None:
    kind = drawn.declare()
    agree(*giving(kind, (3, 4, 3, 5), torch.float64), 1e-6)  # of ATen's hardsigmoid
    small = kind(2, 2, dtype=torch.float64)
    x = torch.randn(2, 2, 2, dtype=torch.float64, requires_grad=True)
    states = leaves(tuple(torch.randn(1, 2, 2, dtype=torch.float64) for _ in drawn.states))
    more = leaves(tuple(torch.randn(2, 2, 2, dtype=torch.float64) for _ in drawn.given))

    def call(x: Tensor, *rest: Tensor) -> Any:
        hx, given = rest[: len(states)], rest[len(states) :]
        named = dict(zip(drawn.given, given, strict=True))
        return tuple(flatten(small(x, hx if len(hx) > 1 else hx[0], **named)))

    torch.autograd.gradcheck(call, (x, *states, *more), atol=1e-4, rtol=1e-3)
    torch.autograd.gradgradcheck(call, (x, *states, *more), atol=1e-4, rtol=1e-3)


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_output_recurrent_state_and_counter(dtype: torch.dtype) -> None:
    layer = Swapped(4, 17, 2, bidirectional=True, batch_first=True, dtype=dtype)
    assert (layer.tau_l1_reverse == 0.5).all()
    x = torch.randn(3, 6, 4, dtype=dtype)
    y, (c, h, count) = layer(x)
    assert torch.equal(count, torch.full_like(count, 6)) and torch.equal(y[:, -1, :17], h[2])
    hx = tree_map(torch.randn_like, (c, h, count))
    tol = {torch.float64: 1e-13, torch.float32: 2e-5, torch.bfloat16: 0.06}[dtype]
    agree(layer, x, hx, tol)
    packed = pack_sequence([torch.randn(n, 4, dtype=dtype) for n in (5, 2, 2)])
    _, (_, _, count) = layer(packed)
    assert torch.equal(count[0, :, 0], torch.tensor([5, 2, 2], dtype=dtype))


def assert_resets_cut(layer: Any, x: Tensor) -> None:
    """What comes after the last reset of a sequence is as if nothing had been before."""
    reset = torch.rand(x.shape[:2]) < 0.3
    y, states = layer(x, reset=reset)
    for b in range(x.shape[1]):
        start = max([0, *reset[:, b].nonzero().flatten().tolist()])
        alone, last = layer(x[start:, b])
        assert_all_close(y[start:, b], alone, tol=1e-13)
        assert_all_close(tree_map(lambda s, b=b: s[:, b], states), last, tol=1e-13)


@needs_kernels
def test_what_happens_between_steps() -> None:
    """Options of all layers, and resets, on kernels or past them: as the function itself."""
    layer = Peephole(4, 9, 2, norm="rms", zoneout=0.2, dtype=torch.float64)
    x = torch.randn(6, 3, 4, dtype=torch.float64)
    hx = tree_map(torch.randn_like, layer.eval()(x)[1])
    agree(layer, x, hx, 1e-12)
    assert_resets_cut(Swapped(4, 9, dtype=torch.float64), x)


# --- A module like others -----------------------------------------------------------------------


def test_parameters_and_states() -> None:
    layer = Swapped(3, 4, 2, bias=False, bidirectional=True)
    names = [name for name, _ in layer.named_parameters()][:3]
    assert names == ["weight_ih_l0", "weight_hh_l0", "tau_l0"]
    assert layer.weight_ih_l1.shape == (16, 8)
    assert issubclass(Swapped, nn.RNNBase) and Swapped.__doc__.startswith("The product is of")
    assert Swapped.__qualname__ == "Swapped" and Swapped.__module__ == __name__
    x = torch.randn(5, 2, 3)
    c, h, count = (torch.zeros(4, 2, 4) for _ in range(3))
    assert_all_close(layer(x, (c, h, count)), layer(x))
    alone = layer(x[:, 0], (c[:, 0], h[:, 0], count[:, 0]))
    assert_all_close(alone[0], layer(x)[0][:, 0], tol=1e-5)
    with pytest.raises(
        TypeError, match=r"expected a tuple of 3 tensors \(c, h, count\), got a ten"
    ):
        layer(x, h)
    with pytest.raises(TypeError, match="got 2"):
        layer(x, (c, h))
    with pytest.raises(RuntimeError, match=r"Expected hidden\[2\] size \(4, 2, 4\)"):
        layer(x, (c, h, count[:2]))
    with pytest.raises(ValueError, match="proj_size"):
        GRU(3, 4, proj_size=2)
    with pytest.raises(ValueError, match="proj_size"):
        Tanh(3, 4, proj_size=2)
    with pytest.raises(TypeError, match="must be tuple of Tensors"):
        LSTM(3, 4)(x, h[:1])


@pytest.mark.drawn(1)
@pytest.mark.parametrize("kind", [Swapped, GRU, LSTM], ids=lambda kind: kind.__name__)
def test_a_single_step(kind: Any) -> None:
    layer = kind(3, 4, dtype=torch.float64)
    step = kind.Cell(3, 4, dtype=torch.float64)
    step.load_state_dict({n.removesuffix("_l0"): p for n, p in layer.state_dict().items()})
    x = torch.randn(4, 2, 3, dtype=torch.float64)
    hx, outputs = None, []
    for t in range(4):
        hx = step(x[t], hx)
        outputs.append(hx[1] if kind is Swapped else hx[0] if kind is LSTM else hx)
    y, last = layer(x)
    assert_all_close(torch.stack(outputs), y, tol=1e-13)
    assert_all_close(hx, tree_map(lambda s: s[0], last), tol=1e-13)
    first = step(x[0, 0])
    assert all(a.shape == (4,) for a in flatten(first))
    assert_all_close(step(x[1, 0], first), tree_map(lambda s: s[0], step(x[1], step(x[0]))), 1e-13)
    with pytest.raises(RuntimeError, match="inconsistent input_size: got 2 expected 3"):
        step(torch.zeros(2, 2, dtype=torch.float64))
    with pytest.raises(RuntimeError, match=r"hx: expected \w+ \[2, 4\]"):
        step(x[0], tree_map(lambda s: s[:1], step(x[0])))


def test_copies_and_pickles() -> None:
    layer = Swapped(3, 4, leak=0.75)
    x = torch.randn(5, 2, 3)
    expected = layer(x)
    saved = io.BytesIO()
    torch.save(layer.state_dict(), saved)
    saved.seek(0)
    fresh = Swapped(3, 4, leak=0.75)
    fresh.load_state_dict(torch.load(saved))
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), fresh):
        assert_all_close(other(x), expected, tol=0)
        assert repr(other) == "Swapped(3, 4, leak=0.75)"
    assert error(Swapped(3, 4)(x)[0], expected[0]) > 1e-3
    step = Swapped.Cell(3, 4, leak=0.75)
    assert_all_close(pickle.loads(pickle.dumps(step))(x[0]), step(x[0]), tol=0)
    # What this process has not met yet: another had another hyperparameter.
    text = pickle.dumps(layer)
    name = CELLS[layer.cell]
    del CELLS[layer.cell]
    Swapped._family._names.clear()
    assert_all_close(pickle.loads(text)(x), expected, tol=0)
    assert CELLS[layer.cell] is not name


@pytest.mark.parametrize("name", ["native", "reference"])
@pytest.mark.parametrize("kind", [Swapped, Peephole], ids=lambda kind: kind.__name__)
def test_compiles_into_one_graph(kind: Any, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if name == "reference":
        monkeypatch.setattr(ops, "supports", lambda *_: False)
    layer = kind(3, 4, 2, dtype=torch.float64)
    x = torch.randn(5, 2, 3, dtype=torch.float64)
    torch._dynamo.reset()
    fast = torch.compile(layer, backend="aot_eager", fullgraph=True)
    ours, plain = run(fast, x), run(layer, x)
    assert_all_close(
        {key.replace("_orig_mod.", ""): v for key, v in ours.items()}, plain, tol=1e-12
    )


def test_transforms_and_double_backward() -> None:
    layer = Swapped(2, 3, dtype=torch.float64)
    x = torch.randn(3, 2, 2, dtype=torch.float64)

    def call(x: Tensor) -> Tensor:
        return layer(x)[0]

    single = torch.func.vmap(call, in_dims=1, out_dims=1)(x.unsqueeze(2))
    assert_all_close(single.squeeze(2), call(x), tol=1e-12)
    tangent = torch.randn_like(x)
    _, forward = torch.func.jvp(call, (x,), (tangent,))
    reverse = torch.autograd.functional.jacobian(call, x)
    assert_all_close(forward, torch.einsum("abcdef,def->abc", reverse, tangent), tol=1e-12)
    assert torch.autograd.gradgradcheck(call, (x.requires_grad_(),))


def test_autocast_and_mixed_threads() -> None:
    layer = Swapped(3, 40)
    x = torch.randn(5, 9, 3)
    with torch.autocast("cpu"):
        low = layer(x)[0]
    assert error(low, layer(x)[0]) < 0.05
    found = []
    for threads in (1, 3):
        torch.set_num_threads(threads)
        found.append(run(layer, x))
    torch.set_num_threads(torch.get_num_threads())
    for key, value in found[0].items():
        assert torch.equal(found[1][key], value), key


@pytest.mark.parametrize("bias", [True, False])
def test_dropout_between_layers_without_a_product(bias: bool) -> None:
    layer = zoo.MinGRU(3, 4, 3, bias=bias, dropout=0.5, bidirectional=True)
    x = torch.randn(5, 2, 3)
    torch.manual_seed(1)
    y, h_n = layer(x)
    torch.manual_seed(1)
    assert_all_close(layer(x), (y, h_n), tol=0)
    assert error(layer.eval()(x)[0], y) > 0 and h_n.shape == (6, 2, 4)


# --- Libraries ----------------------------------------------------------------------------------

PROGRAM = """
import sys, torch, fused_rnn
sys.path.insert(0, {tests!r})
@fused_rnn.cell(gates=("a",), params=("u",))
def Fresh(x, r, s, p):
    return dict(h=torch.tanh(x.a + {number} * r.a + p.u * s.h))
torch.manual_seed(1)
for _ in range(2):
    y = Fresh(3, 4)(torch.ones(2, 1, 3))[0]
print(y.sum().item(), fused_rnn.build.libraries.state().backend)
"""


def fresh(number: str, **own: str) -> subprocess.CompletedProcess[str]:
    text = PROGRAM.format(tests=str(Path(__file__).parent), number=number)
    return forked.python("-c", text, env=os.environ | own)


@needs_kernels
def test_a_library_is_built_once_and_listed(tmp_path: Path) -> None:
    number = f"{torch.rand(()).item():.9f}"
    first = fresh(number)
    assert first.stderr.count("compiling the cell Fresh (float, ") == 1, first.stderr
    second = fresh(number)
    assert second.stderr == "" and second.stdout == first.stdout and "native" in first.stdout
    listed = forked.python("-m", "fused_rnn", "cells").stdout
    assert "peephole_lstm" in listed and "Fresh" in listed
    # Without a compiler the function itself runs, and says so once.
    missing = fresh("1" + number, CXX="/nowhere/c++")
    assert missing.stderr.count("RuntimeWarning: fused_rnn has no Fresh (float) library") == 1
    plain = fresh("1" + number, FUSED_RNN_BACKEND="reference")
    assert float(missing.stdout.split()[0]) == pytest.approx(
        float(plain.stdout.split()[0]), rel=1e-5
    )
    assert plain.stderr == ""
    strict = fresh("1" + number, CXX="/nowhere/c++", FUSED_RNN_BACKEND="native")
    assert "RuntimeError: fused_rnn has no Fresh (float) library" in strict.stderr
    for facts in build.custom.found([build.cache_dir()]):
        if facts["type"] == "Fresh":
            facts["library"].unlink()
            facts["library"].with_suffix(".json").unlink()


@needs_kernels
@pytest.mark.drawn(1)
@pytest.mark.parametrize("capability", build.levels()[:2])
def test_other_instruction_sets(capability: str) -> None:
    done = fresh("0.5", FUSED_RNN_CPU_CAPABILITY=capability)
    assert "native" in done.stdout, done.stderr
    assert "cell Fresh" not in done.stderr or f"(float, {capability})" in done.stderr
    plain = fresh("0.5", FUSED_RNN_BACKEND="reference")
    assert float(done.stdout.split()[0]) == pytest.approx(float(plain.stdout.split()[0]), rel=1e-5)


@needs_kernels
def test_its_source_on_cuda(tmp_path: Path) -> None:
    """A type in memory, by nvcc; without that the function itself runs, with one warning."""

    def no_nvcc() -> Any:
        raise build.BuildError("nvcc was not found", "install it")

    cuda = dataclasses.replace(build.CUDA, find_tools=no_nvcc)
    libraries, main = build.Libraries([cuda]), build.state()
    assert main and main.library
    libraries.use("cuda", main.library, cuda)

    def has_cell() -> bool:
        return libraries.has_cell("cuda", "fresh", "Fresh", "bfloat16", lambda: "// the header")

    with pytest.warns(RuntimeWarning, match=r"no Fresh \(bfloat16, CUDA\) library: nvcc was not f"):
        assert not has_cell()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not has_cell()
    (unit,) = libraries.targets["cuda fresh bfloat16"].units(tmp_path)
    assert unit.rule == "nvcc" and unit.source.suffix == ".cu"
    assert {"-DFRNN_STEPS_ONLY", f"-I{build.CSRC}"} < set(unit.flags)
    assert (tmp_path / "cells/fresh.h").read_text() == "// the header"
    text = unit.source.read_text()
    assert "k_cuda_fresh_bfloat16 = cuda::Engine<custom::Fresh, __nv_bfloat16>::Kernels();" in text
    entry = 'AddCudaKernels("fresh", frnn::Storage::kBFloat16, frnn::k_cuda_fresh_bfloat16)'
    assert entry in text
    # A library that a test brings has no cells beside it unless it says how it was made.
    libraries.use("cuda", main.library)
    assert not libraries.has_cell("cuda", "other", "Other", "float", str)


@needs_kernels
def test_what_the_library_knows() -> None:
    layer = Swapped(3, 4)
    layer(torch.zeros(1, 1, 3))
    known = CELLS[layer.cell]
    assert_library_agrees(layer.cell)
    assert known.states == ("h", "c", "count") and known.output == 0


def test_errors_of_the_function_itself() -> None:
    with pytest.raises(CellError, match=f"{__file__}:.*no gate q; gates are a"):
        fused_rnn.cell(gates=("a",))(lambda x, r, s, p: dict(h=x.q))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert reference.CELLS[GRU.cell].source.type_name == "GRU"
