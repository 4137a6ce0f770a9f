"""What the package asks torch for that torch promises nobody: the one file of Python that names it.

``csrc/ops/direct.cpp`` has at its head what C++ asks for. test_torch_internals.py tries each of
these on the torch that is there, so that a release which lacks one fails there, by its name.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules import module as nn_module

_F = TypeVar("_F", bound=Callable[..., Any])

is_tracing: Callable[[], bool] = torch._C._is_tracing
is_any_autocast_enabled: Callable[[], bool] = torch._C._is_any_autocast_enabled
dispatch_modes: Callable[[], int] = torch._C._len_torch_dispatch_stack
is_legacy_batched: Callable[[Tensor], bool] = torch._C._functorch.is_legacy_batchedtensor


def constant(fn: _F) -> _F:
    """torch.compiler.assume_constant_result, without its import of Dynamo, which takes seconds."""
    fn._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return fn


# A constant, since Dynamo of torch 2.10 and 2.11 cannot trace the call. It compiles anew for the
# tensors of a transform.
@constant
def _transforms() -> int:
    return torch._C._functorch.get_dynamic_layer_stack_depth()


def transformed() -> bool:
    """Whether a ``torch.func`` transform or forward mode is under way."""
    return _transforms() > 0 or forward_ad._current_level >= 0


@constant
def is_onednn_enabled() -> bool:
    return torch.backends.mkldnn.is_available() and bool(torch._C._get_mkldnn_enabled())


@constant
def onednn_has(dtype: torch.dtype) -> bool:
    """Whether oneDNN computes with this 16-bit type here."""
    if dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())


@constant
def is_below_autograd() -> bool:
    """Whether autograd's part of an operator is done, as in the body of a ``custom_op``: torch's
    operators record nothing there."""
    return torch._C._dispatch_tls_is_dispatch_key_excluded(
        torch._C.DispatchKey.AutogradFunctionality
    )


def below_autograd(op: Callable[..., Any]) -> Callable[..., Any]:
    """The operator without its autograd. The guard must cover no more than the call: reading
    ``ctx.saved_tensors`` may run a checkpointed forward again."""

    def call(*args: Any) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            return op(*args)

    return call


def apply_recorded(function: type[torch.autograd.Function]) -> Callable[..., Any]:
    """``function.apply`` without its search for tensors that a transform has left behind."""
    return super(torch.autograd.Function, function).apply  # type: ignore[misc]


class Batch:
    """Tensors of the vmap of ``torch.autograd.grad(is_grads_batched=True)``, row by row."""

    def __init__(self) -> None:
        self._level = torch._C._vmapmode_increment_nesting() - 1
        torch._C._vmapmode_decrement_nesting()

    def rows(self, batched: Tensor) -> Tensor:
        return torch._remove_batch_dim(batched, self._level, 1, 0)

    def of(self, rows: Tensor) -> Tensor:
        return torch._add_batch_dim(rows, 0, self._level)


def direct_call_facts() -> tuple[Any, ...]:
    """What the direct calls compare with and call, see Setup in csrc/ops/direct.cpp: by what a call
    of a module is more than one of its forward, forward mode, a dispatch key. And what finds the
    tensor of C++ in one of Python: the address of how extensions get there (0 if there is none),
    the bytes of such an object, and two of them."""
    load = "_ZN8pybind116detail11type_casterIN2at6TensorEvE4loadENS_6handleEb"
    there = getattr(ctypes.PyDLL(torch._C.__file__), load, None)
    global_hooks = (
        nn_module._global_forward_hooks,
        nn_module._global_forward_pre_hooks,
        nn_module._global_backward_hooks,
        nn_module._global_backward_pre_hooks,
    )
    return (
        nn.Module,
        nn.Module.__call__,
        nn.Module._call_impl,
        global_hooks,
        vars(forward_ad),
        int(torch._C.DispatchKey.AutogradFunctionality),  # type: ignore[call-overload]
        ctypes.cast(there, ctypes.c_void_p).value if there else 0,
        torch._C.TensorBase.__basicsize__,
        torch.empty(1, device="cpu"),
        nn.Parameter(torch.empty(1, device="cpu"), requires_grad=False),
    )
