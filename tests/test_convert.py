"""``replace`` and ``restore``: what is swapped, what is not, and what must survive."""

from __future__ import annotations

import copy
import inspect
import pickle
import warnings
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import CLASSES, some_input
from forked import python
from helpers import assert_all_close, flatten
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

import fused_rnn

pytestmark = pytest.mark.module

ROOT = Path(__file__).resolve().parent.parent


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
    x = some_input(name)
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


# --- Instances of torch.nn's classes and of ours at once -----------------------------------------


class Scaled(nn.LSTM):
    """A subclass with an argument and a result of its own, and torch.nn's forward in between."""

    def __init__(self, *args: Any, scale: float = 2.0, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.scale = scale

    def forward(self, input: Any, hx: Any = None) -> Any:
        y, hx = super().forward(input, hx)
        return y * self.scale, hx


class WithInitialState(nn.LSTM):
    """As an amplifier's model has it: two parameters more, and a forward that is torch.nn's."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.start = nn.Parameter(torch.zeros(2, self.num_layers, self.hidden_size))

    def initial(self, batch: int) -> tuple[Tensor, Tensor]:
        h, c = self.start[:, :, None].expand(-1, -1, batch, -1).unbind()
        return h.contiguous(), c.contiguous()


class Flexible(ABC, nn.RNNBase):
    """As a library for forecasting has it: the forward is in a base, beside which torch.nn's is."""

    @abstractmethod
    def states(self, x: Tensor) -> Any: ...

    def forward(self, x: Any, hx: Any = None, lengths: Any = None) -> Any:
        if lengths is None:
            return self._run_super(x, hx)
        lengths = lengths.clamp(min=1)
        packed = nn.utils.rnn.pack_padded_sequence(x, lengths, self.batch_first, False)
        y, hx = super().forward(packed, hx)
        return nn.utils.rnn.pad_packed_sequence(y, self.batch_first)[0], hx

    def _run_super(self, *args: Any) -> Any:
        return super().forward(*args)


class FlexibleGRU(Flexible, nn.GRU):
    def states(self, x: Tensor) -> Any:
        return None


class Cell(nn.GRUCell):
    def check_nothing(self) -> None: ...


class Checked(nn.RNN):
    calls = 0

    def check_forward_args(self, *args: Any) -> None:
        self.calls += 1
        super().check_forward_args(*args)


SUBCLASSES = [Scaled, WithInitialState, FlexibleGRU, Cell, Checked]


def shaped(kind: type[nn.Module]) -> Tensor:
    return torch.randn(2, 3) if issubclass(kind, nn.RNNCellBase) else torch.randn(5, 2, 3)


@pytest.mark.parametrize("kind", [*(getattr(nn, name) for name in CLASSES), *SUBCLASSES])
def test_isinstance_is_kept(kind: type[nn.Module]) -> None:
    module = kind(3, 4)
    model, x = nn.Sequential(module), shaped(kind)
    expected, state = model(x), module.state_dict()
    (finding,) = fused_rnn.survey(model, keep_isinstance=True)
    assert finding.swapped_for and ("allow_rnn" in finding.gives_up) == issubclass(kind, nn.RNNBase)
    assert "gives up" in str(finding) or not finding.gives_up

    assert fused_rnn.replace(model, keep_isinstance=True) is model
    assert model[0] is module and isinstance(module, kind) and type(module) is not kind
    ours = finding.swapped_for.rpartition(".")[2]
    assert isinstance(module, getattr(fused_rnn, ours))
    assert type(module).__name__ == kind.__name__ and list(module.state_dict()) == list(state)
    assert_all_close(flatten(model(x)), flatten(expected), tol=1e-5)
    assert fused_rnn.survey(model)[0].reason == "already ours"

    other = kind(3, 4)
    fused_rnn.replace(other, keep_isinstance=True)
    assert type(other) is type(module), "made once"
    for copied in (copy.deepcopy(module), *(through_pickle(module, n) for n in range(6))):
        assert type(copied) is type(module)
        assert_all_close(flatten(copied(x)), flatten(module(x)), tol=0)

    assert fused_rnn.restore(model) is model and type(module) is kind
    assert_all_close(flatten(model(x)), flatten(expected), tol=0)


def through_pickle(module: nn.Module, protocol: int) -> Any:
    return pickle.loads(pickle.dumps(module, protocol))


def test_calls_of_subclasses_run_on_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever way they come to torch.nn's forward."""
    seen: list[str] = []
    monkeypatch.setattr(
        fused_rnn.modules.Recurrent,
        "_run",
        lambda self, *args, run=fused_rnn.modules.Recurrent._run: (
            seen.append(type(self).__name__),
            run(self, *args),
        )[1],
    )
    gru, checked = FlexibleGRU(3, 4), Checked(3, 4)
    x, lengths = torch.randn(5, 2, 3), torch.tensor([3, 0])
    expected = gru(x, None, lengths)
    model = fused_rnn.replace(nn.ModuleList([gru, checked]), keep_isinstance=True)
    assert_all_close(flatten(model[0](x, None, lengths)), flatten(expected), tol=1e-5)
    checked(x)
    assert seen == ["FlexibleGRU", "Checked"] and checked.calls == 1


class CallsByName(nn.LSTM):
    def forward(self, input: Any, hx: Any = None) -> Any:
        return nn.LSTM.forward(self, input, hx)


class OwnOperator(nn.GRUCell):
    def forward(self, input: Tensor, hx: Any = None) -> Tensor:
        return torch.gru_cell(input, hx, self.weight_ih, self.weight_hh)


class OwnWeights(nn.GRU):
    @property
    def _flat_weights(self) -> Any:
        return [self.get_parameter(name) * 2 for name in self._flat_weights_names]

    @_flat_weights.setter
    def _flat_weights(self, value: Any) -> None: ...


class OwnName(nn.RNN):
    def _run(self) -> None: ...


class NoHeirs(nn.LSTM):
    def __init_subclass__(cls, *, licence: str) -> None: ...


class OwnLayer(nn.RNNBase):
    pass


def forward_set(module: nn.Module) -> nn.Module:
    """As some do who drop weights: before each call, something happens to them."""
    usual = module.forward
    module.forward = lambda *args: usual(*args)  # type: ignore[method-assign]
    return module


def attribute_set(module: nn.Module) -> nn.Module:
    module._weights = [1, 2]  # type: ignore[assignment]
    return module


STAY = {
    "does not call super().forward": CallsByName(2, 3),
    "OwnOperator.forward": OwnOperator(2, 3),
    "_flat_weights": OwnWeights(2, 3),
    "OwnName defines _run": OwnName(2, 3),
    "licence": NoHeirs(2, 3),
    "a base class": OwnLayer("GRU", 2, 3),
    "forward was set": forward_set(nn.GRU(2, 3)),
    "its attribute _weights": attribute_set(nn.GRU(2, 3)),
}


@pytest.mark.parametrize("words", STAY)
def test_what_cannot_be_taken_is_named(words: str) -> None:
    module = STAY[words]
    kind = type(module)
    for _ in range(2):  # also when it was tried before
        (finding,) = fused_rnn.survey(module, keep_isinstance=True)
        assert finding.swapped_for is None and words in finding.reason
        assert type(fused_rnn.replace(module, keep_isinstance=True)) is kind
    assert fused_rnn.survey(module)[0].swapped_for is None
    assert type(fused_rnn.replace(module)) is kind


def test_forward_that_somebody_replaced_in_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nn.GRU, "forward", lambda self, x: x)
    module = nn.GRU(2, 3)
    assert "was replaced" in fused_rnn.survey(module)[0].reason
    assert type(fused_rnn.replace(module)) is nn.GRU


@pytest.mark.parametrize("keep", [False, True])
def test_forward_set_after_the_swap_keeps_it(keep: bool) -> None:
    """It may hold on to our forward, which would not do for torch.nn's class."""
    model = fused_rnn.replace(nn.Sequential(nn.GRU(2, 3)), keep_isinstance=keep)
    forward_set(model[0])
    with pytest.warns(UserWarning, match="^0 stays ours: its forward was set"):
        fused_rnn.restore(model)
    assert isinstance(model[0], fused_rnn.GRU)
    model(torch.randn(4, 1, 2))


def foreign(name: str, module: str, base: type = nn.Module) -> nn.Module:
    return type(name, (base,), {"__module__": module})()


def test_layers_of_others_are_named() -> None:
    keras = foreign("LSTM", "keras.src.layers.rnn.lstm")
    model = nn.ModuleDict({"keras": keras, "mine": type("Mine", (type(keras),), {})()})
    model["ao"] = foreign("GRU", "torch.ao.nn.quantized.dynamic.modules.rnn")
    model["other"] = foreign("LSTM", "somewhere")
    found = {finding.name: finding.reason for finding in fused_rnn.survey(model)}
    assert set(found) == {"keras", "mine", "ao"}
    assert "Keras" in found["keras"] == found["mine"] and "torch.ao" in found["ao"]


def test_quantized_layers_are_named() -> None:
    from torch.ao.nn.quantizable import LSTM

    found = fused_rnn.survey(nn.Sequential(LSTM(2, 3)))
    assert found[0].name == "0" and all("torch.ao" in finding.reason for finding in found)


def test_ours_become_instances_of_torch_too() -> None:
    model = nn.Sequential(fused_rnn.LSTM(3, 4, recompute=True))
    x = torch.randn(5, 2, 3)
    expected = model(x)
    assert fused_rnn.survey(model, keep_isinstance=True)[0].swapped_for == "fused_rnn.LSTM"
    fused_rnn.replace(model, keep_isinstance=True)
    assert isinstance(model[0], nn.LSTM) and model[0].recompute
    assert_all_close(model(x), expected, tol=0)


def test_a_new_one_from_the_class_of_another() -> None:
    """As in ``type(rnn)(...)``, with torch.nn's arguments and a subclass's."""
    kinds = (nn.GRU(3, 4), nn.LSTMCell(3, 4), Scaled(3, 4))
    gru, cell, scaled = (type(fused_rnn.replace(m, keep_isinstance=True)) for m in kinds)
    assert gru(3, 5, num_layers=2)(torch.randn(4, 1, 3))[1].shape == (2, 1, 5)
    assert cell(3, 5)(torch.randn(1, 3))[0].shape == (1, 5)
    assert scaled(3, 5, scale=3.0).scale == 3.0


@pytest.mark.parametrize("name", ["LSTM", "GRU"])
def test_parametrizations_survive_as_both(name: str) -> None:
    kind = getattr(nn, name)
    model = nn.Sequential(kind(3, 4)).eval()
    weight_norm(model[0])
    x = torch.randn(5, 2, 3)
    with torch.no_grad():  # else torch.nn keeps the computed weight, which nobody can deep copy
        expected = model(x)
    fused_rnn.replace(model, keep_isinstance=True)
    assert isinstance(model[0], kind) and isinstance(model[0], getattr(fused_rnn, name))
    assert_all_close(model(x), expected, tol=1e-5)
    assert_all_close(copy.deepcopy(model)(x), expected, tol=1e-5)
    parametrize.remove_parametrizations(model[0], "weight_hh_l0")
    assert_all_close(model(x), expected, tol=1e-5)
    assert type(fused_rnn.restore(model)[0]) is kind


def test_loading_in_another_process(tmp_path: Path) -> None:
    model = fused_rnn.replace(nn.Sequential(nn.LSTM(3, 4), nn.GRU(4, 4)), keep_isinstance=True)
    x = torch.randn(5, 2, 3)
    torch.save([model, x, model[0](x)[0]], tmp_path / "model.pt")
    program = f"""
import torch
model, x, expected = torch.load({str(tmp_path / "model.pt")!r}, weights_only=False)
assert [isinstance(model[0], torch.nn.LSTM), isinstance(model[1], torch.nn.GRU)] == [True, True]
assert "fused_rnn" in str(type(model[0]).__mro__)
torch.testing.assert_close(model[0](x)[0], expected)
"""
    found = python("-c", program, cwd=ROOT)
    assert found.returncode == 0, found.stderr


def test_scripting_both() -> None:
    """As exporters do it: they ask for the class, copy, and script."""
    model = fused_rnn.replace(nn.Sequential(nn.GRU(3, 4)), keep_isinstance=True)
    assert isinstance(model[0], nn.GRU)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        scripted = torch.jit.script(copy.deepcopy(model))
    x = torch.randn(5, 2, 3)
    assert_all_close(scripted(x), model(x), tol=1e-5)


@pytest.mark.parametrize("allowed", [False, True])
def test_compiling_both(allowed: bool) -> None:
    """Dynamo refuses them as it refuses torch.nn's, until it is told not to."""
    model = fused_rnn.replace(nn.Sequential(nn.GRU(3, 4)), keep_isinstance=True)
    x = torch.randn(5, 2, 3)
    with torch._dynamo.config.patch(allow_rnn=allowed):
        torch._dynamo.reset()
        assert_all_close(torch.compile(model, backend="eager")(x), model(x), tol=1e-6)
        torch._dynamo.reset()
        whole = torch.compile(model, backend="eager", fullgraph=True)
        if allowed:
            assert_all_close(whole(x), model(x), tol=1e-6)
        else:
            with pytest.raises(torch._dynamo.exc.Unsupported):
                whole(x)


def test_fx_takes_torchs_for_leaves_and_goes_into_subclasses() -> None:
    model = fused_rnn.replace(nn.Sequential(nn.GRU(3, 4)), keep_isinstance=True)
    traced = torch.fx.symbolic_trace(model)
    assert [node.op for node in traced.graph.nodes].count("call_module") == 1
    x = torch.randn(5, 2, 3)
    assert_all_close(traced(x), model(x), tol=0)
    with pytest.raises(Exception, match="[Pp]roxy|symbolically traced|Tracer"):
        torch.fx.symbolic_trace(
            fused_rnn.replace(nn.Sequential(Scaled(3, 4)), keep_isinstance=True)
        )


def test_the_type_of_the_model_is_kept() -> None:
    """For who checks types: the result has the type of the argument."""
    hints = [inspect.signature(f) for f in (fused_rnn.replace, fused_rnn.restore)]
    assert all(h.return_annotation == h.parameters["model"].annotation == "Model" for h in hints)
