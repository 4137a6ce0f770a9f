"""``recompute=True``: the same numbers to the last bit, and the tape is really not held."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import Case, pairwise, small
from helpers import assert_all_close, flatten, leaves, map_tensors, native, run
from torch import Tensor, nn
from torch.func import functional_call, grad
from torch.utils.checkpoint import checkpoint

import fused_rnn
from fused_rnn import functional, reference

pytestmark = pytest.mark.module

LAYERS = ["RNN", "LSTM", "GRU"]


def both(name: str, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
    """The module without and with, with the same weights."""
    plain = getattr(fused_rnn, name)(*args, **kwargs)
    recomputed = getattr(fused_rnn, name)(*args, **kwargs, recompute=True)
    recomputed.load_state_dict(plain.state_dict())
    return plain, recomputed


def switched(module: nn.Module) -> nn.Module:
    module = copy.deepcopy(module)
    module.recompute = True
    return module


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, want in expected.items():
        assert torch.equal(actual[name], want), name


# --- The numbers ---------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", pairwise(), ids=str)
def test_same_bits(case: Case, dtype: torch.dtype) -> None:
    _, plain = case.modules(dtype)
    x, hx = case.inputs(dtype)
    found = []
    for module in (plain, switched(plain)):
        torch.manual_seed(5)  # dropout masks
        found.append(run(module, x, hx))
    assert_same(found[1], found[0])


@pytest.mark.parametrize("shape", [(40, 33, 70, 130), (1, 300, 64, 64), (20, 2, 40, 600)], ids=str)
@pytest.mark.parametrize("name", LAYERS)
def test_same_bits_of_large_layers(name: str, shape: tuple[int, int, int, int]) -> None:
    """Tiles, many threads, weights read as they lie; tensors from the engine's pool."""
    time, batch, inputs, hidden = shape
    x = torch.randn(time, batch, inputs)
    plain, recomputed = both(name, inputs, hidden, num_layers=2)
    assert_same(run(recomputed, x), run(plain, x))


@pytest.mark.parametrize("case", small(num_layers=2), ids=lambda c: c.cell)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(case: Case, dtype: torch.dtype) -> None:
    _, plain = case.modules(torch.float32)
    x, hx = case.inputs(torch.float32)
    found = []
    for module in (plain, switched(plain)):
        with torch.autocast("cpu", dtype):
            found.append(run(module, x, hx))
    assert_same(found[1], found[0])


@pytest.mark.parametrize("wanted", ["input", "bias_hh_l0", "weight_ih_l1"])
@pytest.mark.parametrize("name", LAYERS)
def test_frozen_rest(name: str, wanted: str) -> None:
    found = []
    for module in both(name, 3, 4, num_layers=2):
        x = torch.randn(5, 2, 3, generator=torch.Generator().manual_seed(1))
        module.requires_grad_(False)
        leaf = x if wanted == "input" else getattr(module, wanted)
        leaf.requires_grad_()
        module(x)[0].square().sum().backward()
        found.append({wanted: leaf.grad})
    assert_same(found[1], found[0])


@pytest.mark.parametrize("unused", ["y", "h", "all but c"])
def test_outputs_that_nobody_used(unused: str) -> None:
    found = []
    x = torch.randn(5, 2, 3)
    for module in both("LSTM", 3, 4):
        y, (h, c) = module(x)
        loss = {"y": (h + c).sum(), "h": (y.sum() + c.sum()), "all but c": c.sum()}[unused]
        loss.backward()
        found.append({n: p.grad for n, p in module.named_parameters()})
    assert_same(found[1], found[0])


@pytest.mark.parametrize(
    "case",
    small(bidirectional=True, num_layers=2, input_size=2, hidden_size=3, batch=2, time=3)
    + small(layout="unsorted", input_size=2, hidden_size=2, batch=3, time=3),
    ids=str,
)
def test_derivatives_of_both_orders(case: Case) -> None:
    _, module = case.modules()
    module.recompute = True
    x, hx = leaves(case.inputs())
    structure = (x, hx)
    names, parameters = zip(*module.named_parameters(), strict=True)

    def call(*tensors: Tensor) -> tuple[Tensor, ...]:
        weights, values = tensors[: len(names)], iter(tensors[len(names) :])
        for name, weight in zip(names, weights, strict=True):
            delattr(module, name)
            setattr(module, name, weight)
        return tuple(flatten(module(*map_tensors(structure, lambda _: next(values)))))

    inputs = (*(p.detach().requires_grad_() for p in parameters), *flatten(x), *flatten(hx))
    if case.cell == "rnn_relu":
        pytest.skip("a kink may be near")
    assert torch.autograd.gradcheck(call, inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(call, inputs, fast_mode=True)


@pytest.mark.parametrize("name", LAYERS)
def test_gradient_penalty(name: str) -> None:
    """A derivative of the gradient, by the graph that create_graph leaves."""
    found = []
    x = torch.randn(5, 2, 3, dtype=torch.float64)
    for module in both(name, 3, 4, num_layers=2, dtype=torch.float64):
        leaf = x.clone().requires_grad_()
        (dx,) = torch.autograd.grad(module(leaf)[0].square().sum(), leaf, create_graph=True)
        dx.square().sum().backward()
        found.append({n: p.grad for n, p in module.named_parameters()} | {"x": leaf.grad})
    assert_same(found[1], found[0])


@pytest.mark.parametrize("name", LAYERS)
def test_backward_twice(name: str) -> None:
    _, module = both(name, 3, 4)
    loss = module(torch.randn(5, 2, 3))[0].square().sum()
    loss.backward(retain_graph=True)
    once = [p.grad.clone() for p in module.parameters()]
    loss.backward()
    assert_all_close([p.grad for p in module.parameters()], [2 * g for g in once], tol=1e-6)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        loss.backward()


@pytest.mark.parametrize("changed", ["input", "weight", "bias"])
@pytest.mark.parametrize("name", LAYERS)
def test_in_place_edit_of_what_is_saved(name: str, changed: str) -> None:
    """The backward would recompute from other numbers."""
    _, module = both(name, 5, 7)
    x = torch.randn(4, 3, 5)
    loss = module(x)[0].sum()
    with torch.no_grad():
        {"input": x, "weight": module.weight_hh_l0, "bias": module.bias_ih_l0}[changed].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_in_place_edit_of_the_output() -> None:
    """The backward needs it no more than without: but in a stack it is the next layer's input."""
    found = []
    x = torch.randn(4, 3, 5)
    for module in both("GRU", 5, 7, num_layers=2):
        module(x)[0].mul_(2).sum().backward()
        found.append({n: p.grad for n, p in module.named_parameters()})
    assert_same(found[1], found[0])


@pytest.mark.parametrize("name", LAYERS)
def test_inside_a_checkpoint_and_vectorized(name: str) -> None:
    """The backward's own forward may be one of others, and cotangents may be many."""
    plain, recomputed = both(name, 3, 4, dtype=torch.float64)
    x = torch.randn(5, 2, 3, dtype=torch.float64)
    assert_same(run(checkpointed(recomputed), x), run(checkpointed(plain), x))
    if native():  # torch's checkpoint refuses
        jacobians = [
            torch.autograd.functional.jacobian(lambda x, m=m: m(x)[0], x, vectorize=True)
            for m in (plain, recomputed)
        ]
        assert torch.equal(*jacobians)


def checkpointed(inner: nn.Module) -> nn.Module:
    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: Tensor, hx: Any) -> Any:
            return checkpoint(self.inner, x, hx, use_reentrant=False)

    return Checkpointed()


@pytest.mark.parametrize("name", LAYERS)
def test_transforms_take_no_notice(name: str) -> None:
    plain, recomputed = both(name, 3, 4, dtype=torch.float64)
    x = torch.randn(5, 2, 3, dtype=torch.float64)

    def loss(module: nn.Module, parameters: dict[str, Tensor]) -> Tensor:
        return functional_call(module, parameters, x)[0].square().sum()

    parameters = {n: p.detach() for n, p in plain.named_parameters()}
    expected = grad(lambda p: loss(plain, p))(parameters)
    assert_all_close(grad(lambda p: loss(recomputed, p))(parameters), expected)


# --- The memory ----------------------------------------------------------------------------------


def saved_bytes(call: Callable[[], Any], but: Any = ()) -> int:
    """Of distinct storages that the graph of ``call()`` holds, but for those of given tensors."""
    own = {t.untyped_storage().data_ptr() for t in but}
    seen: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            seen[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        kept = call()
    del kept
    return sum(seen.values())


T, B, H, L = 20 if native() else 4, 4, 32, 3  # the reference unrolls time
OUTPUT = T * B * H * 4  # bytes of what one layer hands to the next


def held(module: nn.Module, call: Any = None) -> int:
    x = torch.randn(T, B, H)
    call = module if call is None else call
    return saved_bytes(lambda: call(x), (x, *module.parameters()))


@pytest.mark.parametrize("name", LAYERS)
def test_the_tape_is_not_held(name: str) -> None:
    """Nothing but the input of each layer, which is the output of the one below, and the states."""
    plain, recomputed = both(name, H, H, num_layers=L)
    states = 2 * L * B * H * 4
    assert held(recomputed) <= (L - 1) * OUTPUT + states
    assert held(plain) >= {"RNN": 1.9, "LSTM": 6, "GRU": 5}[name] * held(recomputed)


@pytest.mark.skipif(not native(), reason="the checkpoint holds the inputs while it runs")
def test_nothing_is_held_without_grad() -> None:
    _, module = both("GRU", H, H)
    module.requires_grad_(False)
    assert held(module) == 0


@pytest.mark.drawn(2)
@pytest.mark.parametrize("backend", ["aot_eager", "aot_eager_decomp_partition"])
@pytest.mark.parametrize("name", LAYERS)
def test_compile(name: str, backend: str) -> None:
    """One graph, the same numbers; its backward recomputes too, whoever cuts the graph in two."""
    steps, layers = (T, L) if native() else (2, 2)  # the reference's graph has them all
    plain, recomputed = both(name, H, H, num_layers=layers, bidirectional=True)
    x = torch.randn(steps, B, H)
    torch._dynamo.reset()
    compiled = torch.compile(recomputed, backend=backend, fullgraph=True)
    found = {k.replace("_orig_mod.", ""): v for k, v in run(compiled, x).items()}
    expected = run(plain, x)
    if native():
        assert_same(found, expected)
        assert held(recomputed, compiled) <= 1.1 * held(recomputed)
    else:
        assert_all_close(found, expected, tol=1e-5)
    torch._dynamo.reset()


# --- The module ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LAYERS)
def test_argument(name: str) -> None:
    """By name only, as torch.nn has other arguments after the same positions."""
    plain, recomputed = both(name, 3, 4)
    assert not plain.recompute and recomputed.recompute
    assert repr(recomputed) == repr(plain)[:-1] + ", recompute=True)"
    assert list(recomputed.state_dict()) == list(plain.state_dict())
    with pytest.raises(TypeError):
        getattr(fused_rnn, name)(3, 4, 1, *[True] * 8, True)
    torch.manual_seed(3)
    expected = getattr(nn, name)(3, 4).state_dict()
    torch.manual_seed(3)
    assert_all_close(getattr(fused_rnn, name)(3, 4, recompute=True).state_dict(), expected, tol=0)


@pytest.mark.parametrize("name", LAYERS)
def test_copies(name: str) -> None:
    plain, recomputed = both(name, 3, 4)
    for copied in (copy.deepcopy(recomputed), pickle.loads(pickle.dumps(recomputed))):
        assert copied.recompute and repr(copied) == repr(recomputed)
    old = plain.__getstate__()
    del old["recompute"]
    revived = type(plain).__new__(type(plain))
    revived.__setstate__(old)
    x = torch.randn(5, 2, 3)
    assert not revived.recompute
    assert_same(run(revived, x), run(plain, x))
    assert recomputed._replicate_for_data_parallel().recompute


@pytest.mark.parametrize("name", LAYERS)
def test_replace_and_restore(name: str) -> None:
    module = fused_rnn.replace(getattr(nn, name)(H, H))
    assert not module.recompute and "recompute" not in repr(module)
    before = held(module)
    module.recompute = True
    assert held(module) < before
    back = fused_rnn.restore(module)
    assert type(back) is getattr(nn, name) and "recompute" not in repr(back)
    back(torch.randn(5, 2, H))
    assert fused_rnn.replace(back).recompute


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_jit_script() -> None:
    _, module = both("LSTM", 3, 4)
    x = torch.randn(5, 2, 3)
    scripted = torch.jit.script(nn.Sequential(module))
    assert_all_close(scripted(x), module(x), tol=1e-6)


def test_function() -> None:
    """``functional.recurrent`` has it too."""
    plain, _ = both("RNN", H, H)
    weights = list(plain.parameters())
    x, h = torch.randn(T, B, H), torch.zeros(1, B, H)
    present = reference.present_bits("rnn_tanh", biases=True, projection=False)
    settings = dict(num_layers=1, bidirectional=False, present=present)
    sizes = [
        saved_bytes(
            lambda r=r: functional.recurrent(
                "rnn_tanh", x, h, None, weights, recompute=r, **settings
            ),
            (x, h, *weights),
        )
        for r in (False, True)
    ]
    assert sizes[0] > 0 == sizes[1]
