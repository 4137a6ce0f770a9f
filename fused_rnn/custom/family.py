"""The cells that a function stands for."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from ..between import Options
from ..compiler import CellError, Compiled, Declaration, trace
from ..reference import CELLS, Cell
from .plain import plain_step

OPTIONS = tuple(Options.__annotations__)  # arguments of all layers that are no hyperparameters
MOST_GATES, MOST_PARAMS = 16, 16  # of csrc/core/params.h

Initialiser = Callable[[Tensor], Any] | float | None


class Family:
    """One cell for each set of hyperparameters."""

    def __init__(
        self,
        fn: Callable[..., Mapping[str, Any]],
        declaration: Declaration,
        initialisers: Mapping[str, Initialiser],
    ) -> None:
        self.fn, self.declaration, self.initialisers = fn, declaration, initialisers
        self.where = f"{fn.__code__.co_filename}:{fn.__code__.co_firstlineno}: "
        first, *rest = self._arguments()
        self.defaults = {p.name: p.default for p in rest}
        self._names: dict[tuple[Any, ...], str] = {}
        self.recurrent = ""

    def _arguments(self) -> list[inspect.Parameter]:
        """x and, behind x, r, s and p, the hyperparameters."""
        found = list(inspect.signature(self.fn).parameters.values())
        variadic = [p for p in found if p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
        missing = [p.name for p in found[4:] if p.default is p.empty]
        if len(found) < 4 or variadic or missing:
            raise CellError(
                f"{self.where}expected the arguments x, r, s, p and hyperparameters with defaults, "
                f"got {inspect.signature(self.fn)}"
            )
        return [found[0], *found[4:]]

    def signature(self, init: Callable[..., Any]) -> inspect.Signature:
        """Of the constructor, with the hyperparameters."""
        own = [p for p in list(inspect.signature(init).parameters.values())[1:]]
        own = [p for p in own if p.kind is not p.VAR_KEYWORD]
        more = [p.replace(kind=p.KEYWORD_ONLY) for p in self._arguments()[1:]]
        return inspect.Signature([*own, *more])

    def full(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """All hyperparameters."""
        for name in given:
            if name in OPTIONS or name not in self.defaults:
                known = ", ".join(self.defaults) or "none"
                raise TypeError(
                    f"{self.declaration.name}: unexpected keyword argument {name!r}; "
                    f"hyperparameters are {known}"
                )
        return {**self.defaults, **given}

    def register(self, given: Mapping[str, Any]) -> str:
        """The name that the cell with these hyperparameters has in ``CELLS``."""
        values = self.full(given)
        key = tuple(repr(value) for value in values.values())
        if key not in self._names:
            compiled = Compiled(trace(self.fn, self.declaration, values))
            self._check_counts(compiled)
            self.recurrent = self.recurrent or compiled.trace.recurrent
            if compiled.trace.recurrent != self.recurrent:  # hx would have another form
                raise CellError(
                    f"{self.where}the state that W_hh multiplies depends on a hyperparameter: "
                    f"{self.recurrent} or {compiled.trace.recurrent}"
                )
            CELLS.setdefault(compiled.name, self._known(compiled, values))
            self._names[key] = compiled.name
        return self._names[key]

    def _check_counts(self, compiled: Compiled) -> None:
        found = compiled.trace
        for kind, gates in (("an input part", found.gates_x), ("a product", found.gates_h)):
            if len(gates) > MOST_GATES:
                raise CellError(
                    f"{self.where}expected at most {MOST_GATES} gates with {kind}, got "
                    f"{', '.join(gates)}: more are not supported"
                )

    def _known(self, compiled: Compiled, values: Mapping[str, Any]) -> Cell:
        found, d = compiled.trace, self.declaration
        # W_hh multiplies the first.
        states = (found.recurrent, *(name for name in d.states if name != found.recurrent))
        return Cell(
            plain_step(self.fn, compiled, states, values),
            gates=len(found.gates_x),
            states=states,
            params=d.params,
            output=states.index(d.output),
            gates_h=len(found.gates_h),
            reads_h=found.reads_h,
            reads_new_h=compiled.tape.reads_new_h,
            adds=found.adds,
            source=compiled,
            given=d.given,
            products=found.products if found.operands else (),
        )
