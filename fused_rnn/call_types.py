"""What a call of a module takes and gives, for type checkers: nn.Module's own type says Any."""

from __future__ import annotations

from typing import Literal, Protocol, overload

from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from .sequences import Lengths

Pair = tuple[Tensor, Tensor]


class LayerCall(Protocol):
    @overload
    def __call__(
        self,
        input: Tensor,
        hx: Tensor | None = None,
        *,
        lengths: Lengths | None = None,
        reset: Tensor | None = None,
        reset_to: Tensor | None = None,
        return_states: Literal[False] = False,
    ) -> tuple[Tensor, Tensor]: ...
    @overload
    def __call__(
        self,
        input: Tensor,
        hx: Tensor | None = None,
        *,
        lengths: Lengths | None = None,
        reset: Tensor | None = None,
        reset_to: Tensor | None = None,
        return_states: Literal[True],
    ) -> tuple[Tensor, Tensor, Tensor]: ...
    @overload
    def __call__(
        self,
        input: PackedSequence,
        hx: Tensor | None = None,
        *,
        reset: Tensor | None = None,
        reset_to: Tensor | None = None,
        return_states: Literal[False] = False,
    ) -> tuple[PackedSequence, Tensor]: ...
    @overload
    def __call__(
        self,
        input: PackedSequence,
        hx: Tensor | None = None,
        *,
        reset: Tensor | None = None,
        reset_to: Tensor | None = None,
        return_states: Literal[True],
    ) -> tuple[PackedSequence, Tensor, Tensor]: ...


class LSTMCall(Protocol):
    @overload
    def __call__(
        self,
        input: Tensor,
        hx: Pair | None = None,
        *,
        lengths: Lengths | None = None,
        reset: Tensor | None = None,
        reset_to: Pair | None = None,
        return_states: Literal[False] = False,
    ) -> tuple[Tensor, Pair]: ...
    @overload
    def __call__(
        self,
        input: Tensor,
        hx: Pair | None = None,
        *,
        lengths: Lengths | None = None,
        reset: Tensor | None = None,
        reset_to: Pair | None = None,
        return_states: Literal[True],
    ) -> tuple[Tensor, Pair, Pair]: ...
    @overload
    def __call__(
        self,
        input: PackedSequence,
        hx: Pair | None = None,
        *,
        reset: Tensor | None = None,
        reset_to: Pair | None = None,
        return_states: Literal[False] = False,
    ) -> tuple[PackedSequence, Pair]: ...
    @overload
    def __call__(
        self,
        input: PackedSequence,
        hx: Pair | None = None,
        *,
        reset: Tensor | None = None,
        reset_to: Pair | None = None,
        return_states: Literal[True],
    ) -> tuple[PackedSequence, Pair, Pair]: ...


class CellCall(Protocol):
    def __call__(self, input: Tensor, hx: Tensor | None = None) -> Tensor: ...


class LSTMCellCall(Protocol):
    def __call__(self, input: Tensor, hx: Pair | None = None) -> Pair: ...
