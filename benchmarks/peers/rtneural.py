"""RTNeural (jatinchowdhury18/RTNeural): its layers of constant sizes, of which RTNEURAL names the
source. Compiled for the case with its Eigen backend, which is its own choice; the peer
``rtneural_xsimd`` takes the other one."""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
from pathlib import Path
from typing import ClassVar

from ..cases import Case
from ..problem import Problem
from . import Peer, Prepared, stream

VARIABLE = "RTNEURAL"
_LAYER = {"lstm": "LSTM", "gru": "GRU"}

# A frame at a time, which is all that it has; its input is read from aligned memory.
_DRIVER = """
#include <cstring>
#include <RTNeural/RTNeural.h>

using Model = RTNeural::ModelT<float, {I}, {H}, RTNeural::{layer}LayerT<float, {I}, {H}>>;
constexpr int kRoom = ({I} + 15) / 16 * 16;

extern "C" {{
void* create(const char* weights) {{
  auto* model = new Model();
  const auto json = nlohmann::json::parse(weights);
  RTNeural::torch_helpers::load{layer}<float>(json, "", model->get<0>());
  model->reset();
  return model;
}}
void reset(void* model) {{ static_cast<Model*>(model)->reset(); }}
void process(void* state, const float* x, float* y, size_t frames) {{
  auto* model = static_cast<Model*>(state);
  alignas(64) float frame[kRoom] = {{}};
  for (size_t t = 0; t < frames; t++) {{
    std::memcpy(frame, x + t * {I}, {I} * sizeof(float));
    model->forward(frame);
    std::memcpy(y + t * {H}, model->getOutputs(), {H} * sizeof(float));
  }}
}}
}}
"""


class RTNeural(Peer):
    name, title = "rtneural", "RTNeural"
    # What is defined, what is included, and how its memory is aligned.
    backend: ClassVar[tuple[str, str, int]] = ("RTNEURAL_USE_EIGEN", "modules/Eigen", 32)

    def folder(self) -> Path:
        return Path(os.environ.get(VARIABLE, ""))

    def absent(self) -> str | None:
        if not os.environ.get(VARIABLE):
            return f"{VARIABLE} names no folder of its source"
        for part in ("RTNeural/RTNeural.h", self.backend[1]):
            if not (self.folder() / part).exists():
                return f"{VARIABLE}={self.folder()} has no {part}"
        return None

    def versions(self) -> dict[str, str]:
        command = ["git", "-C", str(self.folder()), "rev-parse", "--short", "HEAD"]
        found = subprocess.run(command, capture_output=True, text=True)
        return {"RTNeural": found.stdout.strip() or "?"}

    def refuses(self, case: Case) -> str | None:
        if case.cell not in _LAYER or case.layers > 1 or not case.bias:
            return "one LSTM or GRU with bias"
        return stream.refuses(case)

    def prepare(self, problem: Problem) -> Prepared:
        case, folder = problem.case, self.folder()
        define, include, alignment = self.backend
        flags = (
            "-O3",
            *stream.NATIVE,
            "-w",
            f"-D{define}=1",
            f"-DRTNEURAL_DEFAULT_ALIGNMENT={alignment}",
        )
        flags += (f"-I{folder}", f"-I{folder / include}")
        source = _DRIVER.format(I=case.I, H=case.H, layer=_LAYER[case.cell])
        library = stream.compiled(source, flags, repr(self.versions()))
        library.create.restype = ctypes.c_void_p
        library.reset.argtypes = [ctypes.c_void_p]
        weights = {name: value.tolist() for name, value in problem.weights.items()}
        state = library.create(json.dumps(weights).encode())
        return stream.prepared(problem, library.process, state, library.reset, case.H)


def peer() -> RTNeural:
    return RTNeural()
