"""Layers of cells that torch.nn does not have: what ``reference.CELLS`` says of a cell, as modules.

They have all that RNN, LSTM and GRU have: layers, directions, dropout, projections, packed
sequences, ``recompute``. ``docs/adding-a-cell.md`` says how a cell comes in.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from .between import shows_options
from .recurrent import PairLayers, Recurrent
from .reference import CELLS

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from .between import Options
    from .call_types import LayerCall, LSTMCall

__all__ = ["BlockGRU", "PeepholeLSTM"]


class CustomLayer(Recurrent):
    """The constructor of a layer whose tensors ``CELLS`` lists."""

    cell: ClassVar[str]
    torch_class: ClassVar[Any] = None

    @shows_options
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
        if proj_size and not CELLS[self.cell].projectable:
            raise ValueError(
                f"proj_size: expected 0, since {type(self).__name__} reads h or the new h unit by "
                f"unit, or has another output, got {proj_size}"
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
    """A stack of layers of the recurrent unit of DreamerV3.

    Hafner et al. 2023, "Mastering diverse domains through world models", arXiv:2301.04104.

        s = W x_t + b_ih + R h_{t-1} + b_hh
        r = σ(s_r)    c = tanh(r ⊙ s_c)    u = σ(s_u - 1)
        h_t = u ⊙ c + (1 - u) ⊙ h_{t-1}

    The rows of every weight hold the gates in the order r, c, u. With ``blocks=8`` R is
    block-diagonal as DreamerV3's is, and with ``norm="rms", norm_at=("sum",)`` s is normalised
    before its bias; ``docs/between-steps.md`` says more.

    Arguments, the call, its shapes, what it returns and raises are those of ``GRU``.

    Examples:
        >>> core = fused_rnn.BlockGRU(10, 32, blocks=8, norm="rms", norm_at=("sum",))
        >>> output, h_n = core(torch.randn(5, 3, 10))
        >>> output.shape, h_n.shape
        (torch.Size([5, 3, 32]), torch.Size([1, 3, 32]))
    """

    if TYPE_CHECKING:
        __call__: LayerCall
    cell = "block_gru"
    _operator = "block_gru"


class PeepholeLSTM(CustomLayer, PairLayers):
    """A stack of LSTM layers whose gates see the cell state of their unit.

    Gers & Schmidhuber 2000, "Recurrent nets that time and count".

        i, f = σ(W x_t + b_ih + R h_{t-1} + b_hh + p ⊙ c_{t-1})
        g = tanh(W x_t + b_ih + R h_{t-1} + b_hh)
        c_t = f ⊙ c_{t-1} + i ⊙ g
        o = σ(W x_t + b_ih + R h_{t-1} + b_hh + p_o ⊙ c_t)
        h_t = o ⊙ tanh(c_t)

    The rows of every weight hold the gates in the order i, f, g, o, as in ``LSTM``. The parameters
    ``p_i_l0``, ``p_f_l0`` and ``p_o_l0`` [H] of each layer and direction come behind those of
    ``LSTM``, and are drawn like them.

    Arguments, the call, its shapes, what it returns and raises are those of ``LSTM``.

    Examples:
        >>> rnn = fused_rnn.PeepholeLSTM(10, 20)
        >>> output, (h_n, c_n) = rnn(torch.randn(5, 3, 10))
        >>> output.shape, c_n.shape
        (torch.Size([5, 3, 20]), torch.Size([1, 3, 20]))
    """

    if TYPE_CHECKING:
        __call__: LSTMCall
    cell = "peephole_lstm"
    _operator = "peephole_lstm"
