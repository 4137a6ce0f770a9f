"""From a function of torch operations to a header of csrc/cells, with its backward.

    graph    expressions: each is there once, constants are folded
    rules    functions of torch as operations of a graph
    symbols  what stands for gates, states and parameters, one number per unit each
    trace    the user's function, run once on symbols
    derive   the gradients of the new states
    cut      which values of the forward are kept for the backward
    affine   whether steps can be composed
    emit     the header
    explain  all that in words

Nothing here knows an engine or a library. ``trace`` runs when a cell is declared, all the rest when
its library has to be compiled.
"""

from __future__ import annotations

import hashlib
from functools import cached_property
from pathlib import Path

from .affine import Affine, affine
from .cut import Tape, choose
from .derive import Gradients, derive
from .emit import header, type_name
from .errors import CellError
from .explain import explanation
from .trace import Declaration, Trace, trace

__all__ = ["CellError", "Compiled", "Declaration", "Trace", "trace"]


def _version() -> str:
    """Changes with the compiler: what it made before is then made anew."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


_VERSION = _version()


class Compiled:
    """A traced cell, and what is made of it, once somebody asks."""

    def __init__(self, traced: Trace) -> None:
        self.trace = traced
        digest = hashlib.sha256(f"{_VERSION}\n{traced.text}".encode()).hexdigest()
        self.type_name = type_name(traced.declaration.name)
        self.name = f"{self.type_name.lower()}_{digest[:12]}"

    @cached_property
    def gradients(self) -> Gradients:
        return derive(self.trace)

    @cached_property
    def tape(self) -> Tape:
        return choose(self.trace, self.gradients)

    @cached_property
    def affine(self) -> Affine | None:
        assert self.gradients  # their operations come first in the graph, which is its order
        return affine(self.trace)

    @cached_property
    def header(self) -> str:
        return header(self.trace, self.gradients, self.tape, self.affine)

    @cached_property
    def explanation(self) -> str:
        return explanation(self.trace, self.gradients, self.tape, self.affine)
