"""The user's function, run once on symbols: what it computes of gates, states and parameters."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from .errors import CellError, refuse
from .graph import Graph, Node, reachable, said
from .rules import made_in
from .symbols import Names, Recurrent, Symbol


@dataclass(frozen=True)
class Declaration:
    """What the author says of a cell beside its function."""

    name: str
    gates: tuple[str, ...]
    states: tuple[str, ...]
    params: tuple[str, ...]
    output: str
    given: tuple[str, ...] = ()


@dataclass(frozen=True)
class Trace:
    """A function, traced. Gates come in the order of the declaration, those of W_hh by product.

    Product 0 is that of a state. An operand of another may be anything that is made of states,
    gates of the input, and gates of products before its own.
    """

    declaration: Declaration
    graph: Graph
    gates_x: tuple[str, ...]  # with a part of W_ih
    gates_h: tuple[str, ...]  # with a part of W_hh
    recurrent: str  # the state that W_hh multiplies
    products: tuple[int, ...]  # how many gates each product has
    operands: tuple[Node, ...]  # of all products but the first
    new: Mapping[str, Node]  # of each state, in their order
    local: Mapping[Node, str]  # the author's own names

    def input(self, kind: str, name: str) -> Node:
        return self.graph.node("input", kind, name)

    @property
    def ends(self) -> list[Node]:
        """What is computed, all in all."""
        return [*self.new.values(), *self.operands]

    @property
    def forward(self) -> list[Node]:
        return reachable(self.ends)

    @property
    def reads_h(self) -> bool:
        """Whether the state that W_hh multiplies is read elementwise too."""
        return self.input("s", self.recurrent) in set(self.forward)

    @property
    def adds(self) -> bool:
        """Whether both parts of each gate are read by nothing but their sum."""
        parts = [
            node
            for node in self.forward
            if node.op == "input"
            and node.args[0] in ("x", "r")
            and node.args[1] not in self.declaration.given
        ]
        users = [node for node in self.forward if not set(parts).isdisjoint(node.operands)]
        return (
            self.gates_x == self.gates_h
            and not self.operands
            and all(
                node.op == "add"
                and node.args == (self.input("x", gate), self.input("r", gate))
                or node.args == (self.input("r", gate), self.input("x", gate))
                for node in users
                for gate in [next(p.args[1] for p in parts if p in node.operands)]
            )
        )

    @property
    def text(self) -> str:
        """All of it, to tell cells apart."""
        named = [(node.index, name) for node, name in self.local.items()]
        new = [(name, node.index) for name, node in self.new.items()]
        facts = [self.declaration, self.gates_x, self.gates_h, self.recurrent, new, named]
        facts += [self.products, [node.index for node in self.operands]]
        return "\n".join(map(repr, [*facts, *self.forward]))


def trace(
    fn: Callable[..., Any], declaration: Declaration, hyperparameters: Mapping[str, Any]
) -> Trace:
    """Run the function on symbols. Raises CellError."""
    d, graph = declaration, Graph()
    used: dict[str, set[str]] = {"x": set(), "r": set(), "s": set(), "p": set()}
    operand_of: dict[str, Node] = {}  # of each gate of W_hh

    def symbol(kind: str, name: str) -> Symbol:
        used[kind].add(name)
        return Symbol(graph.node("input", kind, name))

    def product(gate: str, operand: Any) -> Symbol:
        h = graph.node("input", "s", d.states[0])
        node = h if operand is None else getattr(operand, "node", graph.const(0))
        if node.op == "const" or node.is_condition:
            raise refuse(f"r(...).{gate}: expected a value of the cell, such as s.{d.states[0]}")
        if node.op == "input" and node.args[0] == "s":
            used["s"].add(node.args[1])
        known = operand_of.setdefault(gate, node)
        if known is not node:
            names = f"{said(known)} and to {said(node)}"
            raise refuse(f"r.{gate} is applied to {names}: use two gates")
        return symbol("r", gate)

    arguments = (
        Names("gate", (*d.gates, *d.given), lambda name: symbol("x", name)),
        Recurrent(d.gates, product),
        Names("state", d.states, lambda name: symbol("s", name)),
        Names("parameter", d.params, lambda name: symbol("p", name)),
    )
    names: dict[str, Symbol] = {}
    with made_in(graph), _locals_of(fn, names) as line:
        returned = fn(*arguments, **hyperparameters)
    new = _new_states(returned, d, graph, f"{fn.__code__.co_filename}:{line[0]}")
    where = f"{fn.__code__.co_filename}:{fn.__code__.co_firstlineno}"
    _check_used(d, used, where)
    recurrent, operands = _operands(operand_of.values(), graph.node("input", "s", d.states[0]))
    by_product = [
        tuple(gate for gate in d.gates if operand_of.get(gate) is node)
        for node in (recurrent, *operands)
    ]
    reached = set(reachable([*new.values(), *operands]))
    local: dict[Node, str] = {}
    for name, value in names.items():
        if value.node in reached and value.node.op not in ("input", "const"):
            local.setdefault(value.node, name)
    return Trace(
        declaration,
        graph,
        gates_x=tuple(gate for gate in d.gates if gate in used["x"]),
        gates_h=sum(by_product, ()),
        recurrent=recurrent.args[1],
        products=tuple(map(len, by_product)),
        operands=operands,
        new=new,
        local=local,
    )


def _operands(found: Iterable[Node], h: Node) -> tuple[Node, tuple[Node, ...]]:
    """The state of product 0, h if there is none, and the operands of the others, each once.

    In the order in which the function asks for them none needs a gate of a later product.
    """
    each = list(dict.fromkeys(found))
    states = (node for node in each if node.op == "input" and node.args[0] == "s")
    first = next(states, h)
    return first, tuple(node for node in each if node is not first)


@contextmanager
def _locals_of(fn: Any, names: dict[str, Symbol]) -> Iterator[list[int]]:
    """Fills in the function's own names of symbols, and the line that it returned from."""
    line = [fn.__code__.co_firstlineno]

    def look(frame: Any, event: str, _: Any) -> None:
        if event == "return" and frame.f_code is fn.__code__:
            line[0] = frame.f_lineno
            for name, value in frame.f_locals.items():
                if isinstance(value, Symbol):
                    names[name] = value

    before = sys.getprofile()
    sys.setprofile(look)
    try:
        yield line
    finally:
        sys.setprofile(before)


def _new_states(returned: Any, d: Declaration, graph: Graph, where: str) -> dict[str, Node]:
    states = ", ".join(d.states)
    if not isinstance(returned, Mapping):
        raise CellError(
            f"{where}: returned {type(returned).__name__}; expected a dict of the new states "
            f"{states}"
        )
    missing = [name for name in d.states if name not in returned]
    extra = [name for name in returned if name not in d.states]
    if missing or extra:
        wrong = [f"missing: {', '.join(missing)}"] * bool(missing)
        wrong += [f"no state: {', '.join(map(str, extra))}"] * bool(extra)
        raise CellError(
            f"{where}: returned {', '.join(map(str, returned)) or 'nothing'}; states are {states} "
            f"({'; '.join(wrong)})"
        )
    new = {}
    for name in d.states:
        value = returned[name]
        if not isinstance(value, (Symbol, int, float)):
            raise CellError(f"{where}: state {name}: expected a value, got {type(value).__name__}")
        new[name] = graph.make("add", value.node if isinstance(value, Symbol) else value, 0)
    return new


def _check_used(d: Declaration, used: Mapping[str, set[str]], where: str) -> None:
    for gate in d.gates:
        if gate not in used["x"] | used["r"]:
            raise CellError(f"{where}: gate {gate} is declared but not used")
    for name in d.params:
        if name not in used["p"]:
            raise CellError(f"{where}: parameter {name} is declared but not used")
    if not used["s"]:
        raise CellError(
            f"{where}: nothing recurs: neither a product r nor a state s is read from the "
            "step before"
        )
    if used["x"] <= set(d.given):
        raise CellError(f"{where}: no gate reads the input: expected one that is x.{d.gates[0]}")
    for name in d.given:
        if name not in used["x"]:
            raise CellError(f"{where}: {name} is given but not used: it is read as x.{name}")
