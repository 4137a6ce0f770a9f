"""What traces or scripts a module: torch.fx, torch.jit, tensors without data."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import CELL_CLASSES, CLASSES, pair
from double_modules import LAYERS, Mixed, double_pair, first, is_cell, value
from helpers import assert_all_close, assert_close
from torch import Tensor, nn

import fused_rnn

pytestmark = pytest.mark.parity


def test_fx_symbolic_trace() -> None:
    """Modules are leaves, so that what rewrites graphs knows them as such."""
    theirs, ours = (torch.fx.symbolic_trace(Mixed(library)) for library in (nn, fused_rnn))
    assert str(ours.graph) == str(theirs.graph)
    ours.load_state_dict(theirs.state_dict())
    tokens = torch.randint(10, (2, 5))
    assert_close(ours(tokens), theirs(tokens), tol=1e-5)
    assert_close(copy.deepcopy(ours)(tokens), ours(tokens), tol=0)


def test_fx_goes_into_subclasses() -> None:
    """As with torch.nn, an error. A node would run the subclass's forward twice."""

    class Mine(fused_rnn.GRU):
        def forward(self, input: Tensor, hx: Any = None) -> Any:
            output, hx = super().forward(input, hx)
            return input + output, hx

    with pytest.raises((ValueError, torch.fx.proxy.TraceError)):
        torch.fx.symbolic_trace(nn.Sequential(Mine(4, 4)))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("name", CLASSES)
def test_jit_script(name: str) -> None:
    """Scripting sees torch.nn's module, with our parameters."""

    class Wrapper(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: Tensor) -> Tensor:
            y = self.inner(x)
            return y if isinstance(y, Tensor) else y[0]

    _, ours = double_pair(name)
    if not is_cell(name):  # like torch.nn's it compiles, but cannot be called alone
        torch.jit.script(ours)
    scripted = torch.jit.script(Wrapper(ours) if not is_cell(name) else ours)
    x = value(name)
    assert_close(first(scripted(x)), first(ours(x)))
    with torch.no_grad():
        next(ours.parameters()).add_(1)
    assert_close(first(scripted(x)), first(ours(x)))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_jit_script_of_a_subclass_is_not_replaced() -> None:
    class Mine(fused_rnn.GRU):
        def forward(self, input: Tensor, hx: Any = None) -> Any:
            return super().forward(input, hx)

    module = Mine(3, 4)
    assert module.__prepare_scriptable__() is module


class Holder(nn.Module):
    """A module in all places where one may be held."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.once, self.twice = inner, nn.Sequential(nn.Identity(), nn.ModuleList([inner])[0])
        self.deep = nn.Sequential(nn.Sequential(inner))
        self.__dict__["unregistered"] = nn.Sequential(inner)

    def forward(self, x: Tensor) -> Tensor:
        y, _ = self.once(x)
        z, _ = self.twice(x)
        return y + z


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("name", LAYERS)
def test_jit_script_leaves_the_model_alone(name: str) -> None:
    """The same modules, of the same classes, in the same places; the parameters are shared."""
    theirs, ours = (Holder(module) for module in double_pair(name))
    places = lambda: [  # noqa: E731
        (path, id(module), type(module))
        for root in (ours, ours.unregistered)
        for path, module in root.named_modules(remove_duplicate=False)
    ]
    before = places()
    scripted = torch.jit.script(ours)
    assert places() == before
    assert type(ours.once) is type(ours.twice[1]) is getattr(fused_rnn, name)
    x = value(name)
    assert_close(scripted(x), theirs(x))
    for model in (ours, theirs):
        with torch.no_grad():
            model.once.weight_hh_l0.mul_(2)
    assert_close(scripted(x), theirs(x))
    assert_close(ours(x), theirs(x))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_jit_script_of_models_without_ours() -> None:
    """They are prepared in place, as without this package."""

    class Prepared(nn.Module):
        def __prepare_scriptable__(self) -> nn.Module:
            return nn.Tanh()

    model = nn.Sequential(Prepared())
    torch.jit.script(model)
    assert type(model[0]) is nn.Tanh


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_jit_script_of_a_subclass_that_holds_ours() -> None:
    class Outer(fused_rnn.GRU):
        def __init__(self) -> None:
            super().__init__(3, 4)
            self.inner = fused_rnn.GRU(3, 4)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return self.inner(x)

    module, x = Outer(), torch.randn(5, 2, 3)
    assert_close(torch.jit.script(module)(x)[0], module.inner(x)[0], tol=1e-5)
    assert type(module.inner) is fused_rnn.GRU


class Decoder(nn.Module):
    """A loop over a cell, from states that are given or zeros."""

    def __init__(self, cell: nn.Module, given: bool) -> None:
        super().__init__()
        self.cell, self.given = cell, given

    def forward(self, x: Tensor, h: Tensor) -> Any:
        hx: Any = (h, h) if isinstance(self.cell, fused_rnn.LSTMCell) else h
        state = hx if self.given else None
        for step in x.unbind(0):
            state = self.cell(step, state)
        return state


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("batched", [True, False], ids=["batched", "unbatched"])
@pytest.mark.parametrize("given", [True, False], ids=["hx", "zeros"])
@pytest.mark.parametrize("name", CELL_CLASSES)
def test_jit_trace_of_a_loop(name: str, given: bool, batched: bool) -> None:
    """The tracer traces twice, the second time without gradients, and compares the graphs."""
    _, ours = double_pair(name)
    shapes = [(3, 2, 3), (2, 4)] if batched else [(3, 3), (4,)]
    inputs, others = ([torch.randn(s, dtype=torch.float64) for s in shapes] for _ in range(2))
    decoder = Decoder(ours, given)
    decoder(*inputs)  # loads the kernels
    traced = torch.jit.trace(decoder, inputs)
    assert_all_close(traced(*others), decoder(*others))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", CLASSES)
def test_tensorboard_graph(name: str, tmp_path: Path) -> None:
    tensorboard = pytest.importorskip("torch.utils.tensorboard", exc_type=ImportError)
    _, ours = pair(name, 3, 4)
    inputs = torch.randn(3, 2, 3), torch.randn(2, 4)
    with tensorboard.SummaryWriter(str(tmp_path)) as writer:
        if is_cell(name):
            writer.add_graph(Decoder(ours, True), inputs)
        else:
            writer.add_graph(nn.Sequential(ours), inputs[0])


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("name", CLASSES)
def test_jit_trace(name: str) -> None:
    _, ours = double_pair(name)
    traced = torch.jit.trace(ours, value(name))
    if not is_cell(name):  # torch decomposes those itself
        operator = "rnn_tanh" if name == "RNN" else name.lower()
        assert f"aten::{operator}(" in str(traced.inlined_graph)
    shape = (7, 3) if is_cell(name) else (9, 7, 3)
    x = torch.randn(shape, dtype=torch.float64)
    assert_all_close(traced(x), ours(x))


@pytest.mark.parametrize("name", CLASSES)
def test_fake_tensors(name: str) -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        module = getattr(fused_rnn, name)(3, 4)
        x = torch.randn((2, 3) if is_cell(name) else (5, 2, 3), requires_grad=True)
        output = first(module(x))
        output.sum().backward()
    assert output.shape == ((2, 4) if is_cell(name) else (5, 2, 4))
    assert x.grad.shape == x.shape
