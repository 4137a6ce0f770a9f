"""Keras' recurrent layers on our kernels: values, gradients, models and files as without them."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import forked
import pytest
import torch
from helpers import assert_all_close
from torch import Tensor

import fused_rnn

os.environ.setdefault("KERAS_BACKEND", "torch")
keras = pytest.importorskip("keras")
if keras.config.backend() != "torch":
    pytest.skip("Keras has another backend than torch", allow_module_level=True)

pytestmark = pytest.mark.tools

BATCH, STEPS, INPUTS, UNITS = 4, 6, 3, 5
LAYERS = ["LSTM", "GRU", "SimpleRNN"]
ROWS = {
    "right-padded": ["111111", "111000", "100000", "111111"],
    "left-padded": ["111111", "000111", "000001", "111111"],
    "any": ["101011", "000000", "011000", "111111"],
}
MASKS = {"none": None} | {
    name: torch.tensor([[step == "1" for step in row] for row in rows])
    for name, rows in ROWS.items()
}


def make(kind: str, **kwargs: Any) -> Any:
    kwargs.setdefault("bias_initializer", "random_normal")
    if kind == "LSTM":
        kwargs["unit_forget_bias"] = False
    return getattr(keras.layers, kind)(UNITS, **kwargs)


Count = Callable[[], int]


@pytest.fixture
def kernel_calls(monkeypatch: pytest.MonkeyPatch) -> Count:
    """How often kernels were called since the test began."""
    recurrent, calls = fused_rnn.keras.recurrent, []

    def counting(*args: Any, **kwargs: Any) -> Any:
        calls.append(args)
        return recurrent(*args, **kwargs)

    monkeypatch.setattr(fused_rnn.keras, "recurrent", counting)
    return lambda: len(calls)


def results(layer: Any, x: Tensor, **kwargs: Any) -> list[Tensor]:
    """All that a call returns, and all gradients of it."""
    for weight in layer.weights:
        weight.value.grad = None
    x = x.clone().requires_grad_(x.is_floating_point())
    found = layer(x, **kwargs)
    outputs = list(found) if isinstance(found, (list, tuple)) else [found]
    sum((output.double().cumsum(-1) ** 2).sum() for output in outputs).backward()
    weights = [w.value.grad for w in layer.weights if w.trainable]
    return [*outputs, *([] if x.grad is None else [x.grad]), *weights]


def compare(layer: Any, count: Count, tol: float = 1e-4, calls: int = 1, **kwargs: Any) -> None:
    x = torch.randn(BATCH, STEPS, INPUTS)
    layer(x)  # which makes the weights
    expected = results(layer, x, **kwargs)
    before = count()
    with fused_rnn.keras.enable():
        found = results(layer, x, **kwargs)
    assert count() - before == calls
    assert [f.dtype for f in found] == [e.dtype for e in expected]
    assert_all_close(found, expected, tol=tol)


@pytest.mark.parametrize("backwards", [False, True])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("kind", LAYERS)
def test_layers(kind: str, mask: str, backwards: bool, kernel_calls: Count) -> None:
    for zeros in (False, True):
        for sequences in (False, True):
            layer = make(
                kind,
                return_sequences=sequences,
                return_state=True,
                go_backwards=backwards,
                zero_output_for_mask=zeros,
            )
            compare(layer, kernel_calls, mask=MASKS[mask])
            initial = [torch.randn(BATCH, UNITS) for _ in layer.state_size]
            compare(layer, kernel_calls, mask=MASKS[mask], initial_state=initial)


@pytest.mark.parametrize("merge_mode", ["concat", "sum", "ave", "mul", None])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("kind", LAYERS)
def test_both_directions(kind: str, mask: str, merge_mode: str | None, kernel_calls: Count) -> None:
    for options in ({"return_sequences": True}, {"return_state": True}):
        layer = keras.layers.Bidirectional(make(kind, **options), merge_mode=merge_mode)
        compare(layer, kernel_calls, mask=MASKS[mask])
        states = 2 * len(layer.forward_layer.state_size)
        initial = [torch.randn(BATCH, UNITS) for _ in range(states)]
        compare(layer, kernel_calls, mask=MASKS[mask], initial_state=initial)


@pytest.mark.parametrize(
    "kind, options",
    [
        *((kind, {"use_bias": False}) for kind in LAYERS),
        *((kind, {"unroll": True}) for kind in LAYERS),
        ("SimpleRNN", {"activation": "relu"}),
        ("LSTM", {"implementation": 1}),
        ("LSTM", {"recurrent_dropout": 0.5}),  # which is for training
        ("GRU", {"dropout": 0.5}),
    ],
)
def test_options_that_kernels_have(kind: str, options: dict[str, Any], kernel_calls: Count) -> None:
    compare(make(kind, **options), kernel_calls, mask=MASKS["any"])


def test_a_mask_of_no_step_at_all(kernel_calls: Count) -> None:
    mask = torch.zeros(BATCH, STEPS, dtype=torch.bool)
    for layer in (make("GRU", return_state=True), keras.layers.Bidirectional(make("LSTM"))):
        compare(layer, kernel_calls, calls=0, mask=mask)


def test_layers_around_keras_cells(kernel_calls: Count) -> None:
    layer = keras.layers.RNN(keras.layers.LSTMCell(UNITS), return_sequences=True)
    compare(layer, kernel_calls, mask=MASKS["any"])


class OwnCell(keras.layers.LSTMCell):
    def call(self, inputs: Any, states: Any, training: bool = False) -> Any:
        h, states = super().call(inputs, states, training=training)
        return h + 1, states


@pytest.mark.parametrize(
    "layer",
    [
        lambda: make("LSTM", activation="relu"),
        lambda: make("LSTM", recurrent_activation="hard_sigmoid"),
        lambda: make("SimpleRNN", activation=None),
        lambda: make("GRU", reset_after=False),
        lambda: make("GRU", use_cudnn=False),
        lambda: keras.layers.RNN(OwnCell(UNITS)),
        lambda: keras.layers.RNN([keras.layers.GRUCell(UNITS), keras.layers.GRUCell(UNITS)]),
        lambda: keras.layers.RNN(keras.layers.GRUCell(UNITS, dtype="float64")),
    ],
)
def test_what_stays_keras_own(layer: Callable[[], Any], kernel_calls: Count) -> None:
    compare(layer(), kernel_calls, calls=0, mask=MASKS["right-padded"])


@pytest.mark.parametrize(
    "make_pair",
    [
        lambda: [make("GRU", go_backwards=True), make("GRU")],
        lambda: [make("GRU", dropout=0.5), None],
        lambda: [make("GRU", activity_regularizer="l2"), None],
        lambda: [make("GRU"), keras.layers.GRU(UNITS, use_bias=False, go_backwards=True)],
    ],
)
def test_directions_that_go_one_by_one(
    make_pair: Callable[[], list[Any]], kernel_calls: Count
) -> None:
    forward, backward = make_pair()
    layer = keras.layers.Bidirectional(forward, backward_layer=backward)
    compare(layer, kernel_calls, calls=2, mask=MASKS["any"])


@pytest.mark.parametrize("kind", LAYERS)
def test_dropout_draws_what_keras_draws(kind: str, kernel_calls: Count) -> None:
    x = torch.randn(BATCH, STEPS, INPUTS)
    expected, found = (make(kind, dropout=0.5, seed=3, return_sequences=True) for _ in range(2))
    expected.build(x.shape)
    found.build(x.shape)
    found.set_weights(expected.get_weights())
    for mask in MASKS.values():
        theirs = results(expected, x, training=True, mask=mask)
        with fused_rnn.keras.enable():
            ours = results(found, x, training=True, mask=mask)
        assert_all_close(ours, theirs, tol=1e-4)
    assert kernel_calls() == len(MASKS)
    dropping = make(kind, recurrent_dropout=0.5)
    compare_shapes = dropping(x, training=True).shape
    with fused_rnn.keras.enable():
        assert dropping(x, training=True).shape == compare_shapes
    assert kernel_calls() == len(MASKS)


@pytest.mark.parametrize("kind", LAYERS)
def test_stateful(kind: str, kernel_calls: Count) -> None:
    x = torch.randn(2, BATCH, STEPS, INPUTS)
    layer = make(kind, stateful=True, return_sequences=True)
    layer.build(x.shape[1:])
    found = []
    with fused_rnn.keras.enable():
        for part in x:
            output = layer(part)
            output.sum().backward()  # of states that are written over before
            found.append(output)
    assert kernel_calls() == 2
    layer.reset_state()
    whole = layer(torch.cat(tuple(x), 1))
    assert_all_close(torch.cat(found, 1), whole, tol=1e-5)


@pytest.mark.parametrize("policy, tol", [("mixed_bfloat16", 0.1), ("mixed_float16", 0.02)])
@pytest.mark.parametrize("mask", ["none", "any"])
@pytest.mark.parametrize("kind", LAYERS)
def test_mixed_precision(
    kind: str, mask: str, policy: str, tol: float, kernel_calls: Count
) -> None:
    layer = make(kind, return_sequences=True, return_state=True, dtype=policy)
    compare(layer, kernel_calls, tol, mask=MASKS[mask])
    both = keras.layers.Bidirectional(make(kind, dtype=policy), dtype=policy)
    compare(both, kernel_calls, tol, mask=MASKS[mask])


def test_float64(kernel_calls: Count) -> None:
    layer = make("LSTM", return_sequences=True, dtype="float64")
    compare(layer, kernel_calls, 1e-9)
    compare(layer, kernel_calls, 1e-6, mask=MASKS["any"])  # where Keras itself rounds


def model() -> Any:
    layers = keras.layers
    return keras.Sequential(
        [
            keras.Input((STEPS,), dtype="int32"),
            layers.Embedding(20, INPUTS, mask_zero=True),
            layers.Bidirectional(make("LSTM", return_sequences=True)),
            make("GRU", return_sequences=True, dropout=0.25, seed=5),
            make("SimpleRNN", go_backwards=True),
            layers.Dense(1),
        ]
    )


def test_a_model_trains_and_is_saved(tmp_path: Path, kernel_calls: Count) -> None:
    tokens = torch.randint(1, 20, (BATCH, STEPS)) * MASKS["left-padded"]
    target = torch.randn(BATCH, 1)
    theirs, ours = model(), model()
    ours.set_weights(theirs.get_weights())
    for each in (theirs, ours):
        each.compile("sgd", "mse", jit_compile=False)
    theirs.fit(tokens, target, epochs=2, shuffle=False, verbose=0)
    with fused_rnn.keras.enable():
        ours.fit(tokens, target, epochs=2, shuffle=False, verbose=0)
        assert kernel_calls() == 6
        ours.save(tmp_path / "ours.keras")
        predicted = torch.as_tensor(ours.predict(tokens, verbose=0))
    for found, expected in zip(ours.get_weights(), theirs.get_weights(), strict=True):
        assert_all_close(torch.as_tensor(found), torch.as_tensor(expected), tol=1e-4)
    calls = kernel_calls()
    loaded = keras.saving.load_model(tmp_path / "ours.keras")
    assert_all_close(torch.as_tensor(loaded.predict(tokens, verbose=0)), predicted, tol=1e-5)
    assert kernel_calls() == calls
    with fused_rnn.keras.enable():  # a model made before
        again = torch.as_tensor(loaded.predict(tokens, verbose=0))
    assert kernel_calls() == calls + 3
    assert_all_close(again, predicted, tol=1e-5)


@pytest.mark.parametrize("mask", ["none", "right-padded"])
@pytest.mark.parametrize("kind", LAYERS)
def test_compiled(kind: str, mask: str) -> None:
    """In one graph, and with a mask Keras' own way."""
    layer = make(kind, return_sequences=True)
    x = torch.randn(BATCH, STEPS, INPUTS)
    expected = layer(x, mask=MASKS[mask])
    with fused_rnn.keras.enable():
        if mask == "none":
            assert torch._dynamo.explain(layer)(x).graph_break_count == 0
        compiled = torch.compile(layer, backend="eager")
        assert_all_close(compiled(x, mask=MASKS[mask]), expected, tol=1e-5)


@pytest.mark.filterwarnings("ignore")
def test_onnx_has_operators_of_its_own_for_layers(tmp_path: Path) -> None:
    """In place of all steps one by one."""
    onnx = pytest.importorskip("onnx")
    runtime = pytest.importorskip("onnxruntime")
    layers = [
        make("LSTM", return_sequences=True),
        keras.layers.Bidirectional(make("GRU", return_sequences=True)),
        make("SimpleRNN", go_backwards=True),
    ]
    exported = keras.Sequential([keras.Input((STEPS, INPUTS), batch_size=1), *layers])
    x, path = torch.randn(1, STEPS, INPUTS), tmp_path / "model.onnx"
    expected = exported(x)
    with fused_rnn.keras.enable():
        exported.export(path, format="onnx", verbose=False)
    operators = {node.op_type for node in onnx.load(path).graph.node}
    assert {"LSTM", "GRU", "RNN"} <= operators
    session = runtime.InferenceSession(path)
    (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    assert_all_close(torch.as_tensor(found), expected, tol=1e-5)


# --- On and off -----------------------------------------------------------------------------------

PLACES = [(keras.layers.RNN, "inner_loop"), (keras.layers.LSTM, "inner_loop")]
PLACES += [(keras.layers.GRU, "inner_loop"), (keras.layers.Bidirectional, "call")]


def test_on_and_off() -> None:
    theirs = [vars(cls)[name] for cls, name in PLACES]
    fused_rnn.keras.disable()  # nothing to do
    with fused_rnn.keras.enable():
        assert fused_rnn.keras.is_enabled()
        with fused_rnn.keras.enable():
            pass
        assert fused_rnn.keras.is_enabled()
        assert not any(vars(cls)[name] in theirs for cls, name in PLACES)
    assert not fused_rnn.keras.is_enabled()
    fused_rnn.keras.enable()
    fused_rnn.keras.disable()
    assert [vars(cls)[name] for cls, name in PLACES] == theirs


def test_refusals(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keras.config, "backend", lambda: "jax")
    with pytest.raises(RuntimeError, match="expected Keras on the torch backend, got jax"):
        fused_rnn.keras.enable()
    monkeypatch.setitem(sys.modules, "keras", None)
    with pytest.raises(ImportError, match=r"needs Keras 3 .* pip install fused_rnn\[keras\]"):
        fused_rnn.keras.enable()
    assert not fused_rnn.keras.is_enabled()


KERAS_TESTS = """
import importlib.util, pytest, fused_rnn
names = "lstm gru simple_rnn bidirectional rnn stacked_rnn_cells time_distributed".split()
files = [importlib.util.find_spec(f"keras.src.layers.rnn.{name}_test") for name in names]
fused_rnn.keras.enable()
options = ["-q", "-p", "no:cacheprovider", "-W", "ignore"]
raise SystemExit(pytest.main([*options, *(file.origin for file in files)]))
"""


@pytest.mark.slow
def test_keras_own_tests(tmp_path: Path) -> None:
    done = forked.python("-c", KERAS_TESTS, cwd=tmp_path)
    assert done.returncode == 0, done.stdout
