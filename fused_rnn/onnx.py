"""Layers as ONNX's own operators, for ``torch.onnx.export(dynamo=True)``.

What that exporter makes of torch's operators holds for the number of steps of the example alone, in
most cases without a word. Here one layer becomes one node of RNN, LSTM or GRU, in which batch and
time stay dynamic.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import reference
from .reference import NO_STAGES, PROJECTION, Stages, Weights

# Operator, our gates in the order of its rows, and what else it has to be told.
_OPERATORS: dict[str, tuple[str, list[int], dict[str, Any]]] = {
    "rnn_tanh": ("RNN", [0], {"activations": ["Tanh"]}),
    "rnn_relu": ("RNN", [0], {"activations": ["Relu"]}),
    "lstm": ("LSTM", [0, 3, 1, 2], {}),
    "gru": ("GRU", [1, 0, 2], {"linear_before_reset": 1}),
    "peephole_lstm": ("LSTM", [0, 3, 1, 2], {}),
}
# Of a cell with parameters, in the order of the operator's input P.
_PEEPHOLES = ("p_i", "p_o", "p_f")


def exporting() -> bool:
    """Whether ``torch.onnx.export(dynamo=True)`` is tracing."""
    return torch.compiler.is_exporting() and torch.onnx.is_in_onnx_export()


def check_packed() -> None:
    """Raise RuntimeError where ``torch.onnx.export`` cannot take a PackedSequence."""
    if exporting():
        raise RuntimeError(
            "torch.onnx.export(dynamo=True) takes no PackedSequence. Export with dynamo=False, "
            "which takes those of RNN, LSTM (without proj_size) and GRU, or pass padded sequences"
        )


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
    """The contract of ``reference.recurrent``, which unrolls what ONNX has no operator for."""
    usual = stages.nothing and not every_state and batch_sizes is None is masks
    if not usual or cell not in _OPERATORS or present & PROJECTION:
        return reference.recurrent(
            cell,
            x,
            h0,
            c0,
            weights,
            masks,
            batch_sizes,
            layers,
            directions,
            present,
            stages=stages,
            every_state=every_state,
        )
    h0, c0 = reference.initial_states(cell, x, h0, c0, weights, batch_sizes, present)
    runs = reference.by_name(cell, present, weights)
    h_n, c_n = [], []
    for i in range(layers):
        part = slice(i * directions, (i + 1) * directions)
        x, h, c = _layer(cell, x, h0[part], None if c0 is None else c0[part], runs[part])
        h_n.append(h)
        c_n.append(c)
    return x, torch.cat(h_n), None if c0 is None else torch.cat(c_n)  # type: ignore[arg-type]


def _layer(
    cell: str, x: Tensor, h0: Tensor, c0: Tensor | None, runs: Sequence[Weights]
) -> tuple[Tensor, Tensor, Tensor | None]:
    operator, order, attributes = _OPERATORS[cell]
    directions, batch, width = h0.shape

    def rows(weight: Tensor) -> Tensor:  # in slices, which the exporter computes
        return torch.cat([weight[gate * width : (gate + 1) * width] for gate in order])

    w_ih = torch.stack([rows(run["w_ih"]) for run in runs])
    w_hh = torch.stack([rows(run["w_hh"]) for run in runs])
    biases = [torch.cat([rows(run["b_ih"]), rows(run["b_hh"])]) for run in runs if "b_hh" in run]
    peepholes = [torch.cat([run[name] for name in _PEEPHOLES]) for run in runs if "p_i" in run]
    states = [h0] if c0 is None else [h0, c0]
    attributes = {"hidden_size": width, **attributes}
    if "activations" in attributes:
        attributes["activations"] = attributes["activations"] * directions
    if directions == 2:
        attributes["direction"] = "bidirectional"
    y, *last = torch.onnx.ops.symbolic_multi_out(
        operator,
        [x, w_ih, w_hh, torch.stack(biases) if biases else None]
        + [None, *states]  # all sequences have the length of x
        + ([torch.stack(peepholes)] if peepholes else []),
        attributes,
        dtypes=[x.dtype] * (1 + len(states)),
        shapes=[(x.shape[0], directions, batch, width)] + [s.shape for s in states],
    )
    return y.transpose(1, 2).flatten(2), last[0], last[1] if c0 is not None else None
