"""Do something to another package as soon as anybody imports it, without importing it for that."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType

_waiting: dict[str, list[Callable[[ModuleType], object]]] = {}


def when_imported(name: str, action: Callable[[ModuleType], object]) -> None:
    """Call ``action(module)`` once the module of this name has been imported, or now if it is."""
    if name in sys.modules:
        action(sys.modules[name])
    else:
        _waiting.setdefault(name, []).append(action)


class _Finder:
    """Finds no module by itself. It asks the others, and adds to what is done to load it."""

    def __init__(self) -> None:
        self._asking: set[str] = set()

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        # Another finder may ask all others too, as the one of another copy of this module does.
        if name not in _waiting or name in self._asking:
            return None
        self._asking.add(name)
        try:
            others = [finder for finder in sys.meta_path if finder is not self]
            found = (finder.find_spec(name, path, target) for finder in others)
            spec = next(filter(None, found), None)
        finally:
            self._asking.discard(name)
        if spec is not None and spec.loader is not None:
            load = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                load(module)
                for action in _waiting.pop(name, ()):
                    action(module)

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


sys.meta_path.insert(0, _Finder())
