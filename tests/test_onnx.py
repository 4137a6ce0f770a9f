"""What torch.onnx.export makes of our modules, in ONNX Runtime, at other sizes too."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
from cases import pair
from double_modules import Mixed
from helpers import assert_all_close, assert_close, flatten
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import fused_rnn

runtime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")
pytestmark = [
    pytest.mark.tools,
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.usefixtures("fresh_dynamo"),
]


class Call(nn.Module):
    """A recurrent module called with h, or h and c, where they are given; as many tensors out."""

    def __init__(self, rnn: nn.Module) -> None:
        super().__init__()
        self.rnn = rnn

    def forward(self, x: Tensor, h: Tensor | None = None, c: Tensor | None = None) -> list[Tensor]:
        return flatten(self.rnn(x, h if c is None else (h, c)))


class Packed(Call):
    def forward(  # type: ignore[override]
        self, x: Tensor, lengths: Tensor, h: Tensor | None = None, c: Tensor | None = None
    ) -> list[Tensor]:
        first = self.rnn.batch_first
        packed = pack_padded_sequence(x, lengths, batch_first=first)
        y, hx = self.rnn(packed, h if c is None else (h, c))
        return [pad_packed_sequence(y, batch_first=first)[0], *flatten(hx)]


def inputs(module: nn.Module, form: str, given: bool, time: int, batch: int) -> dict[str, Tensor]:
    """Arguments by name; the name of every dimension that may change is in ``DIMENSIONS``."""
    if isinstance(module, nn.RNNCellBase):
        x, h = torch.randn(batch, 4), torch.randn(batch, 5)
        c = torch.randn(batch, 5)
    else:
        runs = module.num_layers * (1 + module.bidirectional)
        x = torch.randn(*((batch, time) if module.batch_first else (time, batch)), 4)
        h, c = torch.randn(runs, batch, module.proj_size or 5), torch.randn(runs, batch, 5)
    if form == "unbatched":
        batch_at = 0 if x.dim() == 2 or module.batch_first else 1
        x, h, c = x.select(batch_at, 0), h.select(-2, 0), c.select(-2, 0)
    result = {"x": x}
    if form == "packed":
        result["lengths"] = torch.tensor([time, *[max(1, time - 2)] * (batch - 1)])
    if given:
        result |= {"h": h, "c": c} if "LSTM" in type(module).__name__ else {"h": h}
    return result


def dimensions(module: nn.Module, form: str, given: bool) -> dict[str, dict[int, str]]:
    """Which dimensions of the arguments are "time" and "batch"."""
    states = {0: "batch"} if isinstance(module, nn.RNNCellBase) else {1: "batch"}
    if isinstance(module, nn.RNNCellBase):
        x = {0: "batch"}
    else:
        x = {0: "batch", 1: "time"} if module.batch_first else {0: "time", 1: "batch"}
    if form == "unbatched":
        x = {} if isinstance(module, nn.RNNCellBase) else {0: "time"}
        states = {}
    named = {"x": x, "lengths": {0: "batch"}, "h": states, "c": states}
    return {name: named[name] for name in inputs(module, form, given, 3, 2)}


def exported(model: nn.Module, example: dict[str, Tensor], dims: Any, dynamo: bool) -> Any:
    """An ONNX Runtime session of the model."""
    file, arguments = io.BytesIO(), tuple(example.values())
    if dynamo:
        by_name = {name: torch.export.Dim(name, min=1, max=999) for name in ("batch", "time")}
        shapes = {k: {i: by_name[n] for i, n in named.items()} for k, named in dims.items()}
        torch.onnx.export(model, arguments, dynamo=True, dynamic_shapes=shapes, verbose=False).save(
            file
        )
    else:
        names: Any = {"input_names": list(example), "dynamic_axes": dims}
        torch.onnx.export(model, arguments, file, dynamo=False, **names)
    return runtime.InferenceSession(file.getvalue(), providers=["CPUExecutionProvider"])


def outputs(session: Any, arguments: dict[str, Tensor]) -> list[Tensor]:
    names = [node.name for node in session.get_inputs()]
    values = [value.numpy() for value in arguments.values()]
    return [torch.from_numpy(o) for o in session.run(None, dict(zip(names, values, strict=True)))]


BOTH: dict[str, Any] = {"num_layers": 2, "bidirectional": True}
FIRST: dict[str, Any] = {"batch_first": True}
Case = tuple[str, dict[str, Any], str, bool]  # class, arguments, form of the input, states given
CASES: list[Case] = [
    ("RNN", {**BOTH, **FIRST}, "padded", False),
    ("LSTM", FIRST, "unbatched", True),
    ("GRU", {**BOTH, "bias": False}, "padded", True),
    ("LSTMCell", {}, "padded", True),
]
# A cell that torch.nn has not, of which dynamo=False knows no operator.
OWN: list[Case] = [("PeepholeLSTM", BOTH, "padded", False)]
# What dynamo=True cannot take.
PACKED: list[Case] = [
    ("RNN", FIRST, "packed", True),
    ("LSTM", {**BOTH, **FIRST}, "packed", True),
    ("GRU", BOTH, "packed", False),
]
RELU: dict[str, Any] = {"nonlinearity": "relu"}
MORE_LAYERS: list[Case] = [
    (name, {**settings, **more}, form, given)
    for name, more in [("RNN", {}), ("RNN", RELU), ("LSTM", {}), ("GRU", {}), ("PeepholeLSTM", {})]
    for settings in ({}, FIRST, BOTH, {**BOTH, **FIRST}, {"bias": False})
    for form in ("padded", "unbatched")
    for given in (True, False)
]
MORE_CELLS: list[Case] = [
    (name, settings, form, given)
    for name, settings in [("RNNCell", {}), ("RNNCell", RELU), ("LSTMCell", {}), ("GRUCell", {})]
    for form in ("padded", "unbatched")
    for given in (True, False)
]
MORE = MORE_LAYERS + MORE_CELLS
MORE_PACKED: list[Case] = [
    (name, {**settings, **more}, "packed", given)
    for name, more in [("RNN", {}), ("RNN", RELU), ("LSTM", {}), ("GRU", {})]
    for settings in ({}, FIRST, BOTH, {**BOTH, **FIRST}, {"bias": False})
    for given in (True, False)
]


def check_export(name: str, settings: dict[str, Any], form: str, given: bool, dynamo: bool) -> None:
    theirs, ours = pair(name, 4, 5, train=False, **settings)
    wrapper = Packed if form == "packed" else Call
    example = inputs(ours, form, given, time=6, batch=3)
    with torch.no_grad():
        dims = dimensions(ours, form, given)
        session = exported(wrapper(ours), example, dims, dynamo)
        for time, batch in ((6, 3), (9, 5), (1, 4), (4, 1)):
            arguments = inputs(ours, form, given, time, batch)
            expected = wrapper(theirs)(**arguments)
            assert_all_close(outputs(session, arguments), expected, tol=1e-5)


def parametrized(cases: list[Case], dynamo: bool, *marks: Any) -> list[Any]:
    exporter = "dynamo" if dynamo else "script"
    return [
        pytest.param(
            *case, dynamo, id="-".join([case[0], *case[1], case[2], exporter]), marks=marks
        )
        for case in cases
    ]


@pytest.mark.drawn(6)
@pytest.mark.parametrize(
    "name, settings, form, given, dynamo",
    parametrized(CASES + OWN, True)
    + parametrized(CASES + PACKED, False)
    + parametrized(MORE, True, pytest.mark.slow)
    + parametrized(
        [case for case in MORE + MORE_PACKED if case[0] != "PeepholeLSTM"], False, pytest.mark.slow
    ),
)
def test_export(name: str, settings: dict[str, Any], form: str, given: bool, dynamo: bool) -> None:
    """Batch and time are dynamic, all outputs those of torch.nn."""
    check_export(name, settings, form, given, dynamo)


def test_projection() -> None:
    """ONNX has no operator for it: the steps are unrolled, as many as the example has."""
    theirs, ours = pair("LSTM", 4, 5, train=False, proj_size=3)
    example = inputs(ours, "padded", True, time=3, batch=2)
    dims = {"x": {1: "batch"}, "h": {1: "batch"}, "c": {1: "batch"}}
    with torch.no_grad():
        session = exported(Call(ours), example, dims, True)
        for batch in (2, 4):
            arguments = inputs(ours, "padded", True, 3, batch)
            expected = Call(theirs)(**arguments)
            assert_all_close(outputs(session, arguments), expected, tol=1e-5)
        with pytest.raises(Exception, match="[Ii]nvalid dimensions"):
            outputs(session, inputs(ours, "padded", True, 4, 2))


@pytest.mark.parametrize("dynamo", [False, True], ids=["script", "dynamo"])
def test_inside_a_model(dynamo: bool) -> None:
    model, tokens = Mixed(fused_rnn).eval(), torch.randint(10, (2, 5))
    session = exported(model, {"tokens": tokens}, {"tokens": {0: "batch", 1: "time"}}, dynamo)
    tokens = torch.randint(10, (7, 9))
    (found,) = outputs(session, {"tokens": tokens})
    assert_close(found, model(tokens), tol=1e-5)


@pytest.mark.drawn(2)
@pytest.mark.parametrize("given", [True, False], ids=["hx", "zeros"])
@pytest.mark.parametrize("name", ["RNN", "LSTM", "GRU", "PeepholeLSTM"])
def test_packed_by_dynamo_says_what_to_do(name: str, given: bool) -> None:
    _, ours = pair(name, 4, 5, train=False)
    example = inputs(ours, "packed", given, time=6, batch=3)
    with (
        torch.no_grad(),
        pytest.raises(Exception, match="takes no PackedSequence. Export with dynamo=False"),
    ):
        exported(Packed(ours), example, dimensions(ours, "packed", given), True)


def test_one_node_for_a_layer() -> None:
    onnx = pytest.importorskip("onnx")
    _, ours = pair("GRU", 4, 5, train=False, **BOTH)
    example = inputs(ours, "padded", False, 3, 2)
    file = io.BytesIO()
    with torch.no_grad():
        torch.onnx.export(ours, tuple(example.values()), dynamo=True, verbose=False).save(file)
    operators = [node.op_type for node in onnx.load_from_string(file.getvalue()).graph.node]
    assert operators.count("GRU") == 2
    assert "Loop" not in operators and "fused_rnn" not in str(operators)
