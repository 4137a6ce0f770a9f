"""Random cells for tests of the compiler: functions, as text, over all that a cell may use."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import hypothesis.strategies as st
import torch
import torch.nn.functional as F

import fused_rnn

# Each keeps values of moderate size so, and stays where it is differentiable as a rule.
UNARY = """torch.sigmoid({a});torch.tanh({a});{a}.tanh();{a}.sigmoid();torch.exp(torch.tanh({a}))
torch.expm1(torch.tanh({a}));torch.log(1.5 + torch.abs({a}));torch.log1p({a} * {a});-{a};abs({a})
torch.sqrt(0.5 + {a}.square());torch.rsqrt(1 + {a} ** 2);torch.reciprocal(2 + torch.sin({a}))
torch.sin({a});torch.cos(2 * {a});torch.erf({a});torch.relu({a});F.relu({a});torch.sign({a}) * {a}
F.softplus({a});F.softplus({a}, beta=2, threshold=3);F.logsigmoid({a});F.silu({a});F.gelu({a})
F.gelu({a}, approximate="tanh");F.elu({a}, alpha=0.7);F.leaky_relu({a}, 0.1)
F.hardtanh({a}, -0.5, 2.0);F.hardsigmoid({a});torch.clamp({a}, -0.7, 0.9);{a}.clamp(min=-0.3)
(1.2 + torch.tanh({a})) ** 1.7;torch.tanh({a}) ** 3;torch.pow({a}.sigmoid(), 0.5)
(2 + torch.tanh({a})) ** -2;1 - {a};{a} / 3;F.softsign({a});F.mish({a})
torch.where({a} > 0.1, {a}, 0.5 * {a});({a} > 0).float() * {a}
torch.special.expit({a});torch.special.log1p({a}.square());2.0 ** torch.tanh({a});0.3 - {a}
F.selu({a});F.relu6({a})""".replace("\n", ";").split(";")
BINARY = """{a} + {b};{a} - {b};{a} * {b};{a} / (1.5 + {b} * {b});torch.maximum({a}, {b})
torch.minimum({a}, {b});torch.add({a}, {b}, alpha=0.5);torch.lerp({a}, {b}, 0.3)
torch.logaddexp({a}, {b});torch.where({a} < {b}, {a}, -{b});torch.addcmul({a}, {b}, {a}, value=0.2)
torch.where(({a} > 0) & ({b} <= 1), {a} * {b}, {b});torch.where(~({a} >= {b}), {b}, 2 * {a})
torch.where(({a} != {b}) | ({a} > 3), {a}, {b});torch.sub({a}, {b});torch.mul({a}, {b})
{a}.sigmoid() * {b};{a}.lerp({b}, torch.sigmoid({a}));torch.max({a}, {b})""".replace(
    "\n", ";"
).split(";")


@dataclass(frozen=True)
class Drawn:
    gates: tuple[str, ...]
    states: tuple[str, ...]
    params: tuple[str, ...]
    output: str
    given: tuple[str, ...]
    text: str

    def declare(self, name: str = "Drawn") -> Any:
        """The class of its layers."""
        fn = self.fn
        fn.__name__ = name
        return fused_rnn.cell(
            gates=self.gates,
            states=self.states,
            params=self.params,
            output=self.output,
            given=self.given,
        )(fn)

    @property
    def fn(self) -> Callable[..., Any]:
        space: dict[str, Any] = {"torch": torch, "F": F}
        exec(compile(self.text, "<random cell>", "exec"), space)
        found: Callable[..., Any] = space["Drawn"]
        return found

    def __repr__(self) -> str:
        facts = (self.gates, self.states, self.params, self.output, self.given)
        return f'Drawn(*{facts}, """{self.text}""")'


@st.composite
def cells(draw: st.DrawFn, most: int = 8) -> Drawn:
    """Of at most so many lines."""
    return _drawn(
        lambda low, high: draw(st.integers(low, high)),
        lambda values: draw(st.sampled_from(values)),
        lambda: draw(st.booleans()),
        most,
    )


def by_chance(rng: random.Random, most: int = 8) -> Drawn:
    return _drawn(rng.randint, rng.choice, lambda: rng.random() < 0.5, most)


def _drawn(
    integer: Callable[[int, int], int],
    one_of: Callable[[Sequence[str]], str],
    flag: Callable[[], bool],
    most: int,
) -> Drawn:
    def some(kind: str, low: int, high: int) -> tuple[str, ...]:
        return tuple(f"{kind}{i}" for i in range(integer(low, high)))

    gates, states, params = some("g", 1, 6), some("s", 1, 3), some("p", 0, 2)
    given = some("e", 0, 2)
    # "u": a product with anything that is known by then.
    parts = [one_of(["x", "r", "xr", "u", "xu"]) for _ in gates]
    parts[0] = "xr"
    operands = [one_of(states) for _ in range(integer(1, 2))]
    lines, pool = [], [f"s.{name}" for name in states] + [f"p.{name}" for name in params]
    pool += [f"x.{name}" for name in given]
    for gate, part in zip(gates, parts, strict=True):
        pool += [f"x.{gate}"] * ("x" in part)
        pool += [f"r(s.{one_of(operands)}).{gate}"] * ("r" in part)
    read = list(pool)
    later = [gate for gate, part in zip(gates, parts, strict=True) if "u" in part]

    def line(text: str) -> None:
        lines.append(f"v{len(lines)} = {text}")
        pool.append(f"v{len(lines) - 1}")

    for _ in range(integer(1, most)):
        a, b = one_of(pool), one_of(pool)
        line(one_of(UNARY + BINARY).format(a=a, b=b))
        if later and flag():
            line(f"r({one_of(pool[-3:])}).{later[0]}")
            read.append(pool[-1])
            later.pop(0)
    for gate in later:
        line(f"r({one_of(pool)}).{gate}")
        read.append(pool[-1])
    everything = " + ".join(f"0.3 * {name}" for name in read)  # all are used
    ends = [f"torch.tanh({one_of(pool)} + {everything})"]
    ends += [f"torch.tanh({one_of(pool)})" for _ in states[1:]]
    new = ", ".join(f"{name}={end}" for name, end in zip(states, ends, strict=True))
    body = "\n    ".join([*lines, f"return dict({new})"])
    text = f"def Drawn(x, r, s, p):\n    {body}\n"
    return Drawn(gates, states, params, one_of(states), given, text)
