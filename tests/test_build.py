"""What a build of the native library compiles, with which flags and under which key."""

import json
import os
import platform
import re
import sysconfig
import warnings
from dataclasses import replace

import pytest
import torch
from bound import needs_compiler
from small_build import facts_of, key_of, load

from fused_rnn import build
from fused_rnn.build.target import TIERS_OF

pytest_plugins = "build_fixtures"
pytestmark = [
    pytest.mark.compiling,
    needs_compiler,
]


def test_builds_once_and_finds_it_again(libraries, home, capsys):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert libraries.backend() == "native"
    assert capsys.readouterr().err.count("compiling the CPU kernels") == 1
    facts = facts_of(libraries)
    assert facts["origin"] == "built now" and facts["library"].parent.parent == home / "cache"
    left = sorted(path.name for path in (home / "cache").iterdir())
    key = key_of(libraries)
    assert left == [key, f"{key}.lock"], "nothing but the library's folder and the lock may stay"

    record = json.loads((home / "cache" / key / "fused_rnn_native.json").read_text())
    assert record["torch"] == torch.__version__ and record["cells"] == ["one", "two"]
    assert record["source_hash"] == libraries.targets["cpu"].source_hash() and record[
        "tiers"
    ] == list(libraries.targets["cpu"].kinds)

    again = load(home)
    assert again.backend() == "native" and facts_of(again)["origin"] == "cache"
    assert capsys.readouterr().err == "", "only a build says something"


def test_units_and_flags(libraries, home):
    target = libraries.targets["cpu"]
    flags = {unit.source.stem: " ".join(unit.flags) for unit in target.units(home)}
    kinds = [(tier, scalar) for tier in target.kinds for scalar in ("float", "double")]
    instances = {f"instance_{t}_{s}_{cell}" for t, s in kinds for cell in ("one", "two")}
    instances |= {f"gemm_{t}_{s}" for t, s in kinds}  # names no cell: once for all
    assert set(flags) == {*instances, "table", "cpu", "direct", "glibc"}
    for name, text in flags.items():
        assert (" -m" in text) == ("avx" in name) and ("-mavx512f" in text) == ("avx512" in name)
    for name in {*instances, "table"}:
        assert "torch" not in flags[name] and "TORCH" not in flags[name]
    assert "-DTORCH_TARGET_VERSION=0x020A000000000000" in flags["cpu"]
    for text in (*flags.values(), *target.link()):
        assert "native" not in text and "fast-math" not in text
    text = (home / "instance_generic_double_one.cpp").read_text()
    assert text.endswith("double probe_one_generic_double() { return One::kValue; }\n")


@pytest.mark.parametrize(
    ("name", "machine"),
    [
        ("x86_64", "x86_64"),
        ("AMD64", "x86_64"),
        ("aarch64", "aarch64"),
        ("arm64", "aarch64"),
        ("riscv64", "riscv64"),
    ],
)
def test_each_machine_has_its_own_instruction_sets(monkeypatch, name, machine):
    monkeypatch.setattr(platform, "machine", lambda: name)
    assert build.machine() == machine
    tiers = list(TIERS_OF.get(machine, ["generic"]))
    assert build.levels()[: len(tiers)] == tiers
    others = {tier for other in TIERS_OF.keys() - {machine} for tier in TIERS_OF[other]}
    assert others & set(build.levels()) == {"generic"}


def test_a_cell_needs_a_line_in_the_registry_alone(libraries, home):
    with (home / "csrc" / "cells" / "registry.def").open("a") as file:
        file.write("CELL(three, One, one.h)\n")
    for target in libraries.targets.values():
        assert build.cells(target.csrc)[-1].name == "three"
    stems = [unit.source.stem for unit in libraries.targets["cpu"].units(home)]
    assert "instance_generic_float_three" in stems


def test_key_depends_on_all_inputs(libraries, home, monkeypatch):
    target = libraries.targets["cpu"]
    tools = target.find_tools()
    keys = [target.cache_key(tools)]
    (home / "csrc" / "notes.txt").write_text("not an input")
    assert target.cache_key(tools) == keys[0]

    (home / "csrc" / "cells" / "one.h").write_text(
        "struct One { enum { kValue = 2 }; };\nusing Two = One;\n"
    )
    keys.append(target.cache_key(tools))
    (home / "csrc" / "core" / "new.h").write_text("")
    keys.append(target.cache_key(tools))
    keys.append(target.plus("-g").cache_key(tools))
    keys.append(replace(target, link_flags=("-shared",)).cache_key(tools))
    tiers = {"generic": ("-O3",)}
    keys.append(replace(target, variants=build.cpu_variants(tiers)).cache_key(tools))
    monkeypatch.setattr(torch, "__version__", "2.99.0")
    keys.append(target.cache_key(tools))
    monkeypatch.setattr(torch.version, "git_version", "0")
    keys.append(target.cache_key(tools))
    compiler = tools.found[0]._replace(version="c++ 99")
    keys.append(target.cache_key(tools._replace(found=(compiler,))))
    monkeypatch.setattr(platform, "machine", lambda: "riscv64")
    keys.append(target.cache_key(tools))
    assert len(set(keys)) == len(keys)
    assert all(re.fullmatch(r"[\w.]+(-[0-9a-f]{12}){2}", key) for key in keys)


def test_rebuilds_when_a_header_changes(libraries, home):
    assert libraries.backend() == "native"
    (home / "csrc" / "cells" / "one.h").write_text(
        "struct One { enum { kValue = 2 }; };\nusing Two = One;\n"
    )
    again = load(home)
    assert again.backend() == "native" and facts_of(again)["origin"] == "built now"


def test_max_jobs(home, monkeypatch):
    assert 1 <= build.max_jobs() <= os.cpu_count()
    monkeypatch.setenv("FUSED_RNN_MAX_JOBS", "3")
    assert build.max_jobs() == 3


@pytest.mark.parametrize("version", ["1.13.1", "2.9.1+cpu"])
def test_old_torch_is_refused(monkeypatch, version):
    build.check_torch_version()
    monkeypatch.setattr(torch, "__version__", version)
    with pytest.raises(ImportError, match=r"needs torch >= 2\.10, found"):
        build.check_torch_version()


@pytest.mark.parametrize("version", ["2.10.0", "2.14.1+cu130", "3.0.0a0+git1234"])
def test_new_torch_is_welcome(monkeypatch, version):
    monkeypatch.setattr(torch, "__version__", version)
    build.check_torch_version()


# --- Direct calls --------------------------------------------------------------------------------


def test_direct_calls_need_the_header_of_python(libraries, home, monkeypatch):
    def flags():
        return [flag for unit in libraries.targets["cpu"].units(home) for flag in unit.flags]

    keys = {key_of(libraries)}
    assert sysconfig.get_path("include") in flags()
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(home / "nowhere"))
    keys.add(key_of(libraries))
    assert "nowhere" not in " ".join(flags())
    assert len(keys) == 2, "once the header is there, the library is built anew"


def test_free_threaded_python_has_no_direct_calls(libraries, home, monkeypatch):
    get = sysconfig.get_config_var
    monkeypatch.setattr(
        sysconfig,
        "get_config_var",
        lambda name: 1 if name == "Py_GIL_DISABLED" else get(name),
    )
    include = sysconfig.get_path("include")
    assert not any(include in unit.flags for unit in libraries.targets["cpu"].units(home))
    assert libraries.backend() == "native" and libraries.direct_calls([]) is None


def test_library_without_direct_calls(libraries, monkeypatch):
    assert libraries.backend() == "native"
    assert libraries.direct_calls([]) is None, "it is no Python module"
    monkeypatch.delattr(torch.Tensor, "__dlpack_c_exchange_api__", raising=False)
    assert libraries.direct_calls([]) is None


DIRECT = """
#define Py_LIMITED_API 0x030A0000
#include <Python.h>
#pragma weak PyBool_FromLong
#pragma weak PyModule_Create2
PyObject* Setup(PyObject*, PyObject* const*, Py_ssize_t n) { return PyBool_FromLong(n == 5); }
PyMethodDef methods[] = {{"setup", (PyCFunction)(void*)Setup, METH_FASTCALL, 0}, {}};
PyModuleDef module = {PyModuleDef_HEAD_INIT, "_direct", 0, -1, methods, 0, 0, 0, 0};
extern "C" __attribute__((visibility("default"))) PyObject* PyInit__direct() {
  return PyModule_Create(&module);
}
"""


def test_library_that_is_no_use_to_this_torch(libraries, home):
    """A module is asked, with all that it needs of torch, whether it can be used."""
    (home / "csrc" / "ops" / "direct.cpp").write_text(DIRECT)
    assert libraries.backend() == "native"
    if hasattr(torch.Tensor, "__dlpack_c_exchange_api__"):
        assert libraries.direct_calls(len) is None
        assert libraries.direct_calls(len, len).__name__ == "fused_rnn._direct"
