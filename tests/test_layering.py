"""Who never imports whom: the rules that keep engines free of cells and Python free of kernels.

And that every file of tests has a role, so that it is in the runs of the Makefile.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Set
from pathlib import Path

import conftest
import pytest

pytestmark = pytest.mark.unit

ROOT = Path(__file__).resolve().parent.parent


def sources(folder: str, *suffixes: str) -> list[Path]:
    found = [p for p in (ROOT / folder).rglob("*") if p.suffix in suffixes]
    assert found, f"no sources in {folder}"
    return found


def includes(path: Path) -> list[str]:
    return re.findall(r'^#include [<"]([^>"]+)[>"]', path.read_text(), re.M)


def imports(path: Path) -> set[str]:
    """First names of absolute imports and modules of relative ones (as ".name")."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names = [node.module] if node.module else [alias.name for alias in node.names]
            found |= {"." * node.level + name.partition(".")[0] for name in names}
    return found


def own_imports(path: Path) -> set[str]:
    return {name for name in imports(path) if name.startswith(".")}


def check_order(folder: str, layers: str, known: Set[str] = frozenset()) -> list[Path]:
    """Each file may import ``known`` and those that stand before it."""
    paths = [ROOT / f"fused_rnn/{folder}/{name}.py" for name in layers.split()]
    for i, path in enumerate(paths):
        before = known | {f".{earlier.stem}" for earlier in paths[:i]}
        assert own_imports(path) <= before, f"{path} imports {own_imports(path) - before}"
    return paths


def cell_names() -> list[str]:
    return re.findall(r"^CELL\((\w+)", (ROOT / "csrc/cells/registry.def").read_text(), re.M)


@pytest.mark.parametrize(
    "folder, allowed",
    [
        ("csrc/core", ("core/",)),
        ("csrc/cells", ("core/cell.h",)),
        ("csrc/stack", ("core/memory.h", "core/params.h")),
    ],
)
def test_core_and_cells_stand_alone(folder: str, allowed: tuple[str, ...]) -> None:
    for path in sources(folder, ".h"):
        for name in includes(path):
            own = "/" in name
            assert not own or name.startswith(allowed), f"{path.name} includes {name}"


@pytest.mark.parametrize("engine, other", [("cpu", "cuda/"), ("cuda", "cpu/")])
def test_engine_knows_no_cell_and_no_torch(engine: str, other: str) -> None:
    for path in sources(f"csrc/{engine}", ".h", ".cuh", ".cpp"):
        for name in includes(path):
            assert (
                not name.startswith(("torch", "ATen", "c10", "cells/", "ops/", other))
                or name == "cells/registry.def"
            ), f"{path.name} includes {name}"
        words = set(re.findall(r"\w+", path.read_text().lower()))
        assert not words & {*cell_names(), "lstm", "gru", "elman"}, f"{path.name} names a cell"


def test_one_place_calls_cells() -> None:
    """Loading and storing of a unit's operands, and stages around a cell, stand there alone."""
    calls = {
        path.relative_to(ROOT / "csrc").as_posix()
        for path in sources("csrc", ".h", ".cuh", ".cpp")
        if re.search(r"\bC::(forward|backward|affine)\(", path.read_text())
    }
    assert calls == {"core/step.h"}


@pytest.mark.parametrize(
    "path", ["csrc/ops/direct.cpp", "csrc/stack/stack.h", "fused_rnn/ops/schemas.py"]
)
def test_tensors_are_known_by_the_cells_list(path: str) -> None:
    """What a cell has beside the usual five comes in without a change to who passes it on."""
    words = set(re.findall(r"\w+", (ROOT / path).read_text()))
    assert not words & {"b_ih", "b_hh", "w_hr", "bias_ih", "bias_hh", "weight_hr"}


def test_binding_sees_no_kernel() -> None:
    for path in sources("csrc/ops", ".h", ".cpp"):
        own = {
            name
            for name in includes(path)
            if name.split("/")[0] in ("core", "cpu", "cells", "cuda", "stack")
        }
        assert own <= {"core/memory.h", "core/params.h", "core/scratch.h", "stack/stack.h"}, (
            path.name
        )
    assert not any("torch/extension.h" in includes(p) for p in sources("csrc", ".h", ".cpp"))


# Each imports packages, and of these files some that stand before it.
PACKAGES = {".build", ".compiler", ".custom", ".ops", ".reference"}
PYTHON_LAYERS = {
    "torch_internals": set(),
    "imports": set(),
    "scripting": set(),
    "onnx": {".reference"},
    "segments": {".reference", ".torch_internals"},
    "between": {".reference", ".segments"},
    "packed": {".between", ".ops", ".reference"},
    "engines": {".onnx", ".ops", ".packed", ".reference", ".torch_internals"},
    "autocast": {".ops", ".reference"},
    "in_place": {".ops", ".torch_internals"},
    "direct_calls": {".engines", ".ops", ".packed", ".reference"},
    "functional": {
        ".autocast",
        ".between",
        ".engines",
        ".in_place",
        ".ops",
        ".packed",
        ".reference",
        ".segments",
        ".torch_internals",
    },
    "frozen": {".ops", ".packed", ".torch_internals"},
    "torch_shaped": {".frozen", ".scripting", ".torch_internals"},
    "sequences": {".segments"},
    "call_types": {".sequences"},
    "stack": {".between", ".engines", ".packed", ".reference", ".torch_shaped"},
    "recurrent": {
        ".between",
        ".direct_calls",
        ".functional",
        ".onnx",
        ".packed",
        ".sequences",
        ".stack",
        ".torch_internals",
        ".torch_shaped",
    },
    "step_cells": {".call_types", ".direct_calls", ".functional", ".packed", ".torch_shaped"},
    "modules": {".between", ".call_types", ".recurrent", ".step_cells", ".torch_shaped"},
    "cells": {".between", ".call_types", ".recurrent", ".reference"},
    "zoo": {".custom"},
    "cpp": {".build", ".recurrent", ".reference", ".stack"},
    "keras": {".functional"},
    "flops": {".imports", ".ops", ".reference"},
    "hybrid": {".modules"},
    "convert": {".hybrid", ".recurrent"},
    "patch": {".hybrid", ".imports"},
    "registries": {".hybrid", ".imports"},
    "run": {".patch"},
}


def test_python_layers() -> None:
    for module, allowed in PYTHON_LAYERS.items():
        own = own_imports(ROOT / f"fused_rnn/{module}.py")
        assert own <= allowed, f"{module} imports {own - allowed}"


def test_python_layers_are_in_order() -> None:
    """All files have their place, and none imports another that imports it."""
    files = {path.stem for path in (ROOT / "fused_rnn").glob("*.py")}
    assert PYTHON_LAYERS.keys() == files - {"__init__", "__main__"}
    before = set(PACKAGES)
    for module, allowed in PYTHON_LAYERS.items():
        assert allowed <= before, module
        before.add(f".{module}")


def test_layers_of_cells_from_functions() -> None:
    known = {"..between", "..call_types", "..cells", "..compiler", "..functional", "..recurrent"}
    known |= {"..reference", "..stack", "..torch_internals"}
    check_order("custom", "plain family given module single layers declaring __init__", known)


def test_layers_of_the_reference() -> None:
    check_order("reference", "stages cells tensors products direction layers __init__")


def test_layers_of_the_operators() -> None:
    layers = "schemas direct library fakes derivatives step second_derivatives registration"
    known = {"..build", "..reference", "..torch_internals"}
    check_order("ops", f"{layers} __init__", known)


def test_layers_of_the_compiler() -> None:
    """It knows no engine, no library and no layer, and imports networkx to compile alone."""
    layers = "errors graph rules symbols trace derive cut affine emit explain"
    for path in check_order("compiler", layers):
        assert not re.search(r"^(?:import|from) networkx", path.read_text(), re.M), path.name


def test_one_file_names_what_torch_promises_nobody() -> None:
    private = re.compile(r"torch\._C\b|_functorch\b|forward_ad\._|\btorch\._[a-z]+_batch_dim")
    found = [p.name for p in sources("fused_rnn", ".py") if private.search(p.read_text())]
    assert found == ["torch_internals.py"]


def test_layers_of_the_build() -> None:
    """None imports what comes after it, torch or the package around it, at its top."""
    layers = "version messages sources settings tools ninja target record custom cache compiling"
    for path in check_order("build", f"{layers} loading report"):
        top = re.findall(r"^(?:import|from) ([\w.]+)", path.read_text(), re.M)
        assert not any(n.startswith(("torch", "fused_rnn", "..")) for n in top), path.name


def test_torch_ops_are_named_where_they_are_made() -> None:
    makers = ("schemas.py", "segments.py", "torch_internals.py")
    for path in sources("fused_rnn", ".py"):
        if path.name not in makers and path.parent.name != "build":
            assert "torch.ops" not in path.read_text(), path.name


def test_package_imports_no_tests_or_peers() -> None:
    for path in sources("fused_rnn", ".py"):
        assert not imports(path) & {"tests", "benchmarks", "examples", "onnxruntime", "openvino"}, (
            path.name
        )


def test_every_file_of_tests_has_one_role(request: pytest.FixtureRequest) -> None:
    known = conftest.roles(request.config)
    found = {
        path.name: sorted(conftest.marks(path) & known)
        for path in sorted((ROOT / "tests").glob("test_*.py"))
    }
    assert not {name: roles for name, roles in found.items() if len(roles) != 1}
    makefile = (ROOT / "Makefile").read_text()
    runs = re.findall(r"^\t.*\$\(PYTEST\) --roles=([\w,]+)", makefile, re.M)
    assert {role for names in runs for role in names.split(",")} == known
