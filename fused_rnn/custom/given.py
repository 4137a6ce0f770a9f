"""What the caller of a layer gives for each step, to a cell that asks for it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from ..torch_internals import is_any_autocast_enabled


def together(
    owner: str,
    names: Sequence[str],
    given: Mapping[str, Any],
    rows: Tensor,
    shape: tuple[Any, ...],
) -> Tensor | None:
    """The values of these names side by side, after checks against the input of the call."""
    for name in given:
        if name not in names:
            known = ", ".join(names) or "nothing"
            raise TypeError(
                f"{owner}: got an unexpected keyword argument {name!r}; given for each step is "
                f"{known}"
            )
    values: list[Any] = [
        v.data if isinstance(v, PackedSequence) else v for v in map(given.get, names)
    ]
    for name, value in zip(names, values, strict=True):
        if not isinstance(value, Tensor):
            raise TypeError(
                f"{owner}: {name}: expected a tensor {_shape_text(shape)}, which this cell is "
                f"given for each step, got {type(value).__name__}"
            )
        if value.shape != shape:
            raise ValueError(
                f"{owner}: {name}: expected {_shape_text(shape)}, got {list(value.shape)}"
            )
        if value.device != rows.device:
            raise ValueError(
                f"{owner}: {name}: expected it on {rows.device}, as the input is, got "
                f"{value.device}"
            )
        if value.dtype != rows.dtype and not is_any_autocast_enabled():
            raise ValueError(
                f"{owner}: {name}: expected {rows.dtype}, as the input is, got {value.dtype}"
            )
    return torch.cat(values, -1) if len(values) > 1 else values[0] if values else None


def _shape_text(shape: tuple[Any, ...]) -> str:
    return f"[{', '.join(map(str, shape))}]"
