"""The native operators: schemas, fakes, autograd, vmap. The one file that names them.

``recurrent`` runs a stack of layers over a sequence. It has a twin that keeps nothing for a
backward (``recurrent_infer``), one that keeps what goes into each layer alone, whose backward runs
layers again (``recurrent_recomputed``), and a backward that is an operator too, with a formula of
its own, so that derivatives of every order exist. What the backward needs is an input or an output
of the forward; nothing hides on ctx.

The kernels are registered by the native libraries (``csrc/ops/cpu.cpp``, ``cuda.cpp``) when
``build`` loads them, each at its first use.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import torch.library
from torch import Tensor, is_grad_enabled, nn
from torch.compiler import is_dynamo_compiling

from . import build, reference
from .torch_internals import (
    Batch,
    apply_recorded,
    below_autograd,
    constant,
    direct_call_facts,
    is_below_autograd,
    is_legacy_batched,
    is_onednn_enabled,
    onednn_has,
)

Gradients = tuple[Any, ...]

_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

# As for ``reference.recurrent``. between [L-1, rows, D*P] is what a layer gives to the next; hs and
# saved are the tape, whose layout is the engine's own.
_INPUTS = (
    "str cell, Tensor x, Tensor? h0, Tensor? c0, Tensor[] weights, Tensor? masks, "
    "Tensor? batch_sizes, Tensor? reset, Tensor? zoneout, Tensor? h_mask, int layers, "
    "int directions, int present, int blocks, int norm, float norm_eps, bool every_state, "
    "bool allow_tf32"
)
_SCHEMAS = {
    "recurrent_infer": f"({_INPUTS}) -> (Tensor y, Tensor h_n, Tensor c_n)",
    "recurrent": f"({_INPUTS}) -> "
    "(Tensor y, Tensor h_n, Tensor c_n, Tensor between, Tensor hs, Tensor saved)",
    "recurrent_recomputed": f"({_INPUTS}) -> (Tensor y, Tensor h_n, Tensor c_n, Tensor between)",
    # needs: which gradients are wanted, by their numbers: x, h0, c0, then the weights. The others
    # come back empty.
    "recurrent_backward": "(Tensor? dy, Tensor? dh_n, Tensor? dc_n, Tensor between, Tensor hs, "
    f"Tensor saved, int[] needs, {_INPUTS}) -> (Tensor dx, Tensor dh0, Tensor dc0, Tensor[] dw)",
}
_CELL_AT = {name: 7 if name == "recurrent_backward" else 0 for name in _SCHEMAS}


class Call(NamedTuple):
    """What a call is about beside its tensors."""

    cell: str
    layers: int
    directions: int
    present: int
    blocks: int = 1
    norm: int = 0  # 0, or 1 + the number of its kind in reference.NORM_KINDS
    norm_eps: float = 0.0
    every_state: bool = False
    allow_tf32: bool = False


# The tensors of ``reference.Stages``: reset, zoneout, h_mask.
StageTensors = tuple[Tensor | None, Tensor | None, Tensor | None]
_NO_STAGES: StageTensors = (None, None, None)


def _stages_of(call: Call, tensors: Sequence[Tensor | None]) -> reference.Stages:
    reset, zoneout, h_mask = tensors
    norm = None
    if call.norm:
        at = reference.present_norms(call.cell, call.present)
        norm = reference.Norm(reference.NORM_KINDS[call.norm - 1], at, call.norm_eps)
    return reference.Stages(
        reset=reset, zoneout=zoneout, h_mask=h_mask, blocks=call.blocks, norm=norm
    )


# A namespace is torch's to give away once. Another copy of this module in the process, as what
# reloads programs makes, works with the operators of the first, which outlives its module here.
_ops: Any = torch.ops.fused_rnn
_registered = vars(_ops).get("_registered")  # the first copy's schemas and library
if _registered is None:
    _library = torch.library.Library("fused_rnn", "DEF")
    for _name, _schema in _SCHEMAS.items():
        _library.define(_name + _schema, tags=(torch.Tag.pt2_compliant_tag,))
elif _registered[0] != _SCHEMAS:
    raise ImportError(
        "fused_rnn: another version of it was imported in this process, and its operators stay: "
        "start a new process"
    )


# ---- what the package calls ----


# Dynamo asks once and keeps the answer: it must not trace into a build.
@constant
def _is_native(target: str) -> bool:
    global _direct
    native = build.backend(target) == "native"
    if native and target == "cpu" and _direct is None:
        _direct = build.direct_calls(_record_step, *direct_call_facts()) or False
    return native


@constant
def _has_cell(target: str, cell: str, dtype: torch.dtype) -> bool:
    source = reference.CELLS[cell].source
    if source is None:
        return True
    scalar = "double" if dtype == torch.float64 else "float"
    header = lambda: source.header  # noqa: E731
    return target == "cpu" and build.has_cell(cell, source.type_name, scalar, header)


def supports(tensors: Iterable[Tensor | None], cell: str) -> bool:
    """Whether native kernels take these tensors: one floating dtype, dense, CPU, CUDA or meta.

    The first call for a type of device builds or loads its library, and that of the cell.
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
    target = _target(device)
    return _is_native(target) and _has_cell(target, cell, dtype)


def takes(
    stages: reference.Stages,
    every_state: bool,
    cell: str,
    hidden: int,
    device: torch.device,
    *,
    train: bool,
) -> bool:
    """Whether the native kernels have what is to happen between two steps of this cell's layers."""
    has_stages, units_of_block, reads_new_h, has_norm = _stages_of_library(_target(device), cell)
    if stages.reset_to is not None:
        return False
    if stages.norm is not None and (not has_norm or "cell" in stages.norm.at):
        return False
    if stages.blocks > 1 and (not units_of_block or hidden % (stages.blocks * units_of_block)):
        return False
    if not has_stages:
        return stages._replace(blocks=1, norm=None).nothing and not every_state
    # The derivative of such a cell is that at the new h, which a part of the old one is mixed into.
    mixes = stages.zoneout is not None and stages.zoneout.shape[1] == 1
    return not (mixes and train and reads_new_h)


def _target(device: torch.device) -> str:
    """The library for a device: of build.TARGETS. Tensors without data have the CPU's shapes."""
    return "cuda" if device.type == "cuda" else "cpu"


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
    wanted = is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    return wanted and not is_below_autograd()


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
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The contract of ``reference.recurrent`` on the native kernels."""
    norm, eps = 0, 0.0
    if stages.norm is not None:
        norm, eps = 1 + reference.NORM_KINDS.index(stages.norm.kind), stages.norm.eps
    call = Call(
        cell, layers, directions, present, stages.blocks, norm, eps, every_state, _allow_tf32(x)
    )
    tensors: StageTensors = (stages.reset, stages.zoneout, stages.h_mask)
    train = wants_grad((x, h0, c0, *weights))
    compiling = torch.compiler.is_compiling()
    if train and not compiling:
        run = _EagerRecomputed if recompute else _EagerRecurrent
        y, h_n, c_n = run.apply(call, tensors, x, h0, c0, masks, batch_sizes, *weights)
        return y, h_n, c_n if len(reference.CELLS[cell].states) > 1 else None
    if not train and masks is None and _is_plain(call, tensors) and (calls := direct_calls(x)):
        found: tuple[Tensor, Tensor, Tensor | None] | None = calls.forward(
            *call[:4], x, h0, c0, batch_sizes, tuple(weights), False
        )
        if found is not None:
            return found
    name = "recurrent_recomputed" if recompute else "recurrent"
    op = getattr(_ops, name if train else "recurrent_infer").default
    y, h_n, c_n = op(*_inputs(call, tensors, x, h0, c0, masks, batch_sizes, weights))[:3]
    return y, h_n, c_n if len(reference.CELLS[cell].states) > 1 else None


def _is_plain(call: Call, stages: StageTensors) -> bool:
    """Whether nothing happens between two steps: direct calls know nothing of it."""
    there = any(t is not None for t in stages)
    return not there and call.blocks == 1 and not call.norm and not call.every_state


def _inputs(
    call: Call,
    stages: StageTensors,
    x: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    masks: Tensor | None,
    batch_sizes: Tensor | None,
    weights: Sequence[Tensor],
) -> tuple[Any, ...]:
    """In the order of the schemas."""
    cell, *rest = call
    return (cell, x, h0, c0, list(weights), masks, batch_sizes, *stages, *rest)


@constant
def _rnn_allows_tf32() -> bool:
    return torch.backends.cudnn.rnn.fp32_precision == "tf32"  # type: ignore[attr-defined]


def _allow_tf32(x: Tensor) -> bool:
    """Whether float32 products may be rounded to TF32: the setting that torch.nn obeys there."""
    return x.is_cuda and x.dtype == torch.float32 and _rnn_allows_tf32()


# ---- direct calls: the CPU's kernels without torch's dispatcher, which takes longer than one step
# of a small layer. The functions (csrc/ops/direct.cpp) take plain tensors in the usual layouts and
# return None for all else, which then goes the ordinary way: to be refused, copied, converted. ----

_direct: Any = None  # the module; False if there is none, None until ``supports`` has looked


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
    if is_dynamo_compiling() or not _direct:
        return None
    return _direct.call_module(module, args, kwargs, cell, names)


def direct_calls(x: Tensor) -> Any:
    """The direct functions if they may be called for this input. ``step`` alone knows gradients."""
    if is_dynamo_compiling() or not _direct or not x.is_cpu:
        return None
    return _direct


# ---- shapes (fakes) ----


class _Facts(ctypes.Structure):
    """frnn_cell_t of csrc/ops/binding.h."""

    _fields_ = [
        (name, ctypes.c_int)
        for name in (
            "gates_x",
            "gates_h",
            "extra_states",
            "tape",
            "reads_h",
            "reads_new_h",
            "has_stages",
            "block_units",
            "has_norm",
        )
    ]


class _Tape(ctypes.Structure):
    """frnn_tape_t of csrc/ops/binding.h."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("units", "hs_row", "hs_lead")),
        ("hs_as_x", ctypes.c_bool),
    ]


@lru_cache
def _facts(target: str, cell: str) -> Any:
    """What the library knows of a cell."""
    facts, find = _Facts(), build.library(target).frnn_cell
    find.restype = ctypes.c_bool
    if not find(cell.encode(), ctypes.byref(facts)):
        raise RuntimeError(f"cell: unknown cell {cell!r}")
    return facts


@lru_cache
def _tape(target: str, hidden: int, width: int) -> Any:
    """The shape of a tape of so many units, and of h of this width."""
    find = build.library(target).frnn_tape
    find.restype, find.argtypes = _Tape, (ctypes.c_int64, ctypes.c_int64)
    return find(hidden, width)


def _tape_values(target: str, cell: str, present: int) -> int:
    """Values of a unit that a row of the tape has: NormTape of csrc/core/params.h and before."""
    facts, values = _facts(target, cell), 0
    for place in reference.present_norms(cell, present):
        values += 1 + (facts.gates_x if place == "input" else facts.gates_h)
    return facts.tape + values


@constant
def _stages_of_library(target: str, cell: str) -> tuple[bool, int, bool, bool]:
    facts = _facts(target, cell)
    has = bool(facts.has_stages), facts.block_units, bool(facts.reads_new_h), bool(facts.has_norm)
    return has


def tensor_names(target: str, cell: str) -> tuple[str, ...]:
    """What the library calls the tensors of a cell: the same as ``reference.Cell.tensors``."""
    find = build.library(target).frnn_tensor
    find.restype = ctypes.c_char_p
    names: list[str] = []
    while name := find(cell.encode(), len(names)):
        names.append(name.decode())
    return tuple(names)


def _computing(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


class _Sizes(NamedTuple):
    """Of a call: sequences B, units H, width P of h and C of c, all rows of x."""

    batch: Any
    hidden: Any
    width: Any
    extra: Any
    rows: Any


def _sizes(
    cell: str,
    x: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    weights: Sequence[Tensor],
    batch_sizes: Tensor | None,
    present: int,
    blocks: int,
) -> _Sizes:
    found = reference.CELLS[cell]
    run = dict(zip(reference.present_names(cell, present), weights, strict=False))
    hidden = run["w_ih"].shape[0] // found.gates
    width = run["w_hh"].shape[1] * blocks if "w_hh" in run else hidden
    batch: Any
    if h0 is not None:
        batch = h0.shape[1]
    elif batch_sizes is None:
        batch = x.shape[1]
    else:  # a number that is in the data
        batch = torch.library.get_ctx().new_dynamic_size()
    rows = x.shape[0] if batch_sizes is not None else x.shape[0] * x.shape[1]
    return _Sizes(batch, hidden, width, (len(found.states) - 1) * hidden, rows)


def _infer_fake(
    cell: str,
    x: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    weights: Sequence[Tensor],
    masks: Tensor | None,
    batch_sizes: Tensor | None,
    reset: Tensor | None,
    zoneout: Tensor | None,
    h_mask: Tensor | None,
    layers: int,
    directions: int,
    present: int,
    blocks: int,
    norm: int,
    norm_eps: float,
    every_state: bool,
    allow_tf32: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    n = _sizes(cell, x, h0, c0, weights, batch_sizes, present, blocks)
    runs, states = layers * directions, n.rows if every_state else n.batch
    y = x.new_empty((*x.shape[:-1], directions * n.width))
    return y, x.new_empty((runs, states, n.width)), x.new_empty((runs, states, n.extra))


def _recomputed_fake(cell: str, x: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    y, h_n, c_n = _infer_fake(cell, x, *rest)
    layers, rows = rest[8], y.numel() // max(y.shape[-1], 1)
    return y, h_n, c_n, x.new_empty((layers - 1, rows, y.shape[-1]))


def _fake(cell: str, x: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    h0, c0, weights, _, batch_sizes, _, _, _, layers, directions, present, blocks, *_ = rest
    n, target = _sizes(cell, x, h0, c0, weights, batch_sizes, present, blocks), _target(x.device)
    tape, runs, dtype = _tape(target, int(n.hidden), int(n.width)), layers * directions, x.dtype
    y, h_n, c_n, between = _recomputed_fake(cell, x, *rest)
    hs = (runs, tape.hs_lead * n.batch + n.rows, tape.hs_row)
    saved = (runs, n.rows, _tape_values(target, cell, present), tape.units)
    hs_dtype = dtype if tape.hs_as_x else _computing(dtype)
    return (
        y,
        h_n,
        c_n,
        between,
        x.new_empty(hs, dtype=hs_dtype),
        x.new_empty(saved, dtype=_computing(dtype)),
    )


def _backward_fake(*arguments: Any) -> tuple[Any, ...]:
    needs, (_, x, h0, c0, weights, *_) = arguments[6], arguments[7:]
    gradients = [
        x.new_empty(0) if t is None or i not in needs else t.new_empty(t.shape)
        for i, t in enumerate((x, h0, c0, *weights))
    ]
    return (*gradients[:3], gradients[3:])


# ---- first derivatives ----


_plain = below_autograd(_ops.recurrent.default)
_plain_recomputed = below_autograd(_ops.recurrent_recomputed.default)
_plain_backward = below_autograd(_ops.recurrent_backward.default)


class _Saved(NamedTuple):
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


def _save(ctx: Any, saved: _Saved) -> None:
    """Those tensors that there are: tools that look at what is saved expect no None."""
    tensors = (*saved[:-1], *saved.weights)
    ctx.there = [t is not None for t in tensors]
    ctx.save_for_backward(*(t for t in tensors if t is not None))
    ctx.set_materialize_grads(False)  # an unused h_n costs no zeros


def _restore(ctx: Any) -> _Saved:
    rest = iter(ctx.saved_tensors)
    tensors = [next(rest) if there else None for there in ctx.there]
    count = len(_Saved._fields) - 1
    return _Saved._make([*tensors[:count], tuple(tensors[count:])])


def _gradients(
    call: Call,
    saved: _Saved,
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
    inputs = _inputs(call, saved.stages, x, h0, c0, masks, batch_sizes, weights)
    *first, dw = backward(*grads, *kept, needs, *inputs)
    return [g if need else None for g, need in zip((*first, *dw), needed, strict=True)]


def _gradients_of_batch(
    call: Call,
    saved: _Saved,
    grads: Sequence[Tensor | None],
    needed: Sequence[bool],
    backward: Callable[..., Any],
) -> list[Tensor | None]:
    """``_gradients`` one by one, for the vmap of ``torch.autograd.grad(is_grads_batched=True)``,
    whose own loop knows no operator that takes a list of tensors."""
    batch = Batch()
    rows = [None if g is None else batch.rows(g) for g in grads]
    count = max(r.shape[0] for r in rows if r is not None)
    parts = [
        _gradients(
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
    call: Call, saved: _Saved, grads: Sequence[Tensor | None], wanted: Sequence[bool]
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


class _EagerRecurrent(torch.autograd.Function):
    """What ``register_autograd`` makes of the same functions, at less than half its cost per call;
    in a loop over short sequences that is most of the time."""

    @staticmethod
    def forward(
        ctx: Any, call: Call, stages: StageTensors, *tensors: Any
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        x, h0, c0, masks, batch_sizes, *weights = tensors
        ctx.call, found = call, None
        if masks is None and _is_plain(call, stages) and (calls := direct_calls(x)):
            found = calls.forward(*call[:4], x, h0, c0, batch_sizes, tuple(weights), True)
        if found is None:
            found = _plain(*_inputs(call, stages, x, h0, c0, masks, batch_sizes, weights))
        y, h_n, c_n, between, hs, tape = found
        kept = (between, hs, tape)
        _save(ctx, _Saved(x, h0, c0, masks, batch_sizes, *stages, *kept, tuple(weights)))
        return y, h_n, c_n

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Gradients:
        saved, needed = _restore(ctx), ctx.needs_input_grad
        wanted = tuple(_reached(ctx.call, saved, grads, (*needed[2:5], *needed[7:])))
        found: Sequence[Tensor | None] | None = None
        if torch.is_grad_enabled():  # create_graph=True
            run = _ops.recurrent_backward.default
        else:
            run = _plain_backward
            found = _direct_backward(ctx.call, saved, grads, wanted)
        if found is None:
            found = _gradients(ctx.call, saved, grads, wanted, run)
        return (None, None, *found[:3], None, None, *found[3:])


def _direct_backward(
    call: Call, saved: _Saved, grads: Sequence[Tensor | None], wanted: tuple[bool, ...]
) -> tuple[Tensor | None, ...] | None:
    calls = direct_calls(saved.x)
    if not calls or saved.masks is not None or saved.hs is None or all(g is None for g in grads):
        return None
    if not _is_plain(call, saved.stages):
        return None
    x, h0, c0, _, batch_sizes, *_, weights = saved
    inputs = (*call[:4], x, h0, c0, batch_sizes, weights)
    found: tuple[Tensor | None, ...] | None = calls.backward(
        *inputs, *grads, saved.between, saved.hs, saved.saved, wanted
    )
    return found


class _EagerRecomputed(_EagerRecurrent):
    @staticmethod
    def forward(
        ctx: Any, call: Call, stages: StageTensors, *tensors: Any
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        x, h0, c0, masks, batch_sizes, *weights = tensors
        ctx.call = call
        inputs = _inputs(call, stages, x, h0, c0, masks, batch_sizes, weights)
        y, h_n, c_n, between = _plain_recomputed(*inputs)
        tape = (between, None, None)
        _save(ctx, _Saved(x, h0, c0, masks, batch_sizes, *stages, *tape, tuple(weights)))
        return y, h_n, c_n


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
            return _step_grad(ctx, dh, dc, kept, _ops.recurrent_backward.default)
        if calls := direct_calls(kept[-1]):
            found: tuple[Any, ...] | None = calls.step_backward(
                ctx.cell, dh, dc, ctx.present, kept, needed
            )
            if found is not None:
                return found
        return _step_grad(ctx, dh, dc, kept, _plain_backward)


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
    saved = _Saved(x, h, c, None, None, *_NO_STAGES, *kept_tape, of_cell)  # type: ignore[arg-type]
    wanted = [needed[i] for i in places]
    grads = iter(_gradients(call, saved, (None, dh, dc), wanted, backward))
    shaped = {
        i: None if g is None or t is None else g.reshape(t.shape)
        for i, t, g in zip(places, inputs, grads, strict=True)
    }
    return (None, *(shaped.get(i) for i in range(len(needed))), None)


def _tape_of_step(
    call: Call, x: Tensor, h: Tensor, h_n: Tensor | None, tape: Tensor | None
) -> tuple[Tensor, Tensor]:
    """hs and saved as the operator would have left them, where h and h_n serve as hs."""
    (_, batch, width), sizes = h.shape, _tape("cpu", h.shape[2], h.shape[2])
    hs = x.new_zeros(1, 2 * batch, sizes.hs_row)
    hs[:, :batch, :width] = h.detach()
    if h_n is not None:
        hs[:, batch:, :width] = h_n.detach()
    return hs, x.new_empty(1, batch, 0, sizes.units) if tape is None else tape


# A direct call takes no tensors that a transform has left behind.
_record_step = apply_recorded(_EagerStep)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    """Of both operators: what ``_EagerRecurrent`` and ``_EagerRecomputed`` do."""
    cell, x, h0, c0, weights, masks, batch_sizes, reset, zoneout, h_mask, *rest = inputs
    ctx.call = Call(cell, *rest)
    stages = (reset, zoneout, h_mask)
    between, hs, tape = (*output[3:], None, None)[:3]
    kept = (between, hs, tape)
    ctx.mark_non_differentiable(*output[3:])
    _save(ctx, _Saved(x, h0, c0, masks, batch_sizes, *stages, *kept, tuple(weights)))


def _grad(ctx: Any, dy: Any, dh_n: Any, dc_n: Any, *_: Any) -> Gradients:
    _, x, h0, c0, weights, *rest = ctx.needs_input_grad
    saved, grads = _restore(ctx), (dy, dh_n, dc_n)
    wanted = _reached(ctx.call, saved, grads, (x, h0, c0, *weights))
    backward = _ops.recurrent_backward.default
    dx, dh0, dc0, *dw = _gradients(ctx.call, saved, grads, wanted, backward)
    return (None, dx, dh0, dc0, dw, *(None,) * len(rest))


# ---- the operators where no library has registered its kernels ----
#
# A program that torch.export has saved calls the operators in a process where no module of ours has
# loaded the kernels, or on a machine that has none. What is registered for every device does that,
# until a library registers its kernels, which come first.


def _load_kernels(name: str, otherwise: Callable[..., Any]) -> Callable[..., Any]:
    op, cell_at = getattr(_ops, name).default, _CELL_AT[name]

    def call(*arguments: Any) -> Any:
        cell, x = arguments[cell_at : cell_at + 2]
        return (op if supports([x], cell) else otherwise)(*arguments)

    return call


def _reference_infer(
    cell: str, x: Tensor, h0: Any, c0: Any, weights: Sequence[Tensor], *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    masks, batch_sizes, *stages = rest[:5]
    call = Call(cell, *rest[5:])
    y, h_n, c_n = reference.recurrent(
        cell,
        x,
        h0,
        c0,
        weights,
        masks,
        batch_sizes,
        *call[1:4],
        stages=_stages_of(call, stages),
        every_state=call.every_state,
    )
    return y, h_n, x.new_empty((*h_n.shape[:2], 0)) if c_n is None else c_n


def _reference_recomputed(*inputs: Any) -> tuple[Tensor, ...]:
    return *_reference_infer(*inputs), inputs[1].new_empty(0)


def _reference_recurrent(*inputs: Any) -> tuple[Tensor, ...]:
    x = inputs[1]
    return *_reference_infer(*inputs), x.new_empty(0), x.new_empty(0), x.new_empty(0)


def _no_backward(*arguments: Any) -> Any:
    raise RuntimeError(
        "An exported program trains on native kernels only, which are not there: "
        "python -m fused_rnn doctor"
    )


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


def _backward_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    dy, dh_n, dc_n, _, _, _, needs, cell, x, h0, c0, weights, masks, batch_sizes, *rest = inputs
    *stages, ctx.call = *rest[:3], Call(cell, *rest[3:])
    ctx.needs = needs
    ctx.set_materialize_grads(False)
    tensors = (dy, dh_n, dc_n, masks, batch_sizes, *stages, x, h0, c0, *weights)
    ctx.there = [t is not None for t in tensors]
    ctx.save_for_backward(*(t for t in tensors if t is not None))


def _backward_grad(ctx: Any, *ggs: Any) -> Gradients:
    rest = iter(ctx.saved_tensors)
    dy, dh_n, dc_n, masks, batch_sizes, reset, zoneout, h_mask, *tensors = (
        next(rest) if there else None for there in ctx.there
    )
    call: Call = ctx.call

    def forward(x: Tensor, h0: Any, c0: Any, *weights: Any) -> Any:
        return reference.recurrent(
            call.cell,
            x,
            h0,
            c0,
            weights,
            masks,
            batch_sizes,
            *call[1:4],
            stages=_stages_of(call, (reset, zoneout, h_mask)),
            every_state=call.every_state,
        )

    *first, dw = ggs
    wanted = [i in ctx.needs for i in range(len(tensors))]
    grads = _vjp_grads(forward, tensors, (dy, dh_n, dc_n), wanted, (*first, *(dw or ())))
    cotangents, (dx, dh0, dc0, *ddw) = grads[:3], grads[3:]
    return (*cotangents, None, None, None, None, None, dx, dh0, dc0, ddw, *(None,) * 13)


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
    names = [argument.name for argument in getattr(_ops, name).default._schema.arguments]
    x_at = _CELL_AT[name] + 1

    def call(*arguments: Any) -> Any:
        x = arguments[x_at]
        for what, value in zip(names, arguments, strict=False):
            many = isinstance(value, (list, tuple))
            for i, t in enumerate(value if many else (value,)):
                if isinstance(t, Tensor) and what != "batch_sizes":
                    _check_alike(f"{what}[{i}]" if many else what, t, x)
        if x.dtype not in _DTYPES:
            *most, last = (str(dtype) for dtype in _DTYPES)
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
        "recurrent_backward": _no_backward,
    }
    fakes: dict[str, Callable[..., tuple[Any, ...]]] = {
        "recurrent_infer": _infer_fake,
        "recurrent": _fake,
        "recurrent_recomputed": _recomputed_fake,
        "recurrent_backward": _backward_fake,
    }
    gradients: dict[str, tuple[Callable[..., Any], Callable[..., None]]] = {
        "recurrent": (_grad, _setup),
        "recurrent_recomputed": (_grad, _setup),
        "recurrent_backward": (_backward_grad, _backward_setup),
    }
    for name in _SCHEMAS:
        path, op = f"fused_rnn::{name}", getattr(_ops, name).default
        load = _checked(name, _load_kernels(name, otherwise[name]))
        library.impl(name, load, "CompositeExplicitAutograd")
        torch.library.register_fake(path, _checked(name, fakes[name]), lib=library)
        torch.library.register_vmap(path, _vmap_by_slices(op), lib=library)
        if name in gradients:
            gradient, setup = gradients[name]
            torch.library.register_autograd(path, gradient, setup_context=setup, lib=library)


if _registered is None:
    _register(_library)
    _ops._registered = (_SCHEMAS, _library)
