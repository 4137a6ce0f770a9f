"""Products on units for bfloat16 and int8 (csrc/cpu/parts.h, fixed.h), where there are any."""

from __future__ import annotations

import copy

import pytest
import torch
from cases import CELLS, pair
from helpers import assert_no_worse, leave_kink, map_tensors, native, run
from torch import Tensor
from torch.nn.utils.rnn import pack_padded_sequence

pytestmark = [
    pytest.mark.engine,
    pytest.mark.skipif(not native(), reason="about the native kernels"),
]

LAYERS = {"rnn_tanh": "RNN", "rnn_relu": "RNN", "lstm": "LSTM", "gru": "GRU"}
KWARGS = {"rnn_relu": {"nonlinearity": "relu"}}


LOW = [torch.float32, torch.bfloat16, torch.float16]


def layers(cell: str, inputs: int, hidden: int, **kwargs):
    options = {"dtype": torch.float32} | KWARGS.get(cell, {}) | kwargs
    return pair(LAYERS[cell], inputs, hidden, **options)


# Whole tiles and ragged edges, chunks of rows and less than one, one gate that ends inside a tile;
# depths for bfloat16 (below 96) and for fixed point, of one cut and several, or of each side its
# own.
SHAPES = [
    (5, 64, 64, 64),
    (9, 33, 50, 100),
    (40, 17, 130, 31),
    (3, 200, 33, 65),
    (30, 12, 130, 97),
    (5, 64, 300, 256),
    (52, 5, 64, 520),
    (17, 40, 600, 160),
]


@pytest.mark.drawn(48)
@pytest.mark.parametrize("bidirectional", [False, True], ids=["one", "two"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize("cell", LAYERS)
def test_accuracy(
    cell: str, dtype: torch.dtype, shape: tuple[int, int, int, int], bidirectional: bool
) -> None:
    """No worse than torch.nn against float64: the bound of test_parity.test_low_precision."""
    T, B, I, H = shape  # noqa: E741
    theirs, ours = layers(cell, I, H, bidirectional=bidirectional, dtype=dtype)
    x = torch.randn(T, B, I, dtype=dtype)
    if cell == "rnn_relu":
        x, _ = leave_kink((theirs, ours), x, None)
    exact = run(copy.deepcopy(theirs).double(), x.double(), None, dtype)
    assert_no_worse(run(ours, x, None), run(theirs, x, None), exact, terms=max(4 * H, I, B * T))


@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize("hidden, proj", [(96, 40), (200, 130)], ids=str)
def test_projection_and_packed_rows(hidden: int, proj: int, dtype: torch.dtype) -> None:
    theirs, ours = layers("lstm", 48, hidden, proj_size=proj, bidirectional=True, dtype=dtype)
    lengths = torch.randint(1, 30, (40,))
    rows = torch.randn(30, 40, 48, dtype=dtype)
    x = pack_padded_sequence(rows, lengths, enforce_sorted=False)
    exact = run(copy.deepcopy(theirs).double(), map_tensors(x, Tensor.double), None, dtype)
    assert_no_worse(run(ours, x, None), run(theirs, x, None), exact, terms=40 * 30)


@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_rows_apart(dtype: torch.dtype) -> None:
    """batch_first: the rows of a step lie T rows apart, and those of a chunk at no one stride."""
    theirs, ours = layers("gru", 48, 64, batch_first=True, dtype=dtype)
    x = torch.randn(32, 20, 48, dtype=dtype)
    exact = run(copy.deepcopy(theirs).double(), x.double(), None, dtype)
    assert_no_worse(run(ours, x, None), run(theirs, x, None), exact, terms=640)


def same(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, want in expected.items():
        finite = want.isfinite()
        scale = max(1.0, want[finite].abs().max().item()) if finite.any() else 1.0
        torch.testing.assert_close(
            actual[name], want, rtol=1e-4, atol=1e-5 * scale, equal_nan=True, msg=name
        )


WHERE = ["x", "h0", "weight_ih_l0", "weight_hh_l0", "dy"]
LARGE, HUGE = [float("nan"), 1e30, 1e8], [float("inf"), float("-inf"), 3e38]
# An infinite dy is left out: what is inf and what NaN depends on how a derivative is factored.
OUTSIDE = [(w, v) for w in WHERE for v in (LARGE if w == "dy" else LARGE + HUGE)]


@pytest.mark.parametrize("where, value", OUTSIDE)
@pytest.mark.parametrize("I, H", [(40, 48), (100, 130)], ids=["bfloat16", "fixed"])
@pytest.mark.parametrize("cell", ["rnn_tanh", "lstm", "gru"])
def test_values_outside_the_range(cell: str, I: int, H: int, where: str, value: float) -> None:  # noqa: E501, E741
    """One element that tiles cannot hold: in its step or everywhere, vectors do the work."""
    T, B = 12, 32
    found = []
    for module in layers(cell, I, H):
        torch.manual_seed(1)
        x, h0 = torch.randn(T, B, I), torch.randn(1, B, H)
        dy = torch.randn(T, B, H)
        target = {"x": x[7, 3], "h0": h0[0, 5], "dy": dy[6, 9]}.get(where)
        if target is None:
            target = getattr(module, where).data[11]
        target[2] = value
        x.requires_grad_()
        y, _ = module(x, (h0, torch.zeros_like(h0)) if cell == "lstm" else h0)
        y.backward(dy)
        grads = {n: p.grad for n, p in module.named_parameters()}
        found.append({"y": y.detach(), "dx": x.grad} | grads)
    same(found[1], found[0])


@pytest.mark.parametrize("hidden", [64, 128])
def test_growing_state(hidden: int) -> None:
    """A relu layer whose h leaves the range on the way. No summand is negative: no cancellation."""
    found = []
    for module in layers("rnn_relu", 32, hidden, bias=False):
        with torch.no_grad():
            module.weight_ih_l0.abs_()
            module.weight_hh_l0.copy_(4 * torch.eye(hidden))
        torch.manual_seed(1)
        found.append(module(torch.rand(40, 32, 32))[0].detach())
    assert found[0].max() > 2**40
    torch.testing.assert_close(found[1], found[0], rtol=1e-5, atol=0)


@pytest.mark.parametrize("scale", [1e-10, 1e-20, 1e-30, 1e-38])
@pytest.mark.parametrize("hidden", [48, 128])
def test_small_gradients(hidden: int, scale: float) -> None:
    """Gradients keep their precision until they near the smallest normal number, 1.2e-38."""
    theirs, ours = layers("gru", 32, hidden)
    x = torch.randn(10, 32, 32)
    grads = []
    for module in (theirs, ours):
        module(x)[0].mul(scale).sum().backward()
        grads.append({n: p.grad / scale for n, p in module.named_parameters()})
    for name, want in grads[0].items():
        tol = max(1e-5, 1e-36 / scale) * want.abs().max().item()
        torch.testing.assert_close(grads[1][name], want, rtol=0, atol=tol, msg=name)


def relative_errors(actual: dict[str, Tensor], exact: dict[str, Tensor]) -> dict[str, float]:
    """The median over elements: what is small counts as much as what is large."""
    found = {}
    for name, want in exact.items():
        some = want != 0
        found[name] = ((actual[name].double() - want)[some] / want[some]).abs().median().item()
    return found


def one_hot(x: Tensor) -> Tensor:
    return torch.nn.functional.one_hot(x.argmax(-1), x.shape[-1]).to(x.dtype)


def outweigh_features(module: torch.nn.Module, x: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
    scales = 10 ** (6 * torch.rand(x.shape[-1]) - 3)
    module.weight_ih_l0.data /= scales
    return x * scales, dy


def outweigh_one_feature(module: torch.nn.Module, x: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
    scales = torch.ones(x.shape[-1])
    scales[3] = 1e6
    module.weight_ih_l0.data /= scales
    return x * scales, dy


def outweigh_a_sequence(module: torch.nn.Module, x: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
    """Of one-hot vectors: other sequences alone have most columns of W_ih."""
    scales = torch.ones(x.shape[1], 1)
    scales[3] = 1e6
    return one_hot(x), dy * scales


def only_last_step(module: torch.nn.Module, x: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
    """Vanishing gradients, of which each one-hot vector has its own."""
    module.weight_hh_l0.data *= 0.3
    return one_hot(x), torch.cat([torch.zeros_like(dy[1:]), dy[:1]])


@pytest.mark.parametrize(
    "change", [outweigh_features, outweigh_one_feature, outweigh_a_sequence, only_last_step]
)
@pytest.mark.parametrize("cell", ["rnn_tanh", "lstm", "gru"])
def test_unlike_scales(cell: str, change) -> None:
    """What is small beside other elements of its row keeps its digits: fixed point is balanced."""
    T, B, I, H = 20, 40, 300, 128  # noqa: E741
    theirs, ours = layers(cell, I, H)
    x, dy = change(theirs, torch.randn(T, B, I), torch.randn(T, B, H))
    ours.load_state_dict(theirs.state_dict())
    found = []
    for module in (copy.deepcopy(theirs).double(), theirs, ours):
        dtype = module.weight_ih_l0.dtype
        inputs = x.to(dtype).requires_grad_()
        y, _ = module(inputs)
        y.backward(dy.to(dtype))
        grads = {n: p.grad for n, p in module.named_parameters()}
        found.append({"y": y.detach(), "dx": inputs.grad} | grads)
    expected, errors = relative_errors(found[1], found[0]), relative_errors(found[2], found[0])
    for name, error in errors.items():
        assert error <= 16 * expected[name] + 2e-7, f"{name}: {error:.2g}, {expected[name]:.2g}"


@pytest.mark.parametrize("cell", CELLS)
def test_cells_with_many_rows(cell: str) -> None:
    name, kwargs = CELLS[cell]
    theirs, ours = pair(name, 70, 90, dtype=torch.float32, **kwargs)
    x, h = torch.randn(300, 70), torch.randn(300, 90)
    if cell == "rnn_relu":
        x, h = leave_kink((theirs, ours), x, h)
    hx = (h, torch.randn(300, 90)) if cell == "lstm" else h
    double = map_tensors((x, hx), Tensor.double)
    exact = run(copy.deepcopy(theirs).double(), *double, cotangent_dtype=torch.float32)
    assert_no_worse(run(ours, x, hx), run(theirs, x, hx), exact, terms=300)


@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize(
    "shape",
    [(9, 33, 50, 100), (1, 13, 64, 80), (3, 2, 40, 600), (40, 8, 260, 272), (7, 48, 120, 140)],
    ids=str,
)
@pytest.mark.parametrize("cell", LAYERS)
def test_same_for_any_number_of_threads(
    cell: str, shape: tuple[int, int, int, int], dtype: torch.dtype
) -> None:
    """On tiles, for few rows in all (weights as they lie), and for few rows of a wide layer."""
    T, B, I, H = shape  # noqa: E741
    _, module = layers(cell, I, H, dtype=dtype)
    x = torch.randn(T, B, I, dtype=dtype)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(run(module, x, None))
    finally:
        torch.set_num_threads(before)
    for name, want in found[0].items():
        assert all(torch.equal(other[name], want) for other in found[1:]), name
