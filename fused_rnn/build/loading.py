"""The libraries of a process: each found or built, and loaded, at its first use."""

from __future__ import annotations

import contextlib
import ctypes
import importlib.machinery
import os
import platform
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from . import custom, record, settings
from .cache import Place, locked, readable_caches, writable_cache
from .compiling import compile_library
from .messages import FULL, NO_SPACE, BuildError, CompileError
from .sources import PACKAGE
from .target import TARGETS, Target
from .tools import Tools, free_threaded
from .version import VERSION

NO_LOCKS = "set FUSED_RNN_CACHE_DIR to a folder on a local disk"


class State(NamedTuple):
    """What the first use came to. It stays for the life of the process."""

    backend: str  # "native" or "reference"
    reason: str
    library: Path | None = None
    origin: str = ""  # "ahead of time", "cache" or "built now"
    seconds: float = 0.0  # to find, build and load
    failure: BuildError | None = None
    fatal: bool = False  # native was asked for: raise the failure, do not warn
    made: Target | None = (
        None  # what libraries of single cells are compiled like; None: there are none
    )


class Found(NamedTuple):
    """A library that is there, or why there is none."""

    library: Path | None
    origin: str
    reason: str


class Libraries:
    """One for each type of device, by its name: "cpu", "cuda"."""

    def __init__(self, targets: Iterable[Target] = TARGETS.values()) -> None:
        self.targets = {target.name: target for target in targets}
        self._states: dict[str, State] = {}  # from the first use on
        self._first_use = threading.Lock()

    def backend(self, target: str = "cpu") -> str:
        """``"native"`` or ``"reference"``: what does the work on devices of this type.

        The first call loads the library, and builds it if need be. Raises ValueError for settings
        that cannot be, RuntimeError if native is asked for and there is none.
        """
        state = self._states.get(target) or self._decide(target)
        if state.fatal:
            title = self.targets[target].title
            raise RuntimeError(f"fused_rnn has no {title} library: {state.failure}")
        return state.backend

    def state(self, target: str = "cpu") -> State | None:
        """What the first use came to, None before it."""
        return self._states.get(target)

    def library(self, target: str = "cpu") -> ctypes.CDLL:
        """The loaded library, for facts that need no tensor. Raises RuntimeError without it."""
        if self.backend(target) != "native":
            title = self.targets[target].title
            raise RuntimeError(f"fused_rnn runs on its reference path: there is no {title} library")
        return ctypes.CDLL(str(self._states[target].library))

    def use(self, target: str, library: Path, made: Target | None = None) -> None:
        """Load this library in place of the package's own. Raises BuildError.

        Where it was ``made`` like this, cells have libraries of their own beside it.
        """
        _load_into_torch(library)
        self._states[target] = State("native", "it was asked for", library, "given", made=made)

    def has_cell(
        self, target: str, cell: str, type: str, storage: str, header: Callable[[], str]
    ) -> bool:
        """Whether the kernels of a device know a cell beside those of the registry, in a type.

        The first call loads or builds its library; ``header()`` is the text to build it of, and
        ``type`` its name there.
        """
        main, library = self._states[target], self.library(target)
        if main.library is None or main.made is None:
            return False
        kind = custom.kind_of(main.made, storage)
        name = f"{target} {cell} {kind}"
        if state := self._states.get(name):
            return state.backend == "native"
        self.targets[name] = custom.target_of(
            main.made, library, main.library, name, cell, type, kind, header
        )
        return self.backend(name) == "native"

    def direct_calls(self, *torch_facts: object) -> Any:
        """The CPU's library as a Python module, whose functions need no dispatcher, or
        None.

        It is one if it was compiled where Python.h was, and torch has what it needs.
        ``torch_facts`` is what else it is to know of torch: see Setup in csrc/ops/direct.cpp.
        """
        import torch

        if free_threaded() or not hasattr(torch.Tensor, "__dlpack_c_exchange_api__"):
            return None
        path = str(self._states["cpu"].library)
        loader = importlib.machinery.ExtensionFileLoader("fused_rnn._direct", path)
        spec = importlib.machinery.ModuleSpec(loader.name, loader, origin=path)
        try:
            module = loader.create_module(spec)
            loader.exec_module(module)
        except ImportError:
            return None
        tensor = torch.Tensor
        exchange = tensor.__dlpack_c_exchange_api__
        usable = module.setup(exchange, tensor, torch.nn.Parameter, *torch_facts)
        return module if usable else None

    def find(self, target: str = "cpu") -> Found:
        """The library that would be loaded, without building: ahead of time, else in a cache."""
        import torch

        made, reason = self.targets[target], "nothing compiled yet fits these sources and tools"
        library = made.package / f"{made.ahead_of_time}.so"
        if made.ahead_of_time and library.is_file():
            if record.read(library).get("source_hash") != made.source_hash():
                reason = f"{library} was compiled from other sources and is not used"
            elif not (reason := record.damage(library)):
                return Found(library, "ahead of time", "compiled with the package")
        places, wanted = list(self._places(target)), None
        if not places:  # no compiler here: what any other one made of the same sources will do
            wanted = torch.__version__
            places = [
                Place(cache, folder.name)
                for cache in readable_caches()
                for folder in sorted(cache.glob(f"{VERSION}-{made.source_hash()}-*"))
            ]
        for place in places:
            library = place.folder / f"{made.stem}.so"
            # Unlike Path.is_file this is False, not an error, in a folder that cannot be read.
            if not os.path.isfile(library):
                continue
            if wanted and record.read(library).get("torch") != wanted:
                continue
            if not (reason := record.damage(library)):
                return Found(library, "cache", "compiled by an earlier process")
        return Found(None, "", reason)

    def failure(self, target: str = "cpu") -> BuildError | None:
        """Why it cannot be built, as an earlier process found out."""
        failures = (place.failure() for place in self._places(target))
        return next(filter(None, failures), None)

    def _places(self, target: str) -> Iterator[Place]:
        """Where the library is or will be, in each cache; nowhere without the tools."""
        with contextlib.suppress(BuildError):
            key = self.targets[target].cache_key(self.targets[target].find_tools())
            for cache in readable_caches():
                yield Place(cache, key)

    def _decide(self, target: str) -> State:
        settings.check()
        requested = settings.requested_backend()
        with self._first_use:
            if target in self._states:  # another thread was first
                return self._states[target]
            state = self._states[target] = self._state_of(target, requested)
        if state.failure and not state.fatal:
            warnings.warn(
                f"fused_rnn has no {self.targets[target].title} library: {state.failure}\n"
                "  Its slower reference path is used. For more: python -m fused_rnn doctor. "
                "To silence this: FUSED_RNN_BACKEND=reference",
                RuntimeWarning,
                stacklevel=_users_level(),
            )
        return state

    def _state_of(self, target: str, requested: str) -> State:
        if requested == "reference":
            return State("reference", "FUSED_RNN_BACKEND asks for it")
        try:
            return self._load(self.targets[target])
        except BuildError as error:
            failure = error
        except OSError as error:  # a file system that is full, or without locks
            remedy = NO_SPACE if error.errno in FULL else NO_LOCKS
            failure = BuildError(f"the library cannot be built: {error}", remedy)
        reason = f"there is no {self.targets[target].title} library"
        return State("reference", reason, failure=failure, fatal=requested == "native")

    def _load(self, target: Target) -> State:
        """Find or build the library and load it. Raises BuildError, OSError."""
        start = time.monotonic()
        library, origin, reason = self.find(target.name)
        if library is None:
            library, origin = _build_in_cache(target)
        _load_into_torch(library)
        seconds = time.monotonic() - start
        return State("native", reason, library, origin, seconds, made=target)


def _load_into_torch(library: Path) -> None:
    import torch

    try:
        torch.ops.load_library(str(library))
    except OSError as error:
        raise BuildError(
            f"{library} cannot be loaded: {error.__cause__ or error}",
            f"delete {library}, to have it built anew at the next use",
        ) from error


def _build_in_cache(target: Target) -> tuple[Path, str]:
    """Path of the library and its origin: of several processes one builds and the others wait."""
    if os.name != "posix":
        raise BuildError(f"there are no native kernels for {platform.system()} yet", "use Linux")
    tools: Tools = target.find_tools()
    place = Place(writable_cache(), target.cache_key(tools))
    with locked(place, settings.number("FUSED_RNN_LOCK_TIMEOUT", 600)):
        library = place.folder / f"{target.stem}.so"
        if library.is_file() and not record.damage(library):
            return library, "cache"
        if failure := place.failure():
            raise failure
        try:
            return compile_library(target, place, tools=tools), "built now"
        except CompileError as error:
            remedy = f"{error.remedy}; to try again: python -m fused_rnn build"
            failure = BuildError(error.reason, remedy)
            place.remember(failure)
            raise failure from error


def _users_level() -> int:
    """The stacklevel, for the caller, of the first frame outside of this package and torch."""
    import torch

    inside = (f"{PACKAGE}{os.sep}", f"{Path(torch.__file__).parent}{os.sep}")
    frame, level = sys._getframe(1), 1
    while frame.f_back and frame.f_code.co_filename.startswith(inside):
        frame, level = frame.f_back, level + 1
    return level
