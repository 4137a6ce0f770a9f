"""Direct calls: what most calls come to on the CPU, in one function of the library.

That compares all tensors with each other, and where it would have to convert, copy or complain it
returns None. Then nothing has happened, and ``functional.py`` does the work.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from . import engines, ops
from .ops import called_directly
from .packed import NOT_PACKED, Packed
from .reference import CELLS

__all__ = ["called_directly", "recurrent_directly", "step_directly"]


def recurrent_directly(
    cell: str,
    x: Tensor,
    hx: Any,
    parameters: Mapping[str, Tensor | None],
    names: list[str],
    num_layers: int,
    bidirectional: bool,
    present: int,
    batch_first: bool,
    packed: Packed = NOT_PACKED,
) -> Any:
    """``functional.recurrent`` without dropout, to (y, hx); or None.

    hx is h, or a pair (h, c), and comes back in that form; None is zeros. The weights are those
    parameters that ``names`` says. If ``batch_first``, x and y have that layout.
    """
    calls = ops.direct_calls(x)
    if not calls or packed.int8 and packed.tensor is None:
        return None
    states = hx if isinstance(hx, (tuple, list)) else (hx,)
    weights = [parameters.get(name) for name in names]
    if engines.any_answers_itself(weights):
        return None
    directions = 2 if bidirectional else 1
    if ops.wants_grad((*weights, x, *states)):
        call = ops.Call(cell, num_layers, directions, present)
        return _recorded(call, x, hx, weights, batch_first)
    return calls.infer_stack(
        cell, x, hx, parameters, names, num_layers, directions, present, batch_first, packed.tensor
    )


def _recorded(call: ops.Call, x: Tensor, hx: Any, weights: Sequence[Any], batch_first: bool) -> Any:
    """``recurrent_directly`` where autograd keeps x and the states, which must not be views of what
    programs write into (``in_place.kept_for_backward``)."""
    known = CELLS[call.cell]
    if known.given or x.layout != torch.strided or x.dim() != 3:
        return None
    if torch.is_autocast_enabled("cpu"):  # which the call refuses, after a copy of x
        return None
    states: tuple[Any, ...] = ()
    if hx is not None:
        several = isinstance(hx, (tuple, list))
        states = tuple(hx) if several else (hx,)
        if several != (len(known.states) > 1) or len(states) != 1 + several:
            return None
    for state in states:
        usual = type(state) in (Tensor, Parameter) and state.layout == torch.strided
        if not usual or not state.is_contiguous():
            return None
    h0, c0 = (*states, None, None)[:2]
    if batch_first:
        x = x.transpose(0, 1)
    found = ops.directly(call, x.contiguous(), h0, c0, None, weights, None, train=True)
    if found is None:
        return None
    y, h_n, c_n = found
    return y.transpose_(0, 1) if batch_first else y, h_n if c_n is None else (h_n, c_n)


def step_directly(
    cell: str,
    x: Tensor,
    hx: Any,
    parameters: Mapping[str, Tensor | None],
    names: list[str],
    packed: Packed = NOT_PACKED,
) -> Any:
    """``functional.step``, to hx, or None; as in ``recurrent_directly``. B may be missing."""
    calls = ops.direct_calls(x)
    if not calls:
        return None
    states = hx if isinstance(hx, (tuple, list)) else (hx,)
    if packed.int8 and (packed.tensor is None or ops.wants_grad((x, *states))):
        return None
    return calls.step(cell, x, hx, parameters, names, packed.tensor)
