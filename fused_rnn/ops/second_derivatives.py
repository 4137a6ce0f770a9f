"""Second derivatives: the first ones again, through the differentiable reference."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .derivatives import Gradients
from .schemas import Inputs, by_reference


def _vjp_grads(
    forward: Callable[..., Sequence[Tensor | None]],
    tensors: Sequence[Tensor | None],
    cotangents: Sequence[Tensor | None],
    wanted: Sequence[bool],
    grad_outputs: Sequence[Tensor | None],
) -> tuple[Tensor | None, ...]:
    """Gradients of (cotangents, tensors) -> vjp(forward)(tensors), of the `wanted` tensors."""
    higher = torch.is_grad_enabled()
    with torch.enable_grad():
        # Views: a tensor that is passed twice (tied weights) must count once in each place.
        fresh = [
            None if t is None else (t if t.requires_grad else t.detach().requires_grad_())
            for t in tensors
        ]
        inputs = [None if t is None else t.view_as(t) for t in fresh]
        duals = [None if g is None else g.view_as(g) for g in cotangents]
        outputs = forward(*inputs)
        pairs = [
            (o, g) for o, g in zip(outputs, duals, strict=True) if o is not None and g is not None
        ]
        targets = [t for t, want in zip(inputs, wanted, strict=True) if want and t is not None]
        first = torch.autograd.grad(
            [o for o, _ in pairs],
            targets,
            [g for _, g in pairs],
            create_graph=True,
            allow_unused=True,
        )
        ggs = [g for g, want in zip(grad_outputs, wanted, strict=True) if want]
        terms = [
            (f, g)
            for f, g in zip(first, ggs, strict=True)
            if f is not None and g is not None and f.requires_grad
        ]
        sources = [t for t in (*duals, *inputs) if t is not None and t.requires_grad]
        if not terms:
            return (None,) * (len(duals) + len(inputs))
        second = torch.autograd.grad(
            [f for f, _ in terms],
            sources,
            [g for _, g in terms],
            create_graph=higher,
            allow_unused=True,
        )
    found = {id(t): g for t, g in zip(sources, second, strict=True)}
    return tuple(None if t is None else found.get(id(t)) for t in (*duals, *inputs))


def backward_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    dy, dh_n, dc_n, _, _, _, ctx.needs, *rest = inputs
    i = Inputs(*rest)
    ctx.call = i.call
    ctx.set_materialize_grads(False)
    first = (dy, dh_n, dc_n, i.masks, i.batch_sizes, *i.stages)
    tensors = (*first, i.x, i.h0, i.c0, *i.weights)
    ctx.there = [t is not None for t in tensors]
    ctx.save_for_backward(*(t for t in tensors if t is not None))


def backward_grad(ctx: Any, *ggs: Any) -> Gradients:
    rest = iter(ctx.saved_tensors)
    dy, dh_n, dc_n, masks, batch_sizes, reset, zoneout, h_mask, *tensors = (
        next(rest) if there else None for there in ctx.there
    )
    stages = (reset, zoneout, h_mask)

    def forward(x: Tensor, h0: Any, c0: Any, *weights: Any) -> Any:
        return by_reference(ctx.call, stages, x, h0, c0, weights, masks, batch_sizes)

    *first, dw = ggs
    wanted = [i in ctx.needs for i in range(len(tensors))]
    grads = _vjp_grads(forward, tensors, (dy, dh_n, dc_n), wanted, (*first, *(dw or ())))
    cotangents, (dx, dh0, dc0, *ddw) = grads[:3], grads[3:]
    found = (*cotangents, None, None, None, None, None, dx, dh0, dc0, ddw)
    return (*found, *(None,) * (len(ctx.needs_input_grad) - len(found)))
