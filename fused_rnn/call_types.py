"""What a call of a module takes and gives, for type checkers: nn.Module's own type says Any."""

from __future__ import annotations

from typing import Literal, Protocol, TypeVar, overload

from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from .sequences import Lengths

Pair = tuple[Tensor, Tensor]


State = TypeVar("State")  # hx, and what a call returns for it


class Call(Protocol[State]):
    @overload
    def __call__(
        self,
        input: Tensor,
        hx: State | None = None,
        *,
        lengths: Lengths | None = None,
        reset: Tensor | None = None,
        reset_to: State | None = None,
        return_states: Literal[False] = False,
    ) -> tuple[Tensor, State]: ...
    @overload
    def __call__(
        self,
        input: Tensor,
        hx: State | None = None,
        *,
        lengths: Lengths | None = None,
        reset: Tensor | None = None,
        reset_to: State | None = None,
        return_states: Literal[True],
    ) -> tuple[Tensor, State, State]: ...
    @overload
    def __call__(
        self,
        input: PackedSequence,
        hx: State | None = None,
        *,
        reset: Tensor | None = None,
        reset_to: State | None = None,
        return_states: Literal[False] = False,
    ) -> tuple[PackedSequence, State]: ...
    @overload
    def __call__(
        self,
        input: PackedSequence,
        hx: State | None = None,
        *,
        reset: Tensor | None = None,
        reset_to: State | None = None,
        return_states: Literal[True],
    ) -> tuple[PackedSequence, State, State]: ...


LayerCall = Call[Tensor]
LSTMCall = Call[Pair]


class CellCall(Protocol):
    def __call__(self, input: Tensor, hx: Tensor | None = None) -> Tensor: ...


class LSTMCellCall(Protocol):
    def __call__(self, input: Tensor, hx: Pair | None = None) -> Pair: ...
