"""What type checkers make of calls: nothing to run, ``make lint`` has mypy read it."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_sequence
from typing_extensions import assert_type

import fused_rnn

x = torch.ones(5, 3, 4)
packed = pack_sequence([x[:, 0], x[:2, 1]])
zeros = torch.zeros(1, 3, 6)

assert_type(fused_rnn.RNN(4, 6)(x), tuple[Tensor, Tensor])
assert_type(fused_rnn.GRU(4, 6)(x, zeros), tuple[Tensor, Tensor])
assert_type(fused_rnn.GRU(4, 6)(packed), tuple[PackedSequence, Tensor])
assert_type(fused_rnn.LSTM(4, 6)(x, hx=(zeros, zeros)), tuple[Tensor, tuple[Tensor, Tensor]])
assert_type(fused_rnn.LSTM(4, 6)(packed), tuple[PackedSequence, tuple[Tensor, Tensor]])
assert_type(fused_rnn.GRU(4, 6)(x, lengths=[5, 2, 4]), tuple[Tensor, Tensor])
begins = x[..., 0] > 0
assert_type(fused_rnn.GRU(4, 6)(x, reset=begins, reset_to=zeros), tuple[Tensor, Tensor])
assert_type(fused_rnn.GRU(4, 6)(x, return_states=True), tuple[Tensor, Tensor, Tensor])
assert_type(
    fused_rnn.LSTM(4, 6, norm="layer", zoneout=(0.1, 0.2))(packed, return_states=True),
    tuple[PackedSequence, tuple[Tensor, Tensor], tuple[Tensor, Tensor]],
)
assert_type(fused_rnn.RNNCell(4, 6)(x[0]), Tensor)
assert_type(fused_rnn.GRUCell(4, 6)(x[0]), Tensor)
assert_type(fused_rnn.LSTMCell(4, 6)(x[0]), tuple[Tensor, Tensor])

# A call that cannot work is refused.
fused_rnn.LSTM(4, 6)(x, zeros)  # type: ignore[call-overload]
fused_rnn.GRU(4, 6)(x, reset=[[True]])  # type: ignore[call-overload]
fused_rnn.GRU(4, 6, norm="batch")  # type: ignore[arg-type]
