"""Expressions as nodes of a graph: equal ones are one node, and constants are folded.

Nothing is reordered, so a folded expression has the bits of the one that was written.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

COMPARISONS = {"lt", "gt", "le", "ge", "eq", "ne"}
LOGIC = {"and", "or", "not"}

_FOLDED: dict[str, Callable[..., float]] = {
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "mul": lambda a, b: a * b,
    "div": lambda a, b: a / b,
    "neg": lambda a: -a,
    "exp": math.exp,
    "expm1": math.expm1,
    "log": math.log,
    "log1p": math.log1p,
    "sqrt": math.sqrt,
    "sin": math.sin,
    "cos": math.cos,
    "erf": math.erf,
    "tanh": math.tanh,
    "abs": abs,
    "maximum": max,
    "minimum": min,
}


class Node:
    """One operation. ``index`` is its turn in which it was made: of operands it is lower."""

    __slots__ = ("args", "index", "op")

    def __init__(self, op: str, args: tuple[Any, ...], index: int) -> None:
        self.op, self.args, self.index = op, args, index

    @property
    def operands(self) -> list[Node]:
        return [arg for arg in self.args if isinstance(arg, Node)]

    @property
    def value(self) -> float | None:
        """Of a constant."""
        return self.args[0] if self.op == "const" else None

    @property
    def is_condition(self) -> bool:
        return self.op in COMPARISONS or self.op in LOGIC

    def __repr__(self) -> str:
        arguments = (f"%{a.index}" if isinstance(a, Node) else repr(a) for a in self.args)
        return f"%{self.index} = {self.op}({', '.join(arguments)})"


class Graph:
    def __init__(self) -> None:
        self._known: dict[tuple[Any, ...], Node] = {}

    def __iter__(self) -> Iterator[Node]:
        return iter(self._known.values())

    def node(self, op: str, *args: Any) -> Node:
        """This operation as it is."""
        # Python takes 0.0 for -0.0.
        key = (op, *(math.copysign(1, a) if a == 0 else a for a in args), *args)
        if key not in self._known:
            self._known[key] = Node(op, args, len(self._known))
        return self._known[key]

    def const(self, value: float) -> Node:
        return self.node("const", float(value))

    def make(self, op: str, *given: Node | float) -> Node:
        """This operation, or what it comes to."""
        args = [a if isinstance(a, Node) else self.const(a) for a in given]
        if op not in LOGIC:  # a condition counts as 1 or 0
            first = 1 if op == "where" else 0
            args[first:] = [self.number(a) for a in args[first:]]
        values = [a.value for a in args]
        if op in _FOLDED and None not in values:
            try:
                return self.const(_FOLDED[op](*values))
            except (ArithmeticError, ValueError):  # an infinity or NaN, for the kernel to find
                return self.node(op, *args)
        if op == "where" and args[1] is args[2]:
            return args[1]
        simpler = getattr(self, f"_{op}", None)
        return (simpler and simpler(*args, *values)) or self.node(op, *args)

    def number(self, a: Node) -> Node:
        return self.node("where", a, self.const(1), self.const(0)) if a.is_condition else a

    def _add(self, a: Node, b: Node, x: float | None, y: float | None) -> Node | None:
        if x == 0 or y == 0:
            return b if x == 0 else a
        if b.op == "neg":
            return self.make("sub", a, b.args[0])
        if a.op == "neg":
            return self.make("sub", b, a.args[0])
        return None

    def _sub(self, a: Node, b: Node, x: float | None, y: float | None) -> Node | None:
        if x == 0 or y == 0:
            return self.make("neg", b) if x == 0 else a
        return self.make("add", a, b.args[0]) if b.op == "neg" else None

    def _mul(self, a: Node, b: Node, x: float | None, y: float | None) -> Node | None:
        if x == 1 or y == 1:
            return b if x == 1 else a
        if x == -1 or y == -1:
            return self.make("neg", b if x == -1 else a)
        if a.op == "neg":
            return self.make("neg", self.make("mul", a.args[0], b))
        if b.op == "neg":
            return self.make("neg", self.make("mul", a, b.args[0]))
        return None

    def _div(self, a: Node, b: Node, x: float | None, y: float | None) -> Node | None:
        return a if y == 1 else None

    def _neg(self, a: Node, x: float | None) -> Node | None:
        return a.args[0] if a.op == "neg" else None


def reachable(roots: Iterable[Node]) -> list[Node]:
    """The roots and all that they are made of, operands first."""
    seen: dict[Node, None] = {}
    waiting = list(roots)
    while waiting:
        node = waiting.pop()
        if node not in seen:
            seen[node] = None
            waiting.extend(node.operands)
    return sorted(seen, key=lambda node: node.index)


_SIGNS = {"add": "+", "sub": "-", "mul": "*", "div": "/"}


def said(node: Node, local: Mapping[Node, str] | None = None) -> str:
    """A value as the author would say it, who has these names."""
    if local and node in local:
        return local[node]
    if node.op == "input":
        return f"{node.args[0]}.{node.args[1]}"
    if node.op == "const":
        return f"{node.args[0]:g}"
    operands = [said(operand, local) for operand in node.operands]
    if node.op in _SIGNS:
        return f"({f' {_SIGNS[node.op]} '.join(operands)})"
    inner = ", ".join(operands)
    alone = len(operands) == 1 and node.operands[0].op in _SIGNS and inner.startswith("(")
    return f"{node.op}{inner if alone else f'({inner})'}"
