"""Direct calls: the CPU's kernels without torch's dispatcher, which takes longer than one step of a
small layer.

The functions (``csrc/ops/direct.cpp``) take plain tensors in the usual layouts and return None for
all else, which then goes the ordinary way: to be refused, copied, converted.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.compiler import is_dynamo_compiling

from .. import build
from ..torch_internals import direct_call_facts

# The module of functions; False if there is none, None until ``load`` has looked.
functions: Any = None
# Makes a step that was done directly differentiable: ``step.py`` puts it here.
record_step: Callable[..., Any] | None = None


def load() -> None:
    """Once, when the CPU's library is there."""
    global functions
    if functions is None:
        functions = build.direct_calls(record_step, *direct_call_facts()) or False


def called_directly(
    module: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    cell: str,
    names: list[str] | None = None,
) -> Any:
    """``module(*args, **kwargs)`` by a direct call, or None if it has to go all the way.

    That is of a stack of layers, or of one step, whose weights ``names`` are. Without gradients,
    and of a step with them, it is the whole call, in which nobody has a part: no hook, no mode, no
    method or attribute that was replaced.
    """
    if is_dynamo_compiling() or not functions:
        return None
    return functions.call_module(module, args, kwargs, cell, names)


def direct_calls(x: Tensor) -> Any:
    """The direct functions if they may be called for this input. ``step`` alone knows gradients."""
    if is_dynamo_compiling() or not functions or not x.is_cpu:
        return None
    return functions
