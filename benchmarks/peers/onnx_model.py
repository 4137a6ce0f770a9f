"""A case as an ONNX graph: the LSTM, GRU and RNN operators with torch.nn's weights.

Built node by node, so no exporter stands between us and the runtimes. Input ``x`` [T, B, I] (with
``lengths`` [B] if ragged), and ``h0`` and ``c0`` where calls carry states; outputs ``y``, ``h_n``,
``c_n``.
``y`` of a single direction stays as the operator gives it, [T, 1, B, H], which holds the same
numbers in the same order as [T, B, H].
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..cases import Case
from ..problem import Problem

# ONNX wants i, o, f, c and z, r, h where torch has i, f, g, o and r, z, n.
_ORDER = {"lstm": (0, 3, 1, 2), "gru": (1, 0, 2), "rnn": (0,), "rnn_relu": (0,)}
_OPERATOR = {"lstm": "LSTM", "gru": "GRU", "rnn": "RNN", "rnn_relu": "RNN"}


def refuses(case: Case) -> str | None:
    if case.keeps:
        return "inference only"
    return "ONNX has no projections" if case.proj else None


def arrays(problem: Problem) -> dict[str, np.ndarray]:
    """The inputs of the graph."""
    case = problem.case
    feed = {"x": problem.padded.detach().float().numpy()}
    if case.dtype == "float64":
        feed = {"x": problem.padded.detach().numpy()}
    if case.ragged:
        feed["lengths"] = problem.lengths.to(torch.int32).numpy()
    if case.carries:
        feed["h0"] = problem.h.to(torch.from_numpy(feed["x"]).dtype).numpy()
        if problem.c is not None:
            feed["c0"] = problem.c.to(torch.from_numpy(feed["x"]).dtype).numpy()
    return {name: np.ascontiguousarray(array) for name, array in feed.items()}


def output_shapes(case: Case) -> dict[str, tuple[int, ...]]:
    y: tuple[int, ...] = (
        (case.T, case.B, 2 * case.H) if case.bidirectional else (case.T, 1, case.B, case.H)
    )
    states: tuple[int, ...] = (case.layers * case.directions, case.B, case.H)
    return {"y": y, "h_n": states} | ({"c_n": states} if case.cell == "lstm" else {})


def named(problem: Problem, found: dict[str, np.ndarray]) -> dict[str, Tensor]:
    """Results in torch.nn's layout."""
    case = problem.case
    results = {name: torch.from_numpy(np.array(value)) for name, value in found.items()}
    results["y"] = results["y"].reshape(case.T, case.B, -1)
    if case.ragged:
        results["y"] = problem.pack(results["y"]).data
    return results


def build(problem: Problem) -> bytes:
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    case = problem.case
    feed = arrays(problem)
    kind = TensorProto.DOUBLE if case.dtype == "float64" else TensorProto.FLOAT
    nodes: list[Any] = []
    constants: list[Any] = []

    def constant(name: str, value: np.ndarray) -> str:
        constants.append(numpy_helper.from_array(np.ascontiguousarray(value), name))
        return name

    def state(name: str, layer: int) -> str:
        """The part of h0 or c0 that is this layer's."""
        if not case.carries:
            return ""
        if case.layers == 1:
            return name
        start = constant(f"{name}_from{layer}", np.array([layer * case.directions]))
        stop = constant(f"{name}_to{layer}", np.array([(layer + 1) * case.directions]))
        axis = constant(f"{name}_axis{layer}", np.array([0]))
        nodes.append(helper.make_node("Slice", [name, start, stop, axis], [f"{name}_{layer}"]))
        return f"{name}_{layer}"

    states = ["h", "c"] if case.cell == "lstm" else ["h"]
    x = "x"
    for layer in range(case.layers):
        w, r, b = (_weights(problem, layer, kind_of) for kind_of in ("ih", "hh", "bias"))
        last = layer == case.layers - 1
        raw = "y" if last and not case.bidirectional else f"raw{layer}"
        one = case.layers == 1
        attributes: dict[str, Any] = {
            "hidden_size": case.H,
            "direction": "bidirectional" if case.bidirectional else "forward",
        }
        if case.cell == "gru":
            attributes["linear_before_reset"] = 1
        if case.cell.startswith("rnn"):
            name = "Relu" if case.cell == "rnn_relu" else "Tanh"
            attributes["activations"] = [name] * case.directions
        inputs = [
            x,
            constant(f"W{layer}", w),
            constant(f"R{layer}", r),
            constant(f"B{layer}", b) if case.bias else "",
            "lengths" if case.ragged else "",
            *(state(f"{s}0", layer) for s in states),
        ]
        results = [raw, *(f"{s}_n" if one else f"{s}_n{layer}" for s in states)]
        nodes.append(helper.make_node(_OPERATOR[case.cell], inputs, results, **attributes))
        x = raw
        if case.bidirectional:  # [T, 2, B, H] -> [T, B, 2H]
            x = "y" if last else f"x{layer + 1}"
            shape = constant(f"shape{layer}", np.array([case.T, case.B, 2 * case.H]))
            nodes.append(
                helper.make_node("Transpose", [raw], [f"turned{layer}"], perm=[0, 2, 1, 3])
            )
            nodes.append(helper.make_node("Reshape", [f"turned{layer}", shape], [x]))
        elif not last:  # [T, 1, B, H] -> [T, B, H]
            axis = constant(f"squeeze{layer}", np.array([1]))
            x = f"x{layer + 1}"
            nodes.append(helper.make_node("Squeeze", [raw, axis], [x]))
    if case.layers > 1:
        for s in states:
            parts = [f"{s}_n{layer}" for layer in range(case.layers)]
            nodes.append(helper.make_node("Concat", parts, [f"{s}_n"], axis=0))

    given = [
        helper.make_tensor_value_info(
            name, TensorProto.INT32 if name == "lengths" else kind, list(array.shape)
        )
        for name, array in feed.items()
    ]
    wanted = [
        helper.make_tensor_value_info(name, kind, list(shape))
        for name, shape in output_shapes(case).items()
    ]
    graph = helper.make_graph(nodes, "layers", given, wanted, constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    onnx.checker.check_model(model)
    return model.SerializeToString()


def _weights(problem: Problem, layer: int, which: str) -> np.ndarray:
    """[D, G*H, I] of W_ih or W_hh, or the biases [D, 2*G*H], in ONNX's order of gates."""
    directions = []
    for suffix in ["", "_reverse"][: problem.case.directions]:
        names = [f"weight_{which}"] if which != "bias" else ["bias_ih", "bias_hh"]
        if which == "bias" and not problem.case.bias:
            return np.zeros(0)
        found = [getattr(problem.module, f"{name}_l{layer}{suffix}").detach() for name in names]
        directions.append(torch.cat([_reordered(problem.case, tensor) for tensor in found]))
    stacked = torch.stack(directions)
    return (stacked if problem.case.dtype == "float64" else stacked.float()).numpy()


def _reordered(case: Case, tensor: Tensor) -> Tensor:
    order = _ORDER[case.cell]
    gates = tensor.chunk(len(order))
    return torch.cat([gates[i] for i in order])
