"""The choice of an engine for a call.

Four engines can do the work, and this file is where one of them is chosen:

=================  ==============================================================================
``ops``            the native kernels: everything they support
``reference``      plain torch: ``torch.func`` transforms, forward mode, no compiler, all unusual
``onnx``           nodes of ONNX, while ``torch.onnx.export(dynamo=True)`` is tracing
torch's operators  ``torch.jit.trace``, and with it ``torch.onnx.export(dynamo=False)``, which want
                   one known node; complex numbers, sparse inputs, and devices that none of the
                   others knows
=================  ==============================================================================

All of them give the results of torch.nn.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import _VF, Tensor
from torch.nn import Parameter

from . import onnx, ops, reference
from .packed import Packed
from .reference import BIASES
from .torch_internals import transformed

TORCH_STACK: dict[str, Any] = {
    "rnn_tanh": _VF.rnn_tanh,
    "rnn_relu": _VF.rnn_relu,
    "lstm": _VF.lstm,
    "gru": _VF.gru,
}
TORCH_CELL: dict[str, Any] = {
    "rnn_tanh": _VF.rnn_tanh_cell,
    "rnn_relu": _VF.rnn_relu_cell,
    "lstm": _VF.lstm_cell,
    "gru": _VF.gru_cell,
}
TORCH_CELLS = tuple(TORCH_STACK)  # those of torch.nn


def wants_torch_operator(x: Tensor, weights: Iterable[Tensor | None]) -> bool:
    if x.is_complex() or x.layout != torch.strided:
        return True
    if x.device.type not in ("cpu", "cuda", "meta"):
        return True
    if torch.compiler.is_dynamo_compiling():
        return False
    return torch.jit.is_tracing() or any_answers_itself(weights)


_USUAL_TYPES = {Parameter, Tensor, type(None)}
_USUAL_ANSWERS = (
    Tensor.__torch_function__.__func__,  # type: ignore[attr-defined]
    Parameter.__torch_function__,
)


def any_answers_itself(weights: Iterable[Tensor | None]) -> bool:
    """Whether one is of a class that puts code of its own in the place of torch's functions: it may
    know torch.nn's operators, as torch's ExpandedWeight does, and knows nothing of ours."""
    unusual: Any = {*map(type, weights)} - _USUAL_TYPES
    answers = [each.__torch_function__ for each in unusual]
    return any(getattr(answer, "__func__", answer) not in _USUAL_ANSWERS for answer in answers)


def engine_of(
    cell: str,
    x: Tensor,
    states: Sequence[Tensor],
    weights: Sequence[Tensor],
    packed: Packed,
    *,
    wants_torch: bool = False,
) -> tuple[Any, bool]:
    """``ops``, ``reference`` or ``onnx``, all of which have ``recurrent``; and whether its products
    with the weights are of 8-bit integers. ``wants_torch``: what ``wants_torch_operator`` said,
    where torch has no operator for what is asked."""
    int8 = packed.int8 and not ops.wants_grad((x, *states, *weights))
    if onnx.exporting():
        return onnx, int8
    if not (wants_torch or transformed()) and ops.supports([x, *states, *weights], cell):
        # Kernels have such products with packed weights alone.
        return reference if int8 and packed.tensor is None else ops, int8
    # Plain torch would broadcast and promote where torch.nn refuses.
    for kind, operands in (("hidden", states), ("parameter", weights)):
        for operand in operands:
            if operand.device != x.device:
                raise RuntimeError(
                    f"Input and {kind} tensors are not at the same device, found input tensor at "
                    f"{x.device} and {kind} tensor at {operand.device}"
                )
    for operand in (x, *states, *weights):
        if operand.dtype != weights[0].dtype:
            raise RuntimeError(
                "mat1 and mat2 must have the same dtype, but got "
                f"{_type_name(operand)} and {_type_name(weights[0])}"
            )
    return reference, int8


def _type_name(tensor: Tensor) -> str:
    """The name that torch's own messages use, such as Float or BFloat16."""
    return tensor.type().rpartition(".")[2].removesuffix("Tensor")


def by_torch(
    cell: str,
    x: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    weights: Sequence[Tensor],
    present: int,
    config: tuple[int, float, bool, bool],
    batch_first: bool,
    batch_sizes: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """``recurrent`` by torch's own operator."""
    time_first = x.transpose(0, 1) if batch_first else x
    h0, c0 = reference.initial_states(cell, time_first, h0, c0, weights, batch_sizes, present)
    # cuDNN refuses states with strides of their own.
    hx = h0.contiguous() if c0 is None else (h0.contiguous(), c0.contiguous())
    config = (bool(present & BIASES), *config)  # type: ignore[assignment]
    if batch_sizes is None:
        result = TORCH_STACK[cell](x, hx, list(weights), *config, bool(batch_first))
    else:
        result = TORCH_STACK[cell](x, batch_sizes, hx, list(weights), *config)
    return result if c0 is not None else (*result, None)
