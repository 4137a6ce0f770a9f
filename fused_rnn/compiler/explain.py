"""What the compiler made of a cell, for its author."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from .cut import COMPUTE, KEEP, Tape
from .derive import Gradients
from .graph import Node, reachable
from .trace import Trace

_SIGNS = {"add": "+", "sub": "-", "mul": "*", "div": "/"}
# Operations of a function, about as many as core/math.h has for it.
_FUNCTION_FLOPS = 20


def explanation(trace: Trace, gradients: Gradients, tape: Tape) -> str:
    d = trace.declaration
    kept = len(tape.saved) + sum(name != trace.recurrent for name in tape.states)
    backward = _backward_nodes(trace, gradients, tape)
    lines = [
        f"{d.name}: states {', '.join(d.states)}, output {d.output}",
        f"gates       {_listed(trace.gates_x)} of the input; {_listed(trace.gates_h)} of "
        f"{trace.recurrent}",
        f"parameters  {_listed(d.params)}",
        f"kept        {_listed(_named(trace, tape.saved))} for the backward"
        + "".join(f", {name} before the step" for name in tape.states)
        + (f", the new {trace.recurrent}" if tape.reads_new_h else ""),
        f"tape        {4 * kept} bytes per step, row and unit in float32, beside {trace.recurrent}",
        f"operations  {_flops(trace.forward)} forward, {_flops(backward)} backward per step, row "
        "and unit, beside the products",
        f"products    {2 * len(trace.gates_x)} I + {2 * len(trace.gates_h)} H operations per step, "
        "row and unit; twice as many backward",
    ]
    functions = [node for node in tape.again if node.op in COMPUTE]
    for node in functions:
        cost = COMPUTE[node.op] / KEEP
        lines.append(
            f"again       {_name(trace, node)}: computed in the backward once more, which costs "
            f"{cost:g} of keeping it"
        )
    if rest := len(tape.again) - len(functions):
        lines.append(f"again       {rest} sums, products and choices")
    return "\n".join(lines) + "\n"


def _listed(names: Iterable[str]) -> str:
    return ", ".join(names) or "none"


def _name(trace: Trace, node: Node) -> str:
    """As the author would say it."""
    if node in trace.local:
        return trace.local[node]
    if node.op == "input":
        return f"{node.args[0]}.{node.args[1]}"
    if node.op == "const":
        return f"{node.args[0]:g}"
    if node.op in _SIGNS:
        return (
            f"({f' {_SIGNS[node.op]} '.join(_name(trace, operand) for operand in node.operands)})"
        )
    inner = ", ".join(_name(trace, operand) for operand in node.operands)
    alone = len(node.operands) == 1 and node.operands[0].op in _SIGNS and inner.startswith("(")
    return f"{node.op}{inner if alone else f'({inner})'}"


def _named(trace: Trace, nodes: Sequence[Node]) -> list[str]:
    return [_name(trace, node) for node in nodes]


def _backward_nodes(trace: Trace, gradients: Gradients, tape: Tape) -> list[Node]:
    forward = set(trace.forward)
    own = [node for node in reachable(gradients.all) if node not in forward]
    return [*own, *tape.again]


def _flops(nodes: Iterable[Node]) -> int:
    counted = [node.op for node in nodes if node.op not in ("input", "const")]
    return sum(_FUNCTION_FLOPS if op in COMPUTE and op != "div" else 1 for op in counted)
