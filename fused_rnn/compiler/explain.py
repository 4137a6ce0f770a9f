"""What the compiler made of a cell, for its author."""

from __future__ import annotations

from collections.abc import Iterable

from .affine import Affine
from .cut import COMPUTE, KEEP, Tape
from .derive import Gradients
from .graph import Node, reachable, said
from .trace import Trace

# Operations of a function, about as many as core/math.h has for it.
_FUNCTION_FLOPS = 20


def explanation(trace: Trace, gradients: Gradients, tape: Tape, affine: Affine | None) -> str:
    d = trace.declaration
    kept = len(tape.saved) + sum(name != trace.recurrent for name in tape.states)
    backward = _backward_nodes(trace, gradients, tape)
    lines = [
        f"{d.name}: states {', '.join(d.states)}, output {d.output}",
        f"gates       {_listed(trace.gates_x)} of the input; {'; '.join(_products(trace))}",
        *([f"given       {_listed(d.given)} for each step"] if d.given else []),
        f"parameters  {_listed(d.params)}",
        f"kept        {_listed(said(node, trace.local) for node in tape.saved)} for the backward"
        + "".join(f", {name} before the step" for name in tape.states)
        + (f", the new {trace.recurrent}" if tape.reads_new_h else ""),
        f"tape        {4 * kept} bytes per step, row and unit in float32, beside {trace.recurrent}",
        f"operations  {_flops(trace.forward)} forward, {_flops(backward)} backward per step, row "
        "and unit, beside the products",
        f"products    {2 * len(trace.gates_x)} I + {2 * len(trace.gates_h)} H operations per step, "
        "row and unit; twice as many backward",
    ]
    if affine:
        lines.append(
            f"affine      the new {_listed(affine.states)}: CUDA may do many steps of a long "
            "sequence at once"
        )
    functions = [node for node in tape.again if node.op in COMPUTE]
    for node in functions:
        cost = COMPUTE[node.op] / KEEP
        lines.append(
            f"again       {said(node, trace.local)}: computed in the backward once more, which "
            f"costs {cost:g} of keeping it"
        )
    if rest := len(tape.again) - len(functions):
        lines.append(f"again       {rest} sums, products and choices")
    return "\n".join(lines) + "\n"


def _listed(names: Iterable[str]) -> str:
    return ", ".join(names) or "none"


def _products(trace: Trace) -> list[str]:
    """The gates of W_hh, by what it multiplies."""
    names = [trace.recurrent, *(said(node, trace.local) for node in trace.operands)]
    gates, found = iter(trace.gates_h), []
    for name, count in zip(names, trace.products, strict=True):
        own = [next(gates) for _ in range(count)]
        if own or len(names) == 1:
            found.append(f"{_listed(own)} of {name}")
    return found


def _backward_nodes(trace: Trace, gradients: Gradients, tape: Tape) -> list[Node]:
    forward = set(trace.forward)
    own = [node for node in reachable(gradients.all) if node not in forward]
    return [*own, *tape.again]


def _flops(nodes: Iterable[Node]) -> int:
    counted = [node.op for node in nodes if node.op not in ("input", "const")]
    return sum(_FUNCTION_FLOPS if op in COMPUTE and op != "div" else 1 for op in counted)
