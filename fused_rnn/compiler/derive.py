"""Gradients: what a unit's new states say of its gates, old states and parameters.

Reverse mode over the graph of the trace. Where a function is its own best derivative (sigmoid,
tanh, exp, sqrt) the value is used. At ties the convention is torch's: half to each side of a
maximum, 0 for relu at 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from .graph import COMPARISONS, LOGIC, Graph, Node, reachable
from .trace import Trace


@dataclass(frozen=True)
class Gradients:
    """In the order of the trace; what no gradient reaches is the constant 0."""

    gates_x: Sequence[Node]  # and, behind them, what is given
    gates_h: Sequence[Node]
    states: Sequence[Node]
    params: Sequence[Node]
    of: dict[Node, Node]  # of every value of the forward that has one

    @property
    def distinct(self) -> list[Node]:
        """Of the gates, each once."""
        return list(dict.fromkeys([*self.gates_x, *self.gates_h]))

    @property
    def all(self) -> list[Node]:
        return [*self.distinct, *self.states, *self.params]


class _Rules:
    """For each operation the gradients of its operands, given that of its value y."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph

    def times(self, a: Node, b: Node | float) -> Node:
        zero = a.value == 0 or (b.value if isinstance(b, Node) else b) == 0
        return self.graph.const(0) if zero else self.graph.make("mul", a, b)

    def where(self, condition: Node, a: Node | float, b: Node | float) -> Node:
        return self.graph.make("where", condition, a, b)

    def add(self, g: Node, y: Node, a: Node, b: Node) -> tuple[Node, ...]:
        return g, g

    def sub(self, g: Node, y: Node, a: Node, b: Node) -> tuple[Node, ...]:
        return g, self.graph.make("neg", g)

    def mul(self, g: Node, y: Node, a: Node, b: Node) -> tuple[Node, ...]:
        return self.times(g, b), self.times(g, a)

    def div(self, g: Node, y: Node, a: Node, b: Node) -> tuple[Node, ...]:
        of_a = self.graph.make("div", g, b)
        return of_a, self.graph.make("neg", self.times(of_a, y))

    def neg(self, g: Node, y: Node, a: Node) -> tuple[Node, ...]:
        return (self.graph.make("neg", g),)

    def exp(self, g: Node, y: Node, a: Node) -> tuple[Node, ...]:
        return (self.times(g, y),)

    def expm1(self, g: Node, y: Node, a: Node) -> tuple[Node, ...]:
        return (self.times(g, self.graph.make("add", y, 1)),)

    def log(self, g: Node, y: Node, a: Node) -> tuple[Node, ...]:
        return (self.graph.make("div", g, a),)

    def log1p(self, g: Node, y: Node, a: Node) -> tuple[Node, ...]:
        return (self.graph.make("div", g, self.graph.make("add", a, 1)),)

    def sqrt(self, g: Node, y: Node, a: Node) -> tuple[Node, ...]:
        return (self.graph.make("div", self.times(g, 0.5), y),)

    def sin(self, g: Node, y: Node, a: Node) -> tuple[Node, ...]:
        return (self.times(g, self.graph.make("cos", a)),)

    def cos(self, g: Node, y: Node, a: Node) -> tuple[Node, ...]:
        return (self.graph.make("neg", self.times(g, self.graph.make("sin", a))),)

    def erf(self, g: Node, y: Node, a: Node) -> tuple[Node, ...]:
        bell = self.graph.make("exp", self.graph.make("neg", self.graph.make("mul", a, a)))
        return (self.times(g, self.graph.make("mul", bell, 2 / math.sqrt(math.pi))),)

    def abs(self, g: Node, y: Node, a: Node) -> tuple[Node, ...]:
        return (self.times(g, self.graph.make("sign", a)),)

    def sigmoid(self, g: Node, y: Node, a: Node) -> tuple[Node, ...]:
        return (self.times(g, self.graph.make("sigmoid_grad", y)),)

    def tanh(self, g: Node, y: Node, a: Node) -> tuple[Node, ...]:
        return (self.times(g, self.graph.make("tanh_grad", y)),)

    def relu(self, g: Node, y: Node, a: Node) -> tuple[Node, ...]:
        return (self.graph.make("relu_backward", g, y),)

    def softplus(self, g: Node, y: Node, a: Node) -> tuple[Node, ...]:
        return (self.times(g, self.graph.make("sigmoid", a)),)

    def maximum(self, g: Node, y: Node, a: Node, b: Node) -> tuple[Node, ...]:
        return self._chosen(g, a, b, "gt", "lt")

    def minimum(self, g: Node, y: Node, a: Node, b: Node) -> tuple[Node, ...]:
        return self._chosen(g, a, b, "lt", "gt")

    def _chosen(self, g: Node, a: Node, b: Node, *sides: str) -> tuple[Node, ...]:
        half = self.times(g, 0.5)
        tie = self.graph.make("eq", a, b)
        mine = (self.where(self.graph.make(side, a, b), g, 0) for side in sides)
        return tuple(self.where(tie, half, other) for other in mine)

    def select(self, g: Node, y: Node, c: Node, a: Node, b: Node) -> tuple[Node | None, ...]:
        return None, self.where(c, g, 0), self.where(c, 0, g)


_FLAT = {*COMPARISONS, *LOGIC, "sign", "input", "const"}


def derive(trace: Trace) -> Gradients:
    graph, rules, found = trace.graph, _Rules(trace.graph), dict[Node, Node]()
    zero = graph.const(0)

    def reach(node: Node, gradient: Node | None) -> None:
        if gradient is None or gradient is zero or node.op == "const":
            return
        found[node] = _sum(graph, found[node], gradient) if node in found else gradient

    for name, node in trace.new.items():
        reach(node, trace.input("ds_new", name))
    for i, node in enumerate(trace.operands):
        reach(node, trace.input("du", str(i)))
    # A value's gradient is complete when all that is made of it is done, which is further from the
    # end. So sums come in that order too, and those equally far in the author's.
    for node in _by_distance(trace.ends):
        if node in found and node.op not in _FLAT:
            rule: Callable[..., Sequence[Node | None]] = getattr(
                rules, "select" if node.op == "where" else node.op
            )
            for operand, gradient in zip(
                node.args, rule(found[node], node, *node.args), strict=True
            ):
                reach(operand, gradient)

    def of(kind: str, names: Sequence[str]) -> list[Node]:
        return [found.get(trace.input(kind, name), zero) for name in names]

    d = trace.declaration
    return Gradients(
        of("x", (*trace.gates_x, *d.given)),
        of("r", trace.gates_h),
        of("s", d.states),
        of("p", d.params),
        found,
    )


def _sum(graph: Graph, a: Node, b: Node) -> Node:
    """a + b, where a - a z is a (1 - z)."""
    if b.op == "neg" and b.args[0].op == "mul" and a in b.args[0].args:
        first, second = b.args[0].args
        return graph.make("mul", a, graph.make("sub", 1, second if a is first else first))
    return graph.make("add", a, b)


def _by_distance(ends: Sequence[Node]) -> list[Node]:
    """All that the ends are made of, by the longest way to one of them."""
    nodes = reachable(ends)
    distance = dict.fromkeys(nodes, 0)
    for node in reversed(nodes):
        for operand in node.operands:
            distance[operand] = max(distance[operand], distance[node] + 1)
    return sorted(nodes, key=lambda node: (distance[node], node.index))
