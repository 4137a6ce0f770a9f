"""What torch's ``FlopCounterMode`` counts for our operators: the products of matrices in a call,
which it counts one by one where torch.nn's layers do them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from torch._subclasses.fake_tensor import FakeTensor

from . import ops
from .imports import when_imported
from .reference import CELLS, present_names


class _Matrix(NamedTuple):
    """A weight that a product is with: its number among the weights, that of the first weight of
    its layer, and the operations for one row."""

    name: str
    number: int
    first: int
    flops: int


def _matrices(i: ops.Inputs) -> Iterator[_Matrix]:
    names = present_names(i.cell, i.present)
    for number, weight in enumerate(i.weights[: len(i.weights) - bool(CELLS[i.cell].given)]):
        if weight.dim() == 2:
            first = number - number % (i.directions * len(names))
            yield _Matrix(names[number % len(names)], number, first, 2 * weight.numel())


def _forward(*inputs: Any, **_: Any) -> int:
    i = ops.Inputs(*inputs)
    rows = i.x.shape[:-1].numel()
    return sum(rows * m.flops for m in _matrices(i))


def _backward(*arguments: Any, **_: Any) -> int:
    """Two products for each of the forward: the gradient of the weight, and of what it multiplied,
    unless nobody wants them. The states at the first step are wanted only if h0 is. Without a tape
    the forward is run again."""
    _, _, _, _, hs, _, needs, *inputs = arguments
    i = ops.Inputs(*inputs)
    rows, total = i.x.shape[:-1].numel(), 0
    first_rows = 0 if 1 in needs else _batch(i)
    for m in _matrices(i):
        below = min(needs) < 3 + m.first if m.first else 0 in needs
        through = {"w_ih": rows * below, "w_hh": rows - first_rows}.get(m.name, rows)
        own = rows * (3 + m.number in needs)
        again = rows * (hs.numel() == 0)
        total += m.flops * (own + through + again)
    return total


def _batch(i: ops.Inputs) -> int:
    if i.h0 is not None:
        return i.h0.shape[1]
    if i.batch_sizes is None:
        return i.x.shape[1]
    return 0 if isinstance(i.batch_sizes, FakeTensor) else int(i.batch_sizes[0])


def _register(counter: Any) -> None:
    for name, formula in (
        ("recurrent_infer", _forward),
        ("recurrent", _forward),
        ("recurrent_recomputed", _forward),
        ("recurrent_backward", _backward),
    ):
        operator = getattr(ops.operators, name)
        if operator not in counter.flop_registry:  # by another copy of this module
            counter.register_flop_formula(operator, get_raw=True)(formula)


# To import it here would import Triton, which takes longer than torch itself.
when_imported("torch.utils.flop_counter", _register)
