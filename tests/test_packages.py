"""Other people's packages on our layers, where they are installed: as they are on torch.nn's."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from helpers import assert_all_close, flatten
from torch import nn

import fused_rnn

pytestmark = pytest.mark.tools


def swapped(model: Any) -> Any:
    """A copy on ours, of which every recurrent layer stays an instance of what it was."""
    model = fused_rnn.replace(copy.deepcopy(model), keep_isinstance=True)
    found = [m for m in model.modules() if isinstance(m, (nn.RNNBase, nn.RNNCellBase))]
    assert found and all("fused_rnn" in str(type(module).__mro__) for module in found)
    return model


@pytest.mark.parametrize("kind", ["LSTM", "GRU"])
def test_torchrl_resets_states_inside_a_sequence(kind: str) -> None:
    rl = pytest.importorskip("torchrl.modules")
    tensordict = pytest.importorskip("tensordict")
    keys = ["x", "h", "c"] if kind == "LSTM" else ["x", "h"]
    out_keys = ["y", *(("next", key) for key in keys[1:])]
    model = getattr(rl, f"{kind}Module")(
        input_size=4, hidden_size=8, in_keys=keys, out_keys=out_keys
    )
    is_init = torch.zeros(2, 6, 1, dtype=torch.bool)
    is_init[:, 0] = is_init[0, 3] = True
    data = {"x": torch.randn(2, 6, 4), "is_init": is_init}
    data |= {key: torch.zeros(2, 6, 1, 8) for key in keys[1:]}
    batch = tensordict.TensorDict(data, [2, 6])
    ours = swapped(model)
    with rl.set_recurrent_mode(True):
        for key in out_keys:
            assert_all_close(ours(batch.clone())[key], model(batch.clone())[key], tol=1e-5)


@pytest.mark.parametrize("kind", ["lstm", "gru"])
def test_rsl_rl_exports(kind: str) -> None:
    models = pytest.importorskip("rsl_rl.models")
    tensordict = pytest.importorskip("tensordict")
    observed = tensordict.TensorDict({"policy": torch.randn(4, 8)}, batch_size=[4])
    sizes = {"hidden_dims": [32], "rnn_hidden_dim": 16, "rnn_num_layers": 1}
    groups = {"actor": ["policy"]}
    model = models.RNNModel(observed, groups, "actor", 4, rnn_type=kind, **sizes)
    ours = swapped(model)
    x = torch.randn(1, 8)
    assert_all_close(ours.as_jit()(x), model.as_jit()(x), tol=1e-5)
    ours.as_onnx()


@pytest.mark.parametrize("kind", ["LSTM", "GRU"])
def test_pytorch_forecasting_takes_empty_sequences(kind: str) -> None:
    rnn = pytest.importorskip("pytorch_forecasting.models.nn.rnn")
    model = getattr(rnn, kind)(16, 32, 2, batch_first=True)
    x, lengths = torch.randn(4, 20, 16), torch.tensor([20, 5, 1, 0])
    expected = flatten(model(x, lengths=lengths, enforce_sorted=False))
    found = flatten(swapped(model)(x, lengths=lengths, enforce_sorted=False))
    assert_all_close(found, expected, tol=1e-5)


def test_torchnlp_drops_weights() -> None:
    """By a forward that is set on the instance, as ``survey`` says."""
    pytest.importorskip("torchnlp.nn")
    from torchnlp.nn import WeightDropLSTM

    layer = WeightDropLSTM(3, 4, weight_dropout=0.5)
    assert "set on the instance" in fused_rnn.survey(layer, keep_isinstance=True)[0].reason
