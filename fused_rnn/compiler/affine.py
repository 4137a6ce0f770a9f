"""Whether a step is affine in the states before it: s' = A s + b, where A and b are of no state.

Such steps can be composed, so that an engine with more threads than units does many at once
(Blelloch 1990, "Prefix sums and their applications"; Martin & Cundy 2018, arXiv:1709.04057).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .graph import Graph, Node, reachable
from .trace import Trace

# Composing the maps of n states takes n^3 products, more than all else of a step.
MOST_STATES = 2


@dataclass(frozen=True)
class Affine:
    """Of the states that are read. Others are functions of these, and no step needs them."""

    states: Sequence[str]
    by: Sequence[Node]  # A, row by row
    plus: Sequence[Node]  # b


@dataclass(frozen=True)
class _Parts:
    """A value as a sum: of states times factors, and the rest."""

    factors: dict[Node, Node]
    rest: Node


def affine(trace: Trace) -> Affine | None:
    """None of a cell with a recurrent product, or one that is not affine."""
    if trace.gates_h:
        return None
    known = set(trace.forward)
    inputs = {name: trace.input("s", name) for name in trace.new}
    read = [name for name, node in inputs.items() if node in known]
    if not 1 <= len(read) <= MOST_STATES:
        return None
    split = _Splitter(trace.graph, set(inputs.values()))
    new = [split(trace.new[name]) for name in read]
    zero = trace.graph.const(0)
    by, plus = [], []
    for parts in new:
        if parts is None:
            return None
        by += [parts.factors.get(inputs[name], zero) for name in read]
        plus.append(parts.rest)
    return Affine(read, by, plus)


class _Splitter:
    def __init__(self, graph: Graph, states: set[Node]) -> None:
        self.graph, self.states = graph, states
        self._known: dict[Node, _Parts | None] = {}

    def __call__(self, node: Node) -> _Parts | None:
        """None if the value is not affine in the states."""
        for part in reachable([node]):  # operands first
            if part not in self._known:
                self._known[part] = self._split(part)
        return self._known[node]

    def _split(self, node: Node) -> _Parts | None:
        if node in self.states:
            return _Parts({node: self.graph.const(1)}, self.graph.const(0))
        parts = [part for operand in node.operands if (part := self._known[operand])]
        if len(parts) < len(node.operands):
            return None
        if not any(part.factors for part in parts):
            return _Parts({}, node)
        first, last = parts[0], parts[-1]
        if node.op == "neg":
            return self._each("neg", first)
        if node.op in ("add", "sub"):
            return self._join(node.op, first, last)
        if node.op == "mul" and not first.factors:
            return self._each("mul", last, first.rest)
        if node.op in ("mul", "div") and not last.factors:
            return self._each(node.op, first, last.rest)
        if node.op == "where" and not first.factors:
            return self._join("where", parts[1], last, first.rest)
        return None

    def _each(self, op: str, parts: _Parts, *others: Node) -> _Parts:
        """An operation that can be done with each part of a sum."""
        factors = {s: self.graph.make(op, factor, *others) for s, factor in parts.factors.items()}
        zero = parts.rest.value == 0
        return _Parts(factors, parts.rest if zero else self.graph.make(op, parts.rest, *others))

    def _join(self, op: str, a: _Parts, b: _Parts, *first: Node) -> _Parts:
        """An operation that can be done with each two parts of two sums that go together."""
        zero, make = self.graph.const(0), self.graph.make
        factors = {
            s: make(op, *first, a.factors.get(s, zero), b.factors.get(s, zero))
            for s in {**a.factors, **b.factors}
        }
        return _Parts(factors, make(op, *first, a.rest, b.rest))
