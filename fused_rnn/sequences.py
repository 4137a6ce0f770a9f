"""The arguments of a layer's call that torch.nn does not have: lengths, resets, all states.

What they mean to a user is in the docstrings of the layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from .segments import by_direction, last_rows

Lengths = Tensor | Sequence[int]
Pair = tuple[Tensor, Tensor | None]  # h, and c if there is one


class Asked(NamedTuple):
    """What a call asks for beside the usual, in the layout of the engines."""

    reset: Tensor | None = None  # [T, B] or packed [R], on the device of the input
    reset_to: Pair | None = None  # like the initial states, or with T in front
    states: bool = False  # whether those of all steps are to be returned
    given: Tensor | None = None  # to a cell that asks for it: [T, B, given * H] or packed rows

    def packed(self, counts: Tensor) -> Asked:
        """For the sequences of a padded batch that are packed as long as ``counts`` says."""

        def rows(padded: Tensor | None) -> Tensor | None:
            if padded is None:
                return None
            return pack_padded_sequence(padded, counts, enforce_sorted=False).data

        return self._replace(reset=rows(self.reset), given=rows(self.given))

    def sorted(self, indices: Tensor | None) -> Asked:
        """With the states of ``reset_to`` in the order of a packed batch."""
        if indices is None or self.reset_to is None:
            return self
        h, c = (None if s is None else s.index_select(-2, indices) for s in self.reset_to)
        assert h is not None
        return self._replace(reset_to=(h, c))


NOTHING_ASKED = Asked()


def checked_lengths(lengths: Lengths, batch: int, steps: int) -> Tensor:
    """[B] int64 on the CPU."""
    counts = torch.as_tensor(lengths) if len(lengths) else torch.zeros(0, dtype=torch.int64)
    if counts.is_floating_point() or counts.is_complex() or counts.dtype == torch.bool:
        raise TypeError(f"lengths: expected integers, got {counts.dtype}")
    if counts.shape != (batch,):
        raise ValueError(f"lengths: expected shape ({batch},), got {tuple(counts.shape)}")
    counts = counts.to("cpu", torch.int64)
    if bool(((counts < 0) | (counts > steps)).any()):
        raise ValueError(
            f"lengths: expected 0 to {steps}, the steps of input, got {counts.tolist()}"
        )
    return counts


def checked_reset(reset: Any, rows: Tensor) -> Tensor:
    """``reset`` for an input of these rows, on their device."""
    if not isinstance(reset, Tensor):
        raise TypeError(f"reset: expected a bool tensor, got {type(reset).__name__}")
    if reset.dtype != torch.bool:
        raise TypeError(f"reset: expected torch.bool, got {reset.dtype}")
    if reset.shape != rows.shape[:-1]:
        expected, given = tuple(rows.shape[:-1]), tuple(reset.shape)
        raise ValueError(f"reset: expected shape {expected}, as input has, got {given}")
    return reset.to(rows.device)


def check_reset_to(
    states: Sequence[Any],
    sizes: Sequence[tuple[Any, ...]],
    steps: int,
    like: Tensor,
    *,
    any_type: bool,
) -> None:
    """Raise unless each of the states has its size, or that with the steps in front."""
    for i, (state, size) in enumerate(zip(states, sizes, strict=True)):
        name = f"reset_to[{i}]" if len(states) > 1 else "reset_to"
        if not isinstance(state, Tensor):
            raise TypeError(f"{name}: expected a tensor, got {type(state).__name__}")
        many = state.dim() == len(size) + 1
        expected = (steps, *size) if many else size
        if is_dynamo_compiling() and state.dim() == len(expected):
            for found, wanted in zip(state.shape, expected, strict=True):
                torch._check(found == wanted)
        elif state.shape != expected:
            raise ValueError(
                f"{name}: expected shape {tuple(map(int, size))}, or with {steps} steps in front, "
                f"got {tuple(state.shape)}"
            )
        if state.device != like.device:
            raise ValueError(f"{name}: expected it on {like.device}, got {state.device}")
        if state.dtype != like.dtype and not any_type:
            raise ValueError(f"{name}: expected {like.dtype}, got {state.dtype}")


def last_states(rows: Tensor, directions: int, batch: Any, batch_sizes: Tensor | None) -> Tensor:
    """[L*D, B, P] of the states after every step, [L*D, rows, P]."""
    if batch_sizes is None:
        ends = torch.arange(batch, device=rows.device) + (rows.shape[1] - batch)
    else:
        ends = last_rows(batch_sizes, batch).to(rows.device)
    return by_direction(rows, directions, ends, None)


def padded_states(rows: Tensor, packed: PackedSequence, steps: int) -> Tensor:
    """[L*D, T, B, P] of the states after every step, packed like ``packed``; zeros past the end."""
    states = PackedSequence(rows.transpose(0, 1), *packed[1:])
    return pad_packed_sequence(states, total_length=steps)[0].movedim(2, 0)
