"""What torch is to know of the operators beside their kernels: checks, fakes, derivatives, vmap,
and what runs where no library has registered kernels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.library
from torch import Tensor

from .derivatives import grad, setup
from .fakes import backward_fake, fake, infer_fake, pack_fake, recomputed_fake
from .library import supports
from .schemas import CELL_AT, DTYPES, SCHEMAS, Inputs, by_reference, library, operators
from .second_derivatives import backward_grad, backward_setup

# ---- where no library has registered its kernels ----
#
# A program that torch.export has saved calls the operators in a process where no module of ours has
# loaded the kernels, or on a machine that has none. What is registered for every device does that,
# until a library registers its kernels, which come first.


def _load_kernels(name: str, otherwise: Callable[..., Any]) -> Callable[..., Any]:
    op, cell_at = getattr(operators, name).default, CELL_AT[name]

    def call(*arguments: Any) -> Any:
        cell, x = arguments[cell_at : cell_at + 2]
        return (op if supports([x], cell) else otherwise)(*arguments)

    return call


def _reference_infer(*inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
    i = Inputs(*inputs)
    tensors = i.x, i.h0, i.c0, i.weights, i.masks, i.batch_sizes
    y, h_n, c_n = by_reference(i.call, i.stages, *tensors)
    return y, h_n, i.x.new_empty((*h_n.shape[:2], 0)) if c_n is None else c_n


def _reference_recomputed(*inputs: Any) -> tuple[Tensor, ...]:
    return *_reference_infer(*inputs), inputs[1].new_empty(0)


def _reference_recurrent(*inputs: Any) -> tuple[Tensor, ...]:
    x = inputs[1]
    return *_reference_infer(*inputs), x.new_empty(0), x.new_empty(0), x.new_empty(0)


def _reference_pack(*inputs: Any) -> Any:
    return inputs[1].new_empty(0, dtype=torch.int64)


def _no_backward(*arguments: Any) -> Any:
    raise RuntimeError(
        "An exported program trains on native kernels only, which are not there: "
        "python -m fused_rnn doctor"
    )


# ---- vmap: one call per slice. Modules take the reference path under torch.func, which batches its
# products; this is for what reaches the operators otherwise, such as a vectorised Jacobian over the
# backward of an ordinary forward. ----


def _vmap_by_slices(op: Callable[..., tuple[Any, ...]]) -> Callable[..., Any]:
    def part(a: Any, d: Any, i: int) -> Any:
        if isinstance(d, (list, tuple)):
            return [part(b, e, i) for b, e in zip(a, d, strict=True)]
        return a if d is None else a.select(d, i)

    def stacked(parts: Sequence[Any]) -> Any:
        if isinstance(parts[0], Tensor):
            return torch.stack(list(parts))
        return [torch.stack(same) for same in zip(*parts, strict=True)]

    def rule(info: Any, in_dims: Any, *args: Any) -> tuple[Any, Any]:
        slices = [
            op(*(part(a, d, i) for a, d in zip(args, in_dims, strict=True)))
            for i in range(info.batch_size)
        ]
        outputs = tuple(stacked(parts) for parts in zip(*slices, strict=True))
        return outputs, tuple(0 if isinstance(o, Tensor) else [0] * len(o) for o in outputs)

    return rule


# ---- registration ----


def _checked(name: str, body: Callable[..., Any]) -> Callable[..., Any]:
    """``body`` of an operator where all tensors are dense and on the device of x.

    Torch finds the kernel by all of them: one that is sparse, or has no data, leads to a body that
    is not meant for x.
    """
    names = [argument.name for argument in getattr(operators, name).default._schema.arguments]
    x_at = CELL_AT[name] + 1

    def call(*arguments: Any) -> Any:
        x = arguments[x_at]
        for what, value in zip(names, arguments, strict=False):
            many = isinstance(value, (list, tuple))
            for i, t in enumerate(value if many else (value,)):
                if isinstance(t, Tensor) and what != "batch_sizes":
                    _check_alike(f"{what}[{i}]" if many else what, t, x)
        if x.dtype not in DTYPES:
            *most, last = (str(dtype) for dtype in DTYPES)
            raise RuntimeError(f"x: expected {', '.join(most)} or {last}, got {x.dtype}")
        return body(*arguments)

    return call


def _check_alike(name: str, t: Tensor, x: Tensor) -> None:
    """Raise RuntimeError unless t is a dense tensor on the device of x."""
    if t.layout != torch.strided:
        kind = f"one of layout {t.layout}"
    elif t.is_quantized:
        kind = f"a quantized one, {t.dtype}"
    elif t.device != x.device:
        kind = "one"
    else:
        return
    wanted = "" if t is x else f" on {x.device}, as x is"
    raise RuntimeError(f"{name}: expected a dense tensor{wanted}, got {kind} on {t.device}")


def _register(library: torch.library.Library) -> None:
    """All that torch is to know of the operators beside their kernels."""
    otherwise: dict[str, Callable[..., Any]] = {
        "recurrent_infer": _reference_infer,
        "recurrent": _reference_recurrent,
        "recurrent_recomputed": _reference_recomputed,
        "recurrent_pack": _reference_pack,
        "recurrent_backward": _no_backward,
    }
    fakes: dict[str, Callable[..., Any]] = {
        "recurrent_infer": infer_fake,
        "recurrent": fake,
        "recurrent_recomputed": recomputed_fake,
        "recurrent_pack": pack_fake,
        "recurrent_backward": backward_fake,
    }
    gradients: dict[str, tuple[Callable[..., Any], Callable[..., None]]] = {
        "recurrent": (grad, setup),
        "recurrent_recomputed": (grad, setup),
        "recurrent_backward": (backward_grad, backward_setup),
    }
    for name in SCHEMAS:
        path, op = f"fused_rnn::{name}", getattr(operators, name).default
        load = _checked(name, _load_kernels(name, otherwise[name]))
        library.impl(name, load, "CompositeExplicitAutograd")
        torch.library.register_fake(path, _checked(name, fakes[name]), lib=library)
        if name != "recurrent_pack":
            torch.library.register_vmap(path, _vmap_by_slices(op), lib=library)
        if name in gradients:
            gradient, set_up = gradients[name]
            torch.library.register_autograd(path, gradient, setup_context=set_up, lib=library)


if library is not None:
    _register(library)
    operators._registered = (SCHEMAS, library)
