"""Layers of cells that torch.nn does not have: what ``reference.CELLS`` says of a cell, as modules.

They have all that RNN, LSTM and GRU have: layers, directions, dropout, projections, packed
sequences, ``recompute``. ``docs/adding-a-cell.md`` says how a cell comes in.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .modules import PairLayers, Recurrent
from .reference import CELLS, present_bits, present_names

__all__ = ["PeepholeLSTM"]


class CustomLayer(Recurrent):
    """The constructor of a layer whose tensors ``CELLS`` lists."""

    cell: ClassVar[str]
    torch_class: ClassVar[Any] = None

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
    ) -> None:
        known = CELLS[self.cell]
        if proj_size and (known.reads_h or known.output or not known.recurrent_gates):
            raise ValueError(
                f"proj_size: expected 0, since {type(self).__name__} reads h unit by unit, or has "
                f"another output, got {proj_size}"
            )
        # The checks of torch.nn's classes, and their attributes. It knows four modes, none of which
        # is ours; its parameters, which take no memory and no random numbers, go at once.
        super().__init__(
            "RNN_TANH",
            input_size,
            hidden_size,
            num_layers,
            bias,
            batch_first,
            dropout,
            bidirectional,
            proj_size,
            device="meta",
            recompute=recompute,
        )
        self.mode = self.cell.upper()
        for name in list(self._parameters):
            delattr(self, name)
        self._all_weights = [
            self._add_run(layer, suffix, device, dtype)
            for layer in range(num_layers)
            for suffix in ("", "_reverse")[: 1 + bidirectional]
        ]
        self._flat_weights_names = [name for run in self._all_weights for name in run]
        self._init_flat_weights()
        self.reset_parameters()

    def _add_run(self, layer: int, suffix: str, device: Any, dtype: Any) -> list[str]:
        """Make the parameters of one direction of a layer; their names, as torch.nn forms them."""
        width = self.proj_size or self.hidden_size
        inputs = self.input_size if layer == 0 else width * (1 + self.bidirectional)
        names = []
        for name, shape in shapes_of(
            self.cell, inputs, self.hidden_size, bias=self.bias, proj_size=self.proj_size
        ).items():
            names.append(f"{name}_l{layer}{suffix}")
            empty: Tensor = torch.empty(*shape, device=device, dtype=dtype)
            setattr(self, names[-1], nn.Parameter(empty))
        return names


def shapes_of(
    cell: str, inputs: int, hidden: int, *, bias: bool, proj_size: int
) -> dict[str, tuple[int, ...]]:
    """The tensors of a cell, in their order, by the names that torch.nn gives to parameters."""
    known, width = CELLS[cell], proj_size or hidden
    rows, rows_h = known.gates * hidden, known.recurrent_gates * hidden
    named: dict[str, tuple[str, tuple[int, ...]]] = {
        "w_ih": ("weight_ih", (rows, inputs)),
        "w_hh": ("weight_hh", (rows_h, width)),
        "b_ih": ("bias_ih", (rows,)),
        "b_hh": ("bias_hh", (rows_h,)),
        "w_hr": ("weight_hr", (width, hidden)),
    }
    present = present_bits(cell, biases=bias, projection=proj_size > 0)
    return dict(named.get(name, (name, (hidden,))) for name in present_names(cell, present))


class PeepholeLSTM(CustomLayer, PairLayers):
    r"""A stack of LSTM layers whose gates see the cell state of their unit.

    Gers & Schmidhuber 2000, "Recurrent nets that time and count".

    .. math::
        i, f &= \sigma(W x_t + b_{ih} + R h_{t-1} + b_{hh} + p \odot c_{t-1}) \\
        g &= \tanh(W x_t + b_{ih} + R h_{t-1} + b_{hh}) \\
        c_t &= f \odot c_{t-1} + i \odot g \\
        o &= \sigma(W x_t + b_{ih} + R h_{t-1} + b_{hh} + p_o \odot c_t) \\
        h_t &= o \odot \tanh(c_t)

    The rows of every weight hold the gates in the order i, f, g, o, as in ``LSTM``. The parameters
    ``p_i_l0``, ``p_f_l0`` and ``p_o_l0`` [H] of each layer and direction come behind those of
    ``LSTM``, and are drawn like them.

    Args, the call, what it returns and raises: as ``LSTM``.
    """

    cell = "peephole_lstm"
    _operator = "peephole_lstm"
