"""RNNCell, LSTMCell and GRUCell: one step at a time, to be used wherever torch.nn's are.

Sizes in the docstrings: B sequences, I = ``input_size``, H = ``hidden_size``.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from torch.compiler import is_dynamo_compiling

from . import functional
from .direct_calls import called_directly, step_directly
from .packed import NOT_PACKED, pack
from .torch_shaped import HiddenPair, TorchShaped, torchs_own

__all__ = ["GRUCell", "LSTMCell", "RNNCell"]

if TYPE_CHECKING:
    from .call_types import CellCall, LSTMCellCall

_CELL_WEIGHTS = ["weight_ih", "weight_hh", "bias_ih", "bias_hh"]
_RNN_CELLS = {"tanh": "rnn_tanh", "relu": "rnn_relu"}


class _Cell(TorchShaped, nn.RNNCellBase):
    """What the cells share: from a user's call to ``functional.step`` and back."""

    _hidden_name: ClassVar[str] = "hidden"

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run ``forward`` and the hooks; the class says which shapes."""
        # As in Recurrent.__call__.
        found = called_directly(self, args, kwargs, self._cell(), _CELL_WEIGHTS)
        return super().__call__(*args, **kwargs) if found is None else found

    def _cell(self) -> str:
        raise NotImplementedError

    def _zero_hidden(self, x: Tensor) -> Any:
        return torch.zeros(x.size(0), self.hidden_size, dtype=x.dtype, device=x.device)

    def _weights(self) -> list[Any]:
        parameters = self._parameters
        try:
            return [parameters[name] for name in _CELL_WEIGHTS]
        except KeyError:
            return [self._read(name) for name in _CELL_WEIGHTS]

    def _pack(self, weights: Sequence[Tensor], dtype: torch.dtype | None) -> Tensor | None:
        present = sum(1 << i for i, w in enumerate(self._weights()) if w is not None)
        return pack(
            self._cell(),
            weights,
            num_layers=1,
            bidirectional=False,
            present=present,
            dtype=dtype,
        )

    def _has_usual_sizes(self) -> bool:
        return self._width("weight_hh") == self.hidden_size

    def _check_dim(self, tensor: Tensor, what: str) -> int:
        dim = tensor.dim()
        if dim not in (1, 2):
            raise ValueError(
                f"{self.torch_class.__name__}: Expected {what} to be 1D or 2D, got {dim}D instead"
            )
        return dim

    def forward(self, input: Tensor, hx: Any = None) -> Any:
        """Return the next state; the class says which shapes."""
        if type(input) is Tensor and not is_dynamo_compiling() and self._is_usual():
            parameters = self._parameters
            packed = NOT_PACKED if self._frozen is None else self._packed(self._weights())
            found = step_directly(self._cell(), input, hx, parameters, _CELL_WEIGHTS, packed)
            if found is not None:
                return found
        if (node := self._fx_node(input, hx)) is not None:
            return node
        batched = self._check_dim(input, "input") == 2
        x = input if batched else input.unsqueeze(0)
        h, c = self._split_hidden(self._zero_hidden(x) if hx is None else hx)
        if hx is not None:
            states: Any = (h, c) if isinstance(self, HiddenPair) else (h,)
            for i, state in enumerate(states):
                self._check_dim(state, self._hidden_name.format(i))
            if not batched:
                h, c = h.unsqueeze(0), None if c is None else c.unsqueeze(0)
        weights = self._weights()
        w_ih, w_hh, b_ih, b_hh = weights
        packed = self._packed(weights)
        h, c = functional.step(self._cell(), x, h, c, w_ih, w_hh, b_ih, b_hh, packed=packed)
        if not batched:
            h, c = h.squeeze(0), None if c is None else c.squeeze(0)
        return self._join_hidden(h, c)

    __call__.__signature__ = inspect.signature(forward)  # type: ignore[attr-defined]
    _usual_forward = forward


class RNNCell(_Cell):
    """One step of an Elman network; equation and source as in ``RNN``.

    Args:
        input_size: features I.
        hidden_size: units H.
        bias: whether b_ih and b_hh exist.
        nonlinearity: ``"tanh"`` or ``"relu"``.
        device: where the parameters are.
        dtype: of the parameters.

    Call ``cell(input, hx=None)`` with input [B, I] of B sequences, or [I], and hx [B, H] or [H],
    zeros if None; returns the next h, like hx.

    Raises:
        ValueError: input or hx of another rank.
        RuntimeError: sizes, device or dtype that do not fit; an unknown nonlinearity, at the call.

    Examples:
        >>> cell = fused_rnn.RNNCell(10, 20)
        >>> h = torch.zeros(3, 20)
        >>> for x in torch.randn(5, 3, 10):
        ...     h = cell(x, h)
    """

    torch_class = torchs_own("RNNCell")
    if TYPE_CHECKING:
        __call__: CellCall
    __constants__ = ["input_size", "hidden_size", "bias", "nonlinearity"]
    nonlinearity: str

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        nonlinearity: str = "tanh",
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__(input_size, hidden_size, bias, num_chunks=1, device=device, dtype=dtype)
        self.nonlinearity = nonlinearity

    def _cell(self) -> str:
        name = _RNN_CELLS.get(self.nonlinearity)
        if name is None:
            raise RuntimeError(f"Unknown nonlinearity: {self.nonlinearity}")
        return name


class LSTMCell(HiddenPair, _Cell):
    """One step of a long short-term memory; equations, sources and gate order as in ``LSTM``.

    Args:
        input_size: features I.
        hidden_size: units H.
        bias: whether b_ih and b_hh exist.
        device: where the parameters are.
        dtype: of the parameters.

    Call ``cell(input, hx=None)`` with input [B, I] of B sequences, or [I], and hx a pair (h, c),
    both [B, H] or [H], zeros if None; returns the next pair (h, c).

    Raises:
        TypeError, ValueError: hx not a pair; input, h or c of another rank.
        RuntimeError: sizes, device or dtype that do not fit.

    Examples:
        >>> cell = fused_rnn.LSTMCell(10, 20)
        >>> h, c = torch.zeros(3, 20), torch.zeros(3, 20)
        >>> for x in torch.randn(5, 3, 10):
        ...     h, c = cell(x, (h, c))
    """

    torch_class = torchs_own("LSTMCell")
    if TYPE_CHECKING:
        __call__: LSTMCellCall
    _operator = "lstm_cell"
    _hidden_name = "hx[{}]"

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__(input_size, hidden_size, bias, num_chunks=4, device=device, dtype=dtype)

    def _cell(self) -> str:
        return "lstm"

    def _zero_hidden(self, x: Tensor) -> Any:
        zeros = super()._zero_hidden(x)
        return zeros, zeros


class GRUCell(_Cell):
    """One step of a gated recurrent unit; equations, source and gate order as in ``GRU``.

    Args:
        input_size: features I.
        hidden_size: units H.
        bias: whether b_ih and b_hh exist.
        device: where the parameters are.
        dtype: of the parameters.

    Call ``cell(input, hx=None)`` with input [B, I] of B sequences, or [I], and hx [B, H] or [H],
    zeros if None; returns the next h, like hx.

    Raises:
        ValueError: input or hx of another rank.
        RuntimeError: sizes, device or dtype that do not fit.

    Examples:
        >>> cell = fused_rnn.GRUCell(10, 20)
        >>> h = torch.zeros(3, 20)
        >>> for x in torch.randn(5, 3, 10):
        ...     h = cell(x, h)
    """

    torch_class = torchs_own("GRUCell")
    if TYPE_CHECKING:
        __call__: CellCall

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__(input_size, hidden_size, bias, num_chunks=3, device=device, dtype=dtype)

    def _cell(self) -> str:
        return "gru"
