"""The native operators, and whether and how a call goes to them.

``recurrent`` runs a stack of layers over a sequence. It has a twin that keeps nothing for a
backward (``recurrent_infer``), one that keeps what goes into each layer alone, whose backward runs
layers again (``recurrent_recomputed``), and a backward that is an operator too, with a formula of
its own, so that derivatives of every order exist. What the backward needs is an input or an output
of the forward; nothing hides on ctx.

The kernels are registered by the native libraries (``csrc/ops/cpu.cpp``, ``cuda.cpp``) when
``build`` loads them, each at its first use.

==========================  =====================================================================
``schemas.py``              the schemas, and a call's arguments in their order
``library.py``              what the libraries have, by cell, type and device
``direct.py``               calls of the CPU's kernels without torch's dispatcher
``fakes.py``                shapes of results
``derivatives.py``          first derivatives, of a single step ``step.py``
``second_derivatives.py``   those of the backward
``registration.py``         all of it told to torch, vmap, and what runs without kernels
==========================  =====================================================================
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, is_grad_enabled

from .. import reference
from ..torch_internals import constant, is_below_autograd, is_onednn_enabled, onednn_has
from . import direct, registration, step
from .derivatives import EagerRecomputed, EagerRecurrent, record_recurrent
from .direct import called_directly, direct_calls
from .library import facts_of, has_cell, supports, takes, tensor_names
from .schemas import (
    NO_STAGE_TENSORS,
    PACKED_ELEMENTS,
    Call,
    Inputs,
    StageTensors,
    inputs_of,
    is_plain,
    operators,
)

__all__ = [
    "Call",
    "Inputs",
    "called_directly",
    "direct",
    "direct_calls",
    "directly",
    "facts_of",
    "has_cell",
    "onednn_takes",
    "operators",
    "pack",
    "recurrent",
    "registration",
    "step",
    "supports",
    "takes",
    "tensor_names",
    "wants_grad",
]


@constant
def onednn_takes(dtype: torch.dtype) -> bool:
    """Whether torch.nn hands an LSTM whose input is of this dtype to oneDNN, here and now."""
    if not is_onednn_enabled():
        return False
    if dtype == torch.float16 and is_grad_enabled():
        return False
    return dtype == torch.float32 or (
        dtype in (torch.bfloat16, torch.float16) and onednn_has(dtype)
    )


def wants_grad(tensors: Iterable[Tensor | None]) -> bool:
    if is_grad_enabled():
        for t in tensors:
            if t is not None and t.requires_grad:
                return not is_below_autograd()
    return False


def recurrent(
    cell: str,
    x: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    weights: Sequence[Tensor],
    masks: Tensor | None,
    batch_sizes: Tensor | None,
    layers: int,
    directions: int,
    present: int,
    recompute: bool = False,
    stages: reference.Stages = reference.NO_STAGES,
    every_state: bool = False,
    packed: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The contract of ``reference.recurrent`` on the native kernels. ``packed``: what ``pack`` made
    of the weights, or of what was in their place."""
    call = _call(x, cell, layers, directions, present, stages, every_state)
    tensors: StageTensors = (stages.reset, stages.zoneout, stages.h_mask)
    train = wants_grad((*weights, x, h0, c0))
    if masks is None and not (train and recompute) and is_plain(call, tensors):
        found = directly(call, x, h0, c0, batch_sizes, weights, packed, train=train)
        if found is not None:
            return found
    if train and not torch.compiler.is_compiling():
        run = EagerRecomputed if recompute else EagerRecurrent
        y, h_n, c_n = run.apply(call, tensors, None, x, h0, c0, masks, batch_sizes, *weights)
        return y, h_n, c_n if len(reference.CELLS[cell].states) > 1 else None
    name = "recurrent_recomputed" if recompute else "recurrent"
    op = getattr(operators, name if train else "recurrent_infer").default
    inputs = inputs_of(
        call, tensors, x, h0, c0, masks, batch_sizes, weights, None if train else packed
    )
    y, h_n, c_n = op(*inputs)[:3]
    return y, h_n, c_n if len(reference.CELLS[cell].states) > 1 else None


def directly(
    call: Call,
    x: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    batch_sizes: Tensor | None,
    weights: Sequence[Tensor],
    packed: Tensor | None,
    *,
    train: bool,
) -> tuple[Tensor, Tensor, Tensor | None] | None:
    """``recurrent`` by a direct call, which autograd records if ``train``; or None."""
    if not (calls := direct_calls(x)):
        return None
    found: tuple[Any, ...] | None = calls.forward(
        *call[:4], x, h0, c0, batch_sizes, tuple(weights), None if train else packed, train
    )
    if found is None or not train:
        return found
    recorded: tuple[Tensor, Tensor, Tensor | None] = record_recurrent(
        call, NO_STAGE_TENSORS, found, x, h0, c0, None, batch_sizes, *weights
    )
    return recorded


def _call(
    x: Tensor,
    cell: str,
    layers: int,
    directions: int,
    present: int,
    stages: reference.Stages,
    every_state: bool = False,
) -> Call:
    norm, eps = 0, 0.0
    if stages.norm is not None:
        norm, eps = 1 + reference.NORM_KINDS.index(stages.norm.kind), stages.norm.eps
    return Call(
        cell, layers, directions, present, stages.blocks, norm, eps, every_state, _allow_tf32(x)
    )


def pack(
    cell: str,
    weights: Sequence[Tensor],
    layers: int,
    directions: int,
    present: int,
    stages: reference.Stages,
    dtype: torch.dtype | None,
) -> Tensor | None:
    """What kernels read in the place of W_ih and W_hh, as long as nobody writes to these; None if
    they read no such thing. ``dtype``: one of PACKED_ELEMENTS."""
    w_ih, known = weights[0], reference.CELLS[cell]
    x = w_ih.new_empty((1, 0, w_ih.shape[1]))  # of any length
    hidden = w_ih.shape[0] // known.gates
    if not x.is_cpu or not supports([x, *weights], cell):
        return None
    if not takes(stages, cell, hidden, x.device, train=False):
        return None
    # Kernels do not know them again, and go on with these, which for bytes are other numbers.
    if dtype is torch.int8 and not all(w.is_contiguous() for w in weights):
        return None
    given = [x.new_empty((1, 0, len(known.given) * hidden))] if known.given else []
    call, tensors = _call(x, cell, layers, directions, present, stages), (None,) * 4
    packed: Tensor = operators.recurrent_pack.default(
        *inputs_of(call, NO_STAGE_TENSORS, x, *tensors, [*weights, *given]), PACKED_ELEMENTS[dtype]
    )
    return packed if packed.numel() > 0 else None


@constant
def _rnn_allows_tf32() -> bool:
    return torch.backends.cudnn.rnn.fp32_precision == "tf32"  # type: ignore[attr-defined]


def _allow_tf32(x: Tensor) -> bool:
    """Whether float32 products may be rounded to TF32: the setting that torch.nn obeys there."""
    return x.is_cuda and x.dtype == torch.float32 and _rnn_allows_tf32()
