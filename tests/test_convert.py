"""``replace`` and ``restore``: what is swapped, what is not, and what must survive."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from cases import CLASSES
from helpers import assert_all_close, flatten
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

import fused_rnn


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.LSTM(4, 6, num_layers=2, bidirectional=True, batch_first=True)
        self.blocks = nn.ModuleList([nn.GRU(12, 12), nn.RNN(12, 12, nonlinearity="relu")])
        self.cell = nn.GRUCell(12, 12)
        self.head = nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.encoder(x)[0]
        for block in self.blocks:
            x = block(x)[0]
        return self.head(self.cell(x[:, -1]))


def test_replace_and_restore() -> None:
    model = Model().double().eval()
    x = torch.randn(3, 5, 4).double()
    expected, parameters, state = model(x), list(model.parameters()), copy.copy(model.state_dict())
    encoder = model.encoder

    assert fused_rnn.replace(model) is model
    assert model.encoder is encoder and type(encoder) is fused_rnn.LSTM
    assert type(model.blocks[0]) is fused_rnn.GRU and type(model.blocks[1]) is fused_rnn.RNN
    assert type(model.cell) is fused_rnn.GRUCell and type(model.head) is nn.Linear
    assert not model.encoder.training
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert list(model.state_dict()) == list(state)
    assert_all_close(model(x), expected)

    assert fused_rnn.restore(model) is model
    assert type(model.encoder) is nn.LSTM and type(model.cell) is nn.GRUCell
    assert_all_close(model(x), expected)


@pytest.mark.parametrize("name", CLASSES)
def test_a_bare_module(name: str) -> None:
    module = getattr(nn, name)(3, 4)
    x = torch.randn(2, 3) if name.endswith("Cell") else torch.randn(5, 2, 3)
    expected = flatten(module(x))
    assert fused_rnn.replace(module) is module and type(module) is getattr(fused_rnn, name)
    assert_all_close(flatten(module(x)), expected, tol=1e-5)
    assert type(fused_rnn.restore(module)) is getattr(nn, name)
    assert_all_close(flatten(module(x)), expected, tol=0)


def test_a_copy() -> None:
    model = Model()
    copied = fused_rnn.replace(model, inplace=False)
    assert type(model.encoder) is nn.LSTM and type(copied.encoder) is fused_rnn.LSTM
    assert copied.encoder.weight_ih_l0 is not model.encoder.weight_ih_l0
    assert type(fused_rnn.restore(copied, inplace=False).encoder) is nn.LSTM
    assert type(copied.encoder) is fused_rnn.LSTM


def test_filter() -> None:
    model = Model()
    fused_rnn.replace(model, lambda name, module: name.startswith("blocks") and module.bias)
    assert type(model.encoder) is nn.LSTM and type(model.blocks[0]) is fused_rnn.GRU
    fused_rnn.restore(model, lambda name, module: name.endswith("1"))
    assert type(model.blocks[0]) is fused_rnn.GRU and type(model.blocks[1]) is nn.RNN


def test_survey() -> None:
    class MyLSTM(nn.LSTM):
        pass

    model = nn.ModuleDict({"a": nn.LSTM(2, 3), "b": MyLSTM(2, 3), "c": nn.Linear(2, 3)})
    model["d"] = fused_rnn.GRU(2, 3)
    model["e"] = nn.GRU(2, 3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        model["f"] = torch.jit.script(nn.GRUCell(2, 3))
    findings = {f.name: f for f in fused_rnn.survey(model, lambda name, _: name != "e")}

    assert set(findings) == {"a", "b", "d", "e", "f"}
    assert findings["a"].swapped_for == "fused_rnn.LSTM" and not findings["a"].reason
    for name, word in {"b": "subclass", "d": "already", "e": "filter_fn", "f": "scripted"}.items():
        assert findings[name].swapped_for is None and word in findings[name].reason
    assert str(findings["a"]).startswith("a: torch.nn.modules.rnn.LSTM -> fused_rnn.LSTM")

    fused_rnn.replace(model)
    assert type(model["b"]) is MyLSTM, "a subclass stays"
    assert type(model["e"]) is fused_rnn.GRU


def test_hooks_optimizer_and_sharing_survive() -> None:
    shared = nn.GRU(3, 3)
    model = nn.ModuleList([shared, nn.ModuleList([shared])])
    calls: list[str] = []
    shared.register_forward_pre_hook(lambda *_: calls.append("pre"))
    shared.register_forward_hook(lambda *_: calls.append("post"))
    shared.register_full_backward_hook(lambda *_: calls.append("backward"))
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)

    fused_rnn.replace(model)
    assert model[0] is model[1][0] is shared
    before = shared.weight_hh_l0.clone()
    shared(torch.randn(4, 2, 3, requires_grad=True))[0].sum().backward()
    optimizer.step()
    assert sorted(calls) == ["backward", "post", "pre"]
    assert not torch.equal(before, shared.weight_hh_l0)


def weight_norm(module: nn.Module) -> None:
    parametrizations.weight_norm(module, "weight_hh_l0")


def spectral_norm(module: nn.Module) -> None:
    parametrizations.spectral_norm(module, "weight_ih_l0")


def old_weight_norm(module: nn.Module) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        nn.utils.weight_norm(module, "weight_hh_l0")


def tied(module: nn.Module) -> None:
    module.bias_hh_l0 = module.bias_ih_l0


def pruned(module: nn.Module) -> None:
    prune.l1_unstructured(module, "weight_hh_l0", 0.5)


@pytest.mark.parametrize(
    "change", [weight_norm, spectral_norm, old_weight_norm, tied, pruned], ids=lambda f: f.__name__
)
@pytest.mark.parametrize("name", ["LSTM", "GRU"])
def test_changed_weights_survive(name: str, change: Any) -> None:
    model = nn.Sequential(getattr(nn, name)(3, 4).double()).eval()
    change(model[0])
    x = torch.randn(5, 2, 3).double()
    with torch.no_grad():  # else torch.nn keeps the computed weight, which nobody can deep copy
        expected = model(x)
    count = len(list(model.parameters()))

    fused_rnn.replace(model)
    assert isinstance(model[0], getattr(fused_rnn, name))
    assert len(list(model.parameters())) == count
    assert_all_close(model(x), expected)
    if change not in (old_weight_norm, pruned):  # which leave a computed weight on the module
        assert_all_close(copy.deepcopy(model)(x), expected)
    model(x)[0].sum().backward()
    assert all(p.grad is not None for p in model.parameters())

    fused_rnn.restore(model)
    assert not isinstance(model[0], getattr(fused_rnn, name))
    assert_all_close(model(x), expected)


def test_parametrization_is_removed_after_the_swap() -> None:
    module = nn.GRU(3, 4).double()
    weight_norm(module)
    fused_rnn.replace(module)
    x = torch.randn(5, 2, 3).double()
    expected = module(x)
    parametrize.remove_parametrizations(module, "weight_hh_l0")
    assert type(module) is fused_rnn.GRU
    assert_all_close(module(x), expected)


def test_quantize_dynamic_after_restore() -> None:
    if "fbgemm" not in torch.backends.quantized.supported_engines:
        pytest.skip("no quantized engine")
    model = nn.Sequential(fused_rnn.LSTM(4, 4))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quantized = torch.ao.quantization.quantize_dynamic(
            fused_rnn.restore(model), {nn.LSTM}, dtype=torch.qint8
        )
    assert (
        "Quantized" in type(quantized[0]).__name__ or "quantized" in type(quantized[0]).__module__
    )
    assert_all_close(quantized(torch.ones(3, 2, 4)), model(torch.ones(3, 2, 4)), tol=0.1)
