"""The header of a cell, as one would write it by hand: the contract is csrc/core/cell.h."""

from __future__ import annotations

import itertools
import math
import re
import textwrap
from collections.abc import Callable, Container, Iterable, Mapping, Sequence

from .affine import Affine
from .cut import Tape
from .derive import Gradients
from .graph import COMPARISONS, Node, reachable
from .trace import Trace

# Operators, and how tightly they bind.
_INFIX = {
    **{"lt": ("<", 2), "gt": (">", 2), "le": ("<=", 2), "ge": (">=", 2)},
    **{"eq": ("==", 1), "ne": ("!=", 1), "and": ("&", 0), "or": ("|", 0)},
    **{"add": ("+", 3), "sub": ("-", 3), "mul": ("*", 4), "div": ("/", 4)},
}
_UNARY = 5

_BY_DEFAULT = ("kParams", "kGiven", "kOperands")  # 0 in CellDefaults

# What C++ or the header itself means by a name.
_TAKEN = set(
    """alignas alignof and and_eq asm auto bitand bitor bool break case catch char class compl const
    constexpr const_cast continue decltype default delete do double dynamic_cast else enum explicit
    export extern false float for friend goto if inline int long mutable namespace new noexcept not
    not_eq nullptr operator or or_eq private protected public register reinterpret_cast return short
    signed sizeof static static_assert static_cast struct switch template this thread_local throw
    true try typedef typeid typename union unsigned using virtual void volatile wchar_t while xor
    xor_eq NULL assert
    V T Pack Lanes splat frnn custom forward backward affine x h s p s_new saved h_new ds_new d ds
    dp by plus
    sigmoid tanh relu exp expm1 log log1p sqrt sin cos erf abs sign softplus maximum minimum
    sigmoid_grad tanh_grad relu_backward""".split()
)


def type_name(name: str) -> str:
    """A name for C++ of what may be any name in Python."""
    plain = re.sub(r"[^0-9A-Za-z_]", "_", name).strip("_") or "Cell"
    plain = re.sub(r"__+", "_", plain)
    return f"{plain}_" if plain in _TAKEN or plain[0].isdigit() else plain


class _Body:
    """Statements of one function."""

    def __init__(self, inputs: Mapping[Node, str]) -> None:
        self.have = dict(inputs)  # the text of values that have a name
        self.lines: list[str] = []
        self._names: set[str] = set()

    def name(self, wish: str) -> str:
        """A name that nobody has, as near to the wish as can be."""
        plain = re.sub(r"[^0-9A-Za-z_]", "_", wish)
        plain = f"{plain}_" if plain in _TAKEN else plain
        tries = (f"{plain}{number or ''}" for number in itertools.count())
        found = next(name for name in tries if name not in self._names)
        self._names.add(found)
        return found

    def describe(self, node: Node) -> str:
        """A wish for what has no name: a function of something that has one, or anything."""
        named = [self.have.get(operand, "") for operand in node.operands]
        single = len(named) == 1 and re.fullmatch(r"[A-Za-z]\w*", named[0])
        return f"{node.op}_{named[0]}" if single else "u"

    def declare(self, node: Node, wish: str) -> None:
        kind = "auto" if node.is_condition else "V"
        text = self.text(node)
        self.have[node] = self.name(wish)
        self.lines.append(f"const {kind} {self.have[node]} = {text};")

    def assign(self, target: str, node: Node) -> None:
        self.lines.append(f"{target} = {self.value(node)};")

    def value(self, node: Node) -> str:
        """The text of something of type V."""
        if node.value is None:
            return self.text(node)
        return "V{}" if node.value == 0 else f"splat<V>({_constant(node.value)})"

    def text(self, node: Node, level: int = 0) -> str:
        if node in self.have:
            return self.have[node]
        if node.op == "const":
            return _constant(node.args[0])
        if node.op in _INFIX:
            sign, own = _INFIX[node.op]
            a, b = node.args
            if node.op in COMPARISONS:
                left, right = (self._compared(side) for side in (a, b))
            else:
                # Of equals the left comes first, and nothing is reordered.
                left, right = self.text(a, own), self.text(b, own + 1)
            text = f"{left} {sign} {right}"
            return f"({text})" if own < level else text
        if node.op == "neg":
            return f"-{self.text(node.args[0], _UNARY)}"
        if node.op == "not":  # of a condition of lanes, or of one
            return f"({self.text(node.args[0], 1)} ^ (V{{}} == V{{}}))"
        if node.op == "where":
            c, a, b = node.args
            return f"({self.text(c, 1)} ? {self._whole(a)} : {self._whole(b)})"
        return f"{node.op}({', '.join(map(self._whole, node.args))})"

    def _compared(self, node: Node) -> str:
        return self.value(node) if node.value is not None else self.text(node, 3)

    def _whole(self, node: Node) -> str:
        """Of type V exactly, as templates and the two sides of a choice have to be."""
        plain = node in self.have or node.value is not None or node.op not in {*_INFIX, "neg"}
        return self.value(node) if plain else f"V({self.text(node)})"


def _constant(value: float) -> str:
    if math.isnan(value):
        return "std::numeric_limits<T>::quiet_NaN()"
    if math.isinf(value):
        return f"{'-' * (value < 0)}std::numeric_limits<T>::infinity()"
    whole = value.is_integer() and abs(value) < 1e9 and math.copysign(1, value) * value >= 0
    return f"T({int(value)})" if whole and str(value) != "-0.0" else f"T({value!r})"


def _uses(roots: Sequence[Node]) -> dict[Node, int]:
    found: dict[Node, int] = dict.fromkeys(roots, 0)
    for node in reachable(roots):
        for operand in node.operands:
            found[operand] = found.get(operand, 0) + 1
    for node in roots:
        found[node] += 1
    return found


def _gate_names(trace: Trace, nodes: Iterable[Node]) -> dict[Node, str]:
    """For values without a name: that of the one gate that they are made of."""
    found: dict[Node, str] = {}
    taken = set(trace.local.values())
    for node in nodes:
        kind, name = node.args if node.op == "input" else ("", "")
        if kind:
            found[node] = f"{'h' if kind == 'r' else kind}_{name}"
            continue
        gates = {
            n.args[1] for n in reachable([node]) if n.op == "input" and n.args[0] in ("x", "r")
        }
        if len(gates) == 1 and not gates & taken:
            found[node] = gates.pop()
            taken.add(found[node])
    return found


def _forward(trace: Trace, tape: Tape, inputs: Mapping[Node, str]) -> _Body:
    new = list(trace.new.values())
    body, uses = _Body(inputs), _uses([*new, *tape.saved])
    names = {**_gate_names(trace, tape.saved), **trace.local}
    for node in reachable([*new, *tape.saved]):
        if node.op in ("input", "const"):
            continue
        if node in names or uses[node] > 1:
            body.declare(node, names.get(node) or body.describe(node))
    for i, node in enumerate(new):
        body.assign(f"s_new[{i}]", node)
    body.lines += _together(f"saved[{i}] = {body.value(node)}" for i, node in enumerate(tape.saved))
    return body


def _backward(
    trace: Trace, gradients: Gradients, tape: Tape, inputs: Mapping[Node, str], forward: _Body
) -> _Body:
    body = _Body(inputs)
    names = {**_gate_names(trace, tape.saved), **trace.local}
    for node in tape.saved:
        own = forward.have[node] if node.op != "input" and node in forward.have else "u"
        body.have[node] = body.name(names.get(node, own))
    if tape.reads_new_h:
        body.have[trace.new[trace.recurrent]] = "h_new"
    ends = gradients.all
    order, uses = _needed(ends, body.have)
    loads = [f"{body.have[n]} = saved[{i}]" for i, n in enumerate(tape.saved) if n in uses]
    body.lines += [f"const V {', '.join(loads)};"] if loads else []
    gates = {node: f"d[{i}]" for i, node in enumerate(gradients.distinct)}
    of_named = {
        gradients.of[node]: f"d{name}" for node, name in names.items() if node in gradients.of
    }
    wishes = {**of_named, **names}
    for node in order:
        if node.op in ("input", "const"):
            continue
        if node in gates:
            body.assign(gates[node], node)
            body.have[node] = gates[node]
        elif uses[node] > 1 or node in trace.local:
            body.declare(node, wishes.get(node) or body.describe(node))
    for node, target in gates.items():
        if node.op in ("input", "const"):
            body.assign(target, node)
    for name, nodes in (("ds", gradients.states), ("dp", gradients.params)):
        for i, node in enumerate(nodes):
            body.assign(f"{name}[{i}]", node)
    return body


def _affine(trace: Trace, affine: Affine, inputs: Mapping[Node, str]) -> _Body:
    body, ends = _Body(inputs), [*affine.by, *affine.plus]
    order, uses = _needed(ends, body.have)
    for node in order:
        if node.op not in ("input", "const") and (uses[node] > 1 or node in trace.local):
            body.declare(node, trace.local.get(node) or body.describe(node))
    for name, nodes in (("by", affine.by), ("plus", affine.plus)):
        for i, node in enumerate(nodes):
            body.assign(f"{name}[{i}]", node)
    return body


def _needed(ends: Sequence[Node], known: Mapping[Node, str]) -> tuple[list[Node], dict[Node, int]]:
    """All that the ends are made of and that is not known, operands first, and how often each is
    used."""
    uses: dict[Node, int] = {}
    waiting = list(ends)
    while waiting:
        node = waiting.pop()
        uses[node] = uses.get(node, 0) + 1
        if uses[node] == 1 and node not in known:
            waiting.extend(node.operands)
    order = sorted((node for node in uses if node not in known), key=lambda node: node.index)
    return order, uses


def _together(statements: Iterable[str]) -> list[str]:
    joined = ", ".join(statements)
    return [f"{joined};"] if joined else []


def _function(name: str, arguments: Sequence[tuple[str, str]], lines: Sequence[str]) -> str:
    """One function of the struct; what it does not use has no name."""
    body = "\n".join(lines)
    if re.search(r"\bT\(|<T>", body):
        lines = ["using T = typename Lanes<V>::T;", *lines]

    def used(argument: str) -> bool:
        return re.search(rf"(?<![\w.]){argument}\b(?!\()", body) is not None

    given = [
        f"{kind}{argument}" if used(argument) else kind.rstrip() for kind, argument in arguments
    ]
    head = f"FRNN_HD static void {name}("
    whole = (argument.replace(" ", "\0") for argument in given)  # lines end between arguments
    signature = _filled(", ".join(whole), f"  {head}", " " * (2 + len(head)), 98).replace("\0", " ")
    statements = [_filled(line, " " * 4, " " * 8) for line in lines]
    return "\n".join(["  template <class V>", f"{signature}) {{", *statements, "  }"])


def _filled(text: str, first: str, others: str, width: int = 100) -> str:
    return textwrap.fill(
        text,
        width=width,
        initial_indent=first,
        subsequent_indent=others,
        break_long_words=False,
        break_on_hyphens=False,
    )


def _list(values: Iterable[object]) -> str:
    return f"{{{', '.join(map(str, values))}}}"


def header(trace: Trace, gradients: Gradients, tape: Tape, affine: Affine | None) -> str:
    d = trace.declaration
    states = list(d.states)
    numbers: Mapping[str, Callable[[str], int]] = {
        "x": (*trace.gates_x, *d.given).index,
        "r": trace.gates_h.index,
        "s": states.index,
        "p": d.params.index,
        "ds_new": states.index,
        "du": lambda name: len(states) + int(name),
    }
    arrays = {"r": "h", "du": "ds_new"}
    inputs = {
        node: f"{arrays.get(node.args[0], node.args[0])}[{numbers[node.args[0]](node.args[1])}]"
        for node in trace.graph
        if node.op == "input"
        and (
            node.args[0] not in ("x", "r")
            or node.args[1] in (*trace.gates_x, *trace.gates_h, *d.given)
        )
    }
    for_backward = {n: text for n, text in inputs.items() if n.args[0] not in ("x", "r")}
    distinct = gradients.distinct
    reads = set(tape.states) | ({trace.recurrent} if trace.reads_h else set())

    def bits(chosen: Container[str]) -> str:
        found = "".join(str(int(name in chosen)) for name in reversed(states))
        return f"0b{found}" if int(found) else "0"

    counts = {
        "kX": len(trace.gates_x),
        "kH": len(trace.gates_h),
        "kStates": len(states),
        "kSaved": len(tape.saved),
        "kD": len(distinct),
        "kParams": len(d.params),
        "kGiven": len(d.given),
        "kOperands": len(trace.operands),
    }
    facts = [
        "int "
        + ", ".join(f"{name} = {n}" for name, n in counts.items() if n or name not in _BY_DEFAULT)
    ]
    if trace.operands:
        facts.append(f"int kHOf[kOperands + 1] = {_list(trace.products)}")
    all_x = "kX" + " + kGiven" * bool(d.given)
    ends = "kStates" + " + kOperands" * bool(trace.operands)
    places = f"int kDx[{all_x}] = {_list(map(distinct.index, gradients.gates_x))}"
    if trace.gates_h:
        places += f", kDh[kH] = {_list(map(distinct.index, gradients.gates_h))}"
    facts += [places, f"int kReads = {bits(reads)}"]
    if trace.recurrent != states[0]:
        facts.append(f"int kRecurrent = {states.index(trace.recurrent)}")
    if d.output != states[0]:
        facts.append(f"int kOutput = {states.index(d.output)}")
    if tape.reads_new_h:
        facts.append("bool kReadsNewH = true")
    if d.params:
        names = _list(f'"{name}"' for name in d.params)
        facts.append(f"const char* kParamNames[kParams] = {names}")
    if affine:
        facts.append(f"int kAffine = {bits(affine.states)}")
    declared = "\n".join(_filled(f"static constexpr {fact};", "  ", " " * 6) for fact in facts)
    forward = _forward(trace, tape, inputs)
    backward = _backward(trace, gradients, tape, for_backward, forward)
    forward_text = _function(
        "forward",
        [
            (f"const Pack<V, {all_x}>& ", "x"),
            ("const Pack<V, kH>& ", "h"),
            ("const Pack<V, kStates>& ", "s"),
            ("const Pack<V, kParams>& ", "p"),
            ("Pack<V, kStates>& ", "s_new"),
            ("Pack<V, kSaved>& ", "saved"),
        ],
        forward.lines,
    )
    backward_text = _function(
        "backward",
        [
            ("const Pack<V, kSaved>& ", "saved"),
            ("const Pack<V, kStates>& ", "s"),
            ("V ", "h_new"),
            ("const Pack<V, kParams>& ", "p"),
            (f"const Pack<V, {ends}>& ", "ds_new"),
            ("Pack<V, kD>& ", "d"),
            ("Pack<V, kStates>& ", "ds"),
            ("Pack<V, kParams>& ", "dp"),
        ],
        backward.lines,
    )
    functions = [forward_text, backward_text]
    if affine:
        n = len(affine.states)
        arguments = [
            (f"const Pack<V, {all_x}>& ", "x"),
            ("const Pack<V, kParams>& ", "p"),
            (f"Pack<V, {n * n}>& ", "by"),
            (f"Pack<V, {n}>& ", "plus"),
        ]
        functions.append(_function("affine", arguments, _affine(trace, affine, inputs).lines))
    name = type_name(d.name)
    described = [f"// {name}, written by fused_rnn/compiler. Gates: {', '.join(d.gates)}."]
    described += [f"// States: {', '.join(f's[{i}] = {state}' for i, state in enumerate(states))}."]
    if d.given:
        described += [f"// Given for each step: {', '.join(d.given)}."]
    return f"""\
{chr(10).join(described)}
#pragma once
#include "core/cell.h"

namespace frnn {{
namespace custom {{

struct {name} : CellDefaults {{
{declared}

{chr(10).join(functions)}
}};

}}  // namespace custom
}}  // namespace frnn
"""
