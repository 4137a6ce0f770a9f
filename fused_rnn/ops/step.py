"""The derivative of one step of a cell that a direct call has done."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..torch_internals import apply_recorded
from . import direct
from .derivatives import Gradients, Saved, gradients_of, plain_backward
from .library import tape_of
from .schemas import NO_STAGE_TENSORS, Call, operators


class _EagerStep(torch.autograd.Function):
    """One step of a cell that a direct call has done, with x and the states as the cell has them.

    The inputs are x, h, c and the tensors of the cell. ``found`` is (the new states, which tensors
    the backward reads as bits, those tensors): of h_n, hs, saved and the inputs.
    """

    @staticmethod
    def forward(ctx: Any, cell: str, *inputs: Any) -> Any:
        states, ctx.present, kept = inputs[-1]
        ctx.cell = cell
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*kept)
        return states

    @staticmethod
    def backward(ctx: Any, dh: Tensor | None, dc: Tensor | None = None) -> Gradients:
        needed, kept = ctx.needs_input_grad, ctx.saved_tensors
        if dh is None and dc is None:
            return (None,) * len(needed)
        if torch.is_grad_enabled():  # create_graph=True
            return _step_grad(ctx, dh, dc, kept, operators.recurrent_backward.default)
        if calls := direct.direct_calls(kept[-1]):
            found: tuple[Any, ...] | None = calls.step_backward(
                ctx.cell, dh, dc, ctx.present, kept, needed
            )
            if found is not None:
                return found
        return _step_grad(ctx, dh, dc, kept, plain_backward)


def _step_grad(
    ctx: Any,
    dh: Tensor | None,
    dc: Tensor | None,
    kept: tuple[Tensor, ...],
    backward: Callable[..., Any],
) -> Gradients:
    """The gradients of a step by the operator, for which it is a sequence."""
    needed, present = ctx.needs_input_grad[1:-1], ctx.present
    rest = iter(kept)
    h_n, hs, tape, *inputs = (
        next(rest) if present >> i & 1 else None for i in range(3 + len(needed))
    )
    places = [i for i, t in enumerate(inputs) if i < 3 or t is not None]
    inputs = [inputs[i] for i in places]
    dh, dc, h_n, x, h, c = (
        None if t is None else t.reshape(1, -1, t.shape[-1]) for t in (dh, dc, h_n, *inputs[:3])
    )
    call = Call(ctx.cell, 1, 1, present >> 6)
    if hs is None:
        hs, tape = _tape_of_step(call, x, h, h_n, tape)  # type: ignore[arg-type]
    kept_tape, of_cell = (None, hs, tape), tuple(inputs[3:])
    saved = Saved(x, h, c, None, None, *NO_STAGE_TENSORS, *kept_tape, of_cell)  # type: ignore[arg-type]
    wanted = [needed[i] for i in places]
    grads = iter(gradients_of(call, saved, (None, dh, dc), wanted, backward))
    shaped = {
        i: None if g is None or t is None else g.reshape(t.shape)
        for i, t, g in zip(places, inputs, grads, strict=True)
    }
    return (None, *(shaped.get(i) for i in range(len(needed))), None)


def _tape_of_step(
    call: Call, x: Tensor, h: Tensor, h_n: Tensor | None, tape: Tensor | None
) -> tuple[Tensor, Tensor]:
    """hs and saved as the operator would have left them, where h and h_n serve as hs."""
    (_, batch, width), sizes = h.shape, tape_of("cpu", h.shape[2], h.shape[2])
    hs = x.new_zeros(1, 2 * batch, sizes.hs_row)
    hs[:, :batch, :width] = h.detach()
    if h_n is not None:
        hs[:, batch:, :width] = h_n.detach()
    return hs, x.new_empty(1, batch, 0, sizes.units) if tape is None else tape


# A direct call takes no tensors that a transform has left behind.
direct.record_step = apply_recorded(_EagerStep)
