"""Pure functions behind the modules: a stack of recurrent layers, and one step of a cell.

``engines.py`` says which engine does the work.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import autocast, engines, ops, reference, segments
from .between import NOTHING, BetweenSteps
from .in_place import kept_for_backward, reshapes_in_place
from .packed import NOT_PACKED, Packed
from .reference import CELLS, NO_STAGES, PROJECTION, Stages
from .torch_internals import transformed

__all__ = ["recurrent", "step"]

# --- A stack of layers ---------------------------------------------------------------------------


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
    between: BetweenSteps = NOTHING,
    reset: Tensor | None = None,
    reset_to: tuple[Tensor, Tensor | None] | None = None,
    every_state: bool = False,
    given: Tensor | None = None,
    packed: Packed = NOT_PACKED,
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
        between: what happens between two steps.
        reset: [T, B] bool, or packed rows [R]: where states begin anew before the step.
        reset_to: h and c that they begin with, like h0 and c0, or for each step [T, L*D, B, ..];
            None for zeros.
        every_state: return the states after every step.
        given: [T, B, given * H], or packed rows, to a cell that asks for it, in all layers.
        packed: what kernels may read in the place of the weights.

    Returns:
        y [T, B, D*P] (packed: [R, D*P]), h_n like h0, c_n like c0. With ``every_state`` h_n and c_n
        have the rows of x, T*B or R of them, in the place of B.
    """
    directions = 2 if bidirectional else 1
    if len(weights) != num_layers * directions * present.bit_count():
        raise RuntimeError(
            f"{len(weights)} weights do not fit num_layers, bidirectional and bias, which are read "
            "at every call"
        )
    if given is not None:  # is differentiable as they are, and as they are of one dtype
        weights = [*weights, given]
    usual = between is NOTHING and reset is None and not every_state
    wants_torch = engines.wants_torch_operator(x, weights)
    if wants_torch and usual and cell in engines.TORCH_CELLS:
        config = (num_layers, dropout, training, bool(bidirectional))
        return engines.by_torch(cell, x, h0, c0, weights, present, config, batch_first, batch_sizes)

    if batch_first:
        x = x.transpose(0, 1)
    if x.shape[0] == 0:
        raise RuntimeError("Expected sequence length to be larger than 0 in RNN")
    how = _How(
        cell,
        (num_layers, directions, present),
        dropout if training and num_layers > 1 else 0.0,
        training,
        batch_sizes,
        recompute,
        between,
        reset,
        every_state,
        packed,
        wants_torch,
    )
    states = (h0, c0, *(reset_to or (None, None)))
    low = autocast.dtype_for(x, _present(states), weights)
    run = _run if low is None else functools.partial(_run_autocast, low)
    y, h_n, c_n = run(how, x, states, weights)
    if batch_first:
        y = y.transpose_(0, 1) if reshapes_in_place(y) else y.transpose(0, 1)
    return y, h_n, c_n


class _How(NamedTuple):
    """What a call is about beside floating tensors."""

    cell: str
    shape: tuple[int, int, int]  # layers, directions, present
    dropout: float
    training: bool
    batch_sizes: Tensor | None
    recompute: bool
    between: BetweenSteps
    reset: Tensor | None
    every_state: bool
    packed: Packed
    wants_torch: bool  # whether torch's operator is wanted, which does not exist for this


States = tuple[Tensor | None, ...]  # h0, c0, and the h and c after a reset


def _present(tensors: Sequence[Tensor | None]) -> list[Tensor]:
    return [t for t in tensors if t is not None]


def _run_autocast(
    low: torch.dtype, how: _How, x: Tensor, states: States, weights: Sequence[Tensor]
) -> tuple[Tensor, Tensor, Tensor | None]:
    """``_run`` under autocast to ``low``."""
    cell, given = how.cell, _present(states)
    fused = len(CELLS[cell].states) > 1 and autocast.fused_by_torch(x, how.batch_sizes)
    projected = bool(how.shape[2] & PROJECTION)
    h_dtype, c_dtype = autocast.dtypes_of_results(
        cell, low, x, _present(states[:2]), projected=projected, fused=fused
    )
    wide = torch.promote_types(h_dtype, c_dtype)  # compute so, and round once at the end
    kept = kept_for_backward(x, given, weights)
    same = all(w.dtype == wide for w in weights)  # others are not those that were frozen
    with torch.autocast(x.device.type, enabled=False):
        y, h_n, c_n = _run(
            how if same else how._replace(packed=NOT_PACKED),
            x.to(wide, copy=kept, memory_format=torch.contiguous_format),
            tuple(None if s is None else s.to(wide, copy=kept) for s in states),
            [w.to(wide) for w in weights],
        )
        return y.to(h_dtype), h_n.to(h_dtype), None if c_n is None else c_n.to(c_dtype)


def _takes(
    engine: Any, how: _How, x: Tensor, states: States, weights: Sequence[Tensor], stages: Stages
) -> bool:
    """Whether an engine has what is to happen between two steps; the reference has all."""
    if engine is not ops or stages.nothing:
        return True
    _, units = reference.widths(how.cell, weights, how.shape[2])
    train = ops.wants_grad((x, *_present(states), *weights))
    return ops.takes(stages, how.cell, units, x.device, train=train)


def _run(
    how: _How, x: Tensor, states: States, weights: Sequence[Tensor]
) -> tuple[Tensor, Tensor, Tensor | None]:
    """``recurrent`` for tensors of one dtype."""
    cell, batch_sizes, between = how.cell, how.batch_sizes, how.between
    present = how.shape[2]
    engine, int8 = engines.engine_of(
        cell, x, _present(states), weights, how.packed, wants_torch=how.wants_torch
    )
    if kept_for_backward(x, _present(states), weights):
        x = x.contiguous()
        states = tuple(None if s is None else s.contiguous() for s in states)
    h0, c0, *anew = states
    masks, stages = None, NO_STAGES
    if between is not NOTHING or how.dropout > 0:
        weights, masks, stages = _drawn(how, x, h0, weights)
    takes = functools.partial(_takes, engine, how, x, states, weights)
    if stages.blocks > 1 and not takes(Stages(blocks=stages.blocks)):
        weights, stages = reference.without_blocks(cell, weights, present, stages)
    if not takes(stages):
        engine = reference

    own = weights[: len(weights) - bool(CELLS[cell].given)]

    def call(
        x: Tensor, h0: Any, c0: Any, masks: Any, batch_sizes: Any, stages: Stages, given: Any
    ) -> Any:
        if engine is reference:
            stages = stages._replace(int8=int8)
        usual = stages.nothing and not how.every_state
        extra = () if usual else (stages, how.every_state)
        packed = how.packed.tensor if engine is ops else None
        recompute = how.recompute and not transformed()
        return engine.recurrent(
            cell,
            x,
            h0,
            c0,
            [*own, *given],
            masks,
            batch_sizes,
            *how.shape,
            recompute,
            *extra,
            **({} if packed is None else {"packed": packed}),
        )

    if how.reset is not None and how.reset.numel() > 0:
        to = None if anew[0] is None else (anew[0], anew[1])
        whole = stages._replace(reset=how.reset, reset_to=to)
        if engine is ops and not takes(whole):
            initial = reference.initial_states(
                cell, x, h0, c0, weights, batch_sizes, present, stages.blocks
            )
            return segments.run(
                call,
                how.reset,
                x,
                initial,
                to or (None, None),
                masks,
                how.batch_sizes,
                stages,
                weights[len(own) :],
                directions=how.shape[1],
                every_state=how.every_state,
            )
        stages = whole
    found: tuple[Tensor, Tensor, Tensor | None] = call(
        x, h0, c0, masks, batch_sizes, stages, weights[len(own) :]
    )
    return found


def _drawn(
    how: _How, x: Tensor, h0: Tensor | None, weights: Sequence[Tensor]
) -> tuple[Sequence[Tensor], Tensor | None, Stages]:
    """The weights of this call, what layers give to the next one, and what happens between steps.

    Random numbers come in this order.
    """
    cell, between, training = how.cell, how.between, how.training
    layers, directions, present = how.shape
    weights = between.weights_of_call(cell, weights, present, training=training)
    widths = reference.widths(cell, weights, present, between.blocks)
    batch: Any
    if h0 is not None:
        batch = h0.shape[1]
    else:
        batch = x.shape[1] if how.batch_sizes is None else how.batch_sizes[0]
    masks = between.masks_between(
        x, how.batch_sizes, batch, layers, directions * widths[0], how.dropout
    )
    runs = layers * directions
    return weights, masks, between.stages(cell, x, batch, runs, widths, training=training)


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
    packed: Packed = NOT_PACKED,
) -> tuple[Tensor, Tensor | None]:
    """One step for x [B, I], h [B, H] and c [B, C] or None; returns the new h and c."""
    states = (h,) if c is None else (h, c)
    if engines.wants_torch_operator(x, (w_ih, w_hh, b_ih, b_hh)):
        result = engines.TORCH_CELL[cell](x, h if c is None else states, w_ih, w_hh, b_ih, b_hh)
        return (result, None) if c is None else result

    _check_step(x, states, w_ih, w_hh)
    run = (w_ih, w_hh, b_ih, b_hh)  # people drop one bias of the two
    present = sum(1 << i for i, w in enumerate(run) if w is not None)
    weights = [w for w in run if w is not None]
    low = autocast.dtype_for(x, states, weights)
    if low is None:
        return _step(cell, x, states, weights, present, packed)
    h_dtype, c_dtype = autocast.dtypes_of_results(
        cell, low, x, states, projected=False, fused=False
    )
    kept = kept_for_backward(x, states, weights)
    with torch.autocast(x.device.type, enabled=False):
        cast = [w.to(h_dtype) for w in weights]
        x = x.to(h_dtype, copy=kept)
        kept_states = [s.to(h_dtype, copy=kept) for s in states]
        h_new, c_new = _step(cell, x, kept_states, cast, present)
        return h_new, None if c_new is None else c_new.to(c_dtype)


def _step(
    cell: str,
    x: Tensor,
    states: Sequence[Tensor],
    weights: Sequence[Tensor],
    present: int,
    packed: Packed = NOT_PACKED,
) -> tuple[Tensor, Tensor | None]:
    """A sequence of length 1."""
    engine, int8 = engines.engine_of(cell, x, states, weights, packed)
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
        **({} if packed.tensor is None or engine is not ops else {"packed": packed.tensor}),
        **({"stages": Stages(int8=True)} if int8 and engine is reference else {}),
    )
    return _one_step(h_n), None if c_n is None else _one_step(c_n)


def _one_step(states: Tensor) -> Tensor:
    """States of one layer without the dimension of layers."""
    return states.squeeze_(0) if reshapes_in_place(states) else states.squeeze(0)


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
