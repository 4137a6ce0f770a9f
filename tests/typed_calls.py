# pyright: strict, reportUnnecessaryTypeIgnoreComment=true
"""What type checkers make of the public names: nothing to run, ``test_types.py`` asks them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence
from typing_extensions import assert_type

import fused_rnn
from fused_rnn import zoo

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
assert_type(fused_rnn.BlockGRU(4, 6, blocks=2)(x), tuple[Tensor, Tensor])
assert_type(fused_rnn.PeepholeLSTM(4, 6)(packed)[1], tuple[Tensor, Tensor])
assert_type(fused_rnn.RNNCell(4, 6)(x[0]), Tensor)
assert_type(fused_rnn.GRUCell(4, 6)(x[0]), Tensor)
assert_type(fused_rnn.LSTMCell(4, 6)(x[0]), tuple[Tensor, Tensor])


# Cells from functions: what hx is, their declaration says and no type.
@fused_rnn.cell(gates=("a",), params={"tau": 1.0})
def Leaky(x: Any, r: Any, s: Any, p: Any, leak: float = 0.1) -> dict[str, Tensor]:
    return dict(h=s.h + leak * p.tau * (torch.tanh(x.a + r.a) - s.h))


assert_type(Leaky(4, 6, num_layers=2, leak=0.5)(x), tuple[Tensor, Any])
assert_type(zoo.SLSTM(4, 6)(packed, return_states=True), tuple[PackedSequence, Any, Any])
assert_type(Leaky.source(), str)

# A model keeps its type.
model = nn.Sequential(nn.GRU(4, 6))
assert_type(fused_rnn.replace(model, keep_isinstance=True), nn.Sequential)
assert_type(fused_rnn.restore(model), nn.Sequential)
assert_type(fused_rnn.survey(model), list[fused_rnn.Finding])
with fused_rnn.patch_torch() as patch:
    assert_type(patch, fused_rnn.Patch)
assert_type(fused_rnn.backend_info(), dict[str, Any])

# A call that cannot work is refused.
fused_rnn.LSTM(4, 6)(x, zeros)  # type: ignore[call-overload]
fused_rnn.GRU(4, 6)(x, reset=[[True]])  # type: ignore[call-overload]
fused_rnn.GRU(4, 6, norm="batch")  # type: ignore[arg-type]
