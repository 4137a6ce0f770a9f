"""The function of a cell, run on tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..compiler import Compiled
from ..reference import Step


class Values:
    """``x.i`` of tensors."""

    def __init__(self, names: Sequence[str], values: Sequence[Tensor]) -> None:
        for name, value in zip(names, values, strict=True):
            setattr(self, name, value)


class Products:
    """``r.i``, or ``r(operand).i`` of tensors.

    ``of_state`` are the gates of the product that is made already; which state it is of is known
    from the trace. ``others`` make one of an operand.
    """

    def __init__(
        self,
        of_state: Mapping[str, Tensor],
        others: Mapping[str, Callable[[Tensor], Tensor]],
        operand: Any,
    ) -> None:
        self._of_state, self._others, self._operand = of_state, others, operand

    def __call__(self, operand: Any) -> Products:
        return Products(self._of_state, self._others, operand)

    def __getattr__(self, gate: str) -> Tensor:
        made = self._of_state.get(gate)
        return self._others[gate](self._operand) if made is None else made


def plain_step(
    fn: Callable[..., Mapping[str, Any]],
    compiled: Compiled,
    states: Sequence[str],
    values: Mapping[str, Any],
) -> Step:
    """The function as ``reference.Cell`` wants it."""
    trace, d = compiled.trace, compiled.trace.declaration
    gates_x, of_state = (*trace.gates_x, *d.given), trace.gates_h[: trace.products[0]]
    later = list(enumerate(trace.gates_h))[len(of_state) :]
    first, others = states[0], states[1:]

    def step(
        gx: Tensor,
        gh: Tensor | None,
        h: Tensor,
        c: Tensor | None,
        *params: Tensor,
        product: Callable[[int, Tensor], Tensor] | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        parts = gx.chunk(len(gates_x), -1)
        like = parts[0]
        x = Values(gates_x, parts)
        s = Values(states, (h, *(() if c is None else c.chunk(len(others), -1))))
        made = () if gh is None else gh.chunk(len(of_state), -1)

        def made_of(gate: int) -> Callable[[Tensor], Tensor]:
            assert product is not None
            return lambda operand: product(gate, _full(operand, like))

        r = Products(
            dict(zip(of_state, made, strict=True)),
            {name: made_of(gate) for gate, name in later},
            getattr(s, d.states[0]),
        )
        new = fn(x, r, s, Values(d.params, params), **values)
        rest = [_full(new[name], like) for name in others]
        return _full(new[first], like), torch.cat(rest, -1) if rest else None

    return step


def _full(value: Any, like: Tensor) -> Tensor:
    """What may be a constant, or made of parameters alone, as numbers of all rows."""
    if not isinstance(value, Tensor):
        return torch.full_like(like, value)
    return value.to(like.dtype).expand_as(like)
