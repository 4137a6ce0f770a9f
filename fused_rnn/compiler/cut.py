"""Which values of the forward are kept for the backward: a minimum cut.

A value that is needed can be kept, which costs memory for every step, row and unit, or be computed
again from others. The exact best choice is a minimum cut between what the forward had and what the
backward wants: each value is an edge, whose capacity is the cost of keeping it, and an edge from
the forward, whose capacity is the cost of computing it again, where its operands must then be had.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .derive import Gradients
from .graph import Node
from .trace import Trace

KEEP = 1000
# Of computing a value again: keeping one costs about as much time as a function does, and takes
# memory besides.
COMPUTE = {
    **dict.fromkeys(("exp", "expm1", "sin", "cos"), 400),
    **dict.fromkeys(("sigmoid", "log", "log1p", "erf"), 500),
    **dict.fromkeys(("div", "sqrt"), 250),
    "tanh": 600,
    "softplus": 900,
}
ARITHMETIC = 30
# h_t lies there for the next step anyway; but where it is used there can be no projection.
NEW_H = 10


@dataclass(frozen=True)
class Tape:
    saved: Sequence[Node]  # operands of products, then others as the forward computes them
    states: Sequence[str]  # whose value before the step the backward reads
    reads_new_h: bool
    again: Sequence[Node]  # what the backward computes again


def choose(trace: Trace, gradients: Gradients) -> Tape:
    import networkx

    forward = set(trace.forward)
    h, h_new = trace.input("s", trace.recurrent), trace.new[trace.recurrent]
    wanted = [node for node in _first_of(gradients.all, forward) if node.op != "const"]
    flow = networkx.DiGraph()
    flow.add_nodes_from(("had", "wanted"))
    for node in _all_of(wanted):
        into, out = (node.index, 0), (node.index, 1)
        is_there = node.op == "input" and (node is h or node.args[0] == "p")
        if is_there or node in trace.operands:  # these lie there in any case
            flow.add_edge(into, out, capacity=0)
        elif node is h_new and node.op != "input":
            flow.add_edge(into, out, capacity=NEW_H)
        elif not node.is_condition:
            # Of two choices the one with fewer operands behind it, which is the simpler to read.
            flow.add_edge(into, out, capacity=KEEP + len(node.operands))
        else:  # is no number that could be kept
            flow.add_edge(into, out)
        if node.op == "input":
            flow.add_edge("had", into)
        else:
            flow.add_edge("had", into, capacity=COMPUTE.get(node.op, ARITHMETIC))
            for operand in node.operands:
                if operand.op != "const":
                    flow.add_edge((operand.index, 1), into)
    for node in wanted:
        flow.add_edge((node.index, 1), "wanted")
    _, (had, _) = networkx.minimum_cut(flow, "had", "wanted")
    kept = [
        node for node in _all_of(wanted) if (node.index, 0) in had and (node.index, 1) not in had
    ]
    others = [n for n in kept if n not in trace.operands]
    saved = [n for n in others if n is not h_new and (n.op != "input" or n.args[0] in ("x", "r"))]
    reads_new_h = h_new in others and h_new.op != "input"
    states = [n.args[1] for n in others if n.op == "input" and n.args[0] == "s"]
    again = [n for n in _until(wanted, set(kept)) if n.op not in ("const", "input")]
    return Tape([*trace.operands, *saved], states, reads_new_h, again)


def _first_of(ends: Sequence[Node], forward: set[Node]) -> list[Node]:
    """The values of the forward that the ends are made of directly."""
    found: dict[Node, None] = {}
    seen: set[Node] = set()
    waiting = list(ends)
    while waiting:
        node = waiting.pop()
        if node in forward:
            found[node] = None
        elif node not in seen:
            seen.add(node)
            waiting.extend(node.operands)
    return sorted(found, key=lambda node: node.index)


def _all_of(ends: Sequence[Node]) -> list[Node]:
    return [node for node in _until(ends, set()) if node.op != "const"]


def _until(ends: Sequence[Node], known: set[Node]) -> list[Node]:
    """What the ends are made of, as far as it is not made of what is known alone."""
    found: dict[Node, None] = {}
    waiting = [node for node in ends if node not in known]
    while waiting:
        node = waiting.pop()
        if node not in found:
            found[node] = None
            waiting.extend(operand for operand in node.operands if operand not in known)
    return sorted(found, key=lambda node: node.index)
