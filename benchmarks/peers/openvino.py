"""OpenVINO on a CPU, from the same ONNX graph."""

from __future__ import annotations

from importlib.util import find_spec
from itertools import cycle
from typing import Any

import numpy as np
import torch

from ..cases import Case
from ..problem import Problem
from . import Peer, Prepared, onnx_model, version

# Left to itself it computes in bfloat16 wherever the CPU has AMX: not the work of the others.
_PRECISION = {"float32": "f32", "bfloat16": "bf16"}


class OpenVINO(Peer):
    name, title = "openvino", "OpenVINO"

    def absent(self) -> str | None:
        absent = [name for name in ("openvino", "onnx") if find_spec(name) is None]
        return f"not installed: {', '.join(absent)}" if absent else None

    def versions(self) -> dict[str, str]:
        return {"openvino": version("openvino") or "?"}

    def refuses(self, case: Case) -> str | None:
        if case.dtype not in _PRECISION:
            return f"its CPU plugin has no {case.dtype}"
        return onnx_model.refuses(case)

    def regime(self, case: Case) -> str | None:
        return "float32 in and out" if case.dtype == "bfloat16" else None

    def prepare(self, problem: Problem) -> Prepared:
        import openvino as ov

        core = ov.Core()
        config = {
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_NUM_THREADS": torch.get_num_threads(),
            "INFERENCE_PRECISION_HINT": _PRECISION[problem.case.dtype],
        }
        compiled = core.compile_model(core.read_model(onnx_model.build(problem)), "CPU", config)
        feed = onnx_model.arrays(problem)
        shapes = onnx_model.output_shapes(problem.case)

        def bind(inputs: dict[str, np.ndarray], outputs: dict[str, np.ndarray]) -> Any:
            """A request, and what it reads and writes, which it does not keep alive itself."""
            request = compiled.create_infer_request()
            tensors = {n: ov.Tensor(a, shared_memory=True) for n, a in (inputs | outputs).items()}
            for name, tensor in tensors.items():
                request.set_tensor(name, tensor)
            return request, tensors

        first = {name: np.empty(shape, np.float32) for name, shape in shapes.items()}
        requests = [bind(feed, first)]
        last = first
        if problem.case.carries:  # two calls, each reading the states the other wrote
            states = {f"{s}0": f"{s}_n" for s in ("h", "c") if f"{s}_n" in shapes}
            second = {"y": np.empty(shapes["y"], np.float32)}
            second |= {out: feed[given] for given, out in states.items()}
            given = {"x": feed["x"], **{name: first[out] for name, out in states.items()}}
            requests.append(bind(given, second))
            last = second
        turns = cycle(requests)

        def call() -> None:
            request, _ = next(turns)
            request.start_async()  # as infer(), without its dictionaries of inputs and results
            request.wait()

        def results() -> dict[str, Any]:
            for _ in requests:
                call()
            return onnx_model.named(problem, last)

        return Prepared(call, results)


def peer() -> OpenVINO:
    return OpenVINO()
