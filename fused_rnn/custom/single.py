"""A single step of a cell from a function."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .. import functional
from ..reference import CELLS, present_bits
from ..stack import parameter_shapes
from .given import together
from .module import FamilyModule


class SingleStep(FamilyModule, nn.Module):
    """One step, as ``torch.nn.LSTMCell`` is one of ``torch.nn.LSTM``.

    Call ``cell(input, hx=None)`` with input [B, I] or [I] and hx like what it returns: the new
    state [B, H] or [H], or a tuple of them in the order of the declaration.
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        device: Any = None,
        dtype: Any = None,
        **hyperparameters: Any,
    ) -> None:
        super().__init__()
        self._choose(hyperparameters)
        for name, size in (("input_size", input_size), ("hidden_size", hidden_size)):
            if not isinstance(size, int) or size < 1:
                raise ValueError(f"{name}: expected a positive integer, got {size!r}")
        self.input_size, self.hidden_size, self.bias = input_size, hidden_size, bias
        present = present_bits(self.cell, biases=bias, projection=False)
        shapes = parameter_shapes(self.cell, present, input_size, hidden_size, hidden_size)
        self._names = list(shapes)
        for name, shape in shapes.items():
            empty = torch.empty(*shape, device=device, dtype=dtype)
            self.register_parameter(name, nn.Parameter(empty))
        self.reset_parameters()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._choose(self.hyperparameters)

    def reset_parameters(self) -> None:
        """Draw all as ``torch.nn`` does, then those that begin with something of their own."""
        bound = self.hidden_size**-0.5
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -bound, bound)
        self._initialise("")

    def extra_repr(self) -> str:
        bias = "" if self.bias else ", bias=False"
        return f"{self.input_size}, {self.hidden_size}{bias}{self._shown()}"

    def forward(self, input: Tensor, hx: Any = None, **given: Any) -> Any:
        """Return the new states. What is given is [B, H] or [H]."""
        declared = self._family.declaration
        if input.dim() not in (1, 2):
            raise ValueError(
                f"{declared.name}.Cell: expected input to be 1D or 2D, got {input.dim()}D"
            )
        if input.shape[-1] != self.input_size:
            raise RuntimeError(
                f"input has inconsistent input_size: got {input.shape[-1]} expected "
                f"{self.input_size}"
            )
        batched, shape = input.dim() == 2, (*input.shape[:-1], self.hidden_size)
        x = input if batched else input.unsqueeze(0)
        h, c = (None, None) if hx is None else self._states(hx, shape)
        bits = present_bits(self.cell, biases=self.bias, projection=False)
        values = together(f"{declared.name}.Cell", declared.given, given, input, shape)
        _, h_n, c_n = functional.recurrent(
            self.cell,
            x.unsqueeze(0),
            h,
            c,
            [getattr(self, name) for name in self._names],
            num_layers=1,
            bidirectional=False,
            present=bits,
            given=None if values is None else values.reshape(1, -1, values.shape[-1]),
        )
        order, names = CELLS[self.cell].states, declared.states
        new = [h_n, *(() if c_n is None else c_n.split(self.hidden_size, -1))]
        new = [state.squeeze(0) if batched else state.squeeze(0).squeeze(0) for state in new]
        return tuple(new[order.index(name)] for name in names) if len(names) > 1 else new[0]

    def _states(self, hx: Any, shape: tuple[int, ...]) -> tuple[Tensor, Tensor | None]:
        """h and all others, [1, B, ..]."""
        names = self._family.declaration.states
        states = (hx,) if len(names) == 1 and isinstance(hx, Tensor) else hx
        if isinstance(states, Tensor) or len(states) != len(names):
            raise TypeError(
                f"{self._family.declaration.name}.Cell: hx: expected a tensor for each of the "
                f"states {', '.join(names)}"
            )
        for name, state in zip(names, states, strict=True):
            if state.shape != shape:
                raise RuntimeError(f"hx: expected {name} {list(shape)}, got {list(state.shape)}")
        by_name = dict(zip(names, states, strict=True))
        h, *others = (
            by_name[name].reshape(1, -1, self.hidden_size) for name in CELLS[self.cell].states
        )
        return h, torch.cat(others, -1) if others else None
