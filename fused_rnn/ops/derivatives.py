"""First derivatives: the backward operator as autograd calls it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import compress
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import reference
from ..torch_internals import Batch, apply_recorded, below_autograd, is_legacy_batched
from . import direct
from .schemas import Call, Inputs, StageTensors, inputs_of, is_plain, operators

Gradients = tuple[Any, ...]


_plain = below_autograd(operators.recurrent.default)
_plain_recomputed = below_autograd(operators.recurrent_recomputed.default)
plain_backward = below_autograd(operators.recurrent_backward.default)


class Saved(NamedTuple):
    """What the backward reads."""

    x: Tensor
    h0: Tensor | None
    c0: Tensor | None
    masks: Tensor | None
    batch_sizes: Tensor | None
    reset: Tensor | None
    zoneout: Tensor | None
    h_mask: Tensor | None
    between: Tensor | None
    hs: Tensor | None
    saved: Tensor | None
    weights: tuple[Tensor, ...]

    @property
    def stages(self) -> StageTensors:
        return self.reset, self.zoneout, self.h_mask


def _save(ctx: Any, *tensors: Tensor | None) -> None:
    """Those of ``Saved`` that there are, of which the weights are the last: tools that look at what
    is saved expect no None."""
    ctx.there = there = [t is not None for t in tensors]
    ctx.save_for_backward(*compress(tensors, there))
    ctx.set_materialize_grads(False)  # an unused h_n costs no zeros


def _restore(ctx: Any) -> Saved:
    rest = iter(ctx.saved_tensors)
    tensors = [next(rest) if there else None for there in ctx.there]
    count = len(Saved._fields) - 1
    return Saved._make([*tensors[:count], tuple(tensors[count:])])


def gradients_of(
    call: Call,
    saved: Saved,
    grads: Sequence[Tensor | None],
    needed: Sequence[bool],
    backward: Callable[..., Any],
) -> list[Tensor | None]:
    """The gradients of x, h0, c0 and the weights, None where they are not ``needed``."""
    if all(g is None for g in grads):
        return [None] * len(needed)
    if any(g is not None and is_legacy_batched(g) for g in grads):
        return _gradients_of_batch(call, saved, grads, needed, backward)
    x, h0, c0, masks, batch_sizes, *_, weights = saved
    empty = x.new_empty(0)
    kept = (empty if t is None else t for t in (saved.between, saved.hs, saved.saved))
    needs = [i for i, need in enumerate(needed) if need]
    inputs = inputs_of(call, saved.stages, x, h0, c0, masks, batch_sizes, weights)
    *first, dw = backward(*grads, *kept, needs, *inputs)
    return [g if need else None for g, need in zip((*first, *dw), needed, strict=True)]


def _gradients_of_batch(
    call: Call,
    saved: Saved,
    grads: Sequence[Tensor | None],
    needed: Sequence[bool],
    backward: Callable[..., Any],
) -> list[Tensor | None]:
    """``gradients_of`` one by one, for the vmap of ``torch.autograd.grad(is_grads_batched=True)``,
    whose own loop knows no operator that takes a list of tensors."""
    batch = Batch()
    rows = [None if g is None else batch.rows(g) for g in grads]
    count = max(r.shape[0] for r in rows if r is not None)
    parts = [
        gradients_of(
            call,
            saved,
            [None if r is None else r[i if r.shape[0] > 1 else 0] for r in rows],
            needed,
            backward,
        )
        for i in range(count)
    ]
    return [
        None if same[0] is None else batch.of(torch.stack(same))
        for same in zip(*parts, strict=True)
    ]


def _reached(
    call: Call, saved: Saved, grads: Sequence[Tensor | None], wanted: Sequence[bool]
) -> Sequence[bool]:
    """``wanted`` without what no gradient reaches, which stays None, as in torch.nn: where c has
    the only gradient, and there is one step, the projection in the last layer, which comes after
    c."""
    steps = saved.x if saved.batch_sizes is None else saved.batch_sizes
    dy, dh_n, _ = grads
    projected = call.present & reference.PROJECTION
    if not projected or dy is not None or dh_n is not None or steps.shape[0] > 1:
        return wanted
    each = call.present.bit_count()
    at = (call.present & reference.PROJECTION - 1).bit_count()
    first = 3 + (call.layers - 1) * call.directions * each
    last = [first + d * each + at for d in range(call.directions)]
    return [want and i not in last for i, want in enumerate(wanted)]


class EagerRecurrent(torch.autograd.Function):
    """What ``register_autograd`` makes of the same functions, at less than half its cost per call;
    in a loop over short sequences that is most of the time.

    ``found`` is the operator's result, if a direct call has made it already.
    """

    @staticmethod
    def forward(
        ctx: Any, call: Call, stages: StageTensors, found: Any, *tensors: Any
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        x, h0, c0, masks, batch_sizes, *weights = tensors
        ctx.call = call
        if found is None:
            found = _plain(*inputs_of(call, stages, x, h0, c0, masks, batch_sizes, weights))
        y, h_n, c_n, between, hs, tape = found
        _save(ctx, x, h0, c0, masks, batch_sizes, *stages, between, hs, tape, *weights)
        return y, h_n, c_n

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Gradients:
        saved, needed = _restore(ctx), ctx.needs_input_grad
        wanted = tuple(_reached(ctx.call, saved, grads, (*needed[3:6], *needed[8:])))
        found: Sequence[Tensor | None] | None = None
        if torch.is_grad_enabled():  # create_graph=True
            run = operators.recurrent_backward.default
        else:
            run = plain_backward
            found = _direct_backward(ctx.call, saved, grads, wanted)
        if found is None:
            found = gradients_of(ctx.call, saved, grads, wanted, run)
        return (None, None, None, *found[:3], None, None, *found[3:])


# There are no tensors that a transform has left behind among those that a direct call took.
record_recurrent = apply_recorded(EagerRecurrent)


def _in_rows(grad: Tensor | None) -> Tensor | None:
    """With units side by side, as those of a sum are not: one number that is everywhere."""
    if grad is None or grad.layout != torch.strided or grad.stride(-1) == 1:
        return grad
    return grad.contiguous()


def _direct_backward(
    call: Call, saved: Saved, grads: Sequence[Tensor | None], wanted: tuple[bool, ...]
) -> tuple[Tensor | None, ...] | None:
    calls = direct.direct_calls(saved.x)
    if not calls or saved.masks is not None or saved.hs is None or all(g is None for g in grads):
        return None
    if not is_plain(call, saved.stages):
        return None
    x, h0, c0, _, batch_sizes, *_, weights = saved
    inputs = (*call[:4], x, h0, c0, batch_sizes, weights)
    found: tuple[Tensor | None, ...] | None = calls.backward(
        *inputs, *map(_in_rows, grads), saved.between, saved.hs, saved.saved, wanted
    )
    return found


class EagerRecomputed(EagerRecurrent):
    @staticmethod
    def forward(
        ctx: Any, call: Call, stages: StageTensors, found: None, *tensors: Any
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        x, h0, c0, masks, batch_sizes, *weights = tensors
        ctx.call = call
        inputs = inputs_of(call, stages, x, h0, c0, masks, batch_sizes, weights)
        y, h_n, c_n, between = _plain_recomputed(*inputs)
        _save(ctx, x, h0, c0, masks, batch_sizes, *stages, between, None, None, *weights)
        return y, h_n, c_n


def setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    """Of both operators: what ``EagerRecurrent`` and ``EagerRecomputed`` do."""
    i = Inputs(*inputs)
    ctx.call = i.call
    kept = (*output[3:], None, None)[:3]  # between, hs, saved
    ctx.mark_non_differentiable(*output[3:])
    _save(ctx, i.x, i.h0, i.c0, i.masks, i.batch_sizes, *i.stages, *kept, *i.weights)


def grad(ctx: Any, dy: Any, dh_n: Any, dc_n: Any, *_: Any) -> Gradients:
    _, x, h0, c0, weights, *rest = ctx.needs_input_grad
    saved, grads = _restore(ctx), (dy, dh_n, dc_n)
    wanted = _reached(ctx.call, saved, grads, (x, h0, c0, *weights))
    backward = operators.recurrent_backward.default
    dx, dh0, dc0, *dw = gradients_of(ctx.call, saved, grads, wanted, backward)
    return (None, dx, dh0, dc0, dw, *(None,) * len(rest))
