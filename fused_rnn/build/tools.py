"""Compilers, nvcc and ninja: where they are, and whether they fit."""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from . import settings
from .messages import BuildError

# The environment variables that say where they are.
ASKED = ("CXX", "PATH", "CUDA_HOME", "CUDA_PATH", "FUSED_RNN_CUDA_ARCH")


class Compiler(NamedTuple):
    command: tuple[str, ...]
    version: str  # all that --version prints

    def __str__(self) -> str:
        return f"{shlex.join(self.command)}: {self.version.partition(chr(10))[0]}"

    @property
    def program(self) -> str:
        """The compiler itself, whatever runs it and however."""
        return [word for word in self.command if not word.startswith("-")][-1]


class Toolkit(NamedTuple):
    """The CUDA compiler, and the devices it compiles for."""

    nvcc: str
    version: str  # such as "13.0"
    architectures: tuple[str, ...]  # such as "90a"

    def __str__(self) -> str:
        return f"{self.nvcc}: release {self.version}"


class Tools(NamedTuple):
    """What compiles one library."""

    found: tuple[Compiler | Toolkit, ...]
    commands: Mapping[str, tuple[str, ...]]  # "cxx", which links too, and "nvcc"
    kinds: tuple[str, ...] = ()  # of devices, such as "sm_90a"


def for_cpu() -> Tools:
    """Raises BuildError if something is missing, as ``for_cuda`` does."""
    compiler = find_compiler()
    return Tools((compiler,), {"cxx": compiler.command})


def for_cuda() -> Tools:
    toolkit, compiler = find_toolkit(), find_compiler()  # a torch without CUDA is told first
    nvcc = [toolkit.nvcc, "-ccbin", compiler.program]
    nvcc += [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in toolkit.architectures]
    commands = {"cxx": compiler.command, "nvcc": tuple(nvcc)}
    return Tools((compiler, toolkit), commands, tuple(f"sm_{a}" for a in toolkit.architectures))


def find_compiler() -> Compiler:
    """The compiler of $CXX, else the first one on PATH. Raises BuildError."""
    remedy = "install a C++17 compiler such as g++, or set CXX to one"
    own = os.environ.get("CXX")
    for name, *options in [shlex.split(own)] if own else [["c++"], ["g++"], ["clang++"]]:
        if path := shutil.which(name):
            command = (path, *options)
            return Compiler(command, _version(command, "the compiler does not run", remedy))
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
    found = re.search(r"release (\d+\.\d+)", _version((nvcc,), "nvcc does not run", remedy))
    version = found[1] if found else "of an unknown version"
    # Within a major version the runtime of one serves what another compiled.
    if version.partition(".")[0] != wanted.partition(".")[0]:
        raise BuildError(f"{nvcc} is CUDA {version}, but torch was built for {wanted}", remedy)
    return Toolkit(nvcc, version, _architectures())


def _version(command: tuple[str, ...], complaint: str, remedy: str) -> str:
    """What --version prints. Raises BuildError if the program does not run."""
    try:
        return subprocess.run(
            [*command, "--version"],
            env=environment(),
            capture_output=True,
            check=True,
            text=True,
            timeout=60,
        ).stdout.strip()
    except (OSError, subprocess.SubprocessError) as error:
        raise BuildError(f"{complaint}: {error}", remedy) from error


def _architectures() -> tuple[str, ...]:
    """Compute capabilities to compile for, such as "80" or "90a". Raises BuildError.

    Those of the visible devices; FUSED_RNN_CUDA_ARCH names others.
    """
    import torch

    if own := settings.read("FUSED_RNN_CUDA_ARCH").split():
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


def find_ninja() -> str:
    """Ninja of the Python package, beside the interpreter, or on PATH. Raises BuildError."""
    folders = [str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)]
    with contextlib.suppress(ImportError):
        import ninja

        folders.insert(0, ninja.BIN_DIR)
    if path := shutil.which("ninja", path=os.pathsep.join(folders)):
        return path
    raise BuildError("ninja was not found", "pip install ninja")


def python_include() -> list[str]:
    """The flags that make Python.h found, or nothing: then the library lacks its direct calls.

    They keep to Python's limited API, so the version does not matter.
    """
    include = sysconfig.get_path("include")
    usable = os.path.isfile(os.path.join(include, "Python.h")) and not free_threaded()
    return ["-isystem", include] if usable else []


def free_threaded() -> bool:
    """Whether this Python has no global lock, and with it another layout of objects."""
    return bool(sysconfig.get_config_var("Py_GIL_DISABLED"))


def max_jobs() -> int:
    """Compilers to run at once: one per core this process may use, with 2 GB of memory each."""
    if hasattr(os, "sched_getaffinity"):
        jobs = len(os.sched_getaffinity(0))
    else:
        jobs = os.cpu_count() or 1
    with contextlib.suppress(AttributeError, OSError, ValueError):  # memory unknown
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        jobs = min(jobs, memory // (2 << 30))
    return max(1, int(settings.number("FUSED_RNN_MAX_JOBS", jobs)))


def environment(**own: str) -> dict[str, str]:
    """That of tools whose output is read: plain English, no colours, nothing preloaded."""
    left_out = ("CLICOLOR_FORCE", "LD_PRELOAD")
    env = {key: value for key, value in os.environ.items() if key not in left_out}
    return {**env, "LC_ALL": "C", **own}
