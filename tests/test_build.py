"""Building, caching and loading the native library, on a tree of sources that compiles at once."""

import contextlib
import fcntl
import json
import os
import platform
import re
import shlex
import shutil
import signal
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import threading
import time
import warnings
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from bound import needs_compiler
from forked import python
from small_build import KINDS, SOURCES, load

from fused_rnn import build
from fused_rnn.build.messages import listed
from fused_rnn.build.target import TIERS_OF

ROOT = Path(__file__).resolve().parents[1]

pytestmark = [
    pytest.mark.compiling,
    needs_compiler,
]

# ``libraries`` of a process, on the sources in the folder given.
LOADER = """
import sys
from pathlib import Path
from small_build import KINDS
folder = Path(sys.argv[1])
libraries = KINDS[sys.argv[2]](folder)
"""


def with_tests():
    """An environment in which all can be imported that can be here."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}


def key_of(libraries, target="cpu"):
    made = libraries.targets[target]
    return made.cache_key(made.find_tools())


def compile_into(libraries, cache, key="key", name=""):
    return build.compile_library(libraries.targets["cpu"], build.Place(cache, key), name)


def facts_of(libraries):
    return build.report.facts_of(libraries)


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A folder with csrc and cache in it; its name must be quoted everywhere."""
    folder = tmp_path / "a folder, $HOME: 'quoted'"
    for name, text in SOURCES.items():
        path = folder / "csrc" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    for variable in [name for name in os.environ if name.startswith("FUSED_RNN_")]:
        monkeypatch.delenv(variable)
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("FUSED_RNN_CACHE_DIR", str(folder / "cache"))
    return folder


@pytest.fixture
def libraries(home):
    return load(home)


@pytest.fixture(params=KINDS)
def kind(home, request):
    """Of the libraries that a test is about. Where that of a cell is one, the CPU's is there."""
    if request.param == "cell":
        compile_into(load(home), home / "main")
    return request.param


@pytest.fixture
def anew(home, kind):
    """Libraries that have not been used yet."""
    return lambda **changes: KINDS[kind](home, **changes)


def no_compiler(home, monkeypatch):
    (home / "empty").mkdir()
    monkeypatch.setenv("PATH", str(home / "empty"))


def fallback_message(libraries):
    """Use the backend twice, expect the reference and one warning; return its text."""
    with pytest.warns(RuntimeWarning) as caught:
        assert libraries.backend() == "reference"
        assert libraries.backend() == "reference"
    assert len(caught) == 1
    text = str(caught[0].message)
    assert "python -m fused_rnn doctor" in text and "remedy: " in text
    return text


# --- What is built --------------------------------------------------------------------------------


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


# --- Direct calls ---------------------------------------------------------------------------------


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


# --- The library that comes with the package ------------------------------------------------------


def test_ahead_of_time_library_is_used(libraries, home):
    library = compile_into(libraries, home / "temp", "native", "_native")
    for path in (library, library.with_suffix(".json")):
        shutil.copy(path, home)
    assert libraries.backend() == "native" and facts_of(libraries)["origin"] == "ahead of time"
    assert not (home / "cache").exists()

    with (home / "csrc" / "cells" / "one.h").open("a") as file:
        file.write("// changed\n")
    changed = load(home)
    assert changed.backend() == "native" and facts_of(changed)["origin"] == "built now"
    assert "compiled from other sources" in facts_of(changed)["reason"]


def write_library(path, content=b"this is no library", **facts):
    """A file and its record, as a build leaves them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    build.record.write(path, path.with_suffix(".json"), facts)


def test_library_that_does_not_load(libraries, home):
    write_library(home / "_native.so", source_hash=libraries.targets["cpu"].source_hash())
    text = fallback_message(libraries)
    assert "_native.so cannot be loaded" in text


def test_record_that_cannot_be_read(home):
    for text in ("", "{", "[]"):
        (home / "_native.json").write_text(text)
        assert build.record.read(home / "_native.so") == {}


DAMAGES = {
    "no end": lambda path: os.truncate(path, path.stat().st_size // 2),
    "other bytes": lambda path: path.write_bytes(bytes(b ^ 1 for b in path.read_bytes())),
    "no record": lambda path: path.with_suffix(".json").unlink(),
    "empty record": lambda path: path.with_suffix(".json").write_text("{}"),
    "size of another type": lambda path: path.with_suffix(".json").write_text(
        '{"sha256": "", "size": "much"}'
    ),
}


@pytest.mark.drawn(4)
@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_library_in_the_cache_is_built_anew(anew, kind, home, damage):
    """It would end the process, when it is loaded or when it is called."""
    code = f"{LOADER}\nassert libraries.backend() == 'native'"  # this process has not loaded it
    done = python("-c", code, str(home), kind, env=with_tests())
    assert done.returncode == 0, done.stderr
    (library,) = (home / "cache").glob("*/*.so")
    DAMAGES[damage](library)
    again = anew()
    assert again.backend() == "native" and again.state().origin == "built now"
    assert str(library) in again.state().reason
    after = anew()
    assert after.backend() == "native" and after.state().origin == "cache"


def test_damaged_library_of_the_package_is_not_used(libraries, home):
    library = compile_into(libraries, home / "temp", "native", "_native")
    for path in (library, library.with_suffix(".json")):
        shutil.copy(path, home)
    os.truncate(home / "_native.so", 1000)
    assert libraries.backend() == "native"
    facts = facts_of(libraries)
    assert facts["origin"] == "built now" and "_native.so has 1000 bytes" in facts["reason"]


# --- Choosing the backend -------------------------------------------------------------------------


def test_reference_never_builds(libraries, home, monkeypatch):
    monkeypatch.setenv("FUSED_RNN_BACKEND", "reference")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert libraries.backend() == "reference"
    assert not (home / "cache").exists() and facts_of(libraries)["problem"] is None


def test_native_raises_instead_of_falling_back(libraries, home, monkeypatch):
    monkeypatch.setenv("FUSED_RNN_BACKEND", "native")
    no_compiler(home, monkeypatch)
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"no native library: a C\+\+ compiler .* not found"):
            libraries.backend()


def test_native_and_auto_build(home, monkeypatch):
    for value in ("native", "auto", ""):
        monkeypatch.setenv("FUSED_RNN_BACKEND", value)
        assert load(home).backend() == "native"


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("FUSED_RNN_BACKEND", "cuda", "is 'cuda': use auto, native or reference"),
        ("FUSED_RNN_CPU_CAPABILITY", "NEON", f"is 'NEON': use {listed(build.levels())}"),
        ("FUSED_RNN_MAX_JOBS", "many", "is 'many': use a number"),
        ("FUSED_RNN_LOCK_TIMEOUT", "-1", "is '-1': use a number that is not negative"),
        ("FUSED_RNN_CUDA_ARCH", "sm_90", "is 'sm_90': use compute capabilities"),
        ("FUSED_RNN_VERBOSE", "yes", "is 'yes': use 0 or 1"),
        ("FUSED_RNN_BACKENDS", "native", "is no setting of .*; there are FUSED_RNN_BACKEND, "),
    ],
    ids=str,
)
def test_settings_that_cannot_be(libraries, monkeypatch, name, value, message):
    monkeypatch.setenv(name, value)
    for _ in range(2):
        with pytest.raises(ValueError, match=f"{name} {message}"):
            libraries.backend()
    monkeypatch.setenv(name, "")
    if name != "FUSED_RNN_BACKENDS":
        build.settings.check()


def test_settings_of_the_tests_are_left_alone(monkeypatch):
    monkeypatch.setenv("FUSED_RNN_TEST_SEED", "1")
    build.settings.check()


def test_first_use_from_many_threads(libraries, capsys):
    results = []
    threads = [
        threading.Thread(target=lambda: results.append(libraries.backend())) for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == ["native"] * 8
    assert capsys.readouterr().err.count("compiling the CPU kernels") == 1


# --- Failures -------------------------------------------------------------------------------------


def test_no_compiler(anew, home, monkeypatch):
    no_compiler(home, monkeypatch)
    text = fallback_message(anew())
    assert "a C++ compiler (c++, g++, clang++) was not found" in text
    assert "install a C++17 compiler" in text
    libraries = load(home)
    fallback_message(libraries)
    facts = facts_of(libraries)
    assert facts["backend"] == "reference" and "install a C++17 compiler" in facts["remedy"]


def test_compiler_of_cxx_is_missing(anew, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-c++ -m64")
    assert "CXX=no-such-c++ -m64 was not found" in fallback_message(anew())


def test_compiler_that_does_not_run(anew, home, monkeypatch):
    monkeypatch.setenv("CXX", "false")
    assert "the compiler does not run" in fallback_message(anew())


def test_flags_that_the_compiler_does_not_know(anew, home, monkeypatch):
    monkeypatch.setenv("CXX", "c++ --no-such-flag -m64")
    text = fallback_message(anew())
    assert "no-such-flag" in text and "setting CXX" in text
    monkeypatch.setenv("CXX", "c++ -m64")
    assert anew().backend() == "native", "other flags are another build"


def test_flags_of_other_builds_are_not_taken(anew, monkeypatch):
    for name in ("CXXFLAGS", "CFLAGS", "CPPFLAGS", "LDFLAGS"):
        monkeypatch.setenv(name, "--no-such-flag")
    assert anew().backend() == "native"


def test_cached_library_needs_no_compiler(anew, kind, home, monkeypatch):
    assert anew().backend() == "native"
    no_compiler(home, monkeypatch)
    again = anew()
    assert again.backend() == "native" and again.state().origin == "cache"
    if kind == "main":
        assert facts_of(again)["problem"] is None


def test_no_ninja(libraries, tmp_path, monkeypatch):
    (tmp_path / "c++").symlink_to(shutil.which("c++"))
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    monkeypatch.setitem(sys.modules, "ninja", None)
    text = fallback_message(libraries)
    assert "ninja was not found" in text and "pip install ninja" in text


def test_source_that_does_not_compile(libraries, home):
    (home / "csrc" / "cpu" / "table.cpp").write_text('int wrong = "text";\n')
    text = fallback_message(libraries)
    log = home / "cache" / f"{key_of(libraries)}.log"
    assert "table.cpp:1:" in text and "error: invalid conversion" in text and str(log) in text
    assert "int wrong" in log.read_text()
    assert not list((home / "cache").glob("*/*")), "a failed build leaves its log alone"

    (home / "csrc" / "cpu" / "table.cpp").write_text(SOURCES["cpu/table.cpp"])
    assert libraries.backend() == "reference", "one process decides once"
    assert load(home).backend() == "native"


@pytest.fixture
def stub(home, monkeypatch):
    """Makes CXX a program that says its version, notes that it ran and does what it is told to."""
    compiler = home.parent / "stub-c++"  # a path that needs no quotes
    ran = home.parent / "ran"

    def say(text):
        compiler.write_text(
            f'#!/bin/sh\n[ "$1" = --version ] && echo stub 1.0 && exit\necho $$ >> {ran}\n{text}\n'
        )
        compiler.chmod(0o755)
        monkeypatch.setenv("CXX", str(compiler))

    say.count = lambda: len(ran.read_text().split()) if ran.exists() else 0
    say.processes = lambda: [int(pid) for pid in ran.read_text().split()] if ran.exists() else []
    return say


def test_failed_build_is_remembered(home, stub):
    stub("echo error: it cannot be done >&2; exit 1")
    first = fallback_message(load(home))
    ran = stub.count()
    assert ran and "it cannot be done" in first and "python -m fused_rnn build" in first
    second = fallback_message(load(home))
    assert stub.count() == ran, "it is not tried again"
    for part in ("it cannot be done", "not tried again since", "python -m fused_rnn build"):
        assert part in second

    facts = facts_of(load(home))
    assert facts["backend"] is None and "it cannot be done" in facts["problem"]
    assert build.report.build(load(home)) == 1 and stub.count() > ran, "the command tries again"
    # Another compiler, here the same with another version, is another key.
    stub("echo more; exit 1")
    assert "it cannot be done" in fallback_message(load(home))
    (home / "csrc" / "cpu" / "table.cpp").write_text("int other;\n")
    assert "kernels do not compile: ninja" in fallback_message(load(home))


def test_failure_is_tried_again_after_the_command(anew, home, stub):
    """``python -m fused_rnn build``, which the message says, also of the libraries of cells."""
    stub("echo error: >&2; exit 1")
    assert "to try again: python -m fused_rnn build" in fallback_message(anew())
    ran, again = stub.count(), anew()
    assert "not tried again since" in fallback_message(again) and stub.count() == ran
    assert again.failure()
    stub(f'exec {shutil.which("c++")} "$@"')
    build.report.load_all(load(home))
    assert again.failure() is None
    libraries = anew()
    assert libraries.backend() == "native" and libraries.failure() is None


@pytest.mark.parametrize(
    ("text", "remedy"),
    [
        ("c++: fatal error: Killed signal terminated program cc1plus", "FUSED_RNN_MAX_JOBS=1"),
        ("fatal error: error writing to x.s: No space left on device", "free disk space"),
    ],
)
def test_what_may_pass_is_not_remembered(anew, stub, text, remedy):
    stub(f"echo {text} >&2; exit 1")
    assert remedy in fallback_message(anew())
    ran = stub.count()
    assert remedy in fallback_message(anew()) and stub.count() > ran


def test_space_is_asked_first(anew, home, stub):
    stub("exit 1")
    text = fallback_message(anew(space=1 << 60))
    assert f"compiling may take {1 << 40} MB in {home / 'cache'}, where " in text
    assert "FUSED_RNN_CACHE_DIR" in text and stub.count() == 0
    assert not list((home / "cache").glob("*.failed")), "it is not remembered"


def alone(code, *arguments):
    """What a program prints that may mount file systems, which nobody else sees."""
    command = ["unshare", "--mount", "--map-root-user"]
    if not shutil.which("unshare") or subprocess.run([*command, "true"]).returncode:
        pytest.skip("no file systems can be mounted here")
    done = subprocess.run(
        [*command, sys.executable, "-c", code, *map(str, arguments)],
        env=with_tests(),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


# On a disk of so many bytes, of which compiling is said to need none.
FULL = """
import json, os, subprocess, sys, warnings
from pathlib import Path
os.environ["FUSED_RNN_CACHE_DIR"] = "/mnt"
subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={sys.argv[3]}", "none", "/mnt"], check=True)
from small_build import KINDS
def use():
    libraries = KINDS[sys.argv[2]](Path(sys.argv[1]), space=0)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        return libraries.backend(), [str(w.message) for w in caught]
found = [use()]
subprocess.run(["mount", "-o", "remount,size=50m", "/mnt"], check=True)
print(json.dumps([*found, use()]))
"""


@pytest.mark.drawn(2)  # each mounts disks and starts processes
@pytest.mark.parametrize("size", ["4k", "12k", "20k", "40k", "80k"])
def test_full_disk(home, kind, size):
    """Wherever in a build it is met; with more room the next use builds."""
    (backend, messages), (later, _) = json.loads(alone(FULL, home, kind, size))
    assert later == "native", messages
    if backend == "reference":
        (text,) = messages
        assert "free disk space" in text, text


def test_warning_points_at_the_users_line(home, monkeypatch):
    """However many of our functions, and of torch's, are between."""
    code = """
import warnings
import torch, fused_rnn
class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn = fused_rnn.LSTM(4, 6)
    @torch.no_grad()
    def forward(self, x):
        return self.rnn(x)  # here
with warnings.catch_warnings(record=True) as caught:
    torch.nn.Sequential(Model())(torch.randn(5, 3, 4))
print(*(f"{w.filename}:{w.lineno}" for w in caught if w.category is RuntimeWarning))
"""
    (home / "user.py").write_text(code)
    monkeypatch.setenv("CXX", "no-such-c++")
    line = code.splitlines().index("        return self.rnn(x)  # here") + 1
    done = run_afresh(str(home / "user.py"), PYTHONPATH=os.pathsep.join(sys.path))
    assert done.stdout.strip() == f"{home / 'user.py'}:{line}", done.stderr


def test_missing_symbol_fails_at_build(libraries, home):
    (home / "csrc" / "cpu" / "table.cpp").write_text(
        "int gone();\nint table() { return gone(); }\n"
    )
    text = fallback_message(libraries)
    assert "undefined" in text and "gone" in text


def test_no_sources(libraries, home):
    shutil.rmtree(home / "csrc")
    assert "no cells were found" in fallback_message(libraries)


def test_warning_as_error_still_decides(libraries, home, monkeypatch):
    no_compiler(home, monkeypatch)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(RuntimeWarning):
            libraries.backend()
        assert libraries.backend() == "reference"


# --- The cache folder -----------------------------------------------------------------------------


def test_cache_dir_of_the_environment(home, monkeypatch):
    monkeypatch.delenv("FUSED_RNN_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert build.cache_dir() == Path("/xdg/fused_rnn")
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")  # the standard says to ignore it
    assert build.cache_dir() == Path.home() / ".cache" / "fused_rnn"
    monkeypatch.setenv("FUSED_RNN_CACHE_DIR", "~/mine")
    assert build.cache_dir() == Path.home() / "mine"


@pytest.fixture
def unwritable(home, monkeypatch):
    """A cache that not even root can write. Returns the temporary folder that stands in for it."""
    (home / "file").write_text("")
    monkeypatch.setenv("FUSED_RNN_CACHE_DIR", str(home / "file" / "cache"))
    (home / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(home / "tmp"))
    return home / "tmp"


def test_unwritable_cache(anew, unwritable, capsys):
    libraries = anew()
    assert libraries.backend() == "native"
    private = unwritable / f"fused_rnn-{os.getuid()}"
    assert libraries.state().library.is_relative_to(private)
    assert private.stat().st_mode & 0o777 == 0o700
    error = capsys.readouterr().err
    assert "cannot be written" in error and str(private) in error

    again = anew()
    assert again.backend() == "native" and again.state().origin == "cache"


@pytest.mark.parametrize("trap", ["open to all", "link", "file"])
def test_private_folder_must_be_private(anew, home, unwritable, trap):
    private = unwritable / f"fused_rnn-{os.getuid()}"
    if trap == "open to all":
        private.mkdir()
        private.chmod(0o777)
    elif trap == "link":
        (home / "elsewhere").mkdir(mode=0o700)
        private.symlink_to(home / "elsewhere")
    else:
        private.write_text("")
    assert "FUSED_RNN_CACHE_DIR" in fallback_message(anew())


READ_ONLY = """
import os, subprocess, sys, tempfile, warnings
from pathlib import Path
from small_build import KINDS
home, kind = Path(sys.argv[1]), sys.argv[2]
def use():
    libraries = KINDS[kind](home)
    assert libraries.backend() == "native"
    return libraries.state()
os.environ["FUSED_RNN_CACHE_DIR"] = "/mnt"
tempfile.tempdir = str(home)
subprocess.run(["mount", "-t", "tmpfs", "none", "/mnt"], check=True)
if os.fork() == 0:  # whose files are closed when it ends
    assert use().library.is_relative_to("/mnt")
    os._exit(0)
assert os.wait()[1] == 0
subprocess.run(["mount", "-o", "remount,ro", "/mnt"], check=True)
assert use().origin == "cache"  # what is there is used as it is
os.environ["CXX"] = "c++ -m64"
assert use().library.is_relative_to(home)  # and what is not is built elsewhere
"""


def test_cache_on_a_disk_that_is_read_only(home, kind):
    assert alone(READ_ONLY, home, kind) == ""


def test_clean_deletes_only_its_own(libraries, home):
    assert libraries.backend() == "native"
    key = facts_of(libraries)["library"].parent.name
    cache = home / "cache"
    (cache / f"{key}.build-x").mkdir()
    (cache / f"{key}.log").write_text("")
    for name in ("keep", "0.1.0-mine", f"{key}.txt.bak"):
        (cache / name).write_text("")
    build.clean()
    assert sorted(p.name for p in cache.iterdir()) == sorted(
        ["keep", "0.1.0-mine", f"{key}.txt.bak"]
    )
    assert build.clean() == []


def test_clean_leaves_a_build_under_way(libraries, home):
    (home / "cache").mkdir()
    key = key_of(libraries)
    (home / "cache" / f"{key}.build-x").mkdir()
    with build.locked(build.Place(home / "cache", key), timeout=0):
        assert build.clean() == []
    assert (home / "cache" / f"{key}.build-x").exists()


# --- Processes ------------------------------------------------------------------------------------


def test_stale_lock_file_is_harmless(libraries, home):
    (home / "cache").mkdir()
    (home / "cache" / f"{key_of(libraries)}.lock").write_text("pid 1")
    start = time.monotonic()
    assert libraries.backend() == "native" and time.monotonic() - start < 30


def test_waiting_for_the_lock_ends(libraries, home, monkeypatch, capsys):
    (home / "cache").mkdir()
    place = build.Place(home / "cache", key_of(libraries))
    monkeypatch.setenv("FUSED_RNN_LOCK_TIMEOUT", "0.3")
    with place.lock.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        text = fallback_message(libraries)
        assert f"another process has held {place.lock} for " in text
        assert "0.3 s without progress" in text and "FUSED_RNN_LOCK_TIMEOUT" in text
        with pytest.raises(build.BuildError), build.locked(place, timeout=0.3, notice=0.0):
            pass
    assert capsys.readouterr().err.count("waiting for another process to build") == 1


def test_waiting_goes_on_while_the_other_gets_on(home, capsys):
    (home / "cache").mkdir()
    place = build.Place(home / "cache", "0.1.0-key")
    file = place.lock.open("w")
    fcntl.flock(file, fcntl.LOCK_EX)

    def holder():
        for step in range(40):  # 4 seconds, four times the timeout
            with place.log.open("a") as log:
                log.write(f"[{step}/40]\n")
            time.sleep(0.1)
        file.close()

    thread = threading.Thread(target=holder)
    thread.start()
    with build.locked(place, timeout=1.0):
        pass
    thread.join()


def start(home, code, kind="main", **options):
    """A process that has the package ready, and runs code when it gets a line of input."""
    script = f"{LOADER}\nimport torch\nprint('ready', flush=True)\ninput()\n{code}"
    return subprocess.Popen(
        [sys.executable, "-c", script, str(home), kind],
        env=with_tests(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


def release(process):
    process.stdin.write("\n")
    process.stdin.flush()


def test_processes_at_once_build_once(home):
    (home / "csrc" / "ops" / "cpu.cpp").write_text(
        "#include <torch/csrc/stable/library.h>\n"
        "#include <torch/csrc/stable/tensor.h>\n"
        "using torch::stable::Tensor;\n"
        "int64_t count(Tensor x) { return x.numel(); }\n"
        'STABLE_TORCH_LIBRARY(probe, m) { m.def("count(Tensor x) -> int"); }\n'
        'STABLE_TORCH_LIBRARY_IMPL(probe, CPU, m) { m.impl("count", TORCH_BOX(&count)); }\n'
    )
    code = (
        "print(libraries.backend(), libraries.state().origin)\n"
        "assert torch.ops.probe.count(torch.ones(2, 3)) == 6"
    )
    processes = [start(home, code) for _ in range(2)]
    for process in processes:
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        release(process)
    results = [process.communicate(timeout=120) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], results
    assert sorted(out for out, _ in results) == ["native built now\n", "native cache\n"]
    assert "".join(err for _, err in results).count("compiling the CPU kernels") == 1


def test_processes_at_once_build_a_cell_once(home):
    compile_into(load(home), home / "main")
    code = "print(libraries.backend(), libraries.state().origin)"
    processes = [start(home, code, "cell") for _ in range(2)]
    for process in processes:
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        release(process)
    results = [process.communicate(timeout=120) for process in processes]
    assert sorted(out for out, _ in results) == ["native built now\n", "native cache\n"], results


@pytest.mark.drawn(2)
@pytest.mark.parametrize("sign", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_killed_build_leaves_nothing_in_the_way(home, kind, anew, stub, sign):
    """Neither files nor processes: ninja and its compilers end with who started them."""
    stub(f'[ ! -e {home.parent}/slow ] || sleep 60\nexec {shutil.which("c++")} "$@"')
    (home.parent / "slow").write_text("")
    # A shell's background jobs ignore interrupts, and so does what they start.
    heeded = "import signal\nsignal.signal(signal.SIGINT, signal.default_int_handler)"
    process = start(home, f"{heeded}\nlibraries.backend()", kind)
    release(process)
    deadline = time.monotonic() + 60
    while not stub.processes():
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.02)
    process.send_signal(sign)
    process.communicate(timeout=60)
    for pid in stub.processes():
        while Path(f"/proc/{pid}").exists() and "zombie" not in status(pid):
            assert time.monotonic() < deadline, "a compiler lives on"
            time.sleep(0.02)
    assert not list((home / "cache").rglob("*.so"))

    (home.parent / "slow").unlink()
    libraries = anew()
    assert libraries.backend() == "native" and libraries.state().origin == "built now"
    assert not list((home / "cache").glob("*.build-*"))


def status(pid):
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/status").read_text()
    return "zombie"


# --- The CUDA library -----------------------------------------------------------------------------


@pytest.fixture
def cuda(home, monkeypatch):
    """A torch for CUDA 13.0 and a toolkit whose nvcc says what version it is."""

    def toolkit(version):
        nvcc = home / "toolkit" / "bin" / "nvcc"
        nvcc.parent.mkdir(parents=True, exist_ok=True)
        nvcc.write_text(
            f"#!/bin/sh\necho Cuda compilation tools, release {version}, V{version}.88\n"
        )
        nvcc.chmod(0o755)
        monkeypatch.setenv("CUDA_HOME", str(home / "toolkit"))

    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setenv("FUSED_RNN_CUDA_ARCH", "80 90a")
    return toolkit


def test_finds_the_toolkit(libraries, cuda, home, monkeypatch):
    cuda("13.2")  # another minor version will do
    toolkit = build.find_toolkit()
    assert toolkit.nvcc == str(home / "toolkit" / "bin" / "nvcc")
    assert (toolkit.version, toolkit.architectures) == ("13.2", ("80", "90a"))
    tools = libraries.targets["cuda"].find_tools()
    assert tools.kinds == ("sm_80", "sm_90a")
    assert "-gencode=arch=compute_90a,code=sm_90a" in tools.commands["nvcc"]
    keys = {key_of(libraries), key_of(libraries, "cuda")}
    cuda("13.1")
    keys.add(key_of(libraries, "cuda"))
    monkeypatch.setenv("FUSED_RNN_CUDA_ARCH", "80")
    keys.add(key_of(libraries, "cuda"))
    assert len(keys) == 4


def test_nvcc_is_given_the_compiler_itself(cuda, home, monkeypatch):
    """Not what runs it, nor its options."""
    cuda("13.0")
    wrapper = home / "ccache"
    wrapper.write_text('#!/bin/sh\nexec "$@"\n')
    wrapper.chmod(0o755)
    monkeypatch.setenv("CXX", f"{shlex.quote(str(wrapper))} c++ -m64")
    nvcc = build.CUDA.find_tools().commands["nvcc"]
    assert nvcc[nvcc.index("-ccbin") + 1] == "c++"


def test_a_toolkit_that_does_not_fit(libraries, cuda):
    cuda("12.8")
    with pytest.raises(
        build.BuildError, match="is CUDA 12.8, but torch was built for 13.0"
    ) as error:
        build.find_toolkit()
    assert "CUDA toolkit 13.0" in error.value.remedy and "CUDA_HOME" in error.value.remedy
    with pytest.warns(RuntimeWarning, match="no CUDA library: .*but torch was built for 13.0"):
        assert libraries.backend("cuda") == "reference"
    assert libraries.backend("cpu") == "native", "the CPU's library is another one"


def test_no_toolkit(libraries, cuda, home, monkeypatch):
    monkeypatch.setenv("CUDA_HOME", str(home / "nowhere"))
    with pytest.raises(build.BuildError, match="nvcc was not found in .*nowhere"):
        build.find_toolkit()
    monkeypatch.setattr(torch.version, "cuda", None)
    with pytest.raises(build.BuildError, match="this torch was built without CUDA"):
        build.find_toolkit()


def test_no_device(libraries, cuda, monkeypatch):
    cuda("13.0")
    monkeypatch.delenv("FUSED_RNN_CUDA_ARCH")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(build.BuildError, match="there is no CUDA device"):
        build.find_toolkit()


# --- The commands ---------------------------------------------------------------------------------


def run(*arguments, **env):
    """Run Python from the checkout, where the real package and sources are."""
    return python(*arguments, cwd=ROOT, env={**os.environ, **env})


def run_afresh(*arguments, **env):
    """In an interpreter that has imported nothing."""
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env={**os.environ, **env},
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_import_builds_nothing(home):
    code = "import fused_rnn; fused_rnn.GRU(2, 3); assert not fused_rnn.build.state(); import sys; "
    code += "assert 'torch._dynamo' not in sys.modules"  # which takes as long as all of torch
    done = run("-c", code)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert not (home / "cache").exists()


def test_the_build_needs_no_torch(home):
    """setup.py and tests load it by its path where there may be none."""
    code = f"""
import importlib.util, sys
sys.modules["torch"] = sys.modules["fused_rnn"] = None  # their import would fail
path = {str(ROOT / "fused_rnn" / "build" / "__init__.py")!r}
spec = importlib.util.spec_from_file_location("fused_rnn_build", path)
build = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(build)
print(build.VERSION, len(build.CPU.source_hash()), len(build.cells()), build.levels()[0])
"""
    done = run_afresh("-c", code)
    assert done.stdout == f"{build.VERSION} 12 {len(build.cells())} generic\n", done.stderr


def test_doctor_of_the_package(home):
    done = run("-m", "fused_rnn", "doctor")
    assert done.returncode == 0, done.stderr
    facts = dict(line.split(None, 1) for line in done.stdout.splitlines() if line)
    assert facts["torch"] == torch.__version__ and facts["cache"] == str(home / "cache")
    assert not (home / "cache").exists()


def test_unknown_settings_of_the_commands(home):
    done = run("-m", "fused_rnn", "doctor", FUSED_RNN_BACKEND="fastest")
    assert done.returncode == 2 and "use auto, native or reference" in done.stderr
    done = run("-m", "fused_rnn", "doctor", FUSED_RNN_BACKENDS="native")
    assert done.returncode == 2 and "FUSED_RNN_BACKENDS is no setting" in done.stderr


@pytest.fixture
def command(home, monkeypatch, capsys):
    """Runs one command on the small sources; gives its exit code, output and errors."""

    def call(name, *arguments, **env):
        with monkeypatch.context() as patch:
            for variable, value in env.items():
                patch.setenv(variable, value)
            code = getattr(build.report, name)(load(home), *arguments)
        return code, *capsys.readouterr()

    return call


def test_doctor_says_what_is_used(command):
    code, out, _ = command("doctor", False)
    assert code == 0 and "all is well: the first use" in out and "backend   none" in out
    assert re.search(r"^tested    (on such machines|under an emulator|never)", out, re.MULTILINE)
    code, out, _ = command("doctor", True)
    assert code == 0 and "origin    built now" in out and out.endswith("\nall is well\n")
    code, out, _ = command("doctor", False)
    assert code == 0 and "origin    cache" in out and "all is well: the library works" in out
    code, out, _ = command("doctor", True, FUSED_RNN_BACKEND="reference")
    assert code == 0 and "backend   reference" in out and "native is switched off" in out


def test_doctor_names_the_remedy(command):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for load_it in (False, True):
            code, out, _ = command("doctor", load_it, CXX="no-such-c++")
            assert code == 0
            assert "problem   the compiler of CXX=no-such-c++ was not found" in out
            assert "remedy    install a C++17 compiler" in out
            code, _, _ = command("doctor", load_it, CXX="no-such-c++", FUSED_RNN_BACKEND="native")
            assert code == 1


def test_doctor_survives_a_library_that_crashes(command, home):
    """It is tried in a process of its own. The crash is at load, in a constructor."""
    (home / "csrc" / "cpu" / "table.cpp").write_text(
        "struct Crash { Crash() { __builtin_trap(); } } crash;\n"
    )
    libraries = load(home)
    library = compile_into(libraries, home / "cache", key_of(libraries))
    code, out, _ = command("doctor", False)
    assert code == 0 and f"problem   {library} does not work: its process was ended by SIG" in out
    assert f"remedy    delete {library}" in out and "all is well" not in out
    code, _, _ = command("doctor", False, FUSED_RNN_BACKEND="native")
    assert code == 1


def test_doctor_tries_the_layers():
    """The library of the package, whatever it is here: wrong results would be told."""
    if build.backend() != "native":
        pytest.skip("no native library")
    assert build.report.try_out("cpu", build.state().library) is None
    code = """
import sys, torch
from fused_rnn import build
from fused_rnn.build import trial
def forward(self, x):
    return sum(p.sum() for p in self.parameters()).expand(4, 3, 14), None
torch.nn.LSTM.forward = forward
trial.main("cpu", sys.argv[1])
"""
    done = run("-c", code, str(build.state().library))
    assert done.returncode == 1 and "Tensor-likes are not close" in done.stderr


def test_build_and_clean_commands(command, home):
    code, _, err = command("build", CXX="no-such-c++")
    assert code == 1 and "install a C++17 compiler" in err
    code, out, _ = command("build")
    assert code == 0 and "fused_rnn_native.so (built now)" in out
    done = run("-m", "fused_rnn", "clean")
    assert done.returncode == 0 and done.stdout.count("deleted ") == 2
    assert not list((home / "cache").iterdir())


# --- What setup.py makes --------------------------------------------------------------------------

FOLDERS = ("benchmarks", "csrc", "examples", "fused_rnn", "tests")


@pytest.fixture
def tree(home, tmp_path):
    """A copy of what makes the package, where setup.py may write."""
    pytest.importorskip("setuptools", "77")
    folder = tmp_path / "tree"
    ignored = shutil.ignore_patterns("__pycache__", "_native*")
    for name in (*FOLDERS, ".ci", ".github", "docs"):
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name, ignore=ignored)
    for path in ROOT.glob("*"):
        if path.is_file():
            shutil.copy(path, folder)
    shutil.copy(ROOT / ".clang-format", folder)
    return folder


def setup(tree, *arguments, **env):
    return subprocess.run(
        [sys.executable, "setup.py", *arguments],
        cwd=tree,
        env={**os.environ, **env},
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_source_distribution_is_complete(tree):
    """Tests, examples and make work from it as from a checkout."""
    done = setup(tree, "sdist", "--dist-dir", "made")
    assert done.returncode == 0, done.stderr
    (archive,) = (tree / "made").iterdir()
    with tarfile.open(archive) as tar:
        packed = {name.partition("/")[2] for name in tar.getnames()}
    wanted = {path for name in FOLDERS for path in (tree / name).rglob("*") if path.is_file()}
    missing = {path.relative_to(tree).as_posix() for path in wanted} - packed
    assert not missing
    top = "CHANGELOG.md LICENSE Makefile README.md pyproject.toml setup.py .ci/run .clang-format"
    of_site = "mkdocs.yml CONTRIBUTING.md docs/site/hooks.py docs/site/style.css"
    public = "CITATION.cff .github/workflows/tests.yml .github/ISSUE_TEMPLATE/config.yml"
    assert {*top.split(), *of_site.split(), *public.split()} <= packed


def test_wheel_without_kernels_says_so(tree):
    done = setup(tree, "bdist_wheel", FUSED_RNN_SKIP_EXT="1")
    assert done.returncode == 0, done.stderr
    last = done.stdout.strip().splitlines()[-1]
    assert "NO NATIVE LIBRARY" in last and "FUSED_RNN_SKIP_EXT" in last
    (wheel,) = (tree / "dist").iterdir()
    assert wheel.name.endswith("-py3-none-any.whl")


def test_wheel_has_the_package_and_its_sources_and_no_more(tree):
    """From the source distribution too, to the last byte."""
    dated = {"FUSED_RNN_SKIP_EXT": "1", "SOURCE_DATE_EPOCH": "1700000000"}
    assert setup(tree, "bdist_wheel", "sdist", **dated).returncode == 0
    archive, wheel = sorted((tree / "dist").iterdir(), key=lambda path: path.suffix)
    with zipfile.ZipFile(wheel) as packed:
        found = {name for name in packed.namelist() if ".dist-info/" not in name}
    wanted = [path for path in (tree / "fused_rnn").rglob("*") if path.is_file()]
    wanted = {path.relative_to(tree).as_posix() for path in wanted if path.suffix != ".pyc"}
    wanted |= {f"fused_rnn/{path.relative_to(ROOT).as_posix()}" for path in build.source_files()}
    assert found == wanted
    with tarfile.open(archive) as tar:
        tar.extractall(tree.parent / "unpacked")
    (unpacked,) = (tree.parent / "unpacked").iterdir()
    done = setup(unpacked, "bdist_wheel", **dated)
    assert done.returncode == 0, done.stderr
    assert (unpacked / "dist" / wheel.name).read_bytes() == wheel.read_bytes()


def test_library_is_the_same_wherever_it_was_compiled(home, tmp_path, monkeypatch):
    """And whenever, where a date is given: names of folders are in none of its messages."""
    text = "#include <torch/csrc/stable/library.h>\nconst char* file() { return __FILE__; }\n"
    (home / "csrc" / "ops" / "cpu.cpp").write_text(text)
    shutil.copytree(home / "csrc", tmp_path / "elsewhere" / "csrc")
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")
    made = [
        compile_into(load(folder), folder / "made") for folder in (home, tmp_path / "elsewhere")
    ]
    one, other = (path.read_bytes() for path in made)
    assert one == other and str(tmp_path).encode() not in one
    one, other = (path.with_suffix(".json").read_text() for path in made)
    assert one == other and "2023-11-14" in one


def test_kernels_that_are_required(tree):
    done = setup(tree, "bdist_wheel", FUSED_RNN_SKIP_EXT="1", FUSED_RNN_REQUIRE_EXT="1")
    assert done.returncode != 0
    assert "FUSED_RNN_REQUIRE_EXT is set, but FUSED_RNN_SKIP_EXT is set" in done.stderr
    done = setup(tree, "bdist_wheel", FUSED_RNN_REQUIRE="1")
    assert "FUSED_RNN_REQUIRE is no setting" in done.stderr


def test_editable_install_is_a_folder_on_the_path(tree):
    """Type checkers find that, where they find no program that imports would run."""
    code = """
from setuptools.build_meta import build_editable
print(build_editable("made"))
"""
    (tree / "made").mkdir()
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tree, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    (wheel,) = (tree / "made").iterdir()
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".pth"))
        assert Path(archive.read(name).decode().strip()).samefile(tree)
        assert not [name for name in archive.namelist() if name.endswith(".py")]
