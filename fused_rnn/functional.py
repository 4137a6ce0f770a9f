"""Pure functions behind the modules: a stack of recurrent layers, and one step of a cell.

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

import functools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import _VF, Tensor
from torch.nn import Parameter

from . import onnx, ops, reference
from .reference import BIASES, CELLS, PROJECTION, present_bits
from .torch_internals import dispatch_modes, transformed

__all__ = [
    "called_directly",
    "check_packed",
    "present_bits",
    "recurrent",
    "recurrent_directly",
    "step",
]

_TORCH_STACK: dict[str, Any] = {
    "rnn_tanh": _VF.rnn_tanh,
    "rnn_relu": _VF.rnn_relu,
    "lstm": _VF.lstm,
    "gru": _VF.gru,
}
_TORCH_CELL: dict[str, Any] = {
    "rnn_tanh": _VF.rnn_tanh_cell,
    "rnn_relu": _VF.rnn_relu_cell,
    "lstm": _VF.lstm_cell,
    "gru": _VF.gru_cell,
}


# --- The choice of an engine ---------------------------------------------------------------------


def _wants_torch_operator(x: Tensor, weights: Iterable[Tensor | None]) -> bool:
    if x.is_complex() or x.layout != torch.strided:
        return True
    if x.device.type not in ("cpu", "cuda", "meta"):
        return True
    if torch.compiler.is_dynamo_compiling():
        return False
    return torch.jit.is_tracing() or any(map(_answers_itself, weights))


_USUAL_ANSWERS = (
    Tensor.__torch_function__.__func__,  # type: ignore[attr-defined]
    Parameter.__torch_function__,
)


def _answers_itself(weight: Tensor | None) -> bool:
    """Whether it is of a class that puts code of its own in the place of torch's functions: it may
    know torch.nn's operators, as torch's ExpandedWeight does, and knows nothing of ours."""
    if weight is None or type(weight) is Parameter:
        return False
    answer: Any = type(weight).__torch_function__
    return getattr(answer, "__func__", answer) not in _USUAL_ANSWERS


def _engine(cell: str, x: Tensor, states: Sequence[Tensor], weights: Sequence[Tensor]) -> Any:
    """``ops``, ``reference`` or ``onnx``: all have ``recurrent``."""
    if onnx.exporting():
        return onnx
    # Of what torch's operators are asked for, those of torch.nn's cells do not come here.
    if (
        not _wants_torch_operator(x, weights)
        and not transformed()
        and ops.supports([x, *states, *weights], cell)
    ):
        return ops
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
    return reference


def _type_name(tensor: Tensor) -> str:
    """The name that torch's own messages use, such as Float or BFloat16."""
    return tensor.type().rpartition(".")[2].removesuffix("Tensor")


# --- Autocast ------------------------------------------------------------------------------------


def _autocast_dtype(
    x: Tensor, states: Sequence[Tensor], weights: Sequence[Tensor]
) -> torch.dtype | None:
    """The dtype autocast asks for, or None: switched off, or double, which it never casts."""
    device = x.device.type
    if device not in ("cpu", "cuda") or not torch.is_autocast_enabled(device):
        return None
    if any(t.dtype == torch.float64 for t in (x, *states, *weights)):
        return None
    return torch.get_autocast_dtype(device)


def _autocast_results(
    cell: str,
    low: torch.dtype,
    x: Tensor,
    states: Sequence[Tensor],
    *,
    projected: bool,
    fused: bool,
) -> tuple[torch.dtype, torch.dtype]:
    """The dtypes of h and c that torch.nn returns under autocast to ``low``; y has that of h.

    On the CPU products come out in ``low``, and a state that is mixed in elementwise promotes the
    result to its own dtype. So, with a dtype that a state brings along (zeros have that of x):

    ======================================  ===============  ===============
    cell                                    h                c
    ======================================  ===============  ===============
    RNN                                     low
    GRU                                     wider of low, h
    LSTM                                    wider of low, c  wider of low, c
    LSTM, projected: h is one more product  low              wider of low, c
    LSTM of layers that oneDNN runs         low              low
    ======================================  ===============  ===============

    ``fused`` says whether the last row holds, see ``_fused_by_torch``. On CUDA everything is cast
    first. tests/test_transforms.py tries the table against the torch that is there.
    """
    if x.is_cuda:
        return low, low
    mixed = torch.promote_types(low, states[-1].dtype if states else x.dtype)
    if len(CELLS[cell].states) == 1:
        h_dtype = mixed if CELLS[cell].reads_h else low
        return h_dtype, h_dtype
    if fused and not projected:
        return low, low
    c_dtype = mixed
    return low if projected else c_dtype, c_dtype


def _fused_by_torch(x: Tensor, batch_sizes: Tensor | None) -> bool:
    """Whether torch.nn hands an LSTM without projection to oneDNN for this input.

    Padded batches that are not empty, of the dtypes that oneDNN takes here; from torch 2.13 on also
    packed ones whose sequences are equally long. How long they are cannot be asked of what a
    compiler traces; they then count as unequal.
    """
    if x.numel() == 0 or not ops.onednn_takes(x.dtype):
        return False
    if batch_sizes is None:
        return True
    if torch.compiler.is_compiling() or torch.__version__ < "2.13":
        return False
    return type(batch_sizes) is Tensor and bool(batch_sizes[0] == batch_sizes[-1])


# --- Direct calls --------------------------------------------------------------------------------
#
# What most calls come to on the CPU: everything below in one function of the library, or for single
# layers that want gradients at least the checks. It compares all tensors with each other, and where
# it would have to convert, copy or complain it returns None. Then nothing has happened, and the
# functions below do the work.

called_directly = ops.called_directly  # of whole modules


def recurrent_directly(
    cell: str,
    x: Tensor,
    hx: Any,
    parameters: Mapping[str, Tensor | None],
    names: list[str],
    num_layers: int,
    bidirectional: bool,
    present: int,
    batch_first: bool,
) -> Any:
    """``recurrent`` without dropout and gradients, to (y, hx); or None.

    hx is h, or a pair (h, c), and comes back in that form; None is zeros. The weights are those
    parameters that ``names`` says. If ``batch_first``, x and y have that layout.
    """
    calls = ops.direct_calls(x)
    if not calls:
        return None
    states = hx if isinstance(hx, (tuple, list)) else (hx,)
    weights = [parameters.get(name) for name in names]
    if any(map(_answers_itself, weights)) or ops.wants_grad((*weights, x, *states)):
        return None
    directions = 2 if bidirectional else 1
    return calls.infer_stack(
        cell, x, hx, parameters, names, num_layers, directions, present, batch_first
    )


def step_directly(
    cell: str, x: Tensor, hx: Any, parameters: Mapping[str, Tensor | None], names: list[str]
) -> Any:
    """``step``, to hx, or None. B may be missing everywhere; as in ``recurrent_directly``."""
    calls = ops.direct_calls(x)
    return calls.step(cell, x, hx, parameters, names) if calls else None


# --- A stack of layers ---------------------------------------------------------------------------

check_packed = onnx.check_packed


def recurrent(
    cell: str,
    x: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    weights: Sequence[Tensor],
    *,
    num_layers: int,
    bidirectional: bool,
    present: int,
    batch_first: bool = False,
    dropout: float = 0.0,
    training: bool = False,
    batch_sizes: Tensor | None = None,
    recompute: bool = False,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Run L layers of D directions over a whole sequence.

    Args:
        cell: one of ``reference.CELLS``.
        x: [T, B, I], or the rows [R, I] of a PackedSequence with its ``batch_sizes``.
        h0: [L*D, B, P], layer-major; None for zeros.
        c0: [L*D, B, C]; None for zeros, and for a cell without states beside h.
        weights: flat: for each layer and direction the tensors of the cell, in their order.
        present: which of these there are, see ``present_bits``.
        batch_first: x and y are [B, T, features].
        dropout: probability of zeroing an output of any layer but the last, while ``training``.
        recompute: keep no more for the backward than the inputs of each layer, which runs again
            there. Torch's operators and transforms do not know it, and keep what they keep.

    Returns:
        y [T, B, D*P] (packed: [R, D*P]), h_n like h0, c_n like c0.
    """
    directions = 2 if bidirectional else 1
    if len(weights) != num_layers * directions * present.bit_count():
        raise RuntimeError(
            f"{len(weights)} weights do not fit num_layers, bidirectional and bias, which are read "
            "at every call"
        )
    if _wants_torch_operator(x, weights) and cell in _TORCH_STACK:
        config = (num_layers, dropout, training, bool(bidirectional))
        return _by_torch(cell, x, h0, c0, weights, present, config, batch_first, batch_sizes)

    if batch_first:
        x = x.transpose(0, 1)
    if x.shape[0] == 0:
        raise RuntimeError("Expected sequence length to be larger than 0 in RNN")
    shape = (num_layers, directions, present)
    low = _autocast_dtype(x, _present((h0, c0)), weights)
    run = _run if low is None else functools.partial(_run_autocast, low)
    y, h_n, c_n = run(
        cell, x, h0, c0, weights, shape, dropout if training else 0.0, batch_sizes, recompute
    )
    if batch_first:
        y = y.transpose_(0, 1) if reshapes_in_place(y) else y.transpose(0, 1)
    return y, h_n, c_n


def _present(tensors: Sequence[Tensor | None]) -> list[Tensor]:
    return [t for t in tensors if t is not None]


def _run_autocast(
    low: torch.dtype,
    cell: str,
    x: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    weights: Sequence[Tensor],
    shape: tuple[int, int, int],
    dropout: float,
    batch_sizes: Tensor | None,
    recompute: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """``_run`` under autocast to ``low``."""
    states = _present((h0, c0))
    fused = len(CELLS[cell].states) > 1 and _fused_by_torch(x, batch_sizes)
    projected = bool(shape[2] & PROJECTION)
    h_dtype, c_dtype = _autocast_results(cell, low, x, states, projected=projected, fused=fused)
    wide = torch.promote_types(h_dtype, c_dtype)  # compute so, and round once at the end
    kept = _kept_for_backward(x, states, weights)
    with torch.autocast(x.device.type, enabled=False):
        y, h_n, c_n = _run(
            cell,
            x.to(wide, copy=kept, memory_format=torch.contiguous_format),
            None if h0 is None else h0.to(wide, copy=kept),
            None if c0 is None else c0.to(wide, copy=kept),
            [w.to(wide) for w in weights],
            shape,
            dropout,
            batch_sizes,
            recompute,
        )
        return y.to(h_dtype), h_n.to(h_dtype), None if c_n is None else c_n.to(c_dtype)


def _kept_for_backward(x: Tensor, states: Sequence[Tensor], weights: Sequence[Tensor]) -> bool:
    """Whether autograd will keep x and the states, and notice if somebody changes them.

    torch.nn then keeps copies of what it has to cast, and of what is not contiguous, as are inputs
    that are batch-first. So programs write into their inputs as soon as a call has returned
    (``x += rnn(x)[0]``), and we copy the same. A compiler knows by itself who writes where.
    """
    return ops.wants_grad((x, *states, *weights)) and not torch.compiler.is_compiling()


def _run(
    cell: str,
    x: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    weights: Sequence[Tensor],
    shape: tuple[int, int, int],
    dropout: float,
    batch_sizes: Tensor | None,
    recompute: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """``recurrent`` for tensors of one dtype; ``shape`` is (layers, directions, present)."""
    engine = _engine(cell, x, _present((h0, c0)), weights)
    if _kept_for_backward(x, _present((h0, c0)), weights):
        x = x.contiguous()
        h0, c0 = (None if s is None else s.contiguous() for s in (h0, c0))
    layers, directions, present = shape
    masks = None
    if layers > 1 and dropout > 0:  # torch.nn's numbers: layer by layer, in its shape
        _, width = reference.units_of(cell, present, weights)
        ones = x.new_ones((*x.shape[:-1], directions * width))
        masks = torch.stack([F.dropout(ones, dropout, training=True) for _ in range(layers - 1)])
    found: tuple[Tensor, Tensor, Tensor | None] = engine.recurrent(
        cell, x, h0, c0, weights, masks, batch_sizes, *shape, recompute and not transformed()
    )
    return found


def _by_torch(
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
        result = _TORCH_STACK[cell](x, hx, list(weights), *config, bool(batch_first))
    else:
        result = _TORCH_STACK[cell](x, batch_sizes, hx, list(weights), *config)
    return result if c0 is not None else (*result, None)


# --- One step of a cell --------------------------------------------------------------------------


def step(
    cell: str,
    x: Tensor,
    h: Tensor,
    c: Tensor | None,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None,
    b_hh: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """One step for x [B, I], h [B, H] and c [B, C] or None; returns the new h and c."""
    states = (h,) if c is None else (h, c)
    if _wants_torch_operator(x, (w_ih, w_hh, b_ih, b_hh)):
        result = _TORCH_CELL[cell](x, h if c is None else states, w_ih, w_hh, b_ih, b_hh)
        return (result, None) if c is None else result

    _check_step(x, states, w_ih, w_hh)
    run = (w_ih, w_hh, b_ih, b_hh)  # people drop one bias of the two
    present = sum(1 << i for i, w in enumerate(run) if w is not None)
    weights = [w for w in run if w is not None]
    low = _autocast_dtype(x, states, weights)
    if low is None:
        return _step(cell, x, states, weights, present)
    h_dtype, c_dtype = _autocast_results(cell, low, x, states, projected=False, fused=False)
    kept = _kept_for_backward(x, states, weights)
    with torch.autocast(x.device.type, enabled=False):
        cast = [w.to(h_dtype) for w in weights]
        x = x.to(h_dtype, copy=kept)
        kept_states = [s.to(h_dtype, copy=kept) for s in states]
        h_new, c_new = _step(cell, x, kept_states, cast, present)
        return h_new, None if c_new is None else c_new.to(c_dtype)


def _step(
    cell: str, x: Tensor, states: Sequence[Tensor], weights: Sequence[Tensor], present: int
) -> tuple[Tensor, Tensor | None]:
    """A sequence of length 1."""
    engine = _engine(cell, x, states, weights)
    if x.numel() == 0 or states[0].numel() == 0:  # nothing for a kernel to do
        engine = reference
    h, c = states[0], states[1] if len(states) > 1 else None
    _, h_n, c_n = engine.recurrent(
        cell,
        x.unsqueeze(0),
        h.unsqueeze(0),
        None if c is None else c.unsqueeze(0),
        weights,
        None,
        None,
        1,
        1,
        present,
    )
    return _one_step(h_n), None if c_n is None else _one_step(c_n)


def _one_step(states: Tensor) -> Tensor:
    """States of one layer without the dimension of layers."""
    return states.squeeze_(0) if reshapes_in_place(states) else states.squeeze(0)


def reshapes_in_place(result: Tensor) -> bool:
    """Whether an engine's result should change its shape in place rather than become a view, which
    torch.nn's results are not, and which ``detach_()`` refuses.

    Tracers are better off with views. A mode may have kept the tensor, as selective checkpoints do,
    and a subclass of Tensor is a view already, which autograd lets nobody change.
    """
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return False
    return type(result) is Tensor and dispatch_modes() == 0


def _check_step(x: Tensor, states: Sequence[Tensor], w_ih: Tensor, w_hh: Tensor) -> None:
    if x.shape[1] != w_ih.shape[1]:
        raise RuntimeError(
            f"input has inconsistent input_size: got {x.shape[1]} expected {w_ih.shape[1]}"
        )
    for i, state in enumerate(states):
        if state.dim() != 2:
            raise RuntimeError(
                f"Expected 2D hidden{i} (batch x hidden_size), but got {state.dim()}D tensor"
            )
        if state.shape[0] != x.shape[0]:
            raise RuntimeError(
                f"Input batch size {x.shape[0]} doesn't match hidden{i} batch size {state.shape[0]}"
            )
        if state.shape[1] != w_hh.shape[1]:
            raise RuntimeError(
                f"hidden{i} has inconsistent hidden_size: got {state.shape[1]}, "
                f"expected {w_hh.shape[1]}"
            )
