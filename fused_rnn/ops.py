"""The native operators: schemas, fakes, autograd, vmap. The only file that names ``torch.ops``.

``layer`` runs one layer (one or two directions) over a sequence. It has a twin without autograd
(``layer_infer``, which saves nothing) and a backward that is an operator too, with a formula of its
own, so that derivatives of every order exist. What the backward needs is an input or an output of
the forward; nothing hides on ctx. A second twin (``layer_recomputed``) keeps its inputs alone, and
its backward begins with ``layer``.

The kernels are registered by the native libraries (``csrc/ops/cpu.cpp``, ``cuda.cpp``) when
``build`` loads them, each at its first use.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from typing import Any, TypeVar

import torch
import torch.library
from torch import Tensor, is_grad_enabled, nn
from torch.autograd import forward_ad
from torch.compiler import is_dynamo_compiling
from torch.nn.modules import module as nn_module

from . import build, reference
from .reference import Weights

_F = TypeVar("_F", bound=Callable[..., Any])

_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_WEIGHT_NAMES = ("w_ih", "w_hh", "b_ih", "b_hh", "w_hr")
_N_WEIGHTS = 2 * len(_WEIGHT_NAMES)
_N_INPUTS = 3 + _N_WEIGHTS + 1  # x, h0, c0, weights, batch_sizes

_WEIGHT_SCHEMA = (
    "Tensor w_ih, Tensor w_hh, Tensor? b_ih, Tensor? b_hh, Tensor? w_hr, "
    "Tensor? w_ih_r, Tensor? w_hh_r, Tensor? b_ih_r, Tensor? b_hh_r, Tensor? w_hr_r"
)
_LAYER_ARGS = f"Tensor x, Tensor h0, Tensor? c0, {_WEIGHT_SCHEMA}, Tensor? batch_sizes"

# x [T, B, I] or packed rows [R, I] with batch_sizes [T]; h0 [D, B, P]; c0 [D, B, C]; weights as in
# reference.Weights, the second five for the reversed direction. hs and saved belong to the
# backward; their layout is the engine's own.
_SCHEMAS = {
    "layer": f"(str cell, {_LAYER_ARGS}, bool allow_tf32=False) -> "
    "(Tensor y, Tensor h_n, Tensor c_n, Tensor hs, Tensor saved)",
    "layer_infer": f"(str cell, {_LAYER_ARGS}, bool allow_tf32=False) -> "
    "(Tensor y, Tensor h_n, Tensor c_n)",
    "layer_recomputed": f"(str cell, {_LAYER_ARGS}, bool allow_tf32=False) -> "
    "(Tensor y, Tensor h_n, Tensor c_n)",
    # Bit i of `needs`: gradient i is wanted; the others come back empty.
    "layer_backward": f"(str cell, Tensor? dy, Tensor? dh_n, Tensor? dc_n, {_LAYER_ARGS}, "
    "Tensor hs, Tensor saved, int needs, bool allow_tf32=False) -> "
    f"({', '.join(['Tensor'] * (3 + _N_WEIGHTS))})",
}

_library = torch.library.Library("fused_rnn", "DEF")
for _name, _schema in _SCHEMAS.items():
    _library.define(_name + _schema, tags=(torch.Tag.pt2_compliant_tag,))
_ops = torch.ops.fused_rnn


# ---- what the package calls ----


def _constant(fn: _F) -> _F:
    """torch.compiler.assume_constant_result, without its import of Dynamo, which takes seconds."""
    fn._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return fn


# Dynamo asks once and keeps the answer: it must not trace into a build.
@_constant
def _is_native(target: str) -> bool:
    global _direct
    native = build.backend(target) == "native"
    if native and target == "cpu" and _direct is None:
        facts = (_record_step, *_MODULES, vars(forward_ad), Tensor().is_neg, _WATCHERS)
        _direct = build.direct_calls(*facts) or False
    return native


def supports(cell: str, tensors: Sequence[Tensor | None]) -> bool:
    """Whether native kernels take these tensors: one floating dtype, dense, CPU, CUDA or meta.

    The first call for a type of device builds or loads its library.
    """
    dtype, device = None, None
    for t in tensors:
        if t is None:
            continue
        if dtype is None:
            dtype, device = t.dtype, t.device
        if t.dtype != dtype or t.device != device or t.layout != torch.strided:
            return False
    if dtype not in _DTYPES or device is None or device.type not in ("cpu", "cuda", "meta"):
        return False
    return _is_native(_target(device))


def _target(device: torch.device) -> str:
    """The library for a device: of build.TARGETS. Tensors without data have the CPU's shapes."""
    return "cuda" if device.type == "cuda" else "cpu"


# A constant, since Dynamo of torch 2.10 and 2.11 cannot trace the call. It compiles anew for the
# tensors of a transform.
@_constant
def _transforms() -> int:
    return torch._C._functorch.get_dynamic_layer_stack_depth()


def transformed() -> bool:
    """Whether a ``torch.func`` transform or forward mode is under way, which no kernel knows."""
    return _transforms() > 0 or forward_ad._current_level >= 0


@_constant
def onednn_takes(dtype: torch.dtype) -> bool:
    """Whether torch.nn hands a padded LSTM whose input is of this dtype to oneDNN, here."""
    if not torch.backends.mkldnn.is_available():
        return False
    if dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    if dtype == torch.float16:
        return bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())
    return dtype == torch.float32


# ---- direct calls: the CPU's kernels without torch's dispatcher, which takes longer than one step
# of a small layer. The functions (csrc/ops/direct.cpp) take plain tensors in the usual layouts and
# return None for all else, which then goes the ordinary way: to be refused, copied, converted. ----

_direct: Any = None  # the module; False if there is none, None until ``supports`` has looked

# Who may count on torch's dispatcher: modes, a tracer, autocast, a profiler, transforms.
_WATCHERS = (
    torch._C._len_torch_dispatch_stack,
    torch._C._len_torch_function_stack,
    torch._C._is_tracing,
    torch._C._is_any_autocast_enabled,
    torch._C._autograd._profiler_enabled,
    torch._C._functorch.get_dynamic_layer_stack_depth,
)
# By what a call of a module is more than one of its forward.
_MODULES = (
    nn.Module,
    nn.Module.__call__,
    nn.Module._call_impl,
    (
        nn_module._global_forward_hooks,
        nn_module._global_forward_pre_hooks,
        nn_module._global_backward_hooks,
        nn_module._global_backward_pre_hooks,
    ),
)


def called_directly(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], cell: str | None = None
) -> Any:
    """``module(*args, **kwargs)`` by a direct call, or None if it has to go all the way.

    That is of a stack of layers, or of ``cell``. Without gradients it is the whole call, in which
    nobody has a part: no hook, no mode, no method or attribute that was replaced.
    """
    if is_dynamo_compiling() or not _direct:
        return None
    return _direct.called(module, args, kwargs, cell)


def direct_calls(x: Tensor) -> Any:
    """The direct functions if they may be called for this input. ``step`` alone knows gradients."""
    if is_dynamo_compiling() or not _direct or not x.is_cpu:
        return None
    return _direct


def wants_grad(tensors: Iterable[Tensor | None]) -> bool:
    return is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def layer_directly(
    cell: str,
    x: Tensor,
    h0: Tensor,
    c0: Tensor | None,
    weights: Sequence[Weights],
    batch_sizes: Tensor | None = None,
) -> Any:
    """``layer`` by a direct call, or None."""
    calls = direct_calls(x)
    if not calls:
        return None
    tensors = (x, h0, c0, *_ten(weights), batch_sizes)
    if not wants_grad(tensors):
        return calls.layer_infer(cell, *tensors)
    found = calls.layer(cell, *tensors)
    return found and _apply_plain(cell, *tensors, False, found)


def layer(
    cell: str,
    x: Tensor,
    h0: Tensor,
    c0: Tensor | None,
    weights: Sequence[Weights],
    batch_sizes: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The contract of ``reference.layer`` on the native kernels."""
    found: tuple[Tensor, Tensor, Tensor | None] | None
    if found := layer_directly(cell, x, h0, c0, weights, batch_sizes):
        return found
    tensors = (x, h0, c0, *_ten(weights), batch_sizes)
    arguments = (cell, *tensors, _allow_tf32(x))
    if not wants_grad(tensors):
        y, h_n, c_n = _ops.layer_infer.default(*arguments)
    elif torch.compiler.is_compiling():
        y, h_n, c_n, _, _ = _ops.layer.default(*arguments)
    else:
        y, h_n, c_n = _EagerLayer.apply(*arguments, None)
    return y, h_n, None if c0 is None else c_n


def layer_recomputed(
    cell: str,
    x: Tensor,
    h0: Tensor,
    c0: Tensor | None,
    weights: Sequence[Weights],
    batch_sizes: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """``layer``, but the backward runs the forward again instead of keeping what it computed."""
    tensors = (x, h0, c0, *_ten(weights), batch_sizes)
    if not wants_grad(tensors):
        return layer(cell, x, h0, c0, weights, batch_sizes)
    arguments = (cell, *tensors, _allow_tf32(x))
    if torch.compiler.is_compiling():
        y, h_n, c_n = _ops.layer_recomputed.default(*arguments)
    else:
        y, h_n, c_n = _EagerRecomputedLayer.apply(*arguments, None)
    return y, h_n, None if c0 is None else c_n


def _ten(weights: Sequence[Weights]) -> tuple[Tensor | None, ...]:
    """The weights of two directions; those of the second may be missing."""
    return (*weights[0], *(weights[1] if len(weights) == 2 else (None,) * len(_WEIGHT_NAMES)))


def _runs(ten: Sequence[Any], h0: Tensor) -> list[Any]:
    """The inverse of ``_ten``."""
    half = len(_WEIGHT_NAMES)
    return [ten[:half], ten[half:]][: h0.shape[0]]


@_constant
def _rnn_allows_tf32() -> bool:
    return torch.backends.cudnn.rnn.fp32_precision == "tf32"  # type: ignore[attr-defined]


def _allow_tf32(x: Tensor) -> bool:
    """Whether float32 products may be rounded to TF32: the setting that torch.nn obeys there."""
    return x.is_cuda and x.dtype == torch.float32 and _rnn_allows_tf32()


# ---- shapes (fakes) ----


@lru_cache
def _facts(target: str, cell: str) -> tuple[int, int]:
    """(values of a unit on the tape, extra states) of a cell."""
    library = build.library(target)
    name = cell.encode()
    tape, extra = (library.frnn_cell_fact(name, i) for i in range(2))
    if tape < 0:
        raise RuntimeError(f"cell: unknown cell {cell!r}")
    return tape, extra


@lru_cache
def _saved_facts(target: str, hidden: int, width: int) -> tuple[int, int, int, bool]:
    """Units padded, a row of hs, blocks of B rows that it has before its own, dtype as of x?"""
    fact = build.library(target).frnn_saved_fact
    fact.restype = ctypes.c_int64
    fact.argtypes = (ctypes.c_int64, ctypes.c_int64, ctypes.c_int)
    units, row, lead, as_x = (fact(hidden, width, i) for i in range(4))
    return units, row, lead, bool(as_x)


def _computing(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _layer_infer_fake(
    cell: str, x: Tensor, h0: Tensor, c0: Tensor | None, *rest: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    directions, batch, width = h0.shape
    c_width = 0 if c0 is None else c0.shape[2]
    y = x.new_empty((*x.shape[:-1], directions * width))
    return y, x.new_empty(h0.shape), x.new_empty((directions, batch, c_width))


def _layer_fake(
    cell: str, x: Tensor, h0: Tensor, c0: Tensor | None, *rest: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    target = _target(x.device)
    tape, _ = _facts(target, cell)
    directions, batch, width = h0.shape
    w_hr, batch_sizes = rest[_WEIGHT_NAMES.index("w_hr")], rest[_N_WEIGHTS]
    hidden = width if w_hr is None else w_hr.shape[1]
    rows = x.shape[0] if batch_sizes is not None else x.shape[0] * batch
    units, hs_row, lead, as_x = _saved_facts(target, int(hidden), int(width))
    dtype = _computing(x.dtype)
    return (
        *_layer_infer_fake(cell, x, h0, c0),
        x.new_empty((directions, lead * batch + rows, hs_row), dtype=x.dtype if as_x else dtype),
        x.new_empty((directions, rows, tape, units), dtype=dtype),
    )


def _layer_backward_fake(
    cell: str, dy: Any, dh_n: Any, dc_n: Any, *rest: Any
) -> tuple[Tensor, ...]:
    tensors, needs = rest[: 3 + _N_WEIGHTS], rest[6 + _N_WEIGHTS]
    x = tensors[0]
    return tuple(
        x.new_empty(0) if t is None or not needs >> i & 1 else t.new_empty(t.shape)
        for i, t in enumerate(tensors)
    )


# ---- first derivatives ----


def _layer_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.cell, *tensors, ctx.allow_tf32 = inputs
    ctx.set_materialize_grads(False)  # an unused h_n costs no zeros
    ctx.mark_non_differentiable(*output[3:])
    ctx.save_for_backward(*tensors, *output[3:])


def _layer_grad(
    ctx: Any,
    dy: Tensor | None,
    dh_n: Tensor | None,
    dc_n: Tensor | None,
    *_: Any,
    backward: Callable[..., tuple[Tensor | None, ...]] = _ops.layer_backward.default,
) -> tuple[Any, ...]:
    needed = ctx.needs_input_grad[1 : 4 + _N_WEIGHTS]
    if all(g is None for g in (dy, dh_n, dc_n)):
        return (None,) * (len(needed) + 3)
    needs = sum(1 << i for i, need in enumerate(needed) if need)
    tensors = ctx.saved_tensors
    if len(tensors) == _N_INPUTS:  # of layer_recomputed
        tensors += _plain_layer(ctx.cell, *tensors, ctx.allow_tf32)[3:]
    grads = backward(ctx.cell, dy, dh_n, dc_n, *tensors, needs, ctx.allow_tf32)
    return (None, *(g if need else None for g, need in zip(grads, needed, strict=True)), None, None)


def _below_autograd(op: Callable[..., Any]) -> Callable[..., Any]:
    """The operator without its autograd. The guard must cover no more than the call: reading
    ``ctx.saved_tensors`` may run a checkpointed forward again."""

    def call(*args: Any) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            return op(*args)

    return call


_plain_layer = _below_autograd(_ops.layer.default)
_plain_layer_backward = _below_autograd(_ops.layer_backward.default)


def _direct_layer_backward(*arguments: Any) -> tuple[Tensor | None, ...]:
    """The operator's arguments; first tries the direct call, which gives None for no gradient."""
    *inputs, _allow_tf32 = arguments
    if calls := direct_calls(inputs[4]):
        found: tuple[Tensor | None, ...] | None = calls.layer_backward(*inputs)
        if found is not None:
            return found
    return _plain_layer_backward(*arguments)


class _EagerLayer(torch.autograd.Function):
    """What ``register_autograd`` makes of the same functions, at less than half its cost per call;
    in a loop over single steps that is most of the time.

    ``found`` is the operator's result if there is one already, from a direct call.
    """

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
        *arguments, found = inputs
        output = found or _plain_layer(*arguments)
        _layer_setup(ctx, tuple(arguments), output)
        return output[:3]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        if torch.is_grad_enabled():  # create_graph=True
            return (*_layer_grad(ctx, *grads), None)
        return (*_layer_grad(ctx, *grads, backward=_direct_layer_backward), None)


class _EagerStep(torch.autograd.Function):
    """One step of a cell that a direct call has done, with x and the states as the cell has them.

    ``found`` is (the new states, which of the seven inputs are there as bits, what the backward
    needs: these inputs, hs, saved).
    """

    @staticmethod
    def forward(ctx: Any, cell: str, *inputs: Any) -> Any:
        states, ctx.present, kept = inputs[-1]
        ctx.cell = cell
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*kept)
        return states

    @staticmethod
    def backward(ctx: Any, dh: Tensor | None, dc: Tensor | None = None) -> tuple[Any, ...]:
        needed, kept = ctx.needs_input_grad, ctx.saved_tensors
        if dh is None and dc is None:
            return (None,) * len(needed)
        if torch.is_grad_enabled():  # create_graph=True
            return _step_grad(ctx, dh, dc, kept, _ops.layer_backward.default)
        if calls := direct_calls(kept[0]):
            found: tuple[Any, ...] | None = calls.step_backward(
                ctx.cell, dh, dc, ctx.present, kept, needed
            )
            if found is not None:
                return found
        return _step_grad(ctx, dh, dc, kept, _plain_layer_backward)


def _step_grad(
    ctx: Any,
    dh: Tensor | None,
    dc: Tensor | None,
    kept: tuple[Tensor, ...],
    backward: Callable[..., tuple[Tensor, ...]],
) -> tuple[Any, ...]:
    """The gradients of a step by the operator, for which it is a sequence."""
    needed = ctx.needs_input_grad[1:-1]
    *there, hs, saved = kept
    rest = iter(there)
    inputs = [next(rest) if ctx.present >> i & 1 else None for i in range(len(needed))]
    layered = [None if t is None else t.reshape(1, -1, t.shape[-1]) for t in (dh, dc, *inputs[:3])]
    weights = (*inputs[3:], *(None,) * (3 + _N_WEIGHTS - len(inputs)))
    needs = sum(1 << i for i, need in enumerate(needed) if need)
    grads = backward(ctx.cell, None, *layered, *weights, None, hs, saved, needs, False)
    return (
        None,
        *(
            g.reshape(t.shape) if need and t is not None else None
            for g, t, need in zip(grads, inputs, needed, strict=False)
        ),
        None,
    )


# ``apply`` without its search for tensors that a transform has left behind: there are none among
# those that a direct call took.
_apply_plain = super(torch.autograd.Function, _EagerLayer).apply
_record_step = super(torch.autograd.Function, _EagerStep).apply


def _layer_recomputed(*inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Not ``layer_infer``, whose way may differ: the gradients must be those of what was returned.
    The tape it writes is freed at once."""
    y, h_n, c_n, _, _ = _plain_layer(*inputs)
    return y, h_n, c_n


# Any device: the work is done by the operators that it calls.
_library.impl("layer_recomputed", _layer_recomputed, "CompositeExplicitAutograd")


# A program that torch.export has saved calls the operators in a process where no module of ours has
# loaded the kernels, or on a machine that has none. What is registered for every device does that,
# until a library registers its kernels, which come first.
def _load_kernels(name: str, otherwise: Callable[..., Any]) -> Callable[..., Any]:
    x_at = 3 if name == "layer_backward" else 0

    def call(cell: str, *arguments: Any) -> Any:
        if supports(cell, [arguments[x_at]]):
            return getattr(_ops, name).default(cell, *arguments)
        return otherwise(cell, *arguments)

    return call


def _reference_layer_infer(
    cell: str, x: Tensor, h0: Tensor, c0: Tensor | None, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    weights, batch_sizes = _runs(rest[:_N_WEIGHTS], h0), rest[_N_WEIGHTS]
    y, h_n, c_n = reference.layer(cell, x, h0, c0, weights, batch_sizes)
    return y, h_n, x.new_empty((*h0.shape[:2], 0)) if c_n is None else c_n


def _reference_layer(cell: str, x: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    return *_reference_layer_infer(cell, x, *rest), x.new_empty(0), x.new_empty(0)


def _no_layer_backward(*arguments: Any) -> Any:
    raise RuntimeError(
        "An exported program trains on native kernels only, which are not there: "
        "python -m fused_rnn doctor"
    )


for _name, _otherwise in (
    ("layer", _reference_layer),
    ("layer_infer", _reference_layer_infer),
    ("layer_backward", _no_layer_backward),
):
    _library.impl(_name, _load_kernels(_name, _otherwise), "CompositeExplicitAutograd")


class _EagerRecomputedLayer(_EagerLayer):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
        *arguments, _found = inputs
        output = _layer_recomputed(*arguments)
        _layer_setup(ctx, tuple(arguments), output)
        return output


# ---- second derivatives: the first ones again, through the differentiable reference ----


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


def _layer_backward_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    cell, *tensors, _hs, _saved, needs, _allow_tf32 = inputs
    ctx.cell, ctx.needs = cell, needs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors)


def _layer_backward_grad(ctx: Any, *ggs: Tensor | None) -> tuple[Any, ...]:
    dy, dh_n, dc_n, *tensors, batch_sizes = ctx.saved_tensors

    def forward(
        x: Tensor, h0: Tensor, c0: Tensor | None, *weights: Any
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        return reference.layer(ctx.cell, x, h0, c0, _runs(weights, h0), batch_sizes)

    wanted = [bool(ctx.needs >> i & 1) for i in range(len(tensors))]
    grads = _vjp_grads(forward, tensors, (dy, dh_n, dc_n), wanted, ggs)
    return (None, *grads, None, None, None, None, None)


# ---- vmap: one call per slice. Modules take the reference path under torch.func, which batches its
# products; this is for what reaches the operators otherwise, such as a vectorised Jacobian over the
# backward of an ordinary forward. ----


def _vmap_by_slices(op: Callable[..., tuple[Tensor, ...]]) -> Callable[..., Any]:
    def rule(
        info: Any, in_dims: tuple[int | None, ...], *args: Any
    ) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        slices = [
            op(*(a if d is None else a.select(d, i) for a, d in zip(args, in_dims, strict=True)))
            for i in range(info.batch_size)
        ]
        outputs = tuple(torch.stack(parts) for parts in zip(*slices, strict=True))
        return outputs, (0,) * len(outputs)

    return rule


_FAKES: dict[str, Callable[..., tuple[Tensor, ...]]] = {
    "layer": _layer_fake,
    "layer_infer": _layer_infer_fake,
    "layer_recomputed": _layer_infer_fake,
    "layer_backward": _layer_backward_fake,
}
for _name, _fake in _FAKES.items():
    torch.library.register_fake(f"fused_rnn::{_name}", _fake, lib=_library)
    torch.library.register_vmap(
        f"fused_rnn::{_name}", _vmap_by_slices(getattr(_ops, _name).default), lib=_library
    )
for _name, _grad, _setup in (
    ("layer", _layer_grad, _layer_setup),
    ("layer_recomputed", _layer_grad, _layer_setup),
    ("layer_backward", _layer_backward_grad, _layer_backward_setup),
):
    torch.library.register_autograd(
        f"fused_rnn::{_name}", _grad, setup_context=_setup, lib=_library
    )
