"""The layers of a cell from a function."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from ..cells import CustomLayer
from ..reference import CELLS
from .family import OPTIONS
from .given import together
from .module import FamilyModule
from .single import SingleStep

if TYPE_CHECKING:
    from ..call_types import Call


class Layer(FamilyModule, CustomLayer):
    """Base of all layers that ``fused_rnn.cell`` makes."""

    Cell: ClassVar[type[SingleStep]]
    if TYPE_CHECKING:
        __call__: Call[Any]

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        proj_size: int = 0,
        device: Any = None,
        dtype: Any = None,
        *,
        recompute: bool = False,
        **hyperparameters: Any,
    ) -> None:
        options = {n: hyperparameters.pop(n) for n in OPTIONS if n in hyperparameters}
        self._choose(hyperparameters)
        super().__init__(
            input_size,
            hidden_size,
            num_layers,
            bias,
            batch_first,
            dropout,
            bidirectional,
            proj_size,
            device,
            dtype,
            recompute=recompute,
            **options,
        )

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._choose(state["hyperparameters"])  # this process may not have had them
        super().__setstate__(state)

    def reset_parameters(self) -> None:
        super().reset_parameters()
        if self.mode == self.cell.upper():  # not yet where torch.nn's constructor asks for it
            for run in self._all_weights:
                self._initialise(run[0].removeprefix("weight_ih"))

    def _has_usual_sizes(self) -> bool:
        if CELLS[self.cell].recurrent_gates:
            return super()._has_usual_sizes()
        return self._width("weight_ih_l0") == self.input_size

    def extra_repr(self) -> str:
        return super().extra_repr() + self._shown()


class StatesLayer(Layer):
    """Layers whose hidden state is a tuple of any tensors, in the order of the declaration."""

    def _place(self) -> int:
        """Of h among the states."""
        return self._family.declaration.states.index(CELLS[self.cell].states[0])

    def _widths(self) -> list[int]:
        widths = [self.hidden_size] * (len(self._family.declaration.states) - 1)
        widths[self._place() : self._place()] = super()._widths()
        return widths

    def _check_count(self, hx: Any) -> None:
        names = self._family.declaration.states
        if isinstance(hx, Tensor) or len(hx) != len(names):
            kind = "a tensor" if isinstance(hx, Tensor) else f"{len(hx)}"
            raise TypeError(
                f"{type(self).__name__}: hx: expected a tuple of {len(names)} tensors "
                f"({', '.join(names)}), got {kind}"
            )

    def _split_hidden(self, hx: Any) -> tuple[Tensor, Tensor]:
        self._check_count(hx)
        rest = list(hx)
        h = rest.pop(self._place())
        return h, torch.cat(rest, -1)

    def _join_hidden(self, h: Tensor, c: Tensor | None) -> Any:
        assert c is not None
        states = list(c.split(self.hidden_size, -1))
        states.insert(self._place(), h)
        return tuple(states)

    def _zero_hidden(self, x: Tensor, batch: Any) -> Any:
        h = super()._zero_hidden(x, batch)
        others = len(self._family.declaration.states) - 1
        return self._join_hidden(h, h.new_zeros(*h.shape[:-1], others * self.hidden_size))

    def _check_hidden_dim(self, hx: Any, dim: int) -> None:
        self._check_count(hx)
        for state in hx:
            super()._check_hidden_dim(state, dim)

    def check_forward_args(self, input: Tensor, hidden: Any, batch_sizes: Tensor | None) -> None:
        self.check_input(input, batch_sizes)
        self._check_count(hidden)
        layers, batch, width = self.get_expected_hidden_size(input, batch_sizes)
        for i, state in enumerate(hidden):
            expected = (layers, batch, width if i == self._place() else self.hidden_size)
            self.check_hidden_size(state, expected, f"Expected hidden[{i}] size {{}}, got {{}}")

    def permute_hidden(self, hx: Any, permutation: Tensor | None) -> Any:
        if permutation is None:
            return hx
        return tuple(state.index_select(1, permutation) for state in hx)


class GivenLayer(Layer):
    """Layers to whose call the caller gives more for each step."""

    def forward(
        self,
        input: Any,
        hx: Any = None,
        *,
        lengths: Any = None,
        reset: Tensor | None = None,
        reset_to: Any = None,
        return_states: bool = False,
        **given: Any,
    ) -> Any:
        """As of other layers; what is given is [T, B, H] each, in the layout of the input, or like
        it packed rows."""
        asked = self._asked(input, reset, reset_to, return_states)
        rows = input.data if isinstance(input, PackedSequence) else input
        shape = (*rows.shape[:-1], self.hidden_size)
        names = self._family.declaration.given
        values = together(type(self).__name__, names, given, rows, shape)
        assert values is not None
        if rows is input and rows.dim() == 2:
            values = values.unsqueeze(1)
        elif rows is input and self.batch_first:
            values = values.transpose(0, 1)
        return self._forward(input, hx, lengths, asked._replace(given=values))
