"""Building, caching and loading the native library, on a tree of sources that compiles at once."""

import contextlib
import fcntl
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]

pytestmark = pytest.mark.skipif(not shutil.which("c++"), reason="there is no compiler")

SOURCES = {
    "cells/registry.def": "// CELL(not, a, cell)\nCELL(one, One, one.h)\nCELL(two, Two, one.h)\n",
    "cells/one.h": "struct One { enum { kValue = 1 }; };\nusing Two = One;\n",
    "cpu/instance.cpp.in": (
        '#include "cells/@HEADER@"\n'
        "@SCALAR@ probe_@NAME@_@TIER@_@SCALAR@() { return @TYPE@::kValue; }\n"
    ),
    "cpu/gemm.cpp.in": "@SCALAR@ gemm_@TIER@_@SCALAR@() { return 3; }\n",
    "cpu/table.cpp": "double probe_one_generic_double();\ndouble table() { return 2; }\n",
    "ops/cpu.cpp": "#include <torch/headeronly/version.h>\nint bound = TORCH_VERSION_MAJOR;\n",
    "ops/direct.cpp": "#if __has_include(<Python.h>)\n#include <Python.h>\n#endif\nint direct;\n",
}
# Loads build.py by itself, on the sources and cache given, as setup.py and the tests here do.
LOADER = f"""
import importlib.util, sys
from pathlib import Path
spec = importlib.util.spec_from_file_location("build", {str(ROOT / "fused_rnn" / "build.py")!r})
build = importlib.util.module_from_spec(spec)
spec.loader.exec_module(build)
build.CSRC = Path(sys.argv[1])
build.PACKAGE = build.CSRC.parent
"""


def load(folder):
    """A fresh copy of build.py, as a new process would have it."""
    spec = importlib.util.spec_from_file_location("build", ROOT / "fused_rnn" / "build.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.CSRC, module.PACKAGE = folder / "csrc", folder
    return module


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
def build(home):
    return load(home)


def no_compiler(home, monkeypatch):
    (home / "empty").mkdir()
    monkeypatch.setenv("PATH", str(home / "empty"))


def fallback_message(build):
    """Use the backend twice, expect the reference and one warning; return its text."""
    with pytest.warns(RuntimeWarning) as caught:
        assert build.backend() == "reference"
        assert build.backend() == "reference"
    assert len(caught) == 1
    text = str(caught[0].message)
    assert "python -m fused_rnn doctor" in text and "remedy: " in text
    return text


# --- What is built --------------------------------------------------------------------------------


def test_builds_once_and_finds_it_again(build, home, capsys):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert build.backend() == "native"
    assert capsys.readouterr().err.count("compiling the CPU kernels") == 1
    facts = build.info()
    assert facts["origin"] == "built now" and facts["library"].parent.parent == home / "cache"
    left = sorted(path.name for path in (home / "cache").iterdir())
    key = build.cache_key(build.find_compiler())
    assert left == [key, f"{key}.lock"], "nothing but the library's folder and the lock may stay"

    record = json.loads((home / "cache" / key / "fused_rnn_native.json").read_text())
    assert record["torch"] == torch.__version__ and record["cells"] == ["one", "two"]
    assert record["source_hash"] == build.source_hash() and record["tiers"] == list(build.tiers())

    again = load(home)
    assert again.backend() == "native" and again.info()["origin"] == "cache"
    assert capsys.readouterr().err == "", "only a build says something"


def test_units_and_flags(build, home):
    build._write_ninja_file(home, build.find_compiler())
    flags = {}
    lines = (home / "build.ninja").read_text().splitlines()
    for rule, setting in zip(lines, lines[1:], strict=False):
        if rule.startswith("build "):
            flags[rule.split()[1].rstrip(":").partition("_")[2] or "link"] = setting
    kinds = [(tier, scalar) for tier in build.tiers() for scalar in ("float", "double")]
    instances = {f"instance_{t}_{cell}_{s}.o" for t, s in kinds for cell in ("one", "two")}
    instances |= {
        f"gemm_{tier}_{scalar}.o" for tier, scalar in kinds
    }  # names no cell: once for all
    assert set(flags) == {*instances, "table.o", "cpu.o", "direct.o", "link"}
    for name, text in flags.items():
        assert (" -m" in text) == ("avx" in name) and ("-mavx512f" in text) == ("avx512" in name)
    for name in {*instances, "table.o"}:
        assert "torch" not in flags[name] and "TORCH" not in flags[name]
    assert "-DTORCH_TARGET_VERSION=0x020A000000000000" in flags["cpu.o"]
    for text in flags.values():
        assert "native" not in text and "fast-math" not in text
    text = (home / "instance_generic_one_double.cpp").read_text()
    assert text.endswith("double probe_one_generic_double() { return One::kValue; }\n")


def test_key_depends_on_all_inputs(build, home, monkeypatch):
    compiler = build.find_compiler()
    keys = [build.cache_key(compiler)]
    (home / "csrc" / "notes.txt").write_text("not an input")
    assert build.cache_key(compiler) == keys[0]

    (home / "csrc" / "cells" / "one.h").write_text(
        "struct One { enum { kValue = 2 }; };\nusing Two = One;\n"
    )
    keys.append(build.cache_key(compiler))
    (home / "csrc" / "core").mkdir()
    (home / "csrc" / "core" / "new.h").write_text("")
    keys.append(build.cache_key(compiler))
    monkeypatch.setattr(build, "BASE_FLAGS", [*build.BASE_FLAGS, "-g"])
    keys.append(build.cache_key(compiler))
    monkeypatch.setattr(torch, "__version__", "2.99.0")
    keys.append(build.cache_key(compiler))
    monkeypatch.setattr(torch.version, "git_version", "0")
    keys.append(build.cache_key(compiler))
    keys.append(build.cache_key(compiler._replace(version="c++ 99")))
    monkeypatch.setattr(build, "machine", lambda: "riscv64")
    keys.append(build.cache_key(compiler))
    assert len(set(keys)) == len(keys)
    assert all(build.OURS.fullmatch(key) for key in keys)


def test_rebuilds_when_a_header_changes(build, home):
    assert build.backend() == "native"
    (home / "csrc" / "cells" / "one.h").write_text(
        "struct One { enum { kValue = 2 }; };\nusing Two = One;\n"
    )
    again = load(home)
    assert again.backend() == "native" and again.info()["origin"] == "built now"


def test_max_jobs(build, monkeypatch):
    assert 1 <= build.max_jobs() <= os.cpu_count()
    monkeypatch.setenv("FUSED_RNN_MAX_JOBS", "3")
    assert build.max_jobs() == 3
    monkeypatch.setenv("FUSED_RNN_MAX_JOBS", "many")
    with pytest.raises(ValueError, match="FUSED_RNN_MAX_JOBS"):
        build.max_jobs()


@pytest.mark.parametrize("version", ["1.13.1", "2.9.1+cpu"])
def test_old_torch_is_refused(build, monkeypatch, version):
    build.check_torch_version()
    monkeypatch.setattr(torch, "__version__", version)
    with pytest.raises(ImportError, match=r"needs torch >= 2\.10, found"):
        build.check_torch_version()


@pytest.mark.parametrize("version", ["2.10.0", "2.14.1+cu130", "3.0.0a0+git1234"])
def test_new_torch_is_welcome(build, monkeypatch, version):
    monkeypatch.setattr(torch, "__version__", version)
    build.check_torch_version()


# --- Direct calls ---------------------------------------------------------------------------------


def test_direct_calls_need_the_header_of_python(build, home, monkeypatch):
    def flags():
        build._write_ninja_file(home, build.find_compiler())
        return (home / "build.ninja").read_text()

    compiler = build.find_compiler()
    keys = {build.cache_key(compiler)}
    assert f"-isystem {build._ninja_words([build.sysconfig.get_path('include')])}" in flags()
    monkeypatch.setattr(build.sysconfig, "get_path", lambda name: str(home / "nowhere"))
    keys.add(build.cache_key(compiler))
    assert "nowhere" not in flags()
    assert len(keys) == 2, "once the header is there, the library is built anew"


def test_free_threaded_python_has_no_direct_calls(build, home, monkeypatch):
    get = build.sysconfig.get_config_var
    monkeypatch.setattr(
        build.sysconfig,
        "get_config_var",
        lambda name: 1 if name == "Py_GIL_DISABLED" else get(name),
    )
    assert build._python_include() == []
    assert build.backend() == "native" and build.direct_calls([]) is None


def test_library_without_direct_calls(build, monkeypatch):
    assert build.backend() == "native"
    assert build.direct_calls([]) is None, "it is no Python module"
    monkeypatch.delattr(torch.Tensor, "__dlpack_c_exchange_api__", raising=False)
    assert build.direct_calls([]) is None


DIRECT = """
#define Py_LIMITED_API 0x030A0000
#include <Python.h>
#pragma weak PyBool_FromLong
#pragma weak PyModule_Create2
PyObject* Setup(PyObject*, PyObject* const*, Py_ssize_t n) { return PyBool_FromLong(n == 6); }
PyMethodDef methods[] = {{"setup", (PyCFunction)(void*)Setup, METH_FASTCALL, 0}, {}};
PyModuleDef module = {PyModuleDef_HEAD_INIT, "_direct", 0, -1, methods, 0, 0, 0, 0};
extern "C" __attribute__((visibility("default"))) PyObject* PyInit__direct() {
  return PyModule_Create(&module);
}
"""


def test_library_that_is_no_use_to_this_torch(build, home):
    """A module is asked, with all that it needs of torch, whether it can be used."""
    (home / "csrc" / "ops" / "direct.cpp").write_text(DIRECT)
    assert build.backend() == "native"
    if hasattr(torch.Tensor, "__dlpack_c_exchange_api__"):
        assert build.direct_calls(len) is None
        assert build.direct_calls(len, len).__name__ == "fused_rnn._direct"


# --- The library that comes with the package ------------------------------------------------------


def test_ahead_of_time_library_is_used(build, home):
    library = build.compile_library(home / "temp" / "native", build.AHEAD_OF_TIME)
    for path in (library, library.with_suffix(".json")):
        shutil.copy(path, home)
    assert build.backend() == "native" and build.info()["origin"] == "ahead of time"
    assert not (home / "cache").exists()

    with (home / "csrc" / "cells" / "one.h").open("a") as file:
        file.write("// changed\n")
    changed = load(home)
    assert changed.backend() == "native" and changed.info()["origin"] == "built now"
    assert "compiled from other sources" in changed.info()["reason"]


def test_library_that_does_not_load(build, home):
    (home / "_native.so").write_text("this is no library")
    (home / "_native.json").write_text(json.dumps({"source_hash": build.source_hash()}))
    text = fallback_message(build)
    assert "_native.so cannot be loaded" in text


def test_record_that_cannot_be_read(build, home):
    for text in ("", "{", "[]"):
        (home / "_native.json").write_text(text)
        assert build.read_record(home / "_native.so") == {}


# --- Choosing the backend -------------------------------------------------------------------------


def test_reference_never_builds(build, home, monkeypatch):
    monkeypatch.setenv("FUSED_RNN_BACKEND", "reference")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert build.backend() == "reference"
    assert not (home / "cache").exists() and build.info()["problem"] is None


def test_native_raises_instead_of_falling_back(build, home, monkeypatch):
    monkeypatch.setenv("FUSED_RNN_BACKEND", "native")
    no_compiler(home, monkeypatch)
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"no native library: a C\+\+ compiler .* not found"):
            build.backend()


def test_native_and_auto_build(home, monkeypatch):
    for value in ("native", "auto", ""):
        monkeypatch.setenv("FUSED_RNN_BACKEND", value)
        assert load(home).backend() == "native"


def test_unknown_backend(build, monkeypatch):
    monkeypatch.setenv("FUSED_RNN_BACKEND", "cuda")
    with pytest.raises(ValueError, match="'cuda': use auto, native or reference"):
        build.backend()


def test_first_use_from_many_threads(build):
    builds, results = [], []
    compile_library = build.compile_library
    build.compile_library = lambda *args, **kwargs: (
        builds.append(args) or compile_library(*args, **kwargs)
    )
    threads = [threading.Thread(target=lambda: results.append(build.backend())) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == ["native"] * 8 and len(builds) == 1


# --- Failures -------------------------------------------------------------------------------------


def test_no_compiler(build, home, monkeypatch):
    no_compiler(home, monkeypatch)
    assert "a C++ compiler (c++, g++, clang++) was not found" in fallback_message(build)
    facts = build.info()
    assert facts["backend"] == "reference" and "install a C++17 compiler" in facts["remedy"]


def test_compiler_of_cxx_is_missing(build, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-c++ -m64")
    assert "CXX=no-such-c++ -m64 was not found" in fallback_message(build)


def test_compiler_that_does_not_run(build, home, monkeypatch):
    monkeypatch.setenv("CXX", "false")
    assert "the compiler does not run" in fallback_message(build)


def test_cached_library_needs_no_compiler(build, home, monkeypatch):
    assert build.backend() == "native"
    no_compiler(home, monkeypatch)
    again = load(home)
    assert again.backend() == "native" and again.info()["origin"] == "cache"
    assert again.info()["problem"] is None


def test_no_ninja(build, tmp_path, monkeypatch):
    (tmp_path / "c++").symlink_to(shutil.which("c++"))
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    monkeypatch.setitem(sys.modules, "ninja", None)
    text = fallback_message(build)
    assert "ninja was not found" in text and "pip install ninja" in text


def test_source_that_does_not_compile(build, home):
    (home / "csrc" / "cpu" / "table.cpp").write_text('int wrong = "text";\n')
    text = fallback_message(build)
    log = home / "cache" / f"{build.cache_key(build.find_compiler())}.log"
    assert "table.cpp:1:" in text and "error: invalid conversion" in text and str(log) in text
    assert "int wrong" in log.read_text()
    assert not list((home / "cache").glob("*/*")), "a failed build leaves its log alone"

    (home / "csrc" / "cpu" / "table.cpp").write_text(SOURCES["cpu/table.cpp"])
    assert build.backend() == "reference", "one process decides once"
    assert load(home).backend() == "native"


def test_missing_symbol_fails_at_build(build, home):
    (home / "csrc" / "cpu" / "table.cpp").write_text(
        "int gone();\nint table() { return gone(); }\n"
    )
    text = fallback_message(build)
    assert "undefined" in text and "gone" in text


def test_no_sources(build, home):
    shutil.rmtree(home / "csrc")
    assert "no cells were found" in fallback_message(build)


def test_warning_as_error_still_decides(build, home, monkeypatch):
    no_compiler(home, monkeypatch)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(RuntimeWarning):
            build.backend()
        assert build.backend() == "reference"


# --- The cache folder -----------------------------------------------------------------------------


def test_cache_dir_of_the_environment(build, monkeypatch):
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


def test_unwritable_cache(build, home, unwritable, capsys):
    assert build.backend() == "native"
    private = unwritable / f"fused_rnn-{os.getuid()}"
    assert build.info()["library"].is_relative_to(private)
    assert private.stat().st_mode & 0o777 == 0o700
    error = capsys.readouterr().err
    assert "cannot be written" in error and str(private) in error

    again = load(home)
    assert again.backend() == "native" and again.info()["origin"] == "cache"


@pytest.mark.parametrize("trap", ["open to all", "link", "file"])
def test_private_folder_must_be_private(build, home, unwritable, trap):
    private = unwritable / f"fused_rnn-{os.getuid()}"
    if trap == "open to all":
        private.mkdir()
        private.chmod(0o777)
    elif trap == "link":
        (home / "elsewhere").mkdir(mode=0o700)
        private.symlink_to(home / "elsewhere")
    else:
        private.write_text("")
    assert "FUSED_RNN_CACHE_DIR" in fallback_message(build)


def test_clean_deletes_only_its_own(build, home):
    assert build.backend() == "native"
    key = build.info()["library"].parent.name
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


def test_clean_leaves_a_build_under_way(build, home):
    (home / "cache").mkdir()
    key = build.cache_key(build.find_compiler())
    (home / "cache" / f"{key}.build-x").mkdir()
    with build._locked(home / "cache" / f"{key}.lock", timeout=0):
        assert build.clean() == []
    assert (home / "cache" / f"{key}.build-x").exists()


# --- Processes ------------------------------------------------------------------------------------


def test_stale_lock_file_is_harmless(build, home):
    (home / "cache").mkdir()
    (home / "cache" / f"{build.cache_key(build.find_compiler())}.lock").write_text("pid 1")
    start = time.monotonic()
    assert build.backend() == "native" and time.monotonic() - start < 30


def test_waiting_for_the_lock_ends(build, home, monkeypatch, capsys):
    (home / "cache").mkdir()
    lock = home / "cache" / f"{build.cache_key(build.find_compiler())}.lock"
    monkeypatch.setenv("FUSED_RNN_LOCK_TIMEOUT", "0.3")
    monkeypatch.setattr(build, "LOCK_NOTICE", 0.0)
    with lock.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        text = fallback_message(build)
    assert f"another process has held {lock} for 0.3 s" in text and "FUSED_RNN_LOCK_TIMEOUT" in text
    assert capsys.readouterr().err.count("waiting for another process to build") == 1


def start(home, code, **options):
    """A process that has torch and build.py ready, and runs code when it gets a line of input."""
    script = f"{LOADER}\nimport torch\nprint('ready', flush=True)\ninput()\n{code}"
    return subprocess.Popen(
        [sys.executable, "-c", script, str(home / "csrc")],
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
        "print(build.backend(), build.info()['origin'])\n"
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


def test_killed_build_leaves_nothing_in_the_way(home, monkeypatch):
    slow = home / "slow"
    slow.write_text("")
    compiler = home / "c++"
    compiler.write_text(
        f'#!/bin/sh\n[ "$1" = --version ] || [ ! -e "{home.parent}/link/slow" ] || sleep 60\n'
        f'exec {shutil.which("c++")} "$@"\n'
    )
    compiler.chmod(0o755)
    (home.parent / "link").symlink_to(home)  # a path that needs no quotes
    monkeypatch.setenv("CXX", str(home.parent / "link" / "c++"))

    process = start(home, "build.backend()", start_new_session=True)
    try:
        release(process)
        deadline = time.monotonic() + 60
        while not list((home / "cache").glob("*.build-*/build.ninja")):
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.02)
        process.kill()
        process.communicate()
        assert not list((home / "cache").rglob("*.so"))

        slow.unlink()
        build = load(home)
        assert build.backend() == "native" and build.info()["origin"] == "built now"
        assert not list((home / "cache").glob("*.build-*"))
    finally:
        with contextlib.suppress(ProcessLookupError):  # its ninja, which may have outlived it
            os.killpg(process.pid, signal.SIGKILL)


# --- The CUDA library -----------------------------------------------------------------------------


@pytest.fixture
def cuda(build, home, monkeypatch):
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


def test_finds_the_toolkit(build, cuda, home, monkeypatch):
    cuda("13.2")  # another minor version will do
    toolkit = build.find_toolkit()
    assert toolkit.nvcc == str(home / "toolkit" / "bin" / "nvcc")
    assert (toolkit.version, toolkit.architectures) == ("13.2", ("80", "90a"))
    compiler = build.find_compiler()
    keys = {build.cache_key(compiler, toolkit), build.cache_key(compiler)}
    cuda("13.1")
    keys.add(build.cache_key(compiler, build.find_toolkit()))
    monkeypatch.setenv("FUSED_RNN_CUDA_ARCH", "80")
    keys.add(build.cache_key(compiler, build.find_toolkit()))
    assert len(keys) == 4


def test_a_toolkit_that_does_not_fit(build, cuda):
    cuda("12.8")
    with pytest.raises(
        build.BuildError, match="is CUDA 12.8, but torch was built for 13.0"
    ) as error:
        build.find_toolkit()
    assert "CUDA toolkit 13.0" in error.value.remedy and "CUDA_HOME" in error.value.remedy
    with pytest.warns(RuntimeWarning, match="no CUDA library: .*but torch was built for 13.0"):
        assert build.backend("cuda") == "reference"
    assert build.backend("cpu") == "native", "the CPU's library is another one"


def test_no_toolkit(build, cuda, home, monkeypatch):
    monkeypatch.setenv("CUDA_HOME", str(home / "nowhere"))
    with pytest.raises(build.BuildError, match="nvcc was not found in .*nowhere"):
        build.find_toolkit()
    monkeypatch.setattr(torch.version, "cuda", None)
    with pytest.raises(build.BuildError, match="this torch was built without CUDA"):
        build.find_toolkit()


def test_no_device(build, cuda, monkeypatch):
    cuda("13.0")
    monkeypatch.delenv("FUSED_RNN_CUDA_ARCH")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(build.BuildError, match="there is no CUDA device"):
        build.find_toolkit()


# --- The commands ---------------------------------------------------------------------------------


def run(*arguments):
    """Run Python from the checkout, where the real package and sources are."""
    return subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=120
    )


def test_import_builds_nothing(home):
    code = "import fused_rnn; fused_rnn.GRU(2, 3); assert not fused_rnn.build._states; import sys; "
    code += "assert 'torch._dynamo' not in sys.modules"  # which takes as long as all of torch
    done = run("-c", code)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert not (home / "cache").exists()


def test_doctor_of_the_package(home):
    done = run("-m", "fused_rnn", "doctor")
    assert done.returncode == 0, done.stderr
    facts = dict(line.split(None, 1) for line in done.stdout.splitlines() if line)
    assert facts["torch"] == torch.__version__ and facts["cache"] == str(home / "cache")
    assert not (home / "cache").exists()


@pytest.fixture
def command(build, monkeypatch, capsys):
    """Runs one command on the small sources; gives its exit code, output and errors."""
    main = importlib.import_module("fused_rnn.__main__")

    def call(*arguments, **env):
        build._states.clear()
        with monkeypatch.context() as patch:
            for name, value in env.items():
                patch.setenv(name, value)
            patch.setattr(main, "build", build)
            patch.setattr(sys, "argv", ["fused_rnn", *arguments])
            try:
                code = main.main()
            except SystemExit as exit:
                code = exit.code
        return code, *capsys.readouterr()

    return call


def test_doctor_says_what_is_used(command):
    code, out, _ = command("doctor")
    assert code == 0 and "all is well: the first use" in out and "backend   -" in out
    code, out, _ = command("doctor", "--build")
    assert code == 0 and "origin    built now" in out and out.endswith("\nall is well\n")
    code, out, _ = command("doctor")
    assert code == 0 and "origin    cache" in out and "all is well: the library is loaded" in out
    code, out, _ = command("doctor", "--build", FUSED_RNN_BACKEND="reference")
    assert code == 0 and "backend   reference" in out and "native is switched off" in out


def test_doctor_names_the_remedy(command):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for arguments in (["doctor"], ["doctor", "--build"]):
            code, out, _ = command(*arguments, CXX="no-such-c++")
            assert code == 0
            assert "problem   the compiler of CXX=no-such-c++ was not found" in out
            assert "remedy    install a C++17 compiler" in out
            code, _, _ = command(*arguments, CXX="no-such-c++", FUSED_RNN_BACKEND="native")
            assert code == 1
    code, _, err = command("doctor", FUSED_RNN_BACKEND="fastest")
    assert code == 2 and "use auto, native or reference" in err


def test_build_and_clean_commands(command, home):
    code, _, err = command("build", CXX="no-such-c++")
    assert code == 1 and "install a C++17 compiler" in err
    code, out, _ = command("build")
    assert code == 0 and "fused_rnn_native.so (built now)" in out
    code, out, _ = command("clean")
    assert code == 0 and out.count("deleted ") == 2 and not list((home / "cache").iterdir())
