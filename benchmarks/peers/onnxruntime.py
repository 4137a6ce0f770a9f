"""ONNX Runtime on a CPU: buffers bound once, so that a call is a run and nothing else."""

from __future__ import annotations

from importlib.util import find_spec
from itertools import cycle
from typing import Any

import numpy as np
import torch

from ..cases import Case
from ..problem import Problem
from . import Peer, Prepared, onnx_model, version


class OnnxRuntime(Peer):
    name, title = "onnxruntime", "ORT"

    def absent(self) -> str | None:
        absent = [name for name in ("onnxruntime", "onnx") if find_spec(name) is None]
        return f"not installed: {', '.join(absent)}" if absent else None

    def versions(self) -> dict[str, str]:
        return {"onnxruntime": version("onnxruntime") or "?"}

    def refuses(self, case: Case) -> str | None:
        if case.dtype not in ("float32", "float64"):
            return f"its CPU operators have no {case.dtype}"
        return onnx_model.refuses(case)

    def prepare(self, problem: Problem) -> Prepared:
        import onnxruntime as ort

        options = ort.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        session = ort.InferenceSession(
            onnx_model.build(problem), options, providers=["CPUExecutionProvider"]
        )
        feed = onnx_model.arrays(problem)
        shapes = onnx_model.output_shapes(problem.case)
        value = ort.OrtValue.ortvalue_from_numpy

        def bind(inputs: dict[str, Any], outputs: dict[str, Any]) -> Any:
            binding = session.io_binding()
            for name, tensor in inputs.items():
                binding.bind_ortvalue_input(name, tensor)
            for name, tensor in outputs.items():
                binding.bind_ortvalue_output(name, tensor)
            return binding

        inputs = {name: value(array) for name, array in feed.items()}
        kind = feed["x"].dtype
        first = {name: value(np.empty(shape, kind)) for name, shape in shapes.items()}
        bindings = [bind(inputs, first)]
        last = first
        if problem.case.carries:  # two calls, each reading the states the other wrote
            states = {f"{s}0": f"{s}_n" for s in ("h", "c") if f"{s}_n" in shapes}
            # The states the first step reads are those the second one writes.
            second = {"y": value(np.empty(shapes["y"], kind))}
            second |= {out: inputs[given] for given, out in states.items()}
            given = {"x": inputs["x"], **{name: first[out] for name, out in states.items()}}
            bindings.append(bind(given, second))
            last = second
        turns = cycle(bindings)
        run = session.run_with_iobinding

        def call() -> None:
            run(next(turns))

        def results() -> dict[str, Any]:
            for _ in bindings:
                call()
            return onnx_model.named(problem, {n: v.numpy() for n, v in last.items()})

        return Prepared(call, results)


def peer() -> OnnxRuntime:
    return OnnxRuntime()
