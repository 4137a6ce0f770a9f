"""What direct calls leave to the operators."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from cases import CLASSES, Case, pair, some_input
from direct import (
    DIRECT,
    Spy,
    assert_identical,
    by_operator,
    forward,
    infer_stack,
    needs_direct,
    step,
)
from helpers import assert_close, flatten
from torch import Tensor, nn
from torch.func import vmap
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import fused_rnn
from fused_rnn import ops

pytest_plugins = "direct_fixtures"
pytestmark = pytest.mark.engine


class Subclass(Tensor):
    pass


def negative(t: Tensor) -> Tensor:
    """The same numbers, of a tensor that has only promised to negate its memory."""
    t = torch._neg_view(-t)
    assert t.is_neg() and t.is_contiguous()
    return t


def strided(t: Tensor) -> Tensor:
    return torch.stack([t, t], -1)[..., 0]


class Pair(NamedTuple):
    h: Tensor
    c: Tensor


UNUSUAL: dict[str, Callable[[Tensor], Tensor]] = {
    "negative bit": negative,
    "imaginary part": lambda t: torch.complex(t, -t).conj().imag,
    "strided": strided,
    "subclass": lambda t: t.as_subclass(Subclass),
    "sparse": Tensor.to_sparse,
    "mkldnn": Tensor.to_mkldnn,
    "meta": lambda t: t.to("meta"),
    "double": Tensor.double,
    "integers": Tensor.long,
    "complex": lambda t: t.to(torch.complex64),
    "functional": torch._to_functional_tensor,
    "zero": lambda t: torch._efficientzerotensor(t.shape),
    "no elements": lambda t: t[..., :0],
    "another width": lambda t: t[..., :-1].contiguous(),
    "more dimensions": lambda t: t[None, None, None],
    "quantized": lambda t: torch.quantize_per_tensor(t, 0.1, 0, torch.qint8),
    "array": lambda t: t.numpy(),
    "list": lambda t: [t],
    "text": lambda t: "x",
}


@needs_direct
@pytest.mark.parametrize("kind", UNUSUAL)
@pytest.mark.parametrize("place", ["x", "h0", "c0", "w_ih", "w_hh", "b_ih", "w_hr"])
def test_unusual_tensors(kind: str, place: str, spy: Spy) -> None:
    """They get None, not an error, wherever they are."""
    case = Case("lstm", proj_size=2, dtype=torch.float32)
    arguments, _ = case.arguments()
    index = ["x", "h0", "c0", "w_ih", "w_hh", "b_ih", "b_hh", "w_hr"].index(place)
    if kind == "mkldnn" and not torch.backends.mkldnn.is_available():
        pytest.skip("no mkldnn")
    plain = arguments[index]
    arguments[index] = UNUSUAL[kind](plain)
    assert forward(case, arguments) is None
    x, h0, c0, *weights = arguments
    assert infer_stack("lstm", x, (h0, c0), weights, 1, 1, case.present, False) is None
    assert step("lstm", x, (h0, c0), *weights[:4]) is None
    if kind in ("negative bit", "imaginary part", "strided"):  # the operator does the work
        found = case.call(ops.recurrent, arguments, None)
        arguments[index] = plain
        assert_identical(found, forward(case, arguments))
        assert spy.done == [False]


@needs_direct
def test_unusual_arguments() -> None:
    """Anything that is not as documented gets None too."""
    case = Case("gru", dtype=torch.float32)
    arguments, _ = case.arguments()
    x, h0, _, *four = arguments
    assert forward(case, arguments) is not None
    for bad in (
        {"cell": "grr"},
        {"cell": b"gru"},
        {"cell": None},
        {"cell": "lstm"},
        {"layers": 2},
        {"layers": 2**70},
        {"directions": 2},
        {"directions": 1.0},
        {"present": 0b111},
        {"present": 0b101111},
        {"present": -1},
        {"more": None},
        {"batch_sizes": torch.tensor([3, 2])},
        {"x": x[0], "h0": None, "batch_sizes": torch.tensor([3, 2], dtype=torch.int32)},
        {"x": x[0], "h0": None, "batch_sizes": torch.tensor([2**62])},
        {"x": x[0], "h0": None, "batch_sizes": torch.tensor([-1])},
        {"h0": None, "c0": h0},
        {"weights": (None,) * 4},
        {"weights": four},
        {"weights": ()},
    ):
        assert forward(case, arguments, **bad) is None, bad
    assert DIRECT.forward() is None
    rest = (1, 1, 0b1111, False)
    assert infer_stack("gru", x, h0, four, *rest) is not None
    for bad in (
        (x, h0, four[:3], *rest),
        (x, h0, [], *rest),
        (x, h0, four[:2], *rest),
        (x, h0, four, 2, *rest[1:]),
        (x, h0, four, 1, 2, *rest[2:]),
        (x, h0, four, 0, 0, *rest[2:]),
        (x, h0, four, -1, -1, *rest[2:]),
        (x, h0, four, 1, 2**70, *rest[2:]),
        (x, h0, four, 1.0, *rest[1:]),
        (x[0], h0[0], four, *rest),
        (x, (h0,), four, *rest),
        (x, (h0, h0), four, *rest),
        (x, (h0, None), four, *rest),
        (x, (h0, h0, h0), four, *rest),
        (x, (), four, *rest),
        (x, [h0], four, *rest),
        (x, Pair(h0, h0), four, *rest),
    ):
        assert infer_stack("gru", *bad) is None
    assert step("gru", x[0], h0[0], *four) is not None
    assert step("gru", x, h0, *four) is None
    assert step("gru", x[0, 0], h0[0], *four) is None
    assert step("gru", x[0], h0[0], *four[:1]) is None
    assert step("gru", x[0], h0[0], *four, four[0]) is None
    names = list("abcd")
    named = dict(zip(names, four, strict=True))
    for parameters, wanted in (
        (four, names),
        (None, names),
        (named, tuple(names)),
        (named, "abcd"),
        (named, [*"abce"]),
        (named, [*"abc", []]),
    ):
        assert DIRECT.infer_stack("gru", x, h0, parameters, wanted, *rest, None) is None
        assert DIRECT.step("gru", x[0], h0[0], parameters, wanted, None) is None


@needs_direct
def test_states_that_do_not_match(spy: Spy) -> None:
    """Of one layer too few, or too many: an error, and nothing read past the end."""
    module, x = fused_rnn.LSTM(3, 4, num_layers=2), torch.randn(5, 2, 3)
    for layers in ((2, 1), (1, 2), (2, 3), (4, 4)):
        h, c = (torch.randn(n, 2, 4) for n in layers)
        with pytest.raises(RuntimeError, match="Expected hidden"):
            module(x, (h, c))
    assert spy.done == [False] * 4
    case = Case("lstm")
    arguments, _ = case.arguments()
    arguments[2] = arguments[2].repeat(2, 1, 1)
    assert forward(case, arguments) is None
    assert forward(case, arguments, tape=True) is None


@needs_direct
def test_parameters_of_unusual_memory(spy: Spy) -> None:
    """A parameter is looked at anew in each call."""
    _, ours = pair("GRU", 3, 4)
    x = torch.randn(5, 2, 3)
    expected = ours(x)
    assert spy.done.pop()
    ours.weight_hh_l0.data = negative(ours.weight_hh_l0.data)
    assert_identical(ours(x), expected)
    assert not any(spy.done)


@needs_direct
def test_gradients_are_asked_for(spy: Spy) -> None:
    module, x = fused_rnn.GRU(3, 4), torch.randn(5, 2, 3)
    with torch.enable_grad():
        assert module(x)[0].requires_grad and spy.names == ["forward"]
        module.requires_grad_(False)
        assert not module(x)[0].requires_grad and spy.names == ["forward", "call_module"]
        assert module(x.requires_grad_())[0].requires_grad and spy.names.pop() == "forward"


class Dispatch(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


class Function(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


@needs_direct
def test_modes_see_the_operators_of_training(spy: Spy) -> None:
    module, x, mode = fused_rnn.GRU(3, 4), torch.randn(5, 2, 3), Dispatch()
    with torch.enable_grad(), mode:
        module(x)[0].sum().backward()
    assert {"fused_rnn.recurrent.default", "fused_rnn.recurrent_backward.default"} <= set(mode.seen)
    with torch.enable_grad():
        y = module(x)[0]
        with torch.profiler.profile() as trace:
            y.sum().backward()
    assert "fused_rnn::recurrent_backward" in {event.key for event in trace.key_averages()}
    asked = list(zip(spy.names, spy.done, strict=True))
    seen = [("forward", False)] * 2 + [("backward", False)]  # by the module, and by ops
    assert asked == [*seen, ("forward", True), ("backward", False)]


@needs_direct
@pytest.mark.parametrize("name", CLASSES)
def test_modes_see_the_operator(name: str, spy: Spy) -> None:
    module = getattr(fused_rnn, name)(3, 4)
    x = some_input(name)
    expected = module(x)
    assert spy.done.pop()
    for mode in (Dispatch(), Function()):
        with mode:
            found = module(x)
        assert "fused_rnn.recurrent_infer.default" in mode.seen
        assert_identical(found, expected)
    with torch.profiler.profile() as trace:
        module(x)
    assert "fused_rnn::recurrent_infer" in {event.key for event in trace.key_averages()}
    with torch.autograd.profiler.profile(use_kineto=False) as trace:
        module(x)
    assert "fused_rnn::recurrent_infer" in {event.name for event in trace.function_events}
    graph = make_fx(lambda x: flatten(module(x))[0])(x)
    assert "fused_rnn.recurrent_infer" in graph.code
    torch.jit.trace(module, x, check_trace=False)
    mapped = vmap(lambda x: flatten(module(x))[0])(x[None])[0]  # by the reference
    assert_close(mapped, flatten(expected)[0], tol=1e-5)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, torch.ones_like(x))
        output = flatten(module(dual))[0]
        assert torch.autograd.forward_ad.unpack_dual(output).tangent is not None
    assert not any(spy.done)
    module(x)
    assert spy.done.pop(), "and afterwards the calls are direct again"


@needs_direct
@pytest.mark.parametrize("name", CLASSES)
def test_autocast(name: str, spy: Spy) -> None:
    """The choice of types comes first; what is then computed in them may be a direct call."""
    module = getattr(fused_rnn, name)(3, 4)
    x = some_input(name)
    with torch.autocast("cpu", torch.bfloat16):
        for value in (x, x.bfloat16()):
            assert_identical(module(value), by_operator(lambda value=value: module(value)))
        weights = [p.detach() for p in module.parameters()]
        assert step("gru", x, None, *weights) is None


@needs_direct
def test_compiled_code_has_the_operator(spy: Spy) -> None:
    torch._dynamo.reset()
    module, x = fused_rnn.GRU(3, 4), torch.randn(5, 2, 3)
    graphs: list[Any] = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph.code)
        return graph.forward

    compiled = torch.compile(module, backend=backend, fullgraph=True)
    found = compiled(x)
    assert len(graphs) == 1 and "recurrent_infer" in graphs[0] and not spy.done
    assert_identical(found, module(x))
    program = torch.export.export(nn.Sequential(module), (x,))
    assert "fused_rnn.recurrent_infer" in program.graph_module.code
    torch._dynamo.reset()


@needs_direct
def test_fake_tensors_and_devices(spy: Spy) -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    mode = FakeTensorMode()
    module = fused_rnn.GRU(3, 4)
    with mode:
        fakes = fused_rnn.GRU(3, 4)
        assert fakes(torch.randn(5, 2, 3))[0].shape == (5, 2, 4)
    fake = mode.from_tensor(torch.randn(5, 2, 3))
    weights = [mode.from_tensor(p) for p in module.parameters()]
    assert infer_stack("gru", fake, None, weights, 1, 1, 0b1111, False) is None
    assert module.to("meta")(torch.randn(5, 2, 3, device="meta"))[0].device.type == "meta"
    assert not any(spy.done)


@needs_direct
def test_hooks_of_subclasses_are_called(spy: Spy) -> None:
    calls: list[str] = []

    class Mine(fused_rnn.GRU):
        def check_input(self, input: Tensor, batch_sizes: Tensor | None) -> None:
            calls.append("check_input")
            super().check_input(input, batch_sizes)

    class Plain(fused_rnn.GRU):
        pass

    x = torch.randn(5, 2, 3)
    Mine(3, 4)(x)
    assert calls == ["check_input"] and spy.done == [True], "by the layer, below the checks"
    spy.done.clear()
    Plain(3, 4)(x)
    assert spy.done == [True]


@pytest.mark.parametrize("train", [False, True], ids=["infer", "train"])
@pytest.mark.parametrize("name", CLASSES)
def test_sizes_that_overflow(name: str, train: bool) -> None:
    """Inputs that are expanded have any size for free. What they would need is not taken for 0."""
    module = getattr(fused_rnn, name)(1, 4)
    shapes: Any = [(2**60, 1)] if name.endswith("Cell") else [(1, 2**60, 1), (2**60, 1, 1)]
    for shape in shapes:
        with torch.set_grad_enabled(train), pytest.raises((RuntimeError, MemoryError)):
            module(torch.zeros(1).expand(shape))
