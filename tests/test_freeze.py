"""``fused_rnn.freeze``: the results of the module that it was, whoever changes, copies or calls it.

Whether packed weights are read at all is seen by writing into them.
"""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import forked
import pytest
import torch
from cases import CELL_CLASSES, DTYPES, LAYERS, OWN_LAYERS, Case, random_case
from helpers import (
    assert_close,
    assert_no_worse,
    compile_quickly,
    cpu_engine_only,
    error,
    flatten,
    map_tensors,
    native,
    packs,
)
from torch import Tensor, nn

import fused_rnn
from fused_rnn import build, ops, zoo
from fused_rnn.frozen import Freezable

pytestmark = pytest.mark.module

ALL = [*LAYERS, *OWN_LAYERS]


def frozen_of(module: nn.Module) -> Any:
    return fused_rnn.freeze(module, inplace=False)


def run(module: Any, x: Any, hx: Any = None, **more: Any) -> list[Tensor]:
    with torch.no_grad():
        return flatten(module(x, hx, **more))


def assert_same(found: list[Tensor], expected: list[Tensor], tol: float = 1e-5) -> None:
    for a, b in zip(found, expected, strict=True):
        assert_close(a, b, tol)


def assert_equal(found: list[Tensor], expected: list[Tensor]) -> None:
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def reads_packed(module: nn.Module, call: Callable[[], list[Tensor]]) -> bool:
    """Whether a call shows what is written into the packed weights."""
    before, kept = call(), []
    for layer in module.modules():
        if isinstance(layer, Freezable) and layer._frozen is not None:
            packed = layer._frozen.packed.tensor
            assert packed is not None
            kept.append((packed, packed.clone()))
            runs = getattr(layer, "num_layers", 1) * (1 + getattr(layer, "bidirectional", False))
            packed[16 * runs :] = 0  # behind the heads, of 88 bytes each
    after = call()
    for packed, old in kept:
        packed.copy_(old)
    return not all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def assert_reads_packed(module: nn.Module, call: Callable[[], list[Tensor]]) -> None:
    assert not packs() or reads_packed(module, call)


# --- Values --------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", range(100))
@pytest.mark.drawn(30)
def test_results_are_no_worse_than_torchs(number: int, seed: int) -> None:
    """Of cells that torch.nn does not have: than those of the layer that is not frozen."""
    generator = torch.Generator().manual_seed(seed + number)
    cell = ALL[number % len(ALL)]
    case = replace(random_case(generator, cell), training=False)
    if not case.valid:
        return
    theirs, ours = case.modules()
    exact = copy.deepcopy(theirs).double()
    x, hx = case.inputs()
    found, judge, right = (
        {f"output {i}": t for i, t in enumerate(run(module, *given))}
        for module, given in (
            (frozen_of(ours), (x, hx)),
            (theirs, (x, hx)),
            (exact, map_tensors((x, hx), Tensor.double)),
        )
    )
    assert_no_worse(found, judge, right, terms=case.input_size + case.hidden_size)


@pytest.mark.parametrize("cell", ALL)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bits_are_those_of_a_layer_that_packs_at_each_call(cell: str, dtype: torch.dtype) -> None:
    for H, layers, both, T, B in (
        (65, 1, False, 9, 17),
        (193, 2, True, 9, 17),
        (33, 2, False, 40, 1),
    ):
        case = Case(
            *(cell, 7, H, layers, both), time=T, batch=B, training=False, dtype=dtype, hx=False
        )
        _, module = case.modules()
        x, _ = case.inputs()
        assert_equal(run(frozen_of(module), x), run(module, x))


@cpu_engine_only
@pytest.mark.drawn(1)  # a process of its own
@pytest.mark.parametrize("capability", build.levels()[:3])
def test_each_instruction_set_packs_for_itself(capability: str, seed: int) -> None:
    if not packs():
        return
    words = "bits or threads or no_worse"
    done = forked.tests_on(capability, seed, __file__, words=words, quick=12)
    assert done.returncode == 0, done.stdout[-3000:]


@pytest.mark.parametrize("name", ["RNN", "LSTM", "GRU", "PeepholeLSTM"])
def test_one_copy_serves_teams_of_any_size(name: str) -> None:
    module = frozen_of(getattr(fused_rnn, name)(70, 193, num_layers=2))
    packed, before = module._frozen.packed.tensor, torch.get_num_threads()
    try:
        for B, T in ((1, 40), (3, 1), (33, 3)):
            x, found = torch.randn(T, B, 70), []
            for threads in (1, 2, 3):
                torch.set_num_threads(threads)
                found.append(run(module, x))
            same = assert_equal if native() else assert_same  # torch's products differ by threads
            same(found[1], found[0])
            same(found[2], found[0])
            assert_reads_packed(module, lambda x=x: run(module, x))
    finally:
        torch.set_num_threads(before)
    assert module._frozen.packed.tensor is packed


@pytest.mark.parametrize("name", ["LSTM", "GRU", "LSTMCell"])
def test_threads_share_one_copy(name: str) -> None:
    module = frozen_of(getattr(fused_rnn, name)(5, 65))
    packed, lead = module._frozen.packed.tensor, () if name.endswith("Cell") else (7,)
    inputs = [torch.randn(*lead, 1 + i % 3, 5) for i in range(12)]
    expected = [run(module, x) for x in inputs]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(5):
            for found, right in zip(
                pool.map(lambda x: run(module, x), inputs), expected, strict=True
            ):
                assert_same(found, right, 1e-6)  # plain torch sums in the order that it likes
                if packs():
                    assert_equal(found, right)
    assert module._frozen.packed.tensor is packed


@pytest.mark.parametrize(
    "options",
    [
        {},
        dict(blocks=2),
        dict(norm="layer"),
        dict(norm="rms", norm_at=("recurrent",)),
        dict(zoneout=0.3),
        dict(num_layers=3, bidirectional=True, dropout=0.5),
    ],
    ids=str,
)
@pytest.mark.parametrize("name", ["LSTM", "GRU"])
def test_options_of_layers_and_calls(name: str, options: dict[str, Any]) -> None:
    module = getattr(fused_rnn, name)(5, 64, **options).eval()
    frozen, x = frozen_of(module), torch.randn(4, 6, 5)
    hx, reset = map_tensors(module(x)[1], Tensor.detach), torch.rand(4, 6) < 0.3
    calls: list[dict[str, Any]] = [
        {},
        {"lengths": [2, 4, 1, 3, 0, 4]},
        {"reset": reset, "return_states": True},
        {"reset": reset, "reset_to": hx},  # cut, and run in pieces
    ]
    for more in calls:
        assert_same(run(frozen, x, hx, **more), run(module, x, hx, **more))
        assert_reads_packed(frozen, lambda more=more: run(frozen, x, hx, **more))


@pytest.mark.parametrize("name", CELL_CLASSES)
@pytest.mark.parametrize("bias", [True, False])
def test_cells(name: str, bias: bool) -> None:
    cell = getattr(fused_rnn, name)(5, 33, bias=bias)
    frozen, hooked = frozen_of(cell), frozen_of(cell)
    hooked.register_forward_hook(lambda *_: None)  # not by the shortest way
    for shape in ((5,), (1, 5), (17, 5), (0, 5)):
        x = torch.randn(shape)
        for module in (frozen, hooked):
            assert_same(run(module, x), run(cell, x))
            if 0 not in shape:
                assert_reads_packed(module, lambda m=module, x=x: run(m, x))


def test_cell_from_python(monkeypatch: pytest.MonkeyPatch) -> None:
    """One with several products, to which a value is given for each step."""
    compile_quickly(monkeypatch)
    module = zoo.GRUD(5, 33, num_layers=2)
    given = {name: torch.rand(6, 3, 33) for name in ("decay",)}
    frozen, x = frozen_of(module), torch.randn(6, 3, 5)
    with torch.no_grad():
        assert_same(flatten(frozen(x, **given)), flatten(module(x, **given)))
        copied = pickle.loads(pickle.dumps(frozen))
        assert_same(flatten(copied(x, **given)), flatten(module(x, **given)))
        if packs() and frozen._frozen.packed.tensor is not None:
            assert reads_packed(frozen, lambda: flatten(frozen(x, **given)))


@pytest.mark.parametrize("cell", ALL)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_weights_in_bfloat16(cell: str, dtype: torch.dtype) -> None:
    """The same to the last bit as weights that were rounded before."""
    for H, layers, both, T, B in (
        (33, 2, True, 3, 2),
        (65, 1, False, 9, 17),
        (193, 1, False, 1, 1),
    ):
        case = Case(*(cell, 7, H, layers, both), time=T, batch=B, training=False, dtype=dtype)
        _, module = case.modules()
        x, hx = case.inputs()
        rounded = copy.deepcopy(module)
        for name, p in rounded.named_parameters():
            if name.startswith(("weight_ih", "weight_hh")):
                p.data = p.data.bfloat16().to(dtype)
        half = fused_rnn.freeze(module, inplace=False, dtype=torch.bfloat16)
        if not packs():
            assert_equal(run(half, x, hx), run(module, x, hx))
            continue
        assert_equal(run(half, x, hx), run(frozen_of(rounded), x, hx))
        copied = pickle.loads(pickle.dumps(half))
        assert_equal(run(copied, x, hx), run(half, x, hx))
        assert (
            copied._frozen.packed.tensor.numel()
            < 0.6 * frozen_of(module)._frozen.packed.tensor.numel() + 99
        )


def test_float64_stays() -> None:
    module = fused_rnn.LSTM(5, 33).double()
    x = torch.randn(1, 1, 5, dtype=torch.float64)
    wide = fused_rnn.freeze(module, inplace=False, dtype=torch.bfloat16)
    assert_same(run(wide, x), run(module, x), 1e-12)


# --- What freezing is ----------------------------------------------------------------------------


class Tagger(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn = fused_rnn.GRU(5, 33, 2, bidirectional=True)
        self.head = nn.Linear(66, 4)

    def forward(self, x: Tensor, hx: Any = None) -> Tensor:
        return self.head(self.rnn(x, hx)[0])


def test_a_model_is_ready_for_inference_and_otherwise_as_it_was() -> None:
    model, x = Tagger(), torch.randn(3, 2, 5)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    copied = fused_rnn.freeze(model, inplace=False)
    assert model.training and model.rnn._frozen is None and model.head.weight.requires_grad
    frozen = fused_rnn.freeze(model)
    assert frozen is model
    for module in (model, copied):
        assert not any(m.training for m in module.modules())
        assert not any(p.requires_grad for p in module.parameters())
        assert not module(x).requires_grad
        state = module.state_dict()
        assert state.keys() == before.keys() and list(module.buffers()) == []
        assert all(torch.equal(state[name], before[name]) for name in before)
    plain = Tagger()
    plain.load_state_dict(model.state_dict())
    assert_same(run(model, x), run(plain, x))
    assert_reads_packed(model, lambda: run(model, x))


@pytest.mark.parametrize("model", [nn.LSTM(2, 3), nn.Linear(2, 3)], ids=["LSTM", "Linear"])
def test_nothing_to_freeze(model: nn.Module) -> None:
    with pytest.raises(ValueError, match="expected layers of fused_rnn, got L"):
        fused_rnn.freeze(model)
    assert model.training


def test_no_module() -> None:
    with pytest.raises(TypeError, match="model: expected a module, got list"):
        fused_rnn.freeze([fused_rnn.LSTM(2, 3)])  # type: ignore[type-var]


# --- Attempts to train ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["LSTM", "GRUCell"])
def test_training_raises(name: str) -> None:
    module = fused_rnn.freeze(nn.Sequential(getattr(fused_rnn, name)(5, 7)))
    x = torch.randn(2, 5)
    with pytest.raises(RuntimeError, match=f"{name}: frozen for inference, and cannot train"):
        module.train()
    assert not module[0].training
    module.eval()
    module.requires_grad_()
    with pytest.raises(RuntimeError, match=f"{name}: frozen .* its weights require gradients"):
        module(x)
    run(module[0], x)
    module.requires_grad_(False)
    module(x)


@pytest.mark.parametrize("name", ["LSTM", "RNN", "LSTMCell", "RNNCell"])
def test_gradients_of_inputs(name: str) -> None:
    module = getattr(fused_rnn, name)(5, 7)
    frozen, x = frozen_of(module), torch.randn(3, 5)
    found = []
    for m in (module, frozen):
        leaf = x.clone().requires_grad_()
        sum(t.square().sum() for t in flatten(m(leaf))).backward()  # type: ignore[union-attr]
        found.append(leaf.grad)
    assert_close(found[1], found[0], 1e-5)


# --- Changed weights -----------------------------------------------------------------------------


def copied_in(module: Any, new: dict[str, Tensor]) -> None:
    with torch.no_grad():
        for name, p in module.named_parameters():
            p.copy_(new[name])


def loaded(module: Any, new: dict[str, Tensor]) -> None:
    module.load_state_dict(new)


def assigned(module: Any, new: dict[str, Tensor]) -> None:
    module.load_state_dict({name: t.clone() for name, t in new.items()}, assign=True)


def replaced(module: Any, new: dict[str, Tensor]) -> None:
    for name, t in new.items():
        setattr(module, name, nn.Parameter(t.clone(), requires_grad=False))


def deleted(module: Any, new: dict[str, Tensor]) -> None:
    """The memory of the old ones is free before the new ones are made."""
    for name, t in new.items():
        delattr(module, name)
        setattr(module, name, nn.Parameter(t.clone(), requires_grad=False))


def put_in_place(module: Any, new: dict[str, Tensor]) -> None:
    for name, t in new.items():
        module._parameters[name] = nn.Parameter(t.clone(), requires_grad=False)


def as_data(module: Any, new: dict[str, Tensor]) -> None:
    for name, p in module.named_parameters():
        p.data = new[name].clone()


def stepped(module: Any, new: dict[str, Tensor]) -> None:
    optimizer = torch.optim.SGD(module.parameters(), 1.0)
    for name, p in module.named_parameters():
        p.grad = p.detach() - new[name]
    optimizer.step()


def in_inference_mode(module: Any, new: dict[str, Tensor]) -> None:
    with torch.inference_mode():
        for name, p in module.named_parameters():
            p.copy_(new[name])


def frozen_again(module: Any, new: dict[str, Tensor]) -> None:
    for name, p in module.named_parameters():
        p.data.copy_(new[name])  # which nobody sees
    fused_rnn.freeze(module)


CHANGES = [
    copied_in,
    loaded,
    assigned,
    replaced,
    deleted,
    put_in_place,
    as_data,
    stepped,
    in_inference_mode,
    frozen_again,
]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
@pytest.mark.parametrize("name", ["LSTM", "RNN", "GRUCell"])
def test_changed_weights_are_used(name: str, change: Callable[..., None]) -> None:
    frozen, other = frozen_of(getattr(fused_rnn, name)(5, 33)), getattr(fused_rnn, name)(5, 33)
    x = torch.randn(1, 5)
    old = run(frozen, x)
    change(frozen, {k: t.detach().clone() for k, t in other.state_dict().items()})
    new = run(frozen, x)
    assert_same(new, run(other, x))
    assert error(old[0], new[0]) > 1e-3
    # And packed again, but for what only looks like a call with other weights.
    assert not packs() or reads_packed(frozen, lambda: run(frozen, x)) == (
        change is not put_in_place
    )


def test_conversions() -> None:
    module, x = fused_rnn.GRU(5, 33), torch.randn(3, 2, 5)
    frozen = frozen_of(module)
    for dtype in (torch.float64, torch.bfloat16, torch.float32):
        module.to(dtype), frozen.to(dtype)
        given = x.to(dtype)
        assert_same(run(frozen, given), run(module, given))
        assert (
            dtype == torch.bfloat16
            or not packs()
            or reads_packed(frozen, lambda given=given: run(frozen, given))
        )
    frozen.to("meta")
    assert run(frozen, x.to("meta"))[0].shape == (3, 2, 33)


def test_weights_of_inference_mode() -> None:
    with torch.inference_mode():
        module = fused_rnn.LSTM(5, 33)
    frozen, x = fused_rnn.freeze(module), torch.randn(1, 1, 5)
    expected = run(frozen, x)
    assert_reads_packed(frozen, lambda: run(frozen, x))
    with torch.inference_mode():
        frozen.weight_hh_l0.mul_(2)
    assert error(run(frozen, x, expected[1:])[0], expected[0]) > 1e-3


def test_weights_that_are_not_contiguous() -> None:
    module, x = fused_rnn.RNN(5, 33).eval(), torch.randn(1, 1, 5)
    frozen = frozen_of(module)
    for m in (module, frozen):
        weight = module.weight_hh_l0.detach().clone()
        m.weight_hh_l0 = nn.Parameter(weight.t().contiguous().t(), requires_grad=False)
    for _ in range(3):
        x = torch.randn(1, 1, 5)
        assert_same(run(frozen, x), run(module, x))


def test_calls_with_other_weights() -> None:
    module, x = frozen_of(fused_rnn.RNN(5, 33)), torch.randn(4, 1, 5)
    packed = module._frozen.packed.tensor
    with torch.no_grad():
        for change in (
            lambda t: t * 2,
            lambda t: t.clone(),
            lambda t: t.t() if t.dim() == 2 and t.size(0) == t.size(1) else t,  # in the same memory
            lambda t: t.view_as(t),
        ):
            weights = {name: change(p) for name, p in module.named_parameters()}
            found = flatten(torch.func.functional_call(module, weights, (x,)))
            plain = fused_rnn.RNN(5, 33)
            plain.load_state_dict(weights)
            assert_same(found, run(plain, x))
    assert module._frozen.packed.tensor is packed
    assert_reads_packed(module, lambda: run(module, x))
    with torch.autocast("cpu", torch.bfloat16):
        assert run(module, x)[0].dtype == torch.bfloat16
    vmapped = torch.func.vmap(lambda x: module(x)[0])(x.unsqueeze(0).expand(2, 4, 1, 5))
    assert_close(vmapped[1], run(module, x)[0], 1e-5)
    nn.utils.parametrizations.weight_norm(module, "weight_hh_l0")
    assert_same(run(module, x), run(copy.deepcopy(module), x))


@cpu_engine_only
def test_packed_words_that_do_not_fit_are_left_alone() -> None:
    if not packs():
        return
    case = Case("lstm", 5, 33, 2, True, batch=1, time=2, dtype=torch.float32)
    tensors, _ = case.arguments()
    x, h0, c0, *weights = tensors
    infer = torch.ops.fused_rnn.recurrent_infer.default
    pack = torch.ops.fused_rnn.recurrent_pack.default
    arguments = case.kernel, x, h0, c0, weights, *case.rest_of_schema(None)
    right, packed = infer(*arguments), pack(*arguments)
    other_arguments = (*arguments[:4], [w.clone() for w in weights], *arguments[5:])
    for words in (
        pack(*other_arguments),
        packed[:-1],
        packed[:3],
        packed[:0],
        packed.float(),
        torch.cat([packed, packed]),
        torch.zeros_like(packed),
        packed.unsqueeze(0).expand(2, -1).t(),
    ):
        assert_equal(list(infer(*arguments[:-1], words)), list(right))
    used = infer(*arguments[:-1], packed)
    assert_same(list(used), list(right))
    packed[packed.numel() // 2 :] = 0
    assert not torch.equal(infer(*arguments[:-1], packed)[0], used[0])


# --- Copies --------------------------------------------------------------------------------------


def saved(module: nn.Module) -> Any:
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda module: pickle.loads(pickle.dumps(module)),
    "save": saved,
}


@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("name", ["LSTM", "LSTMCell"])
def test_copies_pack_for_themselves(name: str, how: str) -> None:
    frozen, x = frozen_of(getattr(fused_rnn, name)(5, 33)), torch.randn(1, 5)
    expected = run(frozen, x)
    copied = COPIES[how](frozen)
    assert_equal(run(copied, x), expected)
    assert_reads_packed(copied, lambda: run(copied, x))
    with torch.no_grad():
        for p in frozen.parameters():
            p.zero_()
    assert_equal(run(copied, x), expected)
    assert run(frozen, x)[0].abs().max() == 0
    with pytest.raises(RuntimeError, match="frozen for inference"):
        copied.train()


def test_a_pickle_holds_the_plain_weights_alone() -> None:
    module = fused_rnn.LSTM(64, 128)
    plain, frozen = (len(pickle.dumps(m)) for m in (module, frozen_of(module)))
    assert frozen < plain + 1000


def test_swaps() -> None:
    frozen, x = fused_rnn.freeze(fused_rnn.replace(nn.LSTM(5, 33))), torch.randn(1, 1, 5)
    expected = run(frozen, x)
    theirs = fused_rnn.restore(frozen)
    assert type(theirs) is nn.LSTM and theirs.train().training
    assert_same(run(theirs, x), expected)
    again = fused_rnn.replace(theirs, keep_isinstance=True)
    assert isinstance(fused_rnn.freeze(again.eval()), nn.LSTM)
    assert_same(run(again, x), expected)
    assert_reads_packed(again, lambda: run(again, x))


# --- Compilers -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["LSTM", "GRU", "LSTMCell"])
def test_compiled(name: str) -> None:
    frozen, x = frozen_of(getattr(fused_rnn, name)(5, 33)), torch.randn(1, 5)
    compiled = torch.compile(frozen, fullgraph=True, backend="aot_eager")
    expected = run(frozen, x)
    assert_same(run(compiled, x), expected)
    assert_reads_packed(frozen, lambda: run(compiled, x))
    other = getattr(fused_rnn, name)(5, 33)
    copied_in(frozen, dict(other.state_dict()))
    assert_same(run(compiled, x), run(other, x))  # it is not read as long as it is of old weights
    assert error(run(compiled, x)[0], expected[0]) > 1e-3
    frozen.load_state_dict(other.state_dict())
    assert_reads_packed(frozen, lambda: run(compiled, x))


@pytest.mark.parametrize("strict", [False, True])
def test_exported(strict: bool) -> None:
    frozen, x = fused_rnn.freeze(Tagger()), torch.randn(3, 2, 5)
    program = torch.export.export(frozen, (x,), strict=strict)
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    assert_same(run_alone(torch.export.load(file).module(), x), run(frozen, x))


def test_traced() -> None:
    model = nn.Sequential(fused_rnn.GRU(5, 33), First())
    frozen, x = fused_rnn.freeze(model), torch.randn(3, 2, 5)
    expected = run_alone(frozen, x)
    for tool in (
        lambda: torch.jit.trace(frozen, (x,)),
        lambda: torch.jit.script(frozen),
        lambda: torch.fx.symbolic_trace(frozen),
    ):
        assert_same(run_alone(tool(), x), expected)
    assert_reads_packed(frozen, lambda: run_alone(frozen, x))


class First(nn.Module):
    def forward(self, both: tuple[Tensor, Tensor]) -> Tensor:
        return both[0]


def run_alone(module: Any, x: Tensor) -> list[Tensor]:
    with torch.no_grad():
        return flatten(module(x))


def test_operator(seed: int) -> None:
    case = Case("gru", time=3, batch=2, dtype=torch.float32)
    (x, h0, c0, *weights), _ = case.arguments()
    arguments = (case.kernel, x, h0, c0, weights, *case.rest_of_schema(None))
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(ops.operators.recurrent_pack.default, arguments, test_utils=checks)
    packed = ops.operators.recurrent_pack.default(*arguments)
    torch.library.opcheck(ops.operators.recurrent_infer.default, (*arguments[:-1], packed))
