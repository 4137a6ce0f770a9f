"""Layers of cells that torch.nn does not have: what ``reference.CELLS`` says of a cell, as modules.

They have all that RNN, LSTM and GRU have: layers, directions, dropout, projections, packed
sequences, ``recompute``. ``docs/adding-a-cell.md`` says how a cell comes in.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from .recurrent import PairLayers, Recurrent
from .reference import CELLS

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from .between import Options

__all__ = ["BlockGRU", "PeepholeLSTM"]


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
        **options: Unpack[Options],
    ) -> None:
        known = CELLS[self.cell]
        own_width = known.reads_h or known.output or known.products
        if proj_size and (own_width or not known.recurrent_gates):
            raise ValueError(
                f"proj_size: expected 0, since {type(self).__name__} reads h unit by unit, or has "
                f"another output, got {proj_size}"
            )
        super().__init__(
            self.cell,
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
            options=options,
        )


class BlockGRU(CustomLayer):
    r"""A stack of layers of the recurrent unit of DreamerV3.

    Hafner et al. 2023, "Mastering diverse domains through world models", arXiv:2301.04104.

    .. math::
        s &= W x_t + b_{ih} + R h_{t-1} + b_{hh} \\
        r &= \sigma(s_r), \quad c = \tanh(r \odot s_c), \quad u = \sigma(s_u - 1) \\
        h_t &= u \odot c + (1 - u) \odot h_{t-1}

    The rows of every weight hold the gates in the order r, c, u. With ``blocks=8`` R is
    block-diagonal as DreamerV3's is, and with ``norm="rms", norm_at=("sum",)`` s is normalised
    before its bias; ``docs/between-steps.md`` says more.

    Args, the call, what it returns and raises: as ``GRU``.
    """

    cell = "block_gru"
    _operator = "block_gru"


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
