"""What is known about the libraries, for people: facts, a trial, and the commands on them."""

from __future__ import annotations

import contextlib
import ctypes
import platform
import signal
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

from . import custom, record, settings
from .cache import cache_dir, forget_failures, readable_caches
from .loading import Libraries
from .messages import BuildError
from .sources import PACKAGE, machine
from .sources import cells as registry
from .tools import find_compiler, find_ninja
from .version import VERSION

# Where the tests ran, of systems and processors.
TESTED = {
    ("Linux", "x86_64"): "on such machines",
    ("Linux", "aarch64"): "under an emulator, on no such machine",
}


def facts_of(libraries: Libraries) -> dict[str, Any]:
    """What ``python -m fused_rnn doctor`` prints. Builds and loads nothing.

    ``backend`` is None before the first use, and ``library`` then the one that would be loaded.
    ``problem`` and ``remedy`` say what stands in the way of a native backend, if anything does.
    """
    import torch

    state, cpu = libraries.state(), libraries.targets["cpu"]
    if state is None:
        library, origin, reason = libraries.find()
    else:
        library, origin, reason = state.library, state.origin, state.reason
    recorded = record.read(library) if library else {}
    facts: dict[str, Any] = {
        "version": VERSION,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "platform": f"{platform.system()} {machine()}",
        "tested": TESTED.get((platform.system(), machine()), "never, on such a machine"),
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "settings": settings.given(),
        "backend": state.backend if state else None,
        "reason": reason,
        "library": library,
        "origin": origin,
        "tiers": recorded.get("tiers") or list(cpu.kinds),
        "instructions": _instructions(libraries),
        "seconds": {
            "compiling": recorded.get("seconds"),
            "first use": state.seconds if state else None,
        },
        "sources": cpu.csrc,
        "cache": cache_dir(),
        "compiler": None,
        "ninja": None,
        "cuda": _cuda_fact(libraries),
        "problem": None,
        "remedy": None,
    }
    failures = []
    for tool, find in (("compiler", find_compiler), ("ninja", find_ninja)):
        try:
            facts[tool] = str(find())
        except BuildError as error:
            failures += [error] if library is None else []
    if library is None and (failure := libraries.failure()):
        failures.append(failure)
    if state is not None:
        failures = [state.failure] if state.failure else []
    if failures:
        facts["problem"], facts["remedy"] = failures[0].reason, failures[0].remedy
    return facts


def _cuda_fact(libraries: Libraries) -> str:
    """One line on the CUDA library."""
    if state := libraries.state("cuda"):
        return str(state.failure or f"{state.library or state.backend} ({state.reason})")
    try:
        tools = libraries.targets["cuda"].find_tools()
        found = libraries.find("cuda")
        return f"{found.library or found.reason} ({', '.join(map(str, tools.found))})"
    except BuildError as error:
        return f"no: {error.reason}"


def _instructions(libraries: Libraries) -> str | None:
    """What the loaded CPU library uses of this machine: its tier, or units for bfloat16 besides."""
    state = libraries.state()
    if state is None or state.backend != "native":
        return None
    capability = getattr(libraries.library(), "frnn_cpu_capability", None)
    if capability is None:  # another engine in its place, in tests
        return None
    capability.restype = ctypes.c_char_p
    name: bytes = capability()
    return name.decode()


def try_out(target: str, library: Path) -> BuildError | None:
    """What is wrong with the library, found out by running it in a process of its own.

    There a fault of the library ends that process, and not this one.
    """
    remedy = f"delete {library}, to have it built anew at the next use"
    command = [sys.executable, "-m", f"{__package__}.trial", target, str(library)]
    try:
        done = subprocess.run(
            command, cwd=PACKAGE.parent, capture_output=True, text=True, timeout=300
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return BuildError(f"{library} could not be tried: {error}", remedy)
    if done.returncode == 0:
        return None
    said = done.stderr.strip().rpartition("\n")[2]
    if done.returncode < 0:
        said = f"its process was ended by {signal.Signals(-done.returncode).name}"
    return BuildError(f"{library} does not work: {said}", remedy)


def _try_all(libraries: Libraries) -> BuildError | None:
    """``try_out`` for what is there: the first failure."""
    for target in _devices():
        state = libraries.state(target)
        library = state.library if state else libraries.find(target).library
        if library and (failure := try_out(target, library)):
            return failure
    return None


def _devices() -> tuple[str, ...]:
    import torch

    return ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)


def load_all(libraries: Libraries) -> None:
    """Load or build the libraries of this machine; a failure is left for the facts to tell.

    What failed before is tried again: cells from Python at their next use.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        forget_failures()
        for target in _devices():
            with contextlib.suppress(RuntimeError):
                libraries.backend(target)


# --- The commands of ``python -m fused_rnn``: each prints, and returns the exit code --------------


def doctor(libraries: Libraries, load: bool) -> int:
    """Print what is known, try what is there. Returns 1 if native is asked for in vain."""
    settings.check()
    if load:
        load_all(libraries)
    facts = facts_of(libraries)
    problem, remedy = facts.pop("problem"), facts.pop("remedy")
    for name, value in facts.items():
        unknown = facts["backend"] is None and name in ("backend", "instructions")
        print(f"{name:9} {'chosen at the first use' if unknown else _shown(value)}")
    print()
    if not problem and (failure := _try_all(libraries)):
        problem, remedy = failure.reason, failure.remedy
    if problem:
        print(f"problem   {problem}\nremedy    {remedy}")
    elif facts["backend"]:
        print("all is well" if facts["backend"] == "native" else "native is switched off")
    elif facts["library"]:
        print("all is well: the native library works, and is loaded at the first use")
    else:
        print("all is well: the first use, or `python -m fused_rnn build`, builds the library")
    return int(settings.requested_backend() == "native" and problem is not None)


def build(libraries: Libraries) -> int:
    """Build now what this machine needs, also what failed before."""
    load_all(libraries)
    facts = facts_of(libraries)
    if facts["backend"] != "native":
        reason = f"{facts['problem']}\n{facts['remedy']}" if facts["problem"] else facts["reason"]
        print(reason, file=sys.stderr)
        return 1
    print(f"{facts['library']} ({facts['origin']})")
    return 0


def cells(libraries: Libraries) -> int:
    """List those of the registry, and those whose own libraries are in the cache."""
    for cell in registry(libraries.targets["cpu"].csrc):
        print(f"{cell.name:20} in the library")
    for facts in custom.found(list(readable_caches())):
        kind = f"{facts['scalar']}, {', '.join(facts['tiers'])}"
        print(f"{facts['type']:20} {kind:18} {facts['date'][:16]}  {facts['library']}")
    return 0


def _shown(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key}={_shown(item)}" for key, item in value.items()) or "none"
    if isinstance(value, list):
        return ", ".join(value)
    if isinstance(value, float):
        return f"{value:.3g}"
    return "none" if value in (None, "") else str(value)
