"""``export_cpp``: a trained layer as C++ source that needs neither torch nor Python.

What is written is the engine's own headers, put together into one file (``csrc/cpu/stream.h`` and
what it includes), the header of the cell, and the weights as a string literal.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from . import build
from .recurrent import Recurrent
from .reference import CELLS, by_name
from .stack import parameter_shapes

_SCALARS = {torch.float32: "float", torch.float64: "double"}
# Options of BetweenSteps that a layer in eval mode takes no notice of.
_OF_TRAINING = ("recurrent_dropout", "dropout_over_time", "weight_dropout")

_HEADER = """\
/* {title}, written by fused_rnn.export_cpp. The numbers are {scalar}. */
#ifndef {NAME}_H
#define {NAME}_H

#include <stddef.h>

#ifdef __cplusplus
extern "C" {{
#endif

enum {{ {NAME}_INPUTS = {inputs}, {NAME}_OUTPUTS = {outputs} }};

/* One stream. Streams share nothing but constants: each may have a thread of its own. */
typedef struct {name}_state {name}_state;

/* A stream whose states are zeros; NULL if there is no memory. The one function that allocates. */
{name}_state* {name}_create(void);
/* The states become zeros. */
void {name}_reset({name}_state* state);
/* x [frames][{NAME}_INPUTS] -> y [frames][{NAME}_OUTPUTS], which may be x if these are equal. The
   states go on from call to call, and results do not depend on where one ends. */
void {name}_process({name}_state* state, const {scalar}* x, {scalar}* y, size_t frames);
/* How many frames y is behind x: none. */
size_t {name}_latency(const {name}_state* state);
void {name}_destroy({name}_state* state);

#ifdef __cplusplus
}}
#endif
#endif
"""

_SOURCE = """\
// {title}, written by fused_rnn.export_cpp of fused_rnn {version}. C++17 for GCC and Clang; see
// CMakeLists.txt for the flags. The headers below are those of fused_rnn: Copyright (c) 2026, the
// fused_rnn authors, BSD 3-Clause License.
#include "{name}.h"

#include <new>

#pragma GCC diagnostic ignored "-Wattributes"  // all but the five functions is hidden
#pragma GCC diagnostic ignored "-Wpsabi"
#pragma GCC diagnostic ignored "-Wunknown-pragmas"
#pragma GCC diagnostic ignored "-Wunused"  // headers have more than one layer needs
#pragma GCC diagnostic ignored "-Wunused-but-set-parameter"

#define frnn frnn_{name}  // a program may have several of these files
#define FRNN_TIER exported
#define FRNN_SCALAR {scalar}
#pragma GCC visibility push(hidden)
{headers}

// ---- {name} ----
#pragma GCC visibility pop

static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "the weights are little-endian");

namespace {{
using namespace frnn;

using Model = Chain<{parts}>;

union {{
  char bytes[{count} * sizeof(T) + 1];
  T numbers[{count}];
}} const kData = {{
#include "{name}_weights.inc"
}};

// Packed by whoever comes first.
const Model::Weights& TheWeights() {{
  static const Model::Weights weights = [] {{
    Reader from{{kData.numbers}};
    return Model::Weights(from);
  }}();
  return weights;
}}
}}  // namespace

struct {name}_state {{
  const Model::Weights& weights;
  Model model;
}};

extern "C" {{

{name}_state* {name}_create(void) {{
  return new (std::nothrow) {name}_state{{TheWeights(), {{}}}};
}}

void {name}_reset({name}_state* state) {{ state->model.Reset(); }}

void {name}_process({name}_state* state, const {scalar}* x, {scalar}* y, size_t frames) {{
  while (frames > 0) {{
    const size_t n = frames < size_t(kMostSteps) ? frames : size_t(kMostSteps);
    state->model.Run(state->weights, x, int64_t(n), y);
    x += n * {NAME}_INPUTS;
    y += n * {NAME}_OUTPUTS;
    frames -= n;
  }}
}}

size_t {name}_latency(const {name}_state*) {{ return 0; }}

void {name}_destroy({name}_state* state) {{ delete state; }}

}}  // extern "C"
"""

_CMAKE = """\
# {title}, written by fused_rnn.export_cpp.
cmake_minimum_required(VERSION 3.13)
project({name} CXX)

if(NOT CMAKE_BUILD_TYPE AND NOT CMAKE_CONFIGURATION_TYPES)
  set(CMAKE_BUILD_TYPE Release)
endif()
# The instruction set, as -march says it; with nothing, what every processor of the kind has.
set({NAME}_ARCH native CACHE STRING "instruction set")

add_library({name} {name}.cpp)
target_compile_features({name} PUBLIC cxx_std_17)
target_include_directories({name} PUBLIC ${{CMAKE_CURRENT_SOURCE_DIR}})
set_target_properties({name} PROPERTIES POSITION_INDEPENDENT_CODE ON CXX_VISIBILITY_PRESET default)
target_compile_options({name} PRIVATE -fno-math-errno -fno-trapping-math -fopenmp-simd)
if({NAME}_ARCH)
  target_compile_options({name} PRIVATE -march=${{{NAME}_ARCH}} -mtune=generic)
endif()
"""


def export_cpp(
    module: nn.Module,
    folder: str | os.PathLike[str],
    *,
    head: nn.Linear | None = None,
    name: str | None = None,
) -> Path:
    """Write a trained layer as C++17 source, for streams such as sound: no torch, no Python.

    Args:
        module: a layer of this package of one direction: RNN, LSTM, GRU, PeepholeLSTM or another
            cell, also of ``fused_rnn.cell``; any ``num_layers``; float32 or float64.
        folder: where the files go. It is made if need be; files of these names are written over.
        head: a linear layer after it, ``y = W h + b`` in every frame, [features out, H].
        name: of the files and functions; that of the folder by default.

    Returns:
        The folder. It has ``name.cpp``, ``name.h``, ``name_weights.inc`` and a ``CMakeLists.txt``.

    Raises:
        TypeError: ``module`` is no layer of this package, or ``head`` no ``nn.Linear``.
        ValueError: it has what is not supported: a second direction, ``proj_size``, ``norm``,
            ``zoneout``, ``blocks``, values given for each step, another dtype; ``head`` does not
            fit; ``name`` is no name in C.

    The header declares five functions: ``name_create``, ``name_reset``, ``name_process`` (a block
    of frames of one stream, whose states go on from block to block), ``name_latency`` and
    ``name_destroy``. After ``create`` nothing allocates or waits. The code is that of the engine:
    ``docs/export.md`` says which of Python's calls it equals to the last bit.

    Examples:
        >>> rnn = fused_rnn.GRU(1, 32)
        >>> folder = fused_rnn.export_cpp(rnn, "amp", head=torch.nn.Linear(32, 1))
    """
    layer = _checked(module)
    folder = Path(folder)
    name = folder.resolve().name if name is None else name
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
        raise ValueError(f"name: expected letters, digits and _, as names in C have, got {name!r}")
    cell, runs = _weights(layer)
    numbers = [tensor for run in runs for tensor in _in_order(cell, run)]
    hidden, type_name, header = layer.hidden_size, *_type_of(cell)
    inputs = [layer.input_size] + [hidden] * (layer.num_layers - 1)
    parts = [f"Stream<{type_name}, {n}, {hidden}>" for n in inputs]
    title = f"A layer {type(layer).__name__}({layer.extra_repr()})"
    outputs = hidden
    if head is not None:
        numbers += _of_head(head, hidden, numbers[0])
        outputs = head.out_features
        parts.append(f"Dense<{hidden}, {outputs}>")
        title += f" and a linear one of {outputs}"
    words: dict[str, Any] = {
        "name": name,
        "NAME": name.upper(),
        "title": title,
        "version": build.VERSION,
        "scalar": _SCALARS[numbers[0].dtype],
        "inputs": layer.input_size,
        "outputs": outputs,
        "parts": ", ".join(parts),
        "count": sum(tensor.numel() for tensor in numbers),
        "headers": _together(header),
    }
    folder.mkdir(parents=True, exist_ok=True)
    files = {f"{name}.h": _HEADER, f"{name}.cpp": _SOURCE, "CMakeLists.txt": _CMAKE}
    for file, template in files.items():
        (folder / file).write_text(template.format(**words), encoding="utf-8")
    with (folder / f"{name}_weights.inc").open("w", encoding="ascii") as out:
        for tensor in numbers:
            out.writelines(_literal(tensor.numpy().tobytes()))
    return folder


def _checked(module: Any) -> Recurrent:
    if not isinstance(module, Recurrent):
        raise TypeError(
            f"module: expected a layer of fused_rnn, got {type(module).__name__}; "
            "fused_rnn.replace makes one of torch.nn's"
        )
    if module.bidirectional:
        raise ValueError("module: expected one direction, since a stream has no end to begin at")
    if module.proj_size:
        raise ValueError(f"module: expected proj_size=0, got {module.proj_size}")
    for option, value in module.between_steps.changed.items():
        if option not in _OF_TRAINING:
            raise ValueError(f"module: expected no {option}, got {value!r}: it is not supported")
    if given := CELLS[module.mode.lower()].given:
        raise ValueError(f"module: expected no values given for each step, got {', '.join(given)}")
    return module


def _weights(layer: Recurrent) -> tuple[str, list[dict[str, Tensor]]]:
    """The cell, and the tensors of each layer by their short names, in the memory of the CPU."""
    cell, present = layer.mode.lower(), layer._present()
    with torch.no_grad():
        weights = [weight.detach().cpu().contiguous() for weight in layer._weights()]
    dtype = weights[0].dtype
    if dtype not in _SCALARS or any(weight.dtype != dtype for weight in weights):
        raise ValueError(
            f"module: expected parameters of float32 or float64, got {dtype}: convert a copy"
        )
    per_layer = len(weights) // layer.num_layers
    for i in range(layer.num_layers):
        hidden = layer.hidden_size
        inputs = hidden if i else layer.input_size
        shapes = parameter_shapes(cell, present, inputs, hidden, hidden)
        found = weights[i * per_layer : (i + 1) * per_layer]
        for (long, shape), weight in zip(shapes.items(), found, strict=True):
            if tuple(weight.shape) != shape:
                raise ValueError(
                    f"module: expected {long}_l{i} of {list(shape)}, got {list(weight.shape)}"
                )
    return cell, [dict(run) for run in by_name(cell, present, weights)]


def _in_order(cell: str, run: dict[str, Tensor]) -> Iterator[Tensor]:
    """The tensors of a layer as ``Stream::Weights`` reads them; for missing biases zeros."""
    known = CELLS[cell]
    for kind, of in (("w", 2), ("b", 1)):
        for side in ("ih", "hh")[: 1 + (known.recurrent_gates > 0)]:
            weight = run[f"w_{side}"]
            yield run.get(f"{kind}_{side}", weight.new_zeros(weight.shape[:of]))
    for param in known.params:
        yield run[param]


def _of_head(head: Any, hidden: int, like: Tensor) -> list[Tensor]:
    if not isinstance(head, nn.Linear):
        raise TypeError(f"head: expected a torch.nn.Linear, got {type(head).__name__}")
    weight = head.weight.detach().cpu().contiguous()
    if weight.shape[1:] != (hidden,):
        raise ValueError(f"head: expected in_features={hidden}, got {head.in_features}")
    if weight.dtype != like.dtype:
        raise ValueError(f"head: expected {like.dtype}, as the layer has, got {weight.dtype}")
    bias = weight.new_zeros(len(weight)) if head.bias is None else head.bias.detach().cpu()
    return [weight, bias]


def _type_of(cell: str) -> tuple[str, str]:
    """In C++: the type of the cell, and its header."""
    for known in build.cells():
        if known.name == cell:
            return known.type, (build.CSRC / "cells" / known.header).read_text(encoding="utf-8")
    source = CELLS[cell].source
    return f"custom::{source.type_name}", source.header


def _together(cell: str) -> str:
    """All headers that a stream of the cell needs as one text, each after what it includes."""
    seen: set[str] = set()
    parts: list[str] = []

    def add(name: str, text: str) -> None:
        own = []
        for line in text.splitlines():
            if found := re.match(r'#include "([^"]+)"', line):
                if found[1] not in seen:
                    seen.add(found[1])
                    add(found[1], (build.CSRC / found[1]).read_text(encoding="utf-8"))
            elif line != "#pragma once":
                own.append(line)
        parts.append("\n".join([f"\n// ---- {name} ----", *own]))

    add("the cell", cell)
    add("a stream", '#include "cpu/stream.h"')
    return "\n".join(parts)


_ESCAPED = [
    chr(byte) if 32 <= byte < 127 and chr(byte) not in '"\\?' else f"\\{byte:03o}"
    for byte in range(256)
]


def _literal(data: bytes) -> Iterator[str]:
    """Lines of a string literal: what compilers read fastest."""
    for i in range(0, len(data), 64):
        yield f'"{"".join(map(_ESCAPED.__getitem__, data[i : i + 64]))}"\n'
