"""What fused_rnn/torch_internals.py asks torch for is there, and means what it is taken for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode

from fused_rnn import torch_internals as internals

pytestmark = pytest.mark.unit


def test_tracing_and_modes() -> None:
    seen: list[tuple[bool, bool, int]] = []

    def look(x: Tensor) -> Tensor:
        autocast = internals.is_any_autocast_enabled()
        seen.append((internals.is_tracing(), autocast, internals.dispatch_modes()))
        return x + 1

    class Mode(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            return func(*args, **(kwargs or {}))

    x = torch.zeros(2)
    look(x)
    torch.jit.trace(look, x, check_trace=False)
    with torch.autocast("cpu", torch.bfloat16):
        look(x)
    with Mode():
        look(x)
    assert seen == [(False, False, 0), (True, False, 0), (False, True, 0), (False, False, 1)]


def test_transforms() -> None:
    seen: list[bool] = []

    def look(x: Tensor) -> Tensor:
        seen.append(internals.transformed())
        return x.sum()

    x = torch.zeros(2)
    look(x)
    torch.func.grad(look)(x)
    with forward_ad.dual_level():
        look(x)
    assert seen == [False, True, True]


def test_constants_are_kept_by_dynamo() -> None:
    asked: list[int] = []

    @internals.constant
    def answer() -> int:
        asked.append(1)
        return 3

    fn = torch.compile(lambda x: x * answer(), backend="eager", fullgraph=True)
    assert [fn(torch.ones(n)).sum().item() for n in (2, 2)] == [6, 6]
    assert len(asked) == 1


def test_onednn() -> None:
    answers = [
        internals.is_onednn_enabled(),
        internals.onednn_has(torch.bfloat16),
        internals.onednn_has(torch.float16),
    ]
    assert all(type(answer) is bool for answer in answers)
    if answers[0]:
        with torch.backends.mkldnn.flags(enabled=False):
            assert not internals.is_onednn_enabled()


def test_below_autograd() -> None:
    seen: list[bool] = []

    @torch.library.custom_op("fused_rnn_test::look", mutates_args=())
    def look(x: Tensor) -> Tensor:
        seen.append(internals.is_below_autograd())
        return x.clone()

    x = torch.ones(2, requires_grad=True)
    look(x)
    assert seen == [True] and not internals.is_below_autograd()
    assert not internals.below_autograd(torch.ops.aten.mul.Tensor)(x, x).requires_grad
    assert (x * x).requires_grad


def test_recorded_functions() -> None:
    class Twice(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return 2 * x

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            return 2 * grad

    x = torch.ones(3, requires_grad=True)
    internals.apply_recorded(Twice)(x).sum().backward()
    assert x.grad is not None and x.grad.tolist() == [2, 2, 2]


def test_batched_gradients() -> None:
    class Through(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            assert internals.is_legacy_batched(grad)
            batch = internals.Batch()
            rows = batch.rows(grad)
            assert rows.shape == (2, 3)
            return batch.of(rows * 5)

    x = torch.ones(3, requires_grad=True)
    ones = torch.ones(2, 3)
    (found,) = torch.autograd.grad(Through.apply(x), x, ones, is_grads_batched=True)
    assert not internals.is_legacy_batched(x) and torch.equal(found, 5 * ones)


def test_direct_call_facts() -> None:
    module, call, call_impl, hooks, forward_mode, key, *of_tensors = internals.direct_call_facts()
    assert module is nn.Module and call is nn.Module.__call__ and call_impl is nn.Module._call_impl
    handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
    try:
        assert sum(len(found) for found in hooks) == 1
    finally:
        handle.remove()
    assert forward_mode["_current_level"] == -1
    load, size, tensor, parameter = of_tensors
    assert load > 0 and key > 0 and size >= 24
    assert type(tensor) is torch.Tensor and type(parameter) is nn.Parameter
