"""Builds and loads the native libraries: one for the CPU, and one for CUDA devices.

A library is looked for in this order, at its first use and never at import:

1. beside the package, compiled ahead of time by setup.py from the very sources that are here now;
2. in the cache folder, compiled by an earlier process;
3. compiled now, into the cache folder, once for all processes that wait for it;
4. nowhere: one warning says why and what to do, and the reference path does the work.

setup.py loads this file by its path, so it imports nothing but the standard library at its top.

Environment variables, all optional:

FUSED_RNN_BACKEND       auto (default), native (raise rather than fall back) or reference
FUSED_RNN_CACHE_DIR     where libraries are kept; default $XDG_CACHE_HOME/fused_rnn or
                        ~/.cache/fused_rnn
FUSED_RNN_MAX_JOBS      compilers at once; default one per core, with 2 GB of memory each
FUSED_RNN_LOCK_TIMEOUT  seconds to wait for another process that builds; default 600
FUSED_RNN_VERBOSE       1 shows the compiler's commands and output
CXX                     the compiler; default c++, g++ or clang++
FUSED_RNN_CUDA_ARCH     compute capabilities to compile for, such as "80 90a"; default those of the
                        devices here
CUDA_HOME               the CUDA toolkit, whose nvcc is used; default that of the nvcc on PATH
"""

from __future__ import annotations

import contextlib
import ctypes
import datetime
import hashlib
import importlib.machinery
import itertools
import json
import os
import platform
import re
import shlex
import shutil
import stat
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

VERSION = "0.1.0"

# The bindings use this version of torch's stable ABI: one library serves every torch from it on.
TORCH_MIN = (2, 10)
TORCH_TARGET = f"-DTORCH_TARGET_VERSION=0x{TORCH_MIN[0]:02X}{TORCH_MIN[1]:02X}000000000000"

PACKAGE = Path(__file__).resolve().parent
# In an installed wheel the sources lie inside the package, in a checkout beside it.
CSRC = PACKAGE / "csrc" if (PACKAGE / "csrc").is_dir() else PACKAGE.parent / "csrc"

TARGETS = ("cpu", "cuda")  # folders of csrc, and types of devices
BINDINGS = {"cpu": ("cpu", "direct"), "cuda": ("cuda",)}  # stems of files in csrc/ops
# Stems of the libraries and of their records in the cache.
LIBRARY = {"cpu": "fused_rnn_native", "cuda": "fused_rnn_cuda"}
AHEAD_OF_TIME = "_native"  # the CPU's, beside the package

SOURCE_SUFFIXES = {".h", ".cuh", ".cpp", ".def", ".in"}
SCALARS = ("float", "double")
CUDA_STORAGES = {
    "float": "float",
    "double": "double",
    "bfloat16": "__nv_bfloat16",
    "half": "__half",
}  # in the order of enum Storage; the second is the type in C++

# No -march=native: caches are shared between machines. No -ffast-math: it breaks inf and NaN.
BASE_FLAGS = (
    "-std=c++17 -O2 -fPIC -fopenmp -fvisibility=hidden -fno-math-errno -fno-trapping-math "
    "-Wall -Wextra -Wno-psabi -Wno-unknown-pragmas"
).split()
AVX2_FLAGS = "-mavx2 -mfma -mf16c".split()
AVX512_FLAGS = "-mavx512f -mavx512dq -mavx512bw -mavx512vl -mprefer-vector-width=512".split()
X86_TIERS = {"generic": [], "avx2": AVX2_FLAGS, "avx512": AVX512_FLAGS + AVX2_FLAGS}
LINK_FLAGS = ["-shared", "-fopenmp"]
if sys.platform.startswith("linux"):
    LINK_FLAGS += ["-Wl,--as-needed", "-Wl,-z,defs"]  # a missing symbol fails here, not at load
# Relaxed constexpr: kernels call std::numeric_limits and the like.
NVCC_FLAGS = (
    "-std=c++17 -O3 --expt-relaxed-constexpr -Xcompiler -fPIC,-fvisibility=hidden -lineinfo"
).split()
# The CUDA runtime and cuBLAS are the copies that torch loads: they are found through its libraries.
CUDA_LINK_FLAGS = ["-shared"]

LOCK_NOTICE = 10.0  # seconds of silent waiting before a message
# What clean() may delete: folders of libraries, and what builds leave beside them.
OURS = re.compile(r"(\d[\w.]*-[0-9a-f]{12}-[0-9a-f]{12})(\.lock|\.log|\.build-\w+)?")


class BuildError(RuntimeError):
    """There is no native library: the reason, and what the user can do about it."""

    def __init__(self, reason: str, remedy: str) -> None:
        super().__init__(f"{reason}\n  remedy: {remedy}")
        self.reason, self.remedy = reason, remedy


# --- What is built, and with what -----------------------------------------------------------------


def check_torch_version() -> None:
    """Raise ImportError if the installed torch is older than this package can use."""
    import torch

    found = re.match(r"(\d+)\.(\d+)", torch.__version__)
    if found and (int(found[1]), int(found[2])) < TORCH_MIN:
        wanted = ".".join(map(str, TORCH_MIN))
        raise ImportError(
            f"fused_rnn {VERSION} needs torch >= {wanted}, found {torch.__version__}: "
            f"pip install 'torch>={wanted}'"
        )


class Cell(NamedTuple):
    """One line of csrc/cells/registry.def."""

    name: str
    type: str
    header: str


class Compiler(NamedTuple):
    command: tuple[str, ...]
    version: str  # all that --version prints

    def __str__(self) -> str:
        return f"{shlex.join(self.command)}: {self.version.partition(chr(10))[0]}"


class Toolkit(NamedTuple):
    """The CUDA compiler, and the devices it compiles for."""

    nvcc: str
    version: str  # such as "13.0"
    architectures: tuple[str, ...]  # such as "90a"

    def __str__(self) -> str:
        return f"{self.nvcc}: release {self.version}"


def machine() -> str:
    return platform.machine().lower().replace("amd64", "x86_64")


def tiers() -> dict[str, list[str]]:
    """Instruction sets to compile the kernels for, lowest first, with the flags of each."""
    return X86_TIERS if machine() == "x86_64" else {"generic": []}


def source_files(target: str | None = None) -> list[Path]:
    """Everything under csrc that a build (of this target) may read, in a fixed order."""
    others = {other for other in TARGETS if target and other != target}
    return sorted(
        path
        for path in CSRC.rglob("*")
        if path.suffix in SOURCE_SUFFIXES
        and path.is_file()
        and path.parent.name not in others
        and not any(path.stem in BINDINGS[other] for other in others)
    )


def cells() -> list[Cell]:
    """The cells of the registry. Raises BuildError if there are none."""
    registry = CSRC / "cells" / "registry.def"
    text = registry.read_text(encoding="utf-8") if registry.is_file() else ""
    line = r"^\s*CELL\(\s*(\w+)\s*,\s*([\w:]+)\s*,\s*([\w./]+)\s*\)"
    if found := re.findall(line, text, re.MULTILINE):
        return [Cell(*entry) for entry in found]
    raise BuildError(f"no cells were found in {registry}", "install fused_rnn anew")


def find_compiler() -> Compiler:
    """The compiler of $CXX, else the first one on PATH. Raises BuildError."""
    remedy = "install a C++17 compiler such as g++, or set CXX to one"
    own = os.environ.get("CXX")
    for name, *options in [shlex.split(own)] if own else [["c++"], ["g++"], ["clang++"]]:
        if path := shutil.which(name):
            try:
                version = subprocess.run(
                    [path, *options, "--version"],
                    env=_tool_env(),
                    capture_output=True,
                    check=True,
                    text=True,
                    timeout=60,
                ).stdout.strip()
            except (OSError, subprocess.SubprocessError) as error:
                raise BuildError(f"the compiler does not run: {error}", remedy) from error
            return Compiler((path, *options), version)
    missing = f"the compiler of CXX={own}" if own else "a C++ compiler (c++, g++, clang++)"
    raise BuildError(f"{missing} was not found", remedy)


def find_toolkit() -> Toolkit:
    """The nvcc that fits torch, for the visible devices. Raises BuildError."""
    import torch

    if torch.version.cuda is None:
        raise BuildError("this torch was built without CUDA", "install a CUDA build of torch")
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    nvcc = None if home else shutil.which("nvcc")
    usual = Path(home or "/usr/local/cuda") / "bin" / "nvcc"
    if nvcc is None and os.access(usual, os.X_OK):
        nvcc = str(usual)
    wanted = torch.version.cuda
    remedy = f"install the CUDA toolkit {wanted}, or set CUDA_HOME to the folder of one"
    if nvcc is None:
        raise BuildError(f"nvcc was not found{f' in {home}' if home else ''}", remedy)
    try:
        command = [nvcc, "--version"]
        text = subprocess.run(
            command, env=_tool_env(), capture_output=True, check=True, text=True, timeout=60
        ).stdout
    except (OSError, subprocess.SubprocessError) as error:
        raise BuildError(f"nvcc does not run: {error}", remedy) from error
    found = re.search(r"release (\d+\.\d+)", text)
    version = found[1] if found else "of an unknown version"
    # Within a major version the runtime of one serves what another compiled.
    if version.partition(".")[0] != wanted.partition(".")[0]:
        raise BuildError(f"{nvcc} is CUDA {version}, but torch was built for {wanted}", remedy)
    return Toolkit(nvcc, version, _architectures())


def _architectures() -> tuple[str, ...]:
    """Compute capabilities to compile for, such as "80" or "90a". Raises BuildError.

    Those of the visible devices; FUSED_RNN_CUDA_ARCH names others.
    """
    import torch

    if own := os.environ.get("FUSED_RNN_CUDA_ARCH", "").split():
        return tuple(own)
    try:
        count = torch.cuda.device_count()
        found = {torch.cuda.get_device_capability(i) for i in range(count)}
    except RuntimeError as error:
        raise BuildError(
            f"CUDA does not start: {error}", "see torch.cuda.is_available()"
        ) from error
    if not found:
        raise BuildError("there is no CUDA device", "see torch.cuda.is_available()")
    return tuple(f"{major}{minor}{'a' * (major >= 9)}" for major, minor in sorted(found))


def _python_include() -> list[str]:
    """The flags that make Python.h found, or nothing: then the library lacks its direct calls.

    They keep to Python's limited API, so the version does not matter.
    """
    include = sysconfig.get_path("include")
    usable = os.path.isfile(os.path.join(include, "Python.h")) and not _free_threaded()
    return ["-isystem", include] if usable else []


def _free_threaded() -> bool:
    """Whether this Python has no global lock, and with it another layout of objects."""
    return bool(sysconfig.get_config_var("Py_GIL_DISABLED"))


def find_ninja() -> str:
    """Ninja of the Python package, beside the interpreter, or on PATH. Raises BuildError."""
    folders = [str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)]
    with contextlib.suppress(ImportError):
        import ninja

        folders.insert(0, ninja.BIN_DIR)
    if path := shutil.which("ninja", path=os.pathsep.join(folders)):
        return path
    raise BuildError("ninja was not found", "pip install ninja")


def max_jobs() -> int:
    """Compilers to run at once: one per core this process may use, with 2 GB of memory each."""
    if hasattr(os, "sched_getaffinity"):
        jobs = len(os.sched_getaffinity(0))
    else:
        jobs = os.cpu_count() or 1
    with contextlib.suppress(AttributeError, OSError, ValueError):  # memory unknown
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        jobs = min(jobs, memory // (2 << 30))
    return max(1, int(_number("FUSED_RNN_MAX_JOBS", jobs)))


def source_hash(target: str = "cpu") -> str:
    """Hash of all that decides what the library does: sources, flags, platform. 12 hex digits."""
    facts = [BASE_FLAGS, tiers(), TORCH_TARGET, LINK_FLAGS, SCALARS, sys.platform, machine()]
    if target == "cuda":
        facts += [NVCC_FLAGS, CUDA_LINK_FLAGS]
    digest = hashlib.sha256(repr(facts).encode())
    for path in source_files(target):
        content = path.read_bytes()
        digest.update(f"{path.relative_to(CSRC).as_posix()} {len(content)}\n".encode() + content)
    return digest.hexdigest()[:12]


def cache_key(compiler: Compiler, toolkit: Toolkit | None = None) -> str:
    """Name of the library's folder in the cache: new inputs, new folder; none is built twice.

    With a toolkit it is that of the CUDA library.
    """
    import torch

    tools = [torch.__version__, torch.version.git_version, compiler, bool(_python_include())]
    if toolkit:
        tools.append(toolkit)
    tools_hash = hashlib.sha256(repr(tools).encode()).hexdigest()[:12]
    return f"{VERSION}-{source_hash('cuda' if toolkit else 'cpu')}-{tools_hash}"


# --- Compiling ------------------------------------------------------------------------------------


def compile_library(out_dir: Path, name: str | None = None, toolkit: Toolkit | None = None) -> Path:
    """Compile csrc into ``out_dir/<name>.so``, the facts into ``<name>.json``; return the former.

    With a toolkit it is the CUDA library.

    All the work is done in a temporary folder beside out_dir and the library is moved in last, so
    that a killed build leaves none. Raises BuildError, and keeps the compiler's output in
    ``<out_dir>.log`` then.
    """
    import torch

    compiler, ninja = find_compiler(), find_ninja()
    target = "cuda" if toolkit else "cpu"
    name = name or LIBRARY[target]
    start = time.monotonic()
    out_dir = out_dir.absolute()  # ninja runs elsewhere
    out_dir.parent.mkdir(parents=True, exist_ok=True)
    log = out_dir.parent / f"{out_dir.name}.log"
    with tempfile.TemporaryDirectory(
        prefix=f"{out_dir.name}.build-", dir=out_dir.parent, ignore_cleanup_errors=True
    ) as folder:
        work = Path(folder)
        _write_ninja_file(work, compiler, toolkit)
        kinds = [f"sm_{a}" for a in toolkit.architectures] if toolkit else list(tiers())
        _say(f"compiling the {target.upper()} kernels ({', '.join(kinds)}) into {out_dir}")
        _run_ninja(ninja, work, log)
        seconds = round(time.monotonic() - start, 1)
        record = {
            "version": VERSION,
            "source_hash": source_hash(target),
            "torch": torch.__version__,
            "compiler": str(compiler),
            "machine": machine(),
            "flags": BASE_FLAGS + (NVCC_FLAGS if toolkit else []),
            "tiers": kinds,
            "cells": [cell.name for cell in cells()],
            "seconds": seconds,
            "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        }
        (work / "record.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        out_dir.mkdir(exist_ok=True)
        library = out_dir / f"{name}.so"
        os.replace(work / "record.json", library.with_suffix(".json"))
        os.replace(work / "library.so", library)
    log.unlink()
    _say(f"compiled in {seconds} s")
    return library


def _write_ninja_file(work: Path, compiler: Compiler, toolkit: Toolkit | None = None) -> None:
    """Generate the instances of the templates and work/build.ninja, which makes library.so."""
    import torch
    from torch.utils.cpp_extension import include_paths

    target = "cuda" if toolkit else "cpu"
    ours = [*BASE_FLAGS, f"-I{CSRC}"]
    with_torch = [*ours, TORCH_TARGET, *(["-DUSE_CUDA"] if toolkit else _python_include())]
    for folder in include_paths():
        with_torch += ["-isystem", str(folder)]

    units = [(CSRC / "ops" / f"{name}.cpp", with_torch) for name in BINDINGS[target]]
    if toolkit:  # nvcc knows where its headers are
        units += [(path, []) for path in sorted((CSRC / "cuda").glob("*.cpp"))]
        units += [(path, []) for path in _write_cuda_instances(work)]
    else:
        units += [(path, ours) for path in sorted((CSRC / "cpu").glob("*.cpp"))]
        units += [(path, [*ours, *flags]) for path, flags in _write_instances(work)]

    nvcc = (
        [toolkit.nvcc, *NVCC_FLAGS, f"-I{CSRC}", "-ccbin", compiler.command[0]] if toolkit else []
    )
    for arch in toolkit.architectures if toolkit else ():
        nvcc.append(f"-gencode=arch=compute_{arch},code=sm_{arch}")
    lines = [
        f"cxx = {_ninja_words(compiler.command)}",
        "rule compile",
        "  command = $cxx $flags -c $in -o $out",
        "  description = $out",
        "rule compile_cuda",
        f"  command = {_ninja_words(nvcc)} -c $in -o $out",
        "  description = $out",
        "rule link",
        "  command = $cxx $in $flags -o $out",
        "  description = $out",
    ]
    objects = []
    for number, (path, flags) in enumerate(units):
        objects.append(f"{number}_{path.stem}.o")
        rule = "compile" if flags else "compile_cuda"
        lines.append(f"build {objects[-1]}: {rule} {_ninja_path(path)}")
        lines.append(f"  flags = {_ninja_words(flags)}")
    libraries = [f"-L{Path(torch.__file__).parent / 'lib'}", "-ltorch", "-ltorch_cpu", "-lc10"]
    if toolkit:
        libraries += ["-ltorch_cuda", "-lc10_cuda"]
    lines.append(f"build library.so: link {' '.join(objects)}")
    link_flags = CUDA_LINK_FLAGS if toolkit else LINK_FLAGS
    lines.append(f"  flags = {_ninja_words([*link_flags, *libraries])}\n")
    (work / "build.ninja").write_text("\n".join(lines), encoding="utf-8")


def _write_instances(work: Path) -> Iterator[tuple[Path, list[str]]]:
    """One file for each combination of tier, cell and scalar that a template names, and its flags.

    Lowest tier first: of the copies of an inline function (of the standard library, say) the linker
    keeps the first, which every processor must be able to run.
    """
    templates = sorted((CSRC / "cpu").glob("*.cpp.in"))
    for (tier, flags), template, cell, scalar in itertools.product(
        tiers().items(), templates, cells(), SCALARS
    ):
        text = template.read_text(encoding="utf-8")
        parts = [template.name.removesuffix(".cpp.in")]
        for key, value in {"tier": tier, **cell._asdict(), "scalar": scalar}.items():
            if f"@{key.upper()}@" in text:
                text = text.replace(f"@{key.upper()}@", value)
                parts += [value] if key not in ("type", "header") else []
        path = work / f"{'_'.join(parts)}.cpp"
        if not path.exists():
            path.write_text(text, encoding="utf-8")
            yield path, flags


def _write_cuda_instances(work: Path) -> Iterator[Path]:
    """One file for each cell and type in memory."""
    text = (CSRC / "cuda" / "instance.cu.in").read_text(encoding="utf-8")
    for cell, (storage, scalar) in itertools.product(cells(), CUDA_STORAGES.items()):
        path = work / f"cuda_{cell.name}_{storage}.cu"
        instance = text
        for key, value in {**cell._asdict(), "storage": storage, "scalar": scalar}.items():
            instance = instance.replace(f"@{key.upper()}@", value)
        path.write_text(instance, encoding="utf-8")
        yield path


def _ninja_words(words: Sequence[str]) -> str:
    return shlex.join(words).replace("$", "$$")


def _ninja_path(path: Path) -> str:
    return re.sub(r"([$ :])", r"$\1", str(path))


def _run_ninja(ninja: str, work: Path, log: Path) -> None:
    """Run ninja in work with its output in log, showing how far it is. Raises BuildError."""
    verbose = os.environ.get("FUSED_RNN_VERBOSE") == "1"
    live = sys.stderr.isatty() and not verbose
    command = [ninja, "-C", str(work), "-j", str(max_jobs()), *(["-v"] if verbose else [])]
    start, steps, code = time.monotonic(), "starting", None
    with (
        log.open("wb") as sink,
        log.open(encoding="utf-8", errors="replace") as source,
        subprocess.Popen(command, stdout=sink, stderr=sink, env=_tool_env()) as process,
    ):
        try:
            while code is None:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    code = process.wait(timeout=0.2)
                text = source.read()
                steps = (re.findall(r"^\[\d+/\d+\]", text, re.MULTILINE) or [steps])[-1]
                if verbose:
                    sys.stderr.write(text)
                elif live:
                    seconds = time.monotonic() - start
                    sys.stderr.write(f"\rfused_rnn: {steps} {seconds:.0f} s\x1b[K")
                sys.stderr.flush()
        except BaseException:  # such as Ctrl-C: ninja then stops its compilers
            process.terminate()
            raise
        finally:
            if live:
                sys.stderr.write("\r\x1b[K")
    if code:
        text = log.read_text(encoding="utf-8", errors="replace")
        error = re.search(r"^.*(error: |undefined reference|cannot find).*$", text, re.MULTILINE)
        reason = error[0].strip() if error else text.strip().rpartition("\n")[2]
        remedy = "try another compiler by setting CXX"
        if "Killed" in text:  # the system ran out of memory
            remedy = "set FUSED_RNN_MAX_JOBS=1, so that fewer compilers share the memory"
        raise BuildError(f"the kernels do not compile: {reason}", f"see {log}, or {remedy}")


def _tool_env() -> dict[str, str]:
    """The environment for tools whose output is read: plain English, no colours."""
    env = {key: value for key, value in os.environ.items() if key != "CLICOLOR_FORCE"}
    return {**env, "LC_ALL": "C", "NINJA_STATUS": "[%f/%t] "}


def _number(variable: str, default: float) -> float:
    """A number from the environment. Raises ValueError that names the variable."""
    text = os.environ.get(variable)
    try:
        return float(text) if text else default
    except ValueError:
        raise ValueError(f"{variable} is {text!r}, which is not a number") from None


def _say(text: str) -> None:
    print(f"fused_rnn: {text}", file=sys.stderr, flush=True)


# --- The cache ------------------------------------------------------------------------------------


def cache_dir() -> Path:
    """The folder that holds the libraries of all versions, whether it exists or not."""
    if own := os.environ.get("FUSED_RNN_CACHE_DIR"):
        return Path(os.path.abspath(os.path.expanduser(own)))
    base = os.environ.get("XDG_CACHE_HOME", "")
    return Path(base if os.path.isabs(base) else os.path.expanduser("~/.cache")) / "fused_rnn"


def _private_dir() -> Path:
    """This user's stand-in for a cache folder that cannot be written."""
    return Path(tempfile.gettempdir()) / f"fused_rnn-{os.getuid()}"


def _check_private(folder: Path) -> None:
    """Raise BuildError if others can write there: their libraries must never be loaded."""
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o077:
        raise BuildError(
            f"{folder} is not a private folder of this user",
            "set FUSED_RNN_CACHE_DIR to a folder that you can write",
        )


def _cache_dirs() -> Iterator[Path]:
    """The folders to look for a library in."""
    yield cache_dir()
    if os.name == "posix" and os.path.lexists(_private_dir()):
        with contextlib.suppress(BuildError):
            _check_private(_private_dir())
            yield _private_dir()


def _writable_cache() -> Path:
    """The first of the cache folders that takes files. Raises BuildError, OSError."""
    folder = cache_dir()
    try:
        if not folder.is_absolute():
            raise OSError("there is no home folder")
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
        return folder
    except OSError as error:
        private = _private_dir()
        private.mkdir(mode=0o700, exist_ok=True)
        _check_private(private)
        _say(f"the cache folder {folder} cannot be written ({error}), using {private}")
        return private


@contextlib.contextmanager
def _locked(path: Path, timeout: float) -> Iterator[None]:
    """Hold the operating system's lock on a file. Raises BuildError after timeout seconds.

    The lock ends with its process, so a file that was left behind locks nothing.
    """
    import fcntl  # not on Windows, where nothing is built

    start, told = time.monotonic(), False
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # clean() may have deleted the file between our opening and locking it.
            if os.path.samestat(os.fstat(handle), os.stat(path)):
                break
        except (BlockingIOError, FileNotFoundError):
            pass
        os.close(handle)
        waited = time.monotonic() - start
        if waited >= timeout:
            raise BuildError(
                f"another process has held {path} for {timeout:g} s",
                "wait for its build to end, or set FUSED_RNN_LOCK_TIMEOUT to more seconds",
            )
        if waited > LOCK_NOTICE and not told:
            told = True
            _say(f"waiting for another process to build, up to {timeout:g} s (lock {path})")
        time.sleep(0.1)
    try:
        yield
    finally:
        os.close(handle)


def _build_in_cache(target: str) -> tuple[Path, str]:
    """Path of the library and its origin: of several processes one builds and the others wait."""
    if os.name != "posix":
        raise BuildError(f"there are no native kernels for {platform.system()} yet", "use Linux")
    toolkit = find_toolkit() if target == "cuda" else None
    cache = _writable_cache()
    folder = cache / cache_key(find_compiler(), toolkit)
    timeout = _number("FUSED_RNN_LOCK_TIMEOUT", 600)
    with _locked(cache / f"{folder.name}.lock", timeout):
        library = folder / f"{LIBRARY[target]}.so"
        if library.is_file():
            return library, "cache"
        # We hold the lock, so these belong to processes that were killed.
        for left_over in cache.glob(f"{folder.name}.build-*"):
            shutil.rmtree(left_over, ignore_errors=True)
        return compile_library(folder, toolkit=toolkit), "built now"


def clean() -> list[Path]:
    """Delete what builds have put into the cache, but none under way. Returns what was deleted."""
    deleted = []
    for cache in _cache_dirs():
        keys = {found[1] for path in cache.glob("*") if (found := OURS.fullmatch(path.name))}
        for key in sorted(keys):
            with contextlib.suppress(BuildError), _locked(cache / f"{key}.lock", timeout=0):
                for path in sorted(cache.glob(f"{key}*")):
                    if not OURS.fullmatch(path.name):
                        continue
                    if path.is_dir():
                        shutil.rmtree(path)
                    else:
                        path.unlink(missing_ok=True)
                    deleted.append(path)
    return deleted


# --- Loading --------------------------------------------------------------------------------------


class State(NamedTuple):
    """What the first use came to. It stays for the life of the process."""

    backend: str  # "native" or "reference"
    reason: str
    library: Path | None = None
    origin: str = ""  # "ahead of time", "cache" or "built now"
    seconds: float = 0.0  # to find, build and load
    failure: BuildError | None = None
    fatal: bool = False  # native was asked for: raise the failure, do not warn


_states: dict[str, State] = {}  # by target, from the first use on
_first_use = threading.Lock()


def backend(target: str = "cpu") -> str:
    """``"native"`` or ``"reference"``: what does the work on devices of this type.

    The first call loads the library, and builds it if need be. Raises ValueError for an unknown
    FUSED_RNN_BACKEND, RuntimeError if that asks for native and there is none.
    """
    state = _states.get(target) or _decide(target)
    if state.fatal:
        raise RuntimeError(f"fused_rnn has no {_kind(target)} library: {state.failure}")
    return state.backend


def _kind(target: str) -> str:
    return "CUDA" if target == "cuda" else "native"


def library(target: str = "cpu") -> ctypes.CDLL:
    """The loaded library, for facts that need no tensor. Raises RuntimeError without it."""
    if backend(target) != "native":
        raise RuntimeError(
            f"fused_rnn runs on its reference path: there is no {_kind(target)} library"
        )
    return ctypes.CDLL(str(_states[target].library))


def direct_calls(*torch_facts: object) -> Any:
    """The CPU's library as a Python module, whose functions need no dispatcher (ops.py), or None.

    It is one if it was compiled where Python.h was, and torch has what it needs. ``torch_facts`` is
    what else it is to know of torch: see Setup in csrc/ops/direct.cpp.
    """
    import torch

    if _free_threaded() or not hasattr(torch.Tensor, "__dlpack_c_exchange_api__"):
        return None
    path = str(_states["cpu"].library)
    loader = importlib.machinery.ExtensionFileLoader("fused_rnn._direct", path)
    spec = importlib.machinery.ModuleSpec(loader.name, loader, origin=path)
    try:
        module = loader.create_module(spec)
        loader.exec_module(module)
    except ImportError:
        return None
    tensor = torch.Tensor
    exchange = tensor.__dlpack_c_exchange_api__
    usable = module.setup(exchange, tensor, torch.nn.Parameter, tensor.is_neg, *torch_facts)
    return module if usable else None


def requested_backend() -> str:
    """FUSED_RNN_BACKEND: auto, native or reference. Raises ValueError for anything else."""
    value = os.environ.get("FUSED_RNN_BACKEND") or "auto"
    if value not in ("auto", "native", "reference"):
        raise ValueError(f"FUSED_RNN_BACKEND is {value!r}: use auto, native or reference")
    return value


def _decide(target: str) -> State:
    requested = requested_backend()
    with _first_use:
        if target in _states:  # another thread was first
            return _states[target]
        state = _states[target] = _state_of(target, requested)
    if state.failure and not state.fatal:
        warnings.warn(
            f"fused_rnn has no {_kind(target)} library: {state.failure}\n"
            "  Its slower reference path is used. For more: python -m fused_rnn doctor. "
            "To silence this: FUSED_RNN_BACKEND=reference",
            RuntimeWarning,
            stacklevel=3,
        )
    return state


def _state_of(target: str, requested: str) -> State:
    if requested == "reference":
        return State("reference", "FUSED_RNN_BACKEND asks for it")
    try:
        return _load(target)
    except BuildError as error:
        failure = error
    except OSError as error:  # a full disk, a file system without locks
        remedy = "set FUSED_RNN_CACHE_DIR to a folder on a local disk"
        failure = BuildError(f"the library cannot be built: {error}", remedy)
    reason = f"there is no {_kind(target)} library"
    return State("reference", reason, failure=failure, fatal=requested == "native")


def _load(target: str) -> State:
    """Find or build the library and load it. Raises BuildError, OSError."""
    import torch

    start = time.monotonic()
    library, origin, reason = find_library(target)
    if library is None:
        library, origin = _build_in_cache(target)
    try:
        torch.ops.load_library(str(library))
    except OSError as error:
        raise BuildError(
            f"{library} cannot be loaded: {error.__cause__ or error}",
            f"delete {library}, to have it built anew at the next use",
        ) from error
    return State("native", reason, library, origin, time.monotonic() - start)


def find_library(target: str = "cpu") -> tuple[Path | None, str, str]:
    """Path, origin and why that one, without building. The path is None if there is none."""
    import torch

    reason = "nothing compiled yet fits these sources, torch and compiler"
    sources = source_hash(target)
    library = PACKAGE / f"{AHEAD_OF_TIME}.so"
    if target == "cpu" and library.is_file():
        if read_record(library).get("source_hash") == sources:
            return library, "ahead of time", "compiled with the package"
        reason = f"{library} was compiled from other sources and is not used"

    key = None
    with contextlib.suppress(BuildError):
        key = cache_key(find_compiler(), find_toolkit() if target == "cuda" else None)
    for cache in _cache_dirs():
        # Without a compiler here, what any other one made of the same sources will do.
        for folder in [cache / key] if key else sorted(cache.glob(f"{VERSION}-{sources}-*")):
            library = folder / f"{LIBRARY[target]}.so"
            # Unlike Path.is_file this is False, not an error, in a folder that cannot be read.
            if os.path.isfile(library) and (
                key or read_record(library).get("torch") == torch.__version__
            ):
                return library, "cache", "compiled by an earlier process"
    return None, "", reason


def read_record(library: Path) -> dict[str, Any]:
    """The facts that were written down when the library was compiled, or nothing."""
    try:
        record = json.loads(library.with_suffix(".json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}


def _cuda_fact() -> str:
    """One line on the CUDA library."""
    if state := _states.get("cuda"):
        return str(state.failure or f"{state.library or state.backend} ({state.reason})")
    try:
        toolkit = find_toolkit()
        library, _, reason = find_library("cuda")
        return f"{library or reason} ({toolkit})"
    except BuildError as error:
        return f"no: {error.reason}"


def _instructions() -> str | None:
    """What the loaded CPU library uses of this machine: its tier, or units for bfloat16 besides."""
    state = _states.get("cpu")
    if state is None or state.backend != "native":
        return None
    capability = getattr(library(), "frnn_cpu_capability", None)
    if capability is None:  # another engine in its place, in tests
        return None
    capability.restype = ctypes.c_char_p
    name: bytes = capability()
    return name.decode()


def info() -> dict[str, Any]:
    """What ``python -m fused_rnn doctor`` prints. Builds and loads nothing.

    ``backend`` is None before the first use, and ``library`` then the one that would be loaded.
    ``problem`` and ``remedy`` say what stands in the way of a native backend, if anything does.
    """
    import torch

    state = _states.get("cpu")
    if state is None:
        library, origin, reason = find_library()
    else:
        library, origin, reason = state.library, state.origin, state.reason
    record = read_record(library) if library else {}
    facts: dict[str, Any] = {
        "version": VERSION,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "platform": f"{platform.system()} {machine()}",
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "settings": {k: v for k, v in os.environ.items() if k.startswith("FUSED_RNN_")},
        "backend": state.backend if state else None,
        "reason": reason,
        "library": library,
        "origin": origin,
        "tiers": record.get("tiers") or list(tiers()),
        "instructions": _instructions(),
        "seconds": {
            "compiling": record.get("seconds"),
            "first use": state.seconds if state else None,
        },
        "sources": CSRC,
        "cache": cache_dir(),
        "compiler": None,
        "ninja": None,
        "cuda": _cuda_fact(),
        "problem": None,
        "remedy": None,
    }
    failures = []
    for tool, find in (("compiler", find_compiler), ("ninja", find_ninja)):
        try:
            facts[tool] = str(find())
        except BuildError as error:
            failures += [error] if library is None else []
    if state is not None:
        failures = [state.failure] if state.failure else []
    if failures:
        facts["problem"], facts["remedy"] = failures[0].reason, failures[0].remedy
    return facts
