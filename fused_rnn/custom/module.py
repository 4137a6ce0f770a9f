"""What the modules of a cell from a function share: its layers, and that of a single step."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch

from ..reference import CELLS
from .family import Family


class _OfCell:
    """A method of the class and of its instances, whose hyperparameters may differ."""

    def __init__(self, method: Callable[[Any], str]) -> None:
        self.method = method
        self.__doc__ = method.__doc__

    def __get__(self, instance: Any, owner: Any) -> Callable[[], str]:
        return functools.partial(self.method, owner if instance is None else instance)


class FamilyModule:
    """A module of one of the cells of a family."""

    cell: Any
    _family: ClassVar[Family]

    def _choose(self, hyperparameters: Mapping[str, Any]) -> None:
        """Before any parameter is made."""
        self.hyperparameters = self._family.full(hyperparameters)
        self.cell = self._family.register(hyperparameters)

    @_OfCell
    def source(self) -> str:
        """The C++ header that is compiled."""
        text: str = CELLS[self.cell].source.header
        return text

    @_OfCell
    def explain(self) -> str:
        """What the compiler made of the cell: gates, what is kept, what is computed again."""
        text: str = CELLS[self.cell].source.explanation
        return text

    def _initialise(self, suffix: str) -> None:
        for name, initialiser in self._family.initialisers.items():
            with torch.no_grad():
                if callable(initialiser):
                    initialiser(getattr(self, name + suffix))
                elif initialiser is not None:
                    getattr(self, name + suffix).fill_(initialiser)

    def _shown(self) -> str:
        defaults = self._family.defaults
        return "".join(
            f", {name}={value!r}"
            for name, value in self.hyperparameters.items()
            if value != defaults[name]
        )
