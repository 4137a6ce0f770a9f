"""A call of a layer: from what the user gives to ``functional.recurrent`` and back.

Sizes: T steps, B sequences, R packed rows, L layers, D directions, P the width of h.
"""

from __future__ import annotations

import inspect
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.compiler import is_dynamo_compiling
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from . import functional, onnx, sequences
from .between import NOTHING
from .direct_calls import called_directly, recurrent_directly
from .packed import NOT_PACKED
from .sequences import NOTHING_ASKED, Asked, Lengths
from .stack import Stack
from .torch_internals import is_any_autocast_enabled
from .torch_shaped import HiddenPair

# Methods that torch.nn's forward calls, so that a subclass may override them.
_HOOKS = (
    "check_forward_args",
    "check_hidden_size",
    "check_input",
    "get_expected_cell_size",
    "get_expected_hidden_size",
    "permute_hidden",
)
_RANKS = {2: "unbatched 2-D", 3: "batched 3-D"}


class Recurrent(Stack):
    """What all layers share: RNN, LSTM, GRU and those of other cells."""

    _wrong_input: ClassVar[str] = "{}: Expected input to be 2D or 3D, got {}D instead"
    _own_hooks: ClassVar[bool]  # whether _HOOKS are as here and in torch.nn

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        hooks = [getattr(cls, name) for name in _HOOKS if hasattr(cls, name)]
        homes = (__name__, nn.RNNBase.__module__)
        cls._own_hooks = all(getattr(hook, "__module__", None) in homes for hook in hooks)
        cls._usual_forward = Recurrent.forward if cls._own_hooks else None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run ``forward`` and the hooks; the class says which shapes."""
        # nn.Module's own takes as long as a small step and mostly finds nothing to do.
        found = called_directly(self, args, kwargs, self.mode.lower())
        return nn.Module.__call__(self, *args, **kwargs) if found is None else found

    def _has_usual_checks(self) -> bool:
        own = self.__dict__
        usual = own.keys().isdisjoint(_HOOKS) and own.get("between_steps", NOTHING) == NOTHING
        return self._own_hooks and usual

    def _widths(self) -> list[int]:
        """Of the states, in the user's order."""
        return [self.proj_size or self.hidden_size]

    def _zero_hidden(self, x: Tensor, batch: Any) -> Any:
        runs = self.num_layers * (2 if self.bidirectional else 1)
        return torch.zeros(
            runs, batch, self.proj_size or self.hidden_size, dtype=x.dtype, device=x.device
        )

    def _check_hidden_dim(self, hx: Any, dim: int) -> None:
        if hx.dim() != dim:
            raise RuntimeError(
                f"For {_RANKS[dim]} input, hx should also be {dim}-D but got {hx.dim()}-D tensor"
            )

    def check_input(self, input: Tensor, batch_sizes: Tensor | None) -> None:
        weight_dtype = self._weight(0).dtype
        if input.dtype != weight_dtype and not is_any_autocast_enabled():
            raise ValueError(
                f"RNN input dtype ({input.dtype}) does not match weight dtype ({weight_dtype}). "
                f"Convert input: input.to({weight_dtype}), "
                f"or convert model: model.to({input.dtype})"
            )
        expected_dim = 3 if batch_sizes is None else 2
        if input.dim() != expected_dim:
            raise RuntimeError(f"input must have {expected_dim} dimensions, got {input.dim()}")
        if input.size(-1) != self.input_size:
            raise RuntimeError(
                "input.size(-1) must be equal to input_size. "
                f"Expected {self.input_size}, got {input.size(-1)}"
            )

    def check_hidden_size(
        self,
        hx: Tensor,
        expected_hidden_size: tuple[int, int, int],
        msg: str = "Expected hidden size {}, got {}",
    ) -> None:
        if is_dynamo_compiling():  # how many sequences are packed is known when the program runs
            for size, expected in zip(hx.size(), expected_hidden_size, strict=True):
                torch._check(size == expected)
        else:
            super().check_hidden_size(hx, expected_hidden_size, msg)

    def _checked(self, input: Tensor, hx: Any, batch_sizes: Tensor | None) -> Any:
        """hx after torch.nn's checks, for which it has states of zeros where none are given. They
        are as many as the module says, and needed only if that is not what the weights say."""
        usual = self._own_hooks if is_dynamo_compiling() else self._is_usual()
        if hx is None and usual:
            self.check_input(input, batch_sizes)
            return None
        if hx is None:
            batch = input.size(self._batch_dim()) if batch_sizes is None else batch_sizes[0]
            hx = self._zero_hidden(input, batch)
        self.check_forward_args(input, hx, batch_sizes)
        return hx

    def _batch_dim(self) -> int:
        return 0 if self.batch_first else 1

    def _run(
        self, x: Tensor, hx: Any, batch_sizes: Tensor | None, asked: Asked = NOTHING_ASKED
    ) -> tuple[Tensor, Any, Any]:
        """The outputs, the last states and, if asked for, those of all rows, [L*D, rows, P]."""
        h0, c0 = (None, None) if hx is None else self._split_hidden(hx)
        weights = self._weights()
        y, h_n, c_n = functional.recurrent(
            self.mode.lower(),
            x,
            h0,
            c0,
            weights,
            num_layers=self.num_layers,
            bidirectional=self.bidirectional,
            present=self._present(),
            batch_first=self.batch_first and batch_sizes is None,
            dropout=self.dropout,
            training=self.training,
            batch_sizes=batch_sizes,
            recompute=self.recompute,
            between=self.between_steps,
            reset=asked.reset,
            reset_to=asked.reset_to,
            every_state=asked.states,
            given=asked.given,
            packed=self._packed(weights),
        )
        if not asked.states:
            return y, self._join_hidden(h_n, c_n), None
        batch: Any = x.size(self._batch_dim())
        if batch_sizes is not None:
            batch = int(batch_sizes[0]) if h0 is None else h0.size(1)
        last = (
            None
            if rows is None
            else sequences.last_states(rows, 1 + self.bidirectional, batch, batch_sizes)
            for rows in (h_n, c_n)
        )
        return y, self._join_hidden(*last), self._join_hidden(h_n, c_n)  # type: ignore[arg-type]

    def _each(self, states: Any, fn: Any) -> Any:
        """States, in the user's form, of which ``fn`` makes others."""
        h, c = self._split_hidden(states)
        return self._join_hidden(fn(h), None if c is None else fn(c))

    def _asked(self, input: Any, reset: Any, reset_to: Any, return_states: Any) -> Asked:
        """These arguments checked, in the layout of the engines."""
        if not isinstance(return_states, bool):
            given = type(return_states).__name__
            raise TypeError(f"return_states should be of type bool, got: {given}")
        if reset is None:
            if reset_to is not None:
                raise ValueError("reset_to: expected None without reset")
            return Asked(states=return_states)
        rows, batch_sizes = input, None
        if isinstance(input, PackedSequence):
            rows, batch_sizes = input.data, input.batch_sizes
        reset = sequences.checked_reset(reset, rows)
        if batch_sizes is None and self.batch_first and rows.dim() == 3:
            reset = reset.transpose(0, 1)
        elif batch_sizes is None and rows.dim() == 2:
            reset = reset.unsqueeze(1)
        if reset_to is None:
            return Asked(reset, None, return_states)
        widths = self._widths()
        several = len(widths) > 1
        if (
            several != isinstance(reset_to, (tuple, list))
            or several
            and (len(reset_to) != len(widths))
        ):
            wanted = {1: "a tensor", 2: "a pair of tensors"}.get(len(widths))
            raise TypeError(
                f"reset_to: expected {wanted or f'{len(widths)} tensors'}, got "
                f"{type(reset_to).__name__}"
            )
        alone = batch_sizes is None and rows.dim() == 2
        batch = (
            ()
            if alone
            else self.get_expected_hidden_size(input if batch_sizes is None else rows, batch_sizes)[
                1:2
            ]
        )
        runs = self.num_layers * (1 + self.bidirectional)
        sizes = [(runs, *batch, n) for n in widths]
        steps = len(reset) if batch_sizes is None else len(batch_sizes)
        each = list(reset_to) if several else [reset_to]
        sequences.check_reset_to(each, sizes, steps, rows, any_type=is_any_autocast_enabled())
        states = self._split_hidden(reset_to)
        if alone:
            states = tuple(None if s is None else s.unsqueeze(-2) for s in states)  # type: ignore[assignment]
        return Asked(reset, states, return_states)

    def forward(
        self,
        input: Tensor | PackedSequence,
        hx: Any = None,
        *,
        lengths: Lengths | None = None,
        reset: Tensor | None = None,
        reset_to: Any = None,
        return_states: bool = False,
    ) -> Any:
        """Return the outputs of the last layer and the last states; the class says which shapes."""
        asked = NOTHING_ASKED
        if lengths is None and reset is None and reset_to is None and return_states is False:
            found = self._run_directly(input, hx)
            if found is not None:
                return found
        if (node := self._fx_node(input, hx, lengths, reset, reset_to, return_states)) is not None:
            return node
        if not (reset is None and reset_to is None and return_states is False):
            asked = self._asked(input, reset, reset_to, return_states)
        return self._forward(input, hx, lengths, asked)

    def _forward(self, input: Any, hx: Any, lengths: Lengths | None, asked: Asked) -> Any:
        if lengths is not None:
            return self._forward_lengths(input, hx, lengths, asked)
        if isinstance(input, PackedSequence):
            packed, hx, states = self._forward_packed(input, hx, asked)
            return (packed, hx, states) if asked.states else (packed, hx)
        dim = input.dim()
        if dim not in _RANKS:
            raise ValueError(self._wrong_input.format(self.mode, dim))
        batch_dim = self._batch_dim()
        if hx is not None:
            self._check_hidden_dim(hx, dim)
        if dim == 2:
            input = input.unsqueeze(batch_dim)
            if hx is not None:
                hx = self._each(hx, lambda s: s.unsqueeze(1))
        hx = self._checked(input, hx, None)
        if hx is not None:
            hx = self.permute_hidden(hx, None)
        y, hx, states = self._run(input, hx, None, asked)
        if dim == 2:
            y, hx = y.squeeze(batch_dim), self._each(hx, lambda s: s.squeeze(1))
        hx = self.permute_hidden(hx, None)
        if not asked.states:
            return y, hx
        if dim == 3:  # else the rows are the steps
            shape = (input.size(1 - batch_dim), input.size(batch_dim))
            states = self._each(states, lambda s: s.unflatten(1, shape))
        return y, hx, states

    # What help() and editors show.
    __call__.__signature__ = inspect.signature(forward)  # type: ignore[attr-defined]

    def _run_directly(self, x: Any, hx: Any) -> tuple[Tensor, Any] | None:
        """``forward`` of a padded batch by one direct call, or None if it has to go all the way.

        The call checks x and hx against the weights, so no error is lost; overridden hooks would
        not be called.
        """
        if is_dynamo_compiling() or type(x) is not Tensor or not self._is_usual():
            return None
        if self.training and self.dropout or self.recompute and torch.is_grad_enabled():
            return None
        packed = NOT_PACKED if self._frozen is None else self._packed(self._weights())
        found: tuple[Tensor, Any] | None = recurrent_directly(
            self.mode.lower(),
            x,
            hx,
            self._parameters,
            self._flat_weights_names,
            self.num_layers,
            self.bidirectional,
            self._present(),
            self.batch_first,
            packed,
        )
        return found

    def _forward_lengths(self, input: Any, hx: Any, lengths: Lengths, asked: Asked) -> Any:
        """A padded batch whose sequences have lengths of their own: packed, run, and padded."""
        if isinstance(input, PackedSequence):
            raise ValueError("lengths: expected None with a PackedSequence, which has its own")
        if input.dim() != 3:
            raise ValueError(f"lengths: expected input to be 3D, a batch, got {input.dim()}D")
        batch_dim = self._batch_dim()
        batch, steps = input.size(batch_dim), input.size(1 - batch_dim)
        counts = sequences.checked_lengths(lengths, batch, steps)
        if batch == 0 or steps == 0:
            return self._forward(input, hx, None, asked._replace(reset=None, reset_to=None))
        if hx is not None:
            self._check_hidden_dim(hx, 3)
        if bool((counts == 0).any()):
            return self._forward_empty(input, hx, counts, asked)
        packed = pack_padded_sequence(input, counts, self.batch_first, enforce_sorted=False)
        y, hx, states = self._forward_packed(packed, hx, asked.packed(counts))
        padded = pad_packed_sequence(y, self.batch_first, total_length=steps)[0]
        if not asked.states:
            return padded, hx
        states = self._each(states, lambda s: sequences.padded_states(s, packed, steps))
        return padded, hx, states

    def _forward_empty(self, input: Tensor, hx: Any, counts: Tensor, asked: Asked) -> Any:
        """Where some sequences have no step: these run one over zeros, and nothing comes of it."""
        empty = (counts == 0).to(input.device).unsqueeze(-1)  # [B, 1]
        of_batch = empty.unsqueeze(1 - self._batch_dim())
        some = input.masked_fill(of_batch, 0)
        if asked.given is not None:
            asked = asked._replace(given=asked.given.masked_fill(empty, 0))
        y, last, *states = self._forward_lengths(some, hx, counts.clamp(min=1), asked)
        begin = self._zero_hidden(input, input.size(self._batch_dim())) if hx is None else hx
        h, c = (
            s if s is None or first is None else torch.where(empty, first.to(s.dtype), s)
            for first, s in zip(self._split_hidden(begin), self._split_hidden(last), strict=True)
        )
        assert h is not None
        states = [self._each(s, lambda t: t.masked_fill(empty, 0)) for s in states]
        return y.masked_fill(of_batch, 0), self._join_hidden(h, c), *states

    def _forward_packed(
        self, input: PackedSequence, hx: Any, asked: Asked
    ) -> tuple[PackedSequence, Any, Any]:
        onnx.check_packed()
        rows, batch_sizes, sorted_indices, unsorted_indices = input
        if hx is None and torch.compiler.is_compiling():
            # How many sequences there are is in the data: a compiler takes it from the states.
            hx = self._zero_hidden(rows, batch_sizes[0])
        hx = self._checked(rows, hx, batch_sizes)
        if hx is not None:  # in the user's order, the kernels see the longest sequences first
            hx = self.permute_hidden(hx, sorted_indices)
        y, hx, states = self._run(rows, hx, batch_sizes, asked.sorted(sorted_indices))
        packed = PackedSequence(y, batch_sizes, sorted_indices, unsorted_indices)
        return packed, self.permute_hidden(hx, unsorted_indices), states


class PairLayers(HiddenPair, Recurrent):
    """Layers whose state is a pair (h, c)."""

    def _widths(self) -> list[int]:
        return [*super()._widths(), self.hidden_size]

    def _zero_hidden(self, x: Tensor, batch: Any) -> Any:
        h = super()._zero_hidden(x, batch)
        return h, torch.zeros(
            h.size(0), h.size(1), self.hidden_size, dtype=x.dtype, device=x.device
        )

    def _check_hidden_dim(self, hx: Any, dim: int) -> None:
        h, c = self._split_hidden(hx)
        if h.dim() != dim or c.dim() != dim:
            raise RuntimeError(
                f"For {_RANKS[dim]} input, hx and cx should also be {dim}-D "
                f"but got ({h.dim()}-D, {c.dim()}-D) tensors"
            )

    # The three below are nn.LSTM's, to be called and overridden: same names, arguments, messages.

    def get_expected_cell_size(
        self, input: Tensor, batch_sizes: Tensor | None
    ) -> tuple[int, int, int]:
        layers, batch, _ = self.get_expected_hidden_size(input, batch_sizes)
        return layers, batch, self.hidden_size

    def check_forward_args(self, input: Tensor, hidden: Any, batch_sizes: Tensor | None) -> None:
        self.check_input(input, batch_sizes)
        h, c = self._split_hidden(hidden)
        expected_h = self.get_expected_hidden_size(input, batch_sizes)
        self.check_hidden_size(h, expected_h, "Expected hidden[0] size {}, got {}")
        expected_c = self.get_expected_cell_size(input, batch_sizes)
        self.check_hidden_size(c, expected_c, "Expected hidden[1] size {}, got {}")

    def permute_hidden(self, hx: Any, permutation: Tensor | None) -> Any:
        if permutation is None:
            return hx
        h, c = hx
        return h.index_select(1, permutation), c.index_select(1, permutation)
