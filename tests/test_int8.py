"""``fused_rnn.freeze(.., dtype=torch.int8)``: products of 8-bit integers, the same for everybody.

A step that begins with the same numbers gives the same integers, whoever computes it, and sums that
are exact: what kernels and plain torch find differs by the rounding of float32 alone. Over many
steps such a difference may once round to another integer, so longer runs are compared step by step,
or with kernels that began with the same bits.
"""

from __future__ import annotations

import contextlib
import copy
import io
import os
import pickle
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from fractions import Fraction
from typing import Any

import forked
import pytest
import torch
from cases import CELL_CLASSES, LAYER_CLASSES, LAYERS, OWN_LAYERS, Case
from helpers import (
    assert_close,
    compile_quickly,
    cpu_engine_only,
    error,
    flatten,
    map_tensors,
    packs,
)
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import fused_rnn
from fused_rnn import build, ops, zoo
from fused_rnn.reference import Rows

pytestmark = pytest.mark.module

ALL = [*LAYERS, *OWN_LAYERS]
SIZES = [1, 3, 16, 65, 193]


def frozen_of(module: nn.Module) -> Any:
    return fused_rnn.freeze(module, inplace=False, dtype=torch.int8)


def run(module: Any, x: Any, hx: Any = None, **more: Any) -> list[Tensor]:
    with torch.no_grad():
        return flatten(module(x, hx, **more))


needs_kernels = pytest.mark.skipif(
    not packs(), reason="plain torch sums in the order that it likes"
)


@contextlib.contextmanager
def in_plain_torch() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ops, "supports", lambda *_: False)
        patch.setattr(ops.direct, "functions", False)
        yield


def assert_equal(found: list[Tensor], expected: list[Tensor]) -> None:
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def assert_same(found: list[Tensor], expected: list[Tensor], tol: float = 3e-6) -> None:
    for a, b in zip(found, expected, strict=True):
        assert_close(a, b, tol)


def distance(found: list[Tensor], expected: list[Tensor]) -> float:
    return max(error(a, b) for a, b in zip(found, expected, strict=True))


def step_of(layer: Any, batch: int) -> tuple[Tensor, Any]:
    """An input of one step and states, of unlike sizes in each sequence."""
    dtype, sizes = layer.weight_ih_l0.dtype, torch.logspace(-2, 2, batch).unsqueeze(-1)
    x = (torch.randn(1, batch, layer.input_size) * sizes).to(dtype)
    with torch.no_grad():
        last = layer(x)[1]
    return x, map_tensors(last, lambda t: torch.randn_like(t) * sizes.to(dtype).clamp(max=1))


# --- The integers --------------------------------------------------------------------------------


def test_rows_are_whole_numbers_of_a_scale() -> None:
    for K in (1, 2, 5, 33):
        rows = torch.randn(40, K) * torch.logspace(-35, 30, 40).unsqueeze(1)
        rows[3] = 0
        found = Rows.of(rows)
        for row, numbers, scale in zip(
            rows.tolist(), found.numbers.tolist(), found.scales.tolist(), strict=True
        ):
            largest = max(map(abs, row))
            if largest < 1e-30:
                assert set(numbers) == {0} and scale == [0]
                continue
            assert scale[0] == pytest.approx(largest / 127, rel=1e-6)
            assert max(map(abs, numbers)) == 127
            for value, number in zip(row, numbers, strict=True):
                assert number == int(number)
                assert abs(Fraction(value) * 127 / Fraction(largest) - int(number)) < 0.5001


def test_rows_without_numbers() -> None:
    rows = torch.tensor([[1.0, torch.inf], [torch.nan, 2.0], [0.5, -0.25], [-torch.inf, torch.nan]])
    found = Rows.of(rows)
    assert found.numbers.tolist() == [[0, 0], [0, 0], [127, -64], [0, 0]]  # of a tie the even one
    assert found.scales.isnan().squeeze(1).tolist() == [True, True, False, True]


# --- One step, against plain torch ---------------------------------------------------------------


@pytest.mark.parametrize("H", SIZES)
@pytest.mark.parametrize("cell", ALL)
@pytest.mark.drawn(20)
def test_a_step_is_that_of_plain_torch(cell: str, H: int) -> None:
    for inputs, batch, bias, both in (
        (1, 1, True, True),
        (66, 3, False, False),
        (130, 40, True, True),
    ):
        case = Case(
            *(cell, inputs, H, 1, both, bias), training=False, dtype=torch.float32, batch=batch
        )
        if not case.valid:
            return
        _, module = case.modules()
        frozen = frozen_of(module)
        x, hx = step_of(module, batch)
        found = run(frozen, x, hx)
        with in_plain_torch():
            assert_same(found, run(frozen, x, hx))
        assert not any(t.isnan().any() for t in found)
        if H > 3:
            assert distance(found, run(module, x, hx)) > 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("cell", ALL)
def test_a_step_of_16_bits(cell: str, dtype: torch.dtype) -> None:
    _, module = Case(cell, 33, 65, training=False, dtype=dtype).modules()
    frozen = frozen_of(module)
    x, hx = step_of(module, 5)
    with in_plain_torch():
        expected = run(frozen, x, hx)
    assert_same(run(frozen, x, hx), expected, 2 * torch.finfo(dtype).eps)


@pytest.mark.parametrize(
    "options",
    [
        dict(norm="layer"),
        dict(norm="rms", norm_at=("input", "recurrent")),
        dict(zoneout=0.3),
        dict(blocks=2),
        dict(blocks=6),
        dict(num_layers=1, bidirectional=True, dropout_over_time=True, weight_dropout=0.5),
    ],
    ids=str,
)
@pytest.mark.parametrize("name", ["LSTM", "GRU"])
def test_a_step_with_options(name: str, options: dict[str, Any]) -> None:
    """Blocks of 11 units have no kernels of their own."""
    module = getattr(fused_rnn, name)(
        5, 66 if options.get("blocks") == 6 else 128, **options
    ).eval()
    frozen = frozen_of(module)
    x, hx = step_of(module, 3)
    reset = torch.tensor([[True, False, True]])
    calls: list[dict[str, Any]] = [
        {},
        {"reset": reset},
        {"lengths": [1, 0, 1]},
        {"reset": reset, "reset_to": step_of(module, 3)[1]},
    ]
    for more in calls:
        found = run(frozen, x, hx, **more)
        with in_plain_torch():
            assert_same(found, run(frozen, x, hx, **more), 1e-5)
        assert distance(found, run(module, x, hx, **more)) > 0


@pytest.mark.parametrize("name", CELL_CLASSES)
@pytest.mark.parametrize("bias", [True, False])
def test_cells(name: str, bias: bool) -> None:
    cell = getattr(fused_rnn, name)(5, 33, bias=bias)
    frozen, hooked = frozen_of(cell), frozen_of(cell)
    hooked.register_forward_hook(lambda *_: None)  # not by the shortest way
    for shape in ((5,), (1, 5), (17, 5), (0, 5)):
        x = torch.randn(shape)
        with in_plain_torch():
            expected = run(frozen, x)
        for module in (frozen, hooked):
            assert_same(run(module, x), expected)
        if 0 not in shape:
            assert distance(expected, run(cell, x)) > 0


def test_compiled_cells_from_python(monkeypatch: pytest.MonkeyPatch) -> None:
    """One to which a value is given for each step, and one whose second product is of what the
    first one made: its operand may round to another integer, once in a while."""
    compile_quickly(monkeypatch)
    given, x = torch.rand(1, 3, 33), torch.randn(1, 3, 5)
    for module, more, tol in (
        (zoo.GRUD(5, 33), {"decay": given}, 3e-6),
        (zoo.OriginalGRU(5, 33), {}, 5e-3),
    ):
        frozen = frozen_of(module)
        hx = torch.randn(1, 3, 33)
        with torch.no_grad():
            found = flatten(frozen(x, hx, **more))
            with in_plain_torch():
                assert_same(found, flatten(frozen(x, hx, **more)), tol)
            copied = pickle.loads(pickle.dumps(frozen))
            assert_same(flatten(copied(x, hx, **more)), found, tol)
            assert distance(found, flatten(module(x, hx, **more))) > 0


# --- Sequences -----------------------------------------------------------------------------------


@pytest.mark.parametrize("cell", ALL)
def test_each_step_of_a_sequence_is_that_of_plain_torch(cell: str) -> None:
    _, module = Case(cell, 17, 65, training=False, dtype=torch.float32).modules()
    frozen, x = frozen_of(module), torch.randn(7, 4, 17)
    with torch.no_grad():
        y, _, states = frozen(x, return_states=True)
    each: list[Any] = [None]
    for t in range(len(x)):
        each.append(map_tensors(states, lambda s, t=t: s[:, t]))
        with in_plain_torch():
            expected = run(frozen, x[t : t + 1], each[t])
        assert_same([y[t : t + 1], *flatten(each[t + 1])], expected)


# The product of a projection is of floats.
IN_BYTES = [cell for cell in ALL if cell != "lstm_proj"]


@needs_kernels
@pytest.mark.parametrize("cell", IN_BYTES)
def test_bits_do_not_depend_on_how_a_sequence_is_cut_or_who_is_beside_it(cell: str) -> None:
    """Nor on threads. Of the same sums for any number of rows, bits are those of any batch."""
    for H, T, B in ((33, 40, 1), (65, 9, 17), (193, 4, 70)):
        _, module = Case(cell, 7, H, training=False, dtype=torch.float32).modules()
        frozen, x = frozen_of(module), torch.randn(T, B, 7)
        expected, before = run(frozen, x), torch.get_num_threads()
        try:
            for threads in (1, 2, 3):
                torch.set_num_threads(threads)
                assert_equal(run(frozen, x), expected)
        finally:
            torch.set_num_threads(before)
        state: Any = None
        for t in range(T):
            with torch.no_grad():
                y, state = frozen(x[t : t + 1], state)
            assert torch.equal(y[0], expected[0][t])
        assert_equal(flatten(state), expected[1:])
        for b in {0, B // 2, B - 1}:
            assert torch.equal(run(frozen, x[:, b : b + 1])[0][:, 0], expected[0][:, b])


@needs_kernels
@pytest.mark.parametrize(
    "options",
    [dict(norm="layer"), dict(norm="rms", norm_at=("sum", "cell")), dict(blocks=2)],
    ids=str,
)
def test_bits_with_options_do_not_depend_on_the_batch(options: dict[str, Any]) -> None:
    for H, T, B in ((64, 9, 17), (192, 4, 70)):
        frozen, x = frozen_of(fused_rnn.LSTM(7, H, **options)), torch.randn(T, B, 7)
        expected = run(frozen, x)[0]
        for b in (0, B // 2, B - 1):
            assert torch.equal(run(frozen, x[:, b : b + 1])[0][:, 0], expected[:, b])


@needs_kernels
@pytest.mark.parametrize("cell", ALL)
def test_layers_and_directions_are_those_of_single_ones(cell: str) -> None:
    case = Case(cell, 7, 33, 2, True, batch_first=True, training=False, dtype=torch.float32)
    _, module = case.modules()
    frozen, x = frozen_of(module), torch.randn(5, 6, 7)
    y = x
    for i in range(2):
        _, layer = replace(case, num_layers=1, input_size=y.shape[-1]).modules()
        layer.load_state_dict(
            {
                name: module.state_dict()[name.replace("_l0", f"_l{i}")]
                for name in layer.state_dict()
            }
        )
        y = run(frozen_of(layer), y)[0]
    assert torch.equal(run(frozen, x)[0], y)


@needs_kernels
@pytest.mark.parametrize("cell", IN_BYTES)
def test_packed_sequences_are_those_alone(cell: str) -> None:
    _, module = Case(cell, 5, 65, training=False, dtype=torch.float32).modules()
    frozen, x, lengths = frozen_of(module), torch.randn(6, 5, 5), [3, 6, 1, 6, 2]
    packed = pack_padded_sequence(x, torch.tensor(lengths), enforce_sorted=False)
    with torch.no_grad():
        y = pad_packed_sequence(frozen(packed)[0])[0]
    for b, n in enumerate(lengths):
        assert torch.equal(y[:n, b], run(frozen, x[:n, b : b + 1])[0][:, 0])
    assert torch.equal(run(frozen, x, lengths=lengths)[0], y)


@pytest.mark.parametrize("name", LAYER_CLASSES)
def test_long_sequences_stay_near_float32(name: str) -> None:
    module = getattr(fused_rnn, name)(33, 65, num_layers=2, bidirectional=True).eval()
    x = torch.randn(60, 3, 33)
    for frozen in (frozen_of(module), pickle.loads(pickle.dumps(frozen_of(module)))):
        found, expected = run(frozen, x)[0], run(module, x)[0]
        assert 0 < error(found, expected) < 0.05
        with in_plain_torch():
            assert error(found, run(frozen, x)[0]) < 0.05


def test_inputs_that_are_not_contiguous() -> None:
    module = fused_rnn.LSTM(5, 33).eval()
    frozen = frozen_of(module)
    for x in (
        torch.randn(4, 3, 10)[..., ::2],
        torch.randn(3, 4, 5).transpose(0, 1),
        torch.randn(8, 3, 5)[::2],
        torch.randn(1, 3, 5).expand(4, 3, 5),
    ):
        assert_same(run(frozen, x), run(frozen, x.contiguous()))
    weight = nn.Parameter(module.weight_hh_l0.detach().t().contiguous().t(), requires_grad=False)
    frozen.weight_hh_l0 = weight
    assert_same(run(frozen, x[:1]), run(frozen_of(module), x[:1]))


def test_nothing_to_compute() -> None:
    frozen = frozen_of(fused_rnn.GRU(5, 33))
    y, h = frozen(torch.randn(4, 0, 5))
    assert y.shape == (4, 0, 33) and h.shape == (1, 0, 33)
    with pytest.raises(RuntimeError, match="Expected sequence length to be larger than 0"):
        frozen(torch.randn(0, 3, 5))


def test_rows_without_numbers_are_nan_and_others_stay() -> None:
    frozen, x = frozen_of(fused_rnn.GRU(5, 33)), torch.randn(1, 6, 5)
    expected = run(frozen, x)[0]
    x[0, 1, 2], x[0, 4, 0] = torch.inf, torch.nan
    found = run(frozen, x)[0]
    assert found.isnan().all(-1).tolist() == [[False, True, False, False, True, False]]
    assert_same([found[:, [0, 2, 3, 5]]], [expected[:, [0, 2, 3, 5]]])


def test_errors_are_those_of_half_a_number() -> None:
    """Of both sides of each product, whose rows have scales of their own: large rows cost small
    ones nothing."""
    module = fused_rnn.RNN(40, 33, nonlinearity="relu", bias=False).eval()
    with torch.no_grad():
        for p in module.parameters():
            p *= torch.logspace(-12, 3, 33).unsqueeze(1)
            p[5] = 0
    x, h = torch.randn(1, 3, 40), torch.randn(1, 3, 33)
    found = run(frozen_of(module), x, h)[0].double()
    expected = run(copy.deepcopy(module).double(), x.double(), h.double())[0]
    bound = torch.zeros(())
    for a, w in ((x[0], module.weight_ih_l0.detach()), (h[0], module.weight_hh_l0.detach())):
        off_a, off_w = (t.abs().amax(1, keepdim=True) / 254 for t in (a, w))
        bound = bound + a.abs().sum(1, keepdim=True) * off_w.t() + off_a * w.abs().sum(1)
        bound = bound + a.shape[1] * off_a * off_w.t()
    assert (found[..., 5] == 0).all()
    assert ((found - expected).abs()[0] <= 1.001 * bound).all()
    assert ((found - expected).abs()[0] > 0.01 * bound).any()


# --- The same numbers everywhere -----------------------------------------------------------------

BITS = """
import hashlib, sys, torch, fused_rnn
torch.manual_seed(int(sys.argv[1]))
digest = hashlib.sha256()
for inputs, units, batch in ((1, 1, 1), (3, 65, 1), (65, 33, 3), (70, 193, 17), (256, 130, 40)):
    layer = fused_rnn.RNN(inputs, units, nonlinearity="relu").eval()
    x, h = torch.randn(1, batch, inputs), torch.randn(1, batch, units)
    with torch.no_grad():
        digest.update(fused_rnn.freeze(layer, dtype=torch.int8)(x, h)[0].numpy().tobytes())
print(digest.hexdigest())
"""


@needs_kernels
def test_lesser_instruction_sets_agree_to_the_last_bit(seed: int) -> None:
    """Of a cell without a function that they round differently."""
    found = {}
    for capability in (*build.levels()[:3], build.levels()[-1]):
        env = {**os.environ, "FUSED_RNN_CPU_CAPABILITY": capability}
        done = forked.python("-c", BITS, str(seed), env=env)
        assert done.returncode == 0, done.stderr[-3000:]
        found[capability] = done.stdout.split()[-1]
    assert len(set(found.values())) == 1, found


@cpu_engine_only
@pytest.mark.drawn(1)  # a process of its own
@pytest.mark.parametrize("capability", build.levels()[:3])
def test_lesser_instruction_sets(capability: str, seed: int) -> None:
    if not packs():
        return
    words = "plain_torch or bits_do or 16_bits or half_a_number"
    done = forked.tests_on(capability, seed, __file__, words=words, quick=3)
    assert done.returncode == 0, done.stdout[-3000:]


def test_threads_share_one_copy() -> None:
    module = frozen_of(fused_rnn.LSTM(5, 65))
    inputs = [torch.randn(7, 1 + i % 3, 5) for i in range(12)]
    expected = [run(module, x) for x in inputs]
    packed = module._frozen.packed.tensor
    with ThreadPoolExecutor(4) as pool:
        for found, right in zip(pool.map(lambda x: run(module, x), inputs), expected, strict=True):
            assert_same(found, right)
    assert module._frozen.packed.tensor is packed


# --- What it is beside that ----------------------------------------------------------------------


def saved(module: nn.Module) -> Any:
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), saved], ids=str
)
@pytest.mark.parametrize("name", ["LSTM", "GRUCell"])
def test_copies(name: str, copied: Any) -> None:
    module = getattr(fused_rnn, name)(5, 33)
    frozen, x = frozen_of(module), torch.randn(1, 5)
    expected, other = run(frozen, x), copied(frozen)
    assert_same(run(other, x), expected)
    assert distance(expected, run(module, x)) > 0
    with torch.no_grad():
        for p in frozen.parameters():
            p.zero_()
    assert_same(run(other, x), expected)
    assert run(frozen, x)[0].abs().max() == 0


def test_the_state_dict_is_that_of_the_layer() -> None:
    module = fused_rnn.LSTM(64, 128, 2)
    frozen, before = frozen_of(module), module.state_dict()
    assert frozen.state_dict().keys() == before.keys()
    assert all(torch.equal(t, before[name]) for name, t in frozen.state_dict().items())
    assert len(pickle.dumps(frozen)) < len(pickle.dumps(module)) + 1000
    other, x = fused_rnn.LSTM(64, 128, 2), torch.randn(1, 3, 64)
    for load in (
        lambda: frozen.load_state_dict(other.state_dict()),
        lambda: [
            p.detach().copy_(other.get_parameter(name)) for name, p in frozen.named_parameters()
        ],
    ):
        load()
        assert_same(run(frozen, x), run(frozen_of(other), x))
        nn.init.normal_(other.weight_hh_l0)
    if packs():
        plain = fused_rnn.freeze(module, inplace=False)._frozen.packed.tensor
        assert frozen._frozen.packed.tensor.numel() < 0.3 * plain.numel()


def test_conversions() -> None:
    """float64 has no such products, and other types get theirs again."""
    module, x = fused_rnn.GRU(5, 33), torch.randn(1, 2, 5)
    frozen = frozen_of(module)
    frozen.double(), module.double()
    assert_same(run(frozen, x.double()), run(module, x.double()), 1e-12)
    for dtype in (torch.float32, torch.bfloat16, torch.float32):
        frozen.to(dtype), module.to(dtype)
        assert_same(
            run(frozen, x.to(dtype)), run(frozen_of(module), x.to(dtype)), torch.finfo(dtype).eps
        )
    frozen.to("meta")
    assert run(frozen, x.to("meta"))[0].shape == (1, 2, 33)


def test_calls_that_run_as_if_it_was_not_frozen() -> None:
    module, x = fused_rnn.RNN(5, 33).eval(), torch.randn(4, 1, 5)
    frozen, expected = frozen_of(module), run(module, x)
    weights = {name: p.clone() for name, p in frozen.named_parameters()}
    assert_same(flatten(torch.func.functional_call(frozen, weights, (x,))), expected, 1e-5)
    vmapped = torch.func.vmap(lambda x: frozen(x)[0])(x.expand(2, 4, 1, 5))
    assert_close(vmapped[1], expected[0], 1e-5)
    program = torch.export.export(frozen, (x,))
    assert_same(flatten(program.module()(x)), expected, 1e-5)
    low = torch.autocast("cpu", torch.bfloat16)
    with low, torch.no_grad():
        assert_close(frozen(x)[0], module(x)[0], 1e-2)


@pytest.mark.parametrize("name", ["LSTM", "RNN", "LSTMCell", "GRUCell"])
def test_gradients_of_inputs_are_those_of_float32(name: str) -> None:
    module = getattr(fused_rnn, name)(5, 33).requires_grad_(False)
    frozen, x = frozen_of(module), torch.randn(3, 5)
    with torch.no_grad():
        hx = map_tensors(module(x)[1] if name in ("LSTM", "RNN") else module(x), torch.randn_like)
    found: list[list[Tensor]] = []
    for m in (module, frozen):
        leaf, state = (
            x.clone().requires_grad_(),
            map_tensors(hx, lambda t: t.clone().requires_grad_()),
        )
        out = flatten(m(leaf, state))
        sum(t.square().sum() for t in out).backward()  # type: ignore[union-attr]
        found.append([t.detach() for t in out] + [t.grad for t in (leaf, *flatten(state))])
    assert_same(found[1], found[0], 1e-5)
    assert distance(run(frozen, x, hx), run(module, x, hx)) > 0


@pytest.mark.parametrize("name", ["LSTM", "GRU", "LSTMCell"])
def test_compiled(name: str) -> None:
    module = getattr(fused_rnn, name)(5, 33)
    frozen, x = frozen_of(module), torch.randn(1, 5)
    compiled = torch.compile(frozen, fullgraph=True, backend="aot_eager")
    expected = run(frozen, x)
    assert_same(run(compiled, x), expected)
    assert distance(expected, run(module, x)) > 0
    other = getattr(fused_rnn, name)(5, 33)
    frozen.load_state_dict(other.state_dict())
    assert_same(run(compiled, x), run(frozen_of(other), x))


def test_in_a_model_and_swapped() -> None:
    model = nn.Sequential(nn.Linear(5, 7), fused_rnn.replace(nn.GRU(7, 33)))
    frozen, x = frozen_of(model), torch.randn(1, 1, 5)
    assert not frozen.training and distance(run_model(frozen, x), run_model(model, x)) > 0
    theirs = fused_rnn.restore(frozen)
    assert type(theirs[1]) is nn.GRU
    assert_same(run_model(theirs, x), run_model(model, x), 1e-5)


def run_model(model: nn.Module, x: Tensor) -> list[Tensor]:
    with torch.no_grad():
        return flatten(model(x))


# --- What it is not for --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "layer, given",
    [
        (lambda: fused_rnn.LSTM(5, 33).double(), "LSTM of torch.float64 on cpu"),
        (lambda: fused_rnn.GRUCell(5, 33, dtype=torch.float64), "GRUCell of torch.float64 on cpu"),
        (lambda: fused_rnn.RNN(5, 33, device="meta"), "RNN of torch.float32 on meta"),
    ],
    ids=["double", "cell", "meta"],
)
def test_layers_without_such_products(layer: Any, given: str) -> None:
    model = nn.Sequential(fused_rnn.GRU(5, 5), layer())
    text = (
        f"dtype: torch.int8 is for layers of float32, bfloat16 or float16 on the CPU, got {given}"
    )
    with pytest.raises(ValueError, match=text):
        fused_rnn.freeze(model, dtype=torch.int8)
    assert model.training and model[0]._frozen is None and model[0].weight_ih_l0.requires_grad


def test_rows_that_are_too_long_for_sums_in_32_bits() -> None:
    wide = fused_rnn.RNN(65_537, 1)
    with pytest.raises(ValueError, match="dtype: torch.int8 is for at most 65536 .*, got 65537"):
        fused_rnn.freeze(wide, dtype=torch.int8)
    module = fused_rnn.RNN(65_536, 1, nonlinearity="relu", bias=False).eval()
    with torch.no_grad():
        module.weight_ih_l0.fill_(0.5)
    y = run(frozen_of(module), torch.full((1, 1, 65_536), 2.0))[0]
    assert_close(y, torch.full((1, 1, 1), 65_536.0), 1e-6)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.float16, "int8"])
def test_other_types(dtype: Any) -> None:
    text = f"dtype: expected None, torch.bfloat16 or torch.int8, got {dtype}"
    with pytest.raises(ValueError, match=text):
        fused_rnn.freeze(fused_rnn.LSTM(2, 3), dtype=dtype)
