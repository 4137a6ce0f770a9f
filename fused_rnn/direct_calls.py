"""Direct calls: what most calls come to on the CPU, in one function of the library.

That compares all tensors with each other, and where it would have to convert, copy or complain it
returns None. Then nothing has happened, and ``functional.py`` does the work.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from . import engines, ops
from .ops import called_directly
from .packed import NOT_PACKED, Packed

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
    """``functional.recurrent`` without dropout and gradients, to (y, hx); or None.

    hx is h, or a pair (h, c), and comes back in that form; None is zeros. The weights are those
    parameters that ``names`` says. If ``batch_first``, x and y have that layout.
    """
    calls = ops.direct_calls(x)
    if not calls or packed.int8 and packed.tensor is None:
        return None
    states = hx if isinstance(hx, (tuple, list)) else (hx,)
    weights = [parameters.get(name) for name in names]
    if any(map(engines.answers_itself, weights)) or ops.wants_grad((*weights, x, *states)):
        return None
    directions = 2 if bidirectional else 1
    return calls.infer_stack(
        cell, x, hx, parameters, names, num_layers, directions, present, batch_first, packed.tensor
    )


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
