"""Whole calls of modules that are direct calls, and what a user changed that these must heed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import CLASSES, LAYER_CLASSES, pair, some_input
from direct import Spy, assert_identical, by_operator, needs_direct
from double_modules import LAYERS
from helpers import flatten
from torch import Tensor, nn

import fused_rnn
from fused_rnn import functional

pytest_plugins = "direct_fixtures"
pytestmark = pytest.mark.engine


def example(name: str, **kwargs: Any) -> tuple[Any, Tensor, Any]:
    """A module, an input of one step, and states."""
    lead = (2,) if name.endswith("Cell") else (1, 2)
    h, c = torch.randn(2, *lead, 4)
    return (
        getattr(fused_rnn, name)(3, 4, **kwargs),
        torch.randn(*lead, 3),
        (h, c) if name.startswith("LSTM") else h,
    )


@needs_direct
@pytest.mark.parametrize("name", CLASSES)
def test_whole_calls(name: str, spy: Spy) -> None:
    """In every mode without gradients, by position and by name."""
    module, x, hx = example(name)
    forward = "step" if name.endswith("Cell") else "infer_stack"
    expected = by_operator(lambda: module(x, hx))
    for given in ((x, hx), (x, None), (x,)):
        module(*given)
    with torch.inference_mode():
        module(x, hx)
    module.requires_grad_(False)
    with torch.enable_grad():
        assert_identical(module(x, hx), expected)
    assert_identical(module(x, hx=hx), expected)
    assert spy.names == ["call_module"] * 6
    assert_identical(module(input=x, hx=hx), expected)
    assert_identical(module.forward(x, hx), expected)
    assert spy.names[6:] == [forward] * 2
    module.eval()
    assert_identical(module(x, hx), expected)
    assert spy.names[8:] == ["call_module"]
    bad: Any
    for bad in (
        ((), {}),
        ((), {"hx": hx}),
        ((x, hx, x), {}),
        ((x, hx), {"hx": hx}),
        ((x,), {"h": hx}),
    ):
        with pytest.raises(TypeError):
            module(*bad[0], **bad[1])


@needs_direct
@pytest.mark.parametrize("name", CLASSES)
def test_whole_calls_know_who_wants_gradients(name: str, spy: Spy) -> None:
    module, x, hx = example(name)
    states = hx if isinstance(hx, tuple) else (hx,)
    with torch.enable_grad():
        for tensor in (x, *states, *module.parameters()):
            module.requires_grad_(False)
            tensor.requires_grad_()
            assert all(t.requires_grad for t in flatten(module(x, hx))[:1])
            tensor.requires_grad_(False)
    # Of a step it is the whole call, with its place in the graph of autograd.
    assert ("call_module" in spy.names) == name.endswith("Cell")


@needs_direct
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("given", [False, True], ids=["zeros", "hx"])
@pytest.mark.parametrize("name", LAYERS)
def test_training_is_a_direct_call(
    name: str, given: bool, batch_first: bool, spy: Spy, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind = getattr(fused_rnn, name)
    module = kind(3, 4, 2, batch_first=batch_first, bidirectional=True)
    x = torch.randn(5, 7, 3, requires_grad=True)
    h, c = (torch.randn(4, 5 if batch_first else 7, 4, requires_grad=True) for _ in range(2))
    hx = None if not given else (h, c) if name.startswith("LSTM") else h
    leaves = [x, *module.parameters(), *(() if hx is None else flatten(hx))]

    def results() -> list[Tensor]:
        found = []
        for loss in (lambda o: o.sin().sum(), torch.sum):  # the second one's gradient is expanded
            outputs = flatten(module(x, hx))
            outputs[0].mul_(2)  # the backward does not read it
            found += [*outputs, *torch.autograd.grad([loss(o) for o in outputs], leaves)]
        return found

    def never(*_: Any, **__: Any) -> Any:
        raise AssertionError("another way")

    with torch.enable_grad():
        expected = by_operator(results)
        monkeypatch.setattr(functional, "recurrent", never)
        actual = results()
    assert_identical([t.detach() for t in actual], [t.detach() for t in expected])
    assert spy.names == ["forward", "backward"] * 2


@needs_direct
@pytest.mark.parametrize("name", LAYERS)
def test_training_beside_the_usual(name: str, spy: Spy) -> None:
    """What a direct call does not take, and what is wrong, is as it is without."""
    module = getattr(fused_rnn, name)(3, 4)
    x, (h, c) = torch.randn(5, 2, 3), torch.randn(2, 1, 2, 4)
    whole = (lambda h, c: (h, c)) if name.startswith("LSTM") else (lambda h, c: h)
    wide = torch.randn(2, 1, 2, 8)[..., ::2]
    for given in (
        (x[:, 0], None),
        (x.transpose(0, 1).contiguous().transpose(0, 1), None),
        (x, whole(*wide)),
        (x, list(whole(h, c))),
        (x, (h, c, c)),
        (x, (h,)),
        (x, (None, None)),
        (x, whole(h, None)),
        (x, whole(h.double(), c)),
        (x, whole(h[:, :1], c)),
        (x, whole(h[0], c[0])),
        (x, 3),
        (x, "h"),
        (x.double(), None),
        (x[:0], None),
        (x[:, :0], None),
        (x[..., :2], None),
        (x.to_sparse(), None),
        (x.to_mkldnn(), None),
        (x, whole(h.to_sparse(), c)),
        (nn.Parameter(x), whole(nn.Parameter(h), c)),
    ):

        def results(given: Any = given) -> Any:
            try:
                return flatten(module(*given))
            except Exception as error:
                return type(error), str(error)

        with torch.enable_grad():
            expected, found = by_operator(results), results()
        if isinstance(expected, tuple):
            assert found == expected, given
        else:
            assert_identical([t.detach() for t in found], [t.detach() for t in expected])
            assert [t.requires_grad for t in found] == [t.requires_grad for t in expected]


@needs_direct
@pytest.mark.parametrize("name", CLASSES)
def test_hooks_are_called(name: str, spy: Spy) -> None:
    module, x, hx = example(name)
    seen: list[str] = []
    everywhere = torch.nn.modules.module
    for register in (
        module.register_forward_hook,
        module.register_forward_pre_hook,
        module.register_full_backward_hook,
        module.register_full_backward_pre_hook,
        everywhere.register_module_forward_hook,
        everywhere.register_module_forward_pre_hook,
        everywhere.register_module_full_backward_hook,
        everywhere.register_module_full_backward_pre_hook,
    ):
        handle = register(lambda *args, **kwargs: seen.append("hook"))
        try:
            module(x, hx)
        finally:
            handle.remove()
        assert "call_module" not in spy.names
        module(x, hx)
        assert spy.names.pop() == "call_module"
        assert len(seen) == ("backward" not in register.__name__)
        seen.clear()


@needs_direct
@pytest.mark.parametrize("name", CLASSES)
def test_replaced_methods_are_called(name: str, spy: Spy, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the module, of its class, of all modules; and those of a subclass."""
    module, x, hx = example(name)

    def mine(*args: Any, **kwargs: Any) -> str:
        return "mine"

    for where, method in (
        (module, "forward"),
        (module, "_call_impl"),
        (module, "_compiled_call_impl"),
        (type(module), "forward"),
        (type(module), "_call_impl"),
        (type(module), "__call__"),
        (nn.Module, "_call_impl"),
        (nn.Module, "__call__"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(where, method, mine, raising=False)
            assert module(x, hx) == "mine"
        assert not isinstance(module(x, hx), str) and spy.names.pop() == "call_module"
    assert not spy.names

    class Sub(type(module)):  # type: ignore[misc]
        def forward(self, input: Tensor, hx: Any = None) -> Any:
            return super().forward(input, hx), "mine"

    class SubSub(Sub):
        pass

    for kind in (Sub, SubSub):
        assert kind(3, 4)(x, hx)[1] == "mine"
    assert "call_module" not in spy.names


@needs_direct
def test_whole_calls_see_changes(spy: Spy) -> None:
    """Nothing that a module holds is remembered from one call to the next."""
    _, ours = pair("LSTM", 3, 3, num_layers=2, batch_first=True, dropout=0.5)
    x = torch.randn(4, 4, 3)

    def check(whole: bool) -> None:
        spy.names.clear()
        torch.manual_seed(0)
        found = ours(x)
        assert ("call_module" in spy.names) == whole
        torch.manual_seed(0)
        assert_identical(found, by_operator(lambda: ours(x)))

    check(False)
    ours.eval()
    check(True)
    ours.batch_first = False
    check(True)
    ours.train()
    ours.dropout = 0.0
    check(True)
    ours.weight_hh_l1 = nn.Parameter(torch.randn(12, 3))
    check(True)
    ours.weight_hh_l0.data = torch.randn(12, 3)
    check(True)
    ours.weight_ih_l0.data.zero_()
    check(True)
    torch.nn.utils.parametrize.register_parametrization(ours, "weight_hh_l0", nn.Tanh())
    check(False)
    torch.nn.utils.parametrize.remove_parametrizations(ours, "weight_hh_l0")
    check(True)
    others = {name: p + 1 for name, p in ours.named_parameters()}
    found = torch.func.functional_call(ours, others, x)
    ours.load_state_dict(others)
    assert_identical(found, ours(x))
    del ours.bias_hh_l1
    ours.bias_hh_l1 = torch.randn(12)
    check(False)


@needs_direct
def test_whole_calls_of_a_compiled_module(spy: Spy) -> None:
    torch._dynamo.reset()
    module, x, hx = example("GRU")
    graphs: list[str] = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph.code)
        return graph.forward

    module.compile(backend=backend, fullgraph=True)
    found = module(x, hx)
    assert "recurrent_infer" in graphs[0] and not spy.names
    assert_identical(found, module.forward(x, hx))
    torch._dynamo.reset()


# --- What a user has changed on the instance -----------------------------------------------------


HOOKS = ["check_forward_args", "check_input", "check_hidden_size", "permute_hidden"]
HOOKS += ["get_expected_hidden_size", "get_expected_cell_size"]


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("hook", HOOKS)
@pytest.mark.parametrize("name", LAYER_CLASSES)
def test_methods_replaced_on_the_instance_are_called(name: str, hook: str, grad: bool) -> None:
    """If torch.nn calls them."""
    called = []
    for module in pair(name, 3, 4):
        module(torch.randn(5, 2, 3))
        calls: list[str] = []
        if hasattr(module, hook):
            usual = getattr(module, hook)
            setattr(module, hook, lambda *a, f=usual, calls=calls: (calls.append(""), f(*a))[1])
        with torch.set_grad_enabled(grad):
            module(torch.randn(5, 2, 3))
            module(torch.randn(5, 2, 3), module(torch.randn(5, 2, 3))[1])
        called.append(bool(calls))
    assert called[0] == called[1]


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("hx", [False, True])
@pytest.mark.parametrize("size", ["input_size", "hidden_size", "proj_size"])
@pytest.mark.parametrize("name", CLASSES)
def test_sizes_set_afterwards(name: str, size: str, hx: bool, grad: bool) -> None:
    """Raise where torch.nn raises."""
    kwargs = {"proj_size": 2} if name == "LSTM" else {}
    is_cell = name.endswith("Cell")
    raised = []
    for module in pair(name, 3, 4, **kwargs):
        x = some_input(name)
        states = module(x) if is_cell else module(x)[1]
        setattr(module, size, 3)
        module.input_size += size == "input_size"
        with torch.set_grad_enabled(grad):
            try:
                module(x, states if hx else None)
            except RuntimeError as error:
                raised.append(type(error))
            else:
                raised.append(None)
    assert raised[0] is raised[1]
