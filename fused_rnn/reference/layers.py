"""A stack of layers over a whole sequence."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from .cells import CELLS
from .direction import run_direction
from .stages import NO_STAGES, Stages
from .tensors import Weights, by_name, count_runs, widths


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
    stages: Stages = NO_STAGES,
    every_state: bool = False,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Run a stack of layers over a whole sequence.

    Args:
        cell: one of ``CELLS``.
        x: [T, B, I], or packed rows [R, I] with ``batch_sizes``, both of any strides.
        h0: [L*D, B, P], layer-major; None for zeros.
        c0: [L*D, B, C], or None for zeros, and for a cell without states beside h.
        weights: the tensors of each layer and direction in turn, in the order of ``Cell.tensors``;
            then, for a cell that has it, what is given to all of them, [T, B, given * H], or rows.
        masks: [L-1, rows of x.., D*P], which multiply what a layer gives to the next, or None.
        batch_sizes: [T] int64 on the CPU, not increasing: rows of x that belong to each step.
        layers, directions: L and D; the second direction runs backwards in time.
        present: which of ``Cell.tensors`` there are, see ``present_bits``.
        recompute: the backward runs each layer again instead of keeping what it computed.
        stages: what happens between two steps.
        every_state: return the states after every step for the last ones.

    Returns:
        y [T, B, D*P] (packed: [R, D*P]), h_n [L*D, B, P] and c_n [L*D, B, C] or None. With
        ``every_state`` h_n and c_n have the rows of x, T*B or R of them, in the place of B.
    """
    runs = by_name(cell, present, weights)
    h0, c0 = initial_states(cell, x, h0, c0, weights, batch_sizes, present, stages.blocks)
    run_layer = _layer_again if recompute else _layer
    h_n, c_n = [], []
    for i in range(layers):
        part = slice(i * directions, (i + 1) * directions)
        c0_i = None if c0 is None else c0[part]
        own = stages.of_states(lambda t, part=part: t[..., part, :, :])  # type: ignore[misc]
        x, h, c = run_layer(cell, x, h0[part], c0_i, runs[part], batch_sizes, own, every_state)
        if masks is not None and i + 1 < layers:
            x = x * masks[i][: x.shape[0]]
        h_n.append(h)
        c_n.append(c)
    if layers == 1:
        return x, h_n[0], c_n[0]
    return x, torch.cat(h_n), None if c0 is None else torch.cat(c_n)  # type: ignore[arg-type]


def initial_states(
    cell: str,
    x: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    weights: Sequence[Tensor],
    batch_sizes: Tensor | None,
    present: int,
    blocks: int = 1,
) -> tuple[Tensor, Tensor | None]:
    """The states given, or zeros; for the arguments of ``recurrent``."""
    others = len(CELLS[cell].states) - 1
    if h0 is not None and (c0 is not None or not others):
        return h0, c0
    runs, batch = count_runs(cell, present, weights), x.shape[1]
    if batch_sizes is not None:
        batch = batch_sizes[0]  # type: ignore[assignment]
    width, units = widths(cell, weights, present, blocks)
    if h0 is None:
        h0 = torch.zeros(runs, batch, width, dtype=x.dtype, device=x.device)
    if c0 is None and others:
        c0 = torch.zeros(runs, batch, others * units, dtype=x.dtype, device=x.device)
    return h0, c0


def _wide(dtype: torch.dtype) -> torch.dtype:
    """16-bit types are computed in float32 and rounded once at the end."""
    return torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype


def _layer(
    cell: str,
    x: Tensor,
    h0: Tensor,
    c0: Tensor | None,
    runs: Sequence[Weights],
    batch_sizes: Tensor | None,
    stages: Stages,
    every_state: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """One layer of D = ``len(runs)`` directions."""
    dtype = x.dtype
    wide = _wide(dtype)
    sizes = None
    if batch_sizes is not None:
        sizes = batch_sizes.tolist()
        if sizes != sorted(sizes, reverse=True) or sizes[0] != h0.shape[1] or sizes[-1] < 1:
            raise RuntimeError(
                f"batch_sizes: expected positive, not increasing, from {h0.shape[1]} on, "
                f"got {sizes}"
            )
        x = x[: sum(sizes)]  # as torch.nn: rows that belong to no step are left out
    ys, hs, cs = [], [], []
    for d, run in enumerate(runs):
        y, h, c = run_direction(
            CELLS[cell],
            x.to(wide),
            h0[d].to(wide),
            None if c0 is None else c0[d].to(wide),
            {name: w.to(wide) for name, w in run.items()},
            sizes,
            stages.of_states(lambda t, d=d: t.select(-3, d).to(wide)),  # type: ignore[misc]
            every_state,
            reverse=d == 1,
        )
        ys.append(y)
        hs.append(h)
        cs.append(c)
    c_n = None if c0 is None else torch.stack(cs).to(dtype)  # type: ignore[arg-type]
    return torch.cat(ys, -1).to(dtype), torch.stack(hs).to(dtype), c_n


def _layer_again(
    cell: str, x: Tensor, h0: Tensor, c0: Tensor | None, runs: Sequence[Weights], *rest: Any
) -> Any:
    """``_layer``, but the backward runs the forward again instead of keeping what it computed."""
    names = list(runs[0])

    def call(x: Tensor, h0: Tensor, c0: Tensor | None, *flat: Tensor) -> Any:
        again = [
            dict(zip(names, flat[i : i + len(names)], strict=True))
            for i in range(0, len(flat), len(names))
        ]
        return _layer(cell, x, h0, c0, again, *rest)

    # Tensors in a list would be held past autograd, which then could not see them change.
    flat = [run[name] for run in runs for name in names]
    return checkpoint(call, x, h0, c0, *flat, use_reentrant=False, preserve_rng_state=False)
