"""Every cell of the zoo on its compiled kernels, against a loop over its equations."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from typing import Any

import emulated
import pytest
import torch
from helpers import (
    Giving,
    assert_all_close,
    assert_close,
    compile_quickly,
    error,
    flatten,
    magnitude,
    run,
)
from torch import Tensor
from torch.nn.functional import softplus

from fused_rnn import build, ops, zoo
from fused_rnn.reference import CELLS

pytestmark = pytest.mark.compiling


@pytest.fixture(autouse=True)
def compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    compile_quickly(monkeypatch)


# --- The equations. a[g] is the sum of both parts of gate g, w[g] that of the input --------------

Named = dict[str, Tensor]
S, tanh = torch.sigmoid, torch.tanh


def _lstm(*missing: str) -> Callable[[Named, Named, Named, Named], Named]:
    """Greff et al. 2015, appendix A, and its variants."""

    def step(a: Named, w: Named, s: Named, p: Named) -> Named:
        def peephole(name: str, c: Tensor) -> Any:
            return p[name] * c if "peepholes" not in missing else 0

        c, one = s["c"], torch.ones_like(s["c"])
        i = one if "input" in missing else S(a["i"] + peephole("p_i", c))
        if "coupled" in missing:
            f = one - i
        else:
            f = one if "forget" in missing else S(a["f"] + peephole("p_f", c))
        block = a["g"] if "input activation" in missing else tanh(a["g"])
        c = block * i + c * f
        o = one if "output" in missing else S(a["o"] + peephole("p_o", c))
        return {"h": (c if "output activation" in missing else tanh(c)) * o, "c": c}

    return step


def _slstm(a: Named, w: Named, s: Named, p: Named) -> Named:
    """Without the stabiliser, which changes no output: c and n are those of eq. 8-10 times e^-m."""
    scale = torch.exp(s["m"])
    i, f = torch.exp(a["i"]), S(a["f"])
    c, n = f * s["c"] * scale + i * tanh(a["z"]), f * s["n"] * scale + i
    m = torch.maximum(s["m"] - softplus(-a["f"]), a["i"]).where(s["n"] != 0, a["i"])
    back = torch.exp(-m)
    return {"h": S(a["o"]) * c / n, "c": c * back, "n": n * back, "m": m}


def _atr(a: Named, w: Named, s: Named, p: Named) -> Named:
    difference = 2 * w["a"] - a["a"]
    return {"h": S(a["a"]) * w["a"] + S(difference) * s["h"]}


def _fastgrnn(a: Named, w: Named, s: Named, p: Named) -> Named:
    z, content = S(a["a"] + p["b_z"]), tanh(a["a"] + p["b_h"])
    return {"h": (S(p["zeta"]) * (1 - z) + S(p["nu"])) * content + z * s["h"]}


def _cfc(a: Named, w: Named, s: Named, p: Named) -> Named:
    t = S(a["a"] + a["b"])
    return {"h": tanh(a["g"]) * (1 - t) + t * tanh(a["f"])}


def _unicornn(a: Named, w: Named, s: Named, p: Named) -> Named:
    dt = 0.1 * S(p["c"])
    z = s["z"] - dt * (tanh(p["w"] * s["y"] + w["a"]) + 0.9 * s["y"])
    return {"y": s["y"] + dt * z, "z": z}


def _sru(a: Named, w: Named, s: Named, p: Named) -> Named:
    f, r = S(w["f"] + p["v_f"] * s["c"]), S(w["r"] + p["v_r"] * s["c"])
    c = f * s["c"] + (1 - f) * w["g"]
    return {"h": r * c + (1 - r) * w["skip"], "c": c}


def _qrnn(a: Named, w: Named, s: Named, p: Named) -> Named:
    c = S(w["f"]) * s["c"] + (1 - S(w["f"])) * tanh(w["z"])
    return {"h": S(w["o"]) * c, "c": c}


def _minlstm(a: Named, w: Named, s: Named, p: Named) -> Named:
    f, i = S(w["f"]), S(w["i"])
    return {"h": (f * s["h"] + i * w["g"]) / (f + i)}


def _ran(a: Named, w: Named, s: Named, p: Named) -> Named:
    c = S(a["i"]) * w["g"] + S(a["f"]) * s["c"]
    return {"h": tanh(c), "c": c}


def _mixed(gate: str, content: Callable[[Named, Named], Tensor]) -> Any:
    """h' = z h + (1 - z) content"""
    return lambda a, w, s, p: {"h": torch.lerp(content(a, w), s["h"], S(a[gate]))}


Product = Callable[[str, Tensor], Tensor]  # of a gate, R v + b


def _resetting(
    x_in: Callable[[Named], Tensor] = lambda w: w["n"],
    of_z: Callable[[Tensor], Tensor] = lambda h: h,
    *,
    to_old: bool = True,
    has_z: bool = True,
) -> Any:
    """GRUs that reset before the product. z is a part of the old state, or of the new."""

    def step(r: Product, w: Named, s: Named, p: Named) -> Named:
        h = s["h"]
        z = S(w["z"] + r("z", of_z(h))) if has_z else S(w["z"])
        n = tanh(x_in(w) + r("n", S(w["r"] + r("r", h)) * h))
        return {"h": z * h + (1 - z) * n if to_old else z * n + (1 - z) * h}

    return step


def _mgu(r: Product, w: Named, s: Named, p: Named) -> Named:
    f = S(w["f"] + r("f", s["h"]))
    return {"h": (1 - f) * s["h"] + f * tanh(w["n"] + r("n", f * s["h"]))}


def _mlstm(r: Product, w: Named, s: Named, p: Named) -> Named:
    m = w["m"] * r("m", s["h"])
    a = {gate: w[gate] + r(gate, m) for gate in "ifgo"}
    return _lstm("peepholes")(a, w, s, p)


def _fgr(r: Product, w: Named, s: Named, p: Named) -> Named:
    a = {gate: w[gate] + r(gate, s["h"]) for gate in "ifgo"}
    for gate in "ifo":
        for before in "ifo":
            a[gate] = a[gate] + r(f"{gate}_{before}", s[before])
    i, f = S(a["i"] + p["p_i"] * s["c"]), S(a["f"] + p["p_f"] * s["c"])
    c = tanh(a["g"]) * i + s["c"] * f
    o = S(a["o"] + p["p_o"] * c)
    return {"h": tanh(c) * o, "c": c, "i": i, "f": f, "o": o}


def _rhn(r: Product, w: Named, s: Named, p: Named) -> Named:
    v = s["h"]
    for layer in "12":
        x_n, x_t = (w.get(f"{gate}{layer}", 0) for gate in "nt")
        n, t = tanh(x_n + r(f"n{layer}", v)), S(x_t + r(f"t{layer}", v))
        v = n * t + v * (1 - t)
    return {"h": v}


def _lem(r: Product, w: Named, s: Named, p: Named) -> Named:
    t, bar = S(w["t"] + r("t", s["y"])), S(w["s"] + r("s", s["y"]))
    z = (1 - t) * s["z"] + t * tanh(w["z"] + r("z", s["y"]))
    return {"y": (1 - bar) * s["y"] + bar * tanh(w["y"] + r("y", z)), "z": z}


def _cornn(r: Product, w: Named, s: Named, p: Named) -> Named:
    force = tanh(r("y", s["y"]) + r("z", s["z"]) + w["y"])
    z = s["z"] + 0.05 * (force - s["y"] - s["z"])
    return {"y": s["y"] + 0.05 * z, "z": z}


def _grud(r: Product, w: Named, s: Named, p: Named) -> Named:
    return _resetting(to_old=False)(r, w, {"h": w["decay"] * s["h"]}, p)


# What they multiply with W_hh is not the state alone: in the place of a they take the product.
WITH_PRODUCTS: dict[str, Callable[[Product, Named, Named, Named], Named]] = {
    "OriginalGRU": _resetting(),
    "MUT1": _resetting(lambda w: tanh(w["n"]), to_old=False, has_z=False),
    "MUT2": _resetting(to_old=False),
    "MUT3": _resetting(of_z=tanh, to_old=False),
    "MGU": _mgu,
    "MultiplicativeLSTM": _mlstm,
    "FGR": _fgr,
    "RHN": _rhn,
    "LEM": _lem,
    "CoRNN": _cornn,
    "GRUD": _grud,
}

STEPS: dict[str, Callable[[Named, Named, Named, Named], Named]] = {
    "PeepholeLSTM": _lstm(),
    "NIG": _lstm("input"),
    "NFG": _lstm("forget"),
    "NOG": _lstm("output"),
    "NIAF": _lstm("input activation"),
    "NOAF": _lstm("output activation"),
    "CIFG": _lstm("coupled"),
    "NP": _lstm("peepholes"),
    "SLSTM": _slstm,
    "RAN": _ran,
    "JANET": lambda a, w, s, p: {"h": S(a["f"]) * s["h"] + S(1 - a["f"]) * tanh(a["g"])},
    "UGRNN": _mixed("g", lambda a, w: tanh(a["c"])),
    "LiGRU": _mixed("z", lambda a, w: torch.relu(a["c"])),
    "ATR": _atr,
    "FastGRNN": _fastgrnn,
    "CfC": _cfc,
    "LeakyRNN": lambda a, w, s, p: {"h": 0.8 * s["h"] + 0.2 * tanh(a["a"])},
    "IndRNN": lambda a, w, s, p: {"h": torch.relu(w["a"] + p["u"] * s["h"])},
    "AntisymmetricRNN": lambda a, w, s, p: {"h": s["h"] + 0.1 * tanh(a["a"] - 0.1 * s["h"])},
    "UnICORNN": _unicornn,
    "SRU": _sru,
    "QRNN": _qrnn,
    "MinGRU": lambda a, w, s, p: {"h": (1 - S(w["z"])) * s["h"] + S(w["z"]) * w["g"]},
    "MinLSTM": _minlstm,
}


class Loop(Giving):
    """The equations over the parameters of a layer, on x [T, B, I]."""

    def __init__(self, kind: str, layer: Any, given: Named) -> None:
        super().__init__(layer, given)
        self.kind = kind

    def forward(self, x: Tensor, hx: Any, **_: Any) -> Any:
        layer, kind = self.layer, self.kind
        states = layer._family.declaration.states
        last: list[list[Tensor]] = [[] for _ in states]
        hx = hx if isinstance(hx, tuple) else (hx,)
        traced = layer_trace(layer)
        for number in range(layer.num_layers * (1 + layer.bidirectional)):
            i, d = divmod(number, 1 + layer.bidirectional)
            name = f"_l{i}{'_reverse' * d}"
            weights = {short: getattr(layer, short + name) for short in ("weight_ih", "bias_ih")}
            params = {p: getattr(layer, p + name) for p in layer._family.declaration.params}
            if traced.gates_h:
                weights |= {s: getattr(layer, s + name) for s in ("weight_hh", "bias_hh")}
            now = dict(zip(states, (h[number] for h in hx), strict=True))
            outputs = [x] * len(x)
            for t in range(len(x))[:: -1 if d else 1]:
                gates = (x[t] @ weights["weight_ih"].T + weights["bias_ih"]).chunk(
                    len(traced.gates_x), -1
                )
                w = dict(zip(traced.gates_x, gates, strict=True))
                w |= {name: value[t] for name, value in self.given.items()}
                if kind in WITH_PRODUCTS:
                    whole = (weights["weight_hh"], weights["bias_hh"])
                    parts = (tensor.chunk(len(traced.gates_h)) for tensor in whole)
                    of_gate = dict(zip(traced.gates_h, zip(*parts, strict=True), strict=True))
                    now = WITH_PRODUCTS[kind](
                        lambda gate, v, of_gate=of_gate: v @ of_gate[gate][0].T + of_gate[gate][1],
                        w,
                        now,
                        params,
                    )
                    outputs[t] = now[states[0]]
                    continue
                a = dict(w)
                if traced.gates_h:
                    products = now[states[0]] @ weights["weight_hh"].T + weights["bias_hh"]
                    for gate, part in zip(
                        traced.gates_h, products.chunk(len(traced.gates_h), -1), strict=True
                    ):
                        a[gate] = a[gate] + part
                now = STEPS[kind](a, w, now, params)
                outputs[t] = now[states[0]]
            for of, name in zip(last, states, strict=True):
                of.append(now[name])
            if d == 0:
                y = torch.stack(outputs)
            else:
                y = torch.cat([y, torch.stack(outputs)], -1)
            if d == layer.bidirectional:
                x = y
        ends = tuple(map(torch.stack, last))
        return x, ends if len(ends) > 1 else ends[0]


def layer_trace(layer: Any) -> Any:
    return CELLS[layer.cell].source.trace


def example(name: str, **sizes: Any) -> tuple[Any, Tensor, Any, Named]:
    sizes = {"input_size": 5, "hidden_size": 9, "num_layers": 2, "bidirectional": True, **sizes}
    layer = getattr(zoo, name)(**sizes, dtype=torch.float64)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    x = torch.randn(6, 4, sizes["input_size"], dtype=torch.float64)
    given = {
        given: torch.rand(6, 4, sizes["hidden_size"], dtype=torch.float64)
        for given in layer._family.declaration.given
    }
    _, hx = layer(x, **given)
    hx = torch.utils._pytree.tree_map(torch.randn_like, hx)
    if name == "SLSTM":  # the normaliser is a sum of exponentials
        hx = (*hx[:2], hx[2].abs() + 1, hx[3])
    return layer, x, hx, given


@pytest.mark.drawn(4)  # each is compiled
@pytest.mark.parametrize("name", zoo.__all__)
def test_agrees_with_its_equations(name: str) -> None:
    layer, x, hx, given = example(name)
    if build.backend() == "native" and emulated.ENGINE in ("", "emulated"):
        assert ops.has_cell("cpu", layer.cell, torch.float64), "it has kernels"
    loop = Loop(name, layer, given)
    ours, theirs = run(Giving(layer, given), x, hx), run(loop, x, hx)
    for key, value in theirs.items():  # what nothing reads has no gradient there
        assert_close(ours.pop(key), torch.zeros_like(hx[0]) if value is None else value, 1e-11, key)
    assert not ours
    with torch.no_grad():
        assert_all_close(layer(x, hx, **given), loop(x, hx), tol=1e-12)
    assert re.search(r"(19|20)\d\d.*``.*``", getattr(zoo, name).__doc__, re.DOTALL), "its source"


@pytest.mark.drawn(1)
@pytest.mark.parametrize("name", ["SLSTM", "MinLSTM", "FastGRNN", "MultiplicativeLSTM", "FGR"])
def test_float32(name: str) -> None:
    layer, x, hx, _ = example(name, hidden_size=33)
    narrow = copy.deepcopy(layer).float()
    exact = run(layer, x, hx)
    ours = run(narrow, x.float(), torch.utils._pytree.tree_map(lambda t: t.float(), hx))
    for key, value in exact.items():
        assert error(ours[key], value) <= 2e-5 * max(1.0, magnitude(value)), key


@pytest.mark.skipif(
    build.backend() != "native" or bool(emulated.ENGINE), reason="about direct calls"
)
def test_a_cell_without_a_product_is_called_directly() -> None:
    layer, x, hx, _ = example("MinGRU")
    with torch.no_grad():
        expected = layer(x, hx)
        assert layer._is_usual() and layer._run_directly(x, hx) is not None
        assert_all_close(layer(x, hx), expected, tol=0)


def test_slstm_from_zeros_and_far_out() -> None:
    """The stabiliser holds where the exponentials would overflow."""
    layer, x, *_ = example("SLSTM", num_layers=1)
    x = 1000 * x
    y = layer(x)[0]
    y.sum().backward()
    assert all(torch.isfinite(t).all() for t in flatten((y, [p.grad for p in layer.parameters()])))


def test_heads_of_slstm_are_blocks() -> None:
    """Its recurrent matrices are block-diagonal, one block for each head."""
    layer, x, hx, _ = example("SLSTM", hidden_size=8, num_layers=1, blocks=2)
    whole, *_ = example("SLSTM", hidden_size=8, num_layers=1)
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            if name.startswith("weight_hh"):
                gates = [torch.block_diag(*gate.chunk(2)) for gate in parameter.chunk(4)]
                parameter = torch.cat(gates)
            whole.get_parameter(name).copy_(parameter)
    ours, theirs = run(Giving(layer, {}), x, hx), run(Loop("SLSTM", whole, {}), x, hx)
    for key, value in theirs.items():
        if "weight_hh" in key:
            gates = [(gate[:4, :4], gate[4:, 4:]) for gate in value.chunk(4)]
            value = torch.cat([head for gate in gates for head in gate])
        assert_close(ours.pop(key), value, 1e-11, key)
    assert not ours


def test_antisymmetric_blocks() -> None:
    """Each block by itself: as the layer of the whole matrix with them on its diagonal."""
    in_blocks = zoo.AntisymmetricRNN(3, 64, blocks=2, dtype=torch.float64)
    whole = zoo.AntisymmetricRNN(3, 64, dtype=torch.float64)
    state = in_blocks.state_dict()
    name = "parametrizations.weight_hh_l0.original"
    whole.load_state_dict(state | {name: torch.block_diag(*state[name].chunk(2))})
    x = torch.randn(5, 2, 3, dtype=torch.float64)
    assert_close(in_blocks(x)[0], whole(x)[0], 1e-12)
