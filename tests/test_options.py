"""Options of constructors and arguments of calls that torch.nn does not have, around the numbers:
parameters, errors, copies, tools of torch."""

from __future__ import annotations

import copy
import dataclasses
import pickle
from typing import Any

import pytest
import torch
from helpers import assert_all_close, assert_close, flatten
from torch import Tensor, fx, nn
from torch.nn.utils.rnn import pack_sequence

import fused_rnn

pytestmark = pytest.mark.module

LAYERS = ["RNN", "LSTM", "GRU", "PeepholeLSTM", "BlockGRU"]
ALL: dict[str, Any] = dict(
    norm="layer",
    norm_eps=1e-3,
    zoneout=(0.1, 0.2),
    recurrent_dropout=0.2,
    dropout=0.3,
    dropout_over_time=True,
    weight_dropout=0.4,
    blocks=2,
    num_layers=2,
    bidirectional=True,
)


def everything(name: str = "LSTM", **kwargs: Any) -> Any:
    return getattr(fused_rnn, name)(3, 4, **{**ALL, **kwargs})


@pytest.mark.parametrize("name", LAYERS)
def test_parameters(name: str) -> None:
    """torch.nn's names, order and numbers, gains of 1 and shifts of 0 behind those of a run."""
    make = getattr(fused_rnn, name)
    torch.manual_seed(1)
    plain_one = make(3, 4, num_layers=2, bidirectional=True)
    drawn = torch.rand(3)
    torch.manual_seed(1)
    module = make(3, 4, num_layers=2, bidirectional=True, norm="rms")
    assert torch.equal(torch.rand(3), drawn)
    own = dict(module.named_parameters())
    names = ["gain_ih", "gain_hh"] + ["gain_c", "shift_c"] * name.endswith("LSTM")
    count = len(module.all_weights[0])
    assert list(own)[count - len(names) : count] == [f"{n}_l0" for n in names]
    assert list(own)[2 * count - 1] == f"{names[-1]}_l0_reverse"
    for key, value in plain_one.state_dict().items():
        assert torch.equal(own.pop(key), value)
    G = {"RNN": 1, "GRU": 3, "BlockGRU": 3}.get(name, 4)
    for key, value in own.items():
        assert value.shape == ((G * 4,) if "h_l" in key else (4,)), key
        assert (value == float(key.startswith("gain"))).all(), key
    with torch.no_grad():
        module.gain_ih_l0.zero_()
    module.reset_parameters()
    assert (module.gain_ih_l0 == 1).all()


def test_parameters_of_sums_and_blocks() -> None:
    module = fused_rnn.LSTM(3, 6, norm="layer", norm_at=("sum",), blocks=3, bias=False)
    shapes = {name: tuple(p.shape) for name, p in module.named_parameters()}
    assert shapes == {"weight_ih_l0": (24, 3), "weight_hh_l0": (24, 2), "gain_l0": (24,)}
    bound = 6**-0.5
    assert 0 < module.weight_hh_l0.abs().max() <= bound
    made = fused_rnn.GRU(3, 6, blocks=2, device="meta", dtype=torch.bfloat16)
    assert made.weight_hh_l0.is_meta and made.weight_hh_l0.dtype == torch.bfloat16


def test_as_without_options() -> None:
    """All of the defaults given are none."""
    defaults = {f.name: f.default for f in dataclasses.fields(fused_rnn.BetweenSteps)}
    torch.manual_seed(1)
    module = fused_rnn.GRU(3, 4, **defaults)
    torch.manual_seed(1)
    other = fused_rnn.GRU(3, 4)
    assert repr(module) == repr(other) and module.between_steps is other.between_steps
    x = torch.randn(5, 2, 3)
    assert_all_close(module(x), other(x), tol=0)


@pytest.mark.parametrize("name", LAYERS)
def test_copies(name: str) -> None:
    kwargs = {} if name.endswith("LSTM") else {"zoneout": 0.1}
    module = everything(name, **kwargs).eval()
    x, reset = torch.randn(5, 3, 3), torch.rand(5, 3) < 0.5
    expected = module(x, reset=reset)
    fresh = everything(name, **kwargs).eval()
    assert fresh.load_state_dict(module.state_dict()).missing_keys == []
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module)), fresh):
        assert repr(other) == repr(module)
        assert_all_close(other(x, reset=reset), expected, tol=0)
    old = module.__dict__.copy()
    del old["between_steps"]
    assert "zoneout" not in repr(_revived(type(module), old))


def _revived(kind: Any, state: dict[str, Any]) -> Any:
    module = kind.__new__(kind)
    module.__setstate__(state)
    return module


def test_repr() -> None:
    module = fused_rnn.LSTM(3, 4, norm="rms", zoneout=0.1, blocks=2, recompute=True)
    assert repr(module) == (
        "LSTM(3, 4, recompute=True, norm='rms', norm_at=('input', 'recurrent', 'cell'), "
        "zoneout=0.1, blocks=2)"
    )


def test_change_later() -> None:
    module = fused_rnn.GRU(3, 4, zoneout=0.5)
    x = torch.randn(5, 2, 3)
    torch.manual_seed(1)
    before = module(x)[0]
    module.between_steps = dataclasses.replace(module.between_steps, zoneout=0.0)
    plain_one = fused_rnn.GRU(3, 4)
    plain_one.load_state_dict(module.state_dict())
    assert_all_close(module(x), plain_one(x), tol=1e-6)
    assert not torch.equal(module(x)[0], before)


def test_names_are_free_for_users() -> None:
    """A subclass may have attributes of these names, as one of torch.nn's may."""

    class Mine(fused_rnn.LSTM):
        def __init__(self) -> None:
            super().__init__(3, 4)
            self.norm = nn.LayerNorm(4)
            self.blocks = 7
            self.zoneout = 0.5

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(super().forward(x)[0])

    module = Mine()
    x = torch.randn(5, 2, 3)
    plain_one = fused_rnn.LSTM(3, 4)
    plain_one.load_state_dict(module.state_dict(), strict=False)
    assert_all_close(module(x), nn.functional.layer_norm(plain_one(x)[0], (4,)))


WRONG: list[tuple[str, dict[str, Any], type[Exception], str]] = [
    ("LSTM", {"norm": "batch"}, ValueError, 'norm: expected "layer", "rms" or None, got \'batch\''),
    ("LSTM", {"norm_at": ("input",)}, ValueError, "norm_at: expected None without norm, got"),
    ("LSTM", {"norm": "rms", "norm_at": "input"}, TypeError, "norm_at: expected a tuple of"),
    ("LSTM", {"norm": "rms", "norm_at": ("all",)}, ValueError, r"norm_at: .* got \('all',\)"),
    ("LSTM", {"norm": "rms", "norm_at": ()}, ValueError, r"norm_at: expected some of .* got \(\)"),
    ("LSTM", {"norm": "rms", "norm_at": ("sum", "input")}, ValueError, 'norm_at: expected "sum"'),
    ("GRU", {"norm": "rms", "norm_at": ("cell",)}, ValueError, "norm_at: .* which GRU has, got"),
    ("GRU", {"norm": "rms", "norm_at": ("sum",)}, ValueError, "norm_at: .* which GRU has, got"),
    ("LSTM", {"norm": "rms", "norm_eps": "a"}, TypeError, "norm_eps: expected a number, got 'a'"),
    ("LSTM", {"norm": "rms", "norm_eps": -1}, ValueError, "norm_eps: .* from 0 on, got -1"),
    (
        "LSTM",
        {"zoneout": 1.5},
        ValueError,
        r"zoneout should be a number in range \[0, 1\], got 1.5",
    ),
    ("LSTM", {"zoneout": True}, ValueError, "zoneout should be a number in range"),
    ("LSTM", {"zoneout": (0.1,)}, ValueError, "zoneout: expected a number or two, got 1"),
    ("GRU", {"zoneout": (0.1, 0.1)}, ValueError, "zoneout: expected one number, since GRU has h"),
    ("LSTM", {"zoneout": 0.1, "proj_size": 2}, ValueError, "zoneout: expected 0 with proj_size"),
    ("LSTM", {"recurrent_dropout": -0.1}, ValueError, "recurrent_dropout should be a number in"),
    ("LSTM", {"weight_dropout": "a"}, ValueError, "weight_dropout should be a number in"),
    ("LSTM", {"dropout_over_time": 1}, TypeError, "dropout_over_time should be of type bool"),
    ("LSTM", {"blocks": 1.0}, TypeError, "blocks should be of type int, got: float"),
    ("LSTM", {"blocks": 0}, ValueError, "blocks: expected 1 or more, got 0"),
    ("LSTM", {"blocks": 3}, ValueError, "blocks: expected a divisor of hidden_size, 4, got 3"),
    ("LSTM", {"blocks": 2, "proj_size": 2}, ValueError, "blocks: expected 1 with proj_size, got 2"),
    ("GRU", {"layer_norm": True}, TypeError, "GRU.* unexpected keyword argument 'layer_norm'"),
    ("PeepholeLSTM", {"blocks": 3}, ValueError, "blocks: expected a divisor"),
    ("RNN", {"norm": "layer", "hidden_size": "4"}, TypeError, "hidden_size"),
]


@pytest.mark.parametrize("name, kwargs, error, message", WRONG)
def test_wrong_options(
    name: str, kwargs: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        getattr(fused_rnn, name)(3, **{"hidden_size": 4, **kwargs})


def swapped() -> Any:
    """Layers of three states, of which the second goes into the product."""

    @fused_rnn.cell(gates=("a",), states=("c", "h", "d"))
    def Swapped(x: Any, r: Any, s: Any, p: Any) -> dict[str, Any]:
        return dict(c=torch.tanh(x.a + r(s.h).a) + 0.5 * s.c, h=torch.tanh(s.c), d=s.d + s.h)

    return Swapped


@pytest.mark.parametrize("every", [False, True])
def test_states_of_many_begin_anew_with_their_own(every: bool) -> None:
    """What comes after a reset is as if the sequence began there with the states given."""
    module = swapped()(3, 4, dtype=torch.float64)
    x, reset = torch.randn(5, 2, 3, dtype=torch.float64), torch.zeros(5, 2, dtype=torch.bool)
    reset[2] = True
    to = tuple(torch.randn(1, 2, 4, dtype=torch.float64) for _ in range(3))
    given = tuple(s.expand(5, 1, 2, 4) for s in to) if every else to
    y, last = module(x, reset=reset, reset_to=given)
    alone, ends = module(x[2:], to)
    assert_close(y[2:], alone)
    for a, b in zip(last, ends, strict=True):
        assert_close(a, b)


def test_wrong_resets() -> None:
    module = fused_rnn.GRU(3, 4, batch_first=True)
    x, reset, h = torch.randn(2, 5, 3), torch.rand(2, 5) < 0.5, torch.zeros(1, 2, 4)
    calls: list[tuple[dict[str, Any], type[Exception], str]] = [
        ({"reset": reset.tolist()}, TypeError, "reset: expected a bool tensor, got list"),
        ({"reset": reset.int()}, TypeError, "reset: expected torch.bool, got torch.int32"),
        ({"reset": reset.t()}, ValueError, r"reset: expected shape \(2, 5\), .* got \(5, 2\)"),
        ({"reset": reset[:, :4]}, ValueError, r"reset: expected shape \(2, 5\), .* got \(2, 4\)"),
        ({"reset_to": h}, ValueError, "reset_to: expected None without reset"),
        ({"reset": reset, "reset_to": (h, h)}, TypeError, "reset_to: expected a tensor, got tuple"),
        ({"reset": reset, "reset_to": [h]}, TypeError, "reset_to: expected a tensor, got list"),
        (
            {"reset": reset, "reset_to": h[:, :1]},
            ValueError,
            r"reset_to: expected shape \(1, 2, 4\), or with 5 steps in front, got \(1, 1, 4\)",
        ),
        (
            {"reset": reset, "reset_to": h.expand(4, 1, 2, 4)},
            ValueError,
            r"reset_to: expected shape \(1, 2, 4\), or with 5 steps in front, got \(4, 1, 2, 4\)",
        ),
        ({"reset": reset, "reset_to": h.double()}, ValueError, "reset_to: expected torch.float32"),
        ({"return_states": 1}, TypeError, "return_states should be of type bool, got: int"),
    ]
    for kwargs, error, message in calls:
        with pytest.raises(error, match=message):
            module(x, **kwargs)
    lstm = fused_rnn.LSTM(3, 4)
    x, reset = x.transpose(0, 1), reset.t()
    for to, error, message in (
        (h, TypeError, "reset_to: expected a pair of tensors, got Tensor"),
        ((h, h, h), TypeError, "reset_to: expected a pair of tensors, got tuple"),
        ((h, 1.0), TypeError, r"reset_to\[1\]: expected a tensor, got float"),
        ((h, h[..., :3]), ValueError, r"reset_to\[1\]: expected shape \(1, 2, 4\)"),
    ):
        with pytest.raises(error, match=message):
            lstm(x, reset=reset, reset_to=to)
    three = swapped()(3, 4)
    for to, error, message in (
        (h, TypeError, "reset_to: expected 3 tensors, got Tensor"),
        ((h, h), TypeError, "reset_to: expected 3 tensors, got tuple"),
        ((h, h, h[..., :3]), ValueError, r"reset_to\[2\]: expected shape \(1, 2, 4\)"),
    ):
        with pytest.raises(error, match=message):
            three(x, reset=reset, reset_to=to)
    packed = pack_sequence([torch.randn(3, 3), torch.randn(1, 3)])
    with pytest.raises(ValueError, match=r"reset: expected shape \(4,\), .* got \(3, 2\)"):
        lstm(packed, reset=reset[:3])
    with pytest.raises(TypeError, match="reset: expected a bool tensor, got PackedSequence"):
        lstm(packed, reset=packed)


def test_restore() -> None:
    """Options are not lost without a word, and torch.nn's layers come without any."""
    model = nn.Sequential(fused_rnn.LSTM(3, 4, zoneout=0.1, blocks=2), fused_rnn.GRU(3, 4))
    with pytest.warns(UserWarning, match="0 stays ours: torch.nn has no zoneout, blocks"):
        fused_rnn.restore(model)
    assert type(model[0]) is fused_rnn.LSTM and type(model[1]) is nn.GRU
    fused_rnn.replace(model)
    assert type(model[1]) is fused_rnn.GRU and not model[1].between_steps.changed
    kept = fused_rnn.replace(model, keep_isinstance=True)
    assert isinstance(kept[1], nn.GRU)
    y, _ = kept[1](torch.randn(5, 2, 3), reset=torch.zeros(5, 2, dtype=torch.bool))
    assert y.shape == (5, 2, 4)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_tools_of_torch() -> None:
    """Scripting says what it has not; tracing, exports and fx take all.

    In float64: a program computes what the module computes, by other operations, and a layer norm
    of four units enlarges what float32 rounds differently.
    """
    module = fused_rnn.LSTM(3, 4, norm="layer", zoneout=0.1).double().eval()
    x, reset = torch.randn(5, 2, 3, dtype=torch.float64), torch.rand(5, 2) < 0.5
    with pytest.raises(RuntimeError, match="torch.nn's .* no norm, norm_at, zoneout"):
        torch.jit.script(nn.Sequential(module))

    class Model(nn.Module):
        def __init__(self, inner: Any) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: Tensor, reset: Tensor) -> Any:
            return self.inner(x, reset=reset, return_states=True)

    for inner in (module, fused_rnn.GRU(3, 4).double()):
        model = Model(inner)
        expected = model(x, reset)
        traced = torch.jit.trace(model, (x, reset), check_trace=False)
        assert_all_close(traced(x, reset), expected, tol=1e-12)
        assert_all_close(traced(x, ~reset), model(x, ~reset), tol=1e-12)
        program = torch.export.export(model, (x, reset)).module()
        assert_all_close(program(x, ~reset), model(x, ~reset), tol=1e-12)
        graph = fx.symbolic_trace(model)
        (node,) = (n for n in graph.graph.nodes if n.op == "call_module")
        assert node.kwargs.keys() == {"reset", "return_states"}
        assert_all_close(graph(x, reset), expected, tol=0)


def test_onnx() -> None:
    """The loop over the steps of the example."""
    pytest.importorskip("onnxscript")
    onnxruntime = pytest.importorskip("onnxruntime")
    module = fused_rnn.LSTM(3, 4, norm="rms").eval()
    x = torch.randn(5, 2, 3)
    program = torch.onnx.export(module, (x,), dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(program.model_proto.SerializeToString())
    found = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    for ours, theirs in zip(found, flatten(module(x)), strict=True):
        assert_all_close(torch.tensor(ours), theirs, tol=1e-5)


def test_usual_calls_stay_direct(monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers without options are what they were to the direct calls, those with some are not."""
    assert fused_rnn.GRU(3, 4)._is_usual()
    assert not fused_rnn.GRU(3, 4, zoneout=0.1)._is_usual()
    module = fused_rnn.GRU(3, 4)
    module.between_steps = fused_rnn.BetweenSteps(recurrent_dropout=0.5)
    assert not module._is_usual()
    module.between_steps = fused_rnn.BetweenSteps()
    assert module._is_usual()


def test_empty_batches() -> None:
    module = fused_rnn.LSTM(3, 4, bidirectional=True)
    x = torch.randn(5, 0, 3)
    y, (h, _), (every, _) = module(x, reset=x[..., 0] > 0, return_states=True)
    assert y.shape == (5, 0, 8) and h.shape == (2, 0, 4) and every.shape == (2, 5, 0, 4)
