"""Cells from Python whose gate kernels tests/compile_gate.py compiles.

Of the zoo, with affine updates, one with all functions, and random ones.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import contract_cells
import random_cells
import scan_cells
from hypothesis import HealthCheck, Phase, given, settings

from fused_rnn import zoo
from fused_rnn.reference import CELLS

SIMPLE = (zoo.FastGRNN, zoo.MinGRU)


def drawn(most: int) -> list[Any]:
    """The longest of those with as many gates and states, always the same."""
    longest: dict[tuple[int, int], random_cells.Drawn] = {}

    @settings(
        max_examples=200,
        deadline=None,
        database=None,
        derandomize=True,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(random_cells.cells(most=40))
    def draw(cell: random_cells.Drawn) -> None:
        shape = (len(cell.gates), len(cell.states))
        before = longest.get(shape)
        if "r(v" in cell.text or cell.given or (before and len(before.text) >= len(cell.text)):
            return
        longest[shape] = cell

    draw()
    layers: list[Any] = []
    for cell in longest.values():
        layer = cell.declare(f"Drawn{len(layers)}")
        if not CELLS[layer.cell].products:
            layers.append(layer)
    return layers[:most]


def write(layers: list[Any], scalar: str, path: Path) -> None:
    """A source of all kernels of their steps, for tensors of this type."""
    (path.parent / "cells").mkdir(exist_ok=True)
    headers = ("gates_backward", "gates_forward", "matrices", "scan")
    includes = [f'#include "cuda/{name}.cuh"' for name in headers]
    kernels = [
        f"template __global__ void AddTo<{scalar}>(int64_t, int64_t, {scalar}*, const {scalar}*);"
    ]
    for layer in layers:
        header = f"cells/{layer.cell}.h"
        (path.parent / header).write_text(layer.source())
        includes.append(f'#include "{header}"')
        name = f"custom::{CELLS[layer.cell].source.type_name}"
        count = len(CELLS[layer.cell].products)
        for way, first in (("Forward", 0), ("Backward", 1)):
            for stages in ("false", "true"):
                chosen = [f"Gate{way}<{name}, {scalar}, {stages}>"]
                chosen += [
                    f"Operand{way}<{name}, {scalar}, {stages}, {first + k}>"
                    for k in range(count - 1)
                ]
                kernels += [
                    f"template __global__ void {kernel}("
                    f"const __grid_constant__ Gate{way}Args<{scalar}>);"
                    for kernel in chosen
                ]
            if CELLS[layer.cell].source.affine:
                args = f"const __grid_constant__ Scan{way}Args<{name}, {scalar}>"
                kernels += [
                    f"template __global__ void Scan{way}{part}<{name}, {scalar}>({args});"
                    for part in ("", "Maps")
                ]
        if CELLS[layer.cell].source.affine:
            wide = f"{name}, Wide<{scalar}>"
            kernels.append(
                f"template __global__ void ScanStarts<{wide}>(int64_t, int64_t, int64_t, "
                f"Rows<const Wide<{scalar}>>, ScanMaps<{wide}>);"
            )
    text = [*includes, "namespace frnn {", "namespace cuda {", *kernels, "}", "}", ""]
    path.write_text("\n".join(text))


def sources(folder: Path, scalars: Mapping[str, str]) -> dict[str, Path]:
    """Of all these cells by the types' names; and under "simple" of two, for the first."""
    layers = [zoo.SLSTM, zoo.UnICORNN, zoo.GRUD, zoo.RHN, contract_cells.Everything, *drawn(3)]
    layers += [zoo.MinLSTM, zoo.QRNN]
    layers += [cell.declare(f"Scanned{i}") for i, cell in enumerate(scan_cells.ALL[1:])]
    found = {name: folder / f"python_{name}.cu" for name in scalars}
    for name, path in found.items():
        write(layers, scalars[name], path)
    found["simple"] = folder / "python_simple.cu"
    write(list(SIMPLE), next(iter(scalars.values())), found["simple"])
    return found
