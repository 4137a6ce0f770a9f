"""What functions of torch are in operations of the graph: a rule takes nodes and numbers, and makes
a node."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .errors import refuse
from .graph import COMPARISONS, Graph, Node

_graph: ContextVar[Graph | None] = ContextVar("_graph", default=None)


@contextmanager
def made_in(graph: Graph) -> Iterator[None]:
    """Have rules make their nodes in this graph."""
    token = _graph.set(graph)
    try:
        yield
    finally:
        _graph.reset(token)


def _here() -> Graph:
    graph = _graph.get()
    if graph is None:
        raise refuse("a gate, state or parameter has no value outside of the function of its cell")
    return graph


def _make(op: str, *args: Any) -> Node:
    for value in args:
        if not isinstance(value, (Node, int, float)):
            raise refuse(f"{type(value).__name__} in the arithmetic of a cell: use a number")
    return _here().make(op, *args)


def _operation(op: str, operands: int) -> Callable[..., Node]:
    if operands == 1:
        return lambda input: _make(op, input)
    return lambda input, other: _make(op, input, other)


def _add(input: Any, other: Any, *, alpha: float = 1) -> Node:
    return _make("add", input, _make("mul", other, alpha) if alpha != 1 else other)


def _sub(input: Any, other: Any, *, alpha: float = 1) -> Node:
    return _make("sub", input, _make("mul", other, alpha) if alpha != 1 else other)


def _rsub(input: Any, other: Any) -> Node:
    return _make("sub", other, input)


def _where(condition: Any, input: Any, other: Any) -> Node:
    if not isinstance(condition, Node) or not condition.is_condition:
        raise refuse("torch.where: expected a comparison, such as x.i > 0, as the condition")
    return _make("where", condition, input, other)


def _method_where(input: Any, condition: Any, other: Any) -> Node:
    return _where(condition, input, other)


def _clamp(input: Any, min: Any = None, max: Any = None) -> Node:
    if min is not None:
        input = _make("where", _make("lt", input, min), min, input)
    if max is not None:
        input = _make("where", _make("gt", input, max), max, input)
    return input


def _pow(input: Any, exponent: Any) -> Node:
    n = exponent.value if isinstance(exponent, Node) else exponent
    if not isinstance(n, (int, float)):
        raise refuse("powers need a constant exponent: torch.exp(b * torch.log(a)) is a to the b")
    n = float(n)
    if n == 0.5:
        return _make("sqrt", input)
    if not n.is_integer() or abs(n) > 64:
        return _make("exp", _make("mul", n, _make("log", input)))
    if n < 0:
        return _make("div", 1, _pow(input, -n))
    if n <= 1:
        return _make("add", input, 0) if n else _here().const(1)
    half = _pow(input, n // 2)
    square = _make("mul", half, half)
    return _make("mul", square, input) if n % 2 else square


def _rpow(input: Any, base: Any) -> Node:
    if isinstance(base, (int, float)) and base > 0:
        return _make("exp", _make("mul", math.log(base), input))
    return _pow(base, input)


def _rsqrt(input: Any) -> Node:
    return _make("div", 1, _make("sqrt", input))


def _logaddexp(input: Any, other: Any) -> Node:
    apart = _make("neg", _make("abs", _make("sub", input, other)))
    return _make("add", _make("maximum", input, other), _make("softplus", apart))


def _softplus(input: Any, beta: float = 1, threshold: float = 20) -> Node:
    scaled = _make("mul", input, beta)
    soft = _make("div", _make("softplus", scaled), beta)
    return _make("where", _make("gt", scaled, threshold), input, soft)


def _logsigmoid(input: Any) -> Node:
    return _make("neg", _make("softplus", _make("neg", input)))


def _leaky_relu(input: Any, negative_slope: float = 0.01) -> Node:
    return _make("where", _make("gt", input, 0), input, _make("mul", input, negative_slope))


def _elu(input: Any, alpha: float = 1.0, scale: float = 1.0, input_scale: float = 1.0) -> Node:
    below = _make("mul", _make("expm1", _make("mul", input, input_scale)), alpha * scale)
    return _make("where", _make("gt", input, 0), _make("mul", input, scale), below)


def _selu(input: Any) -> Node:
    return _elu(input, 1.6732632423543772848170429916717, 1.0507009873554804934193349852946)


def _silu(input: Any) -> Node:
    return _make("mul", input, _make("sigmoid", input))


def _mish(input: Any) -> Node:
    return _make("mul", input, _make("tanh", _softplus(input)))


def _gelu(input: Any, approximate: str = "none") -> Node:
    half = _make("mul", input, 0.5)
    if approximate == "none":
        return _make("mul", half, _make("add", _make("erf", _make("mul", input, 0.5**0.5)), 1))
    cube = _make("mul", _make("mul", _make("mul", input, input), input), 0.044715)
    inner = _make("mul", _make("add", input, cube), (2 / math.pi) ** 0.5)
    return _make("mul", half, _make("add", _make("tanh", inner), 1))


def _hardtanh(input: Any, min_val: float = -1.0, max_val: float = 1.0) -> Node:
    below = _make("where", _make("ge", input, max_val), max_val, input)
    return _make("where", _make("le", input, min_val), min_val, below)


def _hardsigmoid(input: Any) -> Node:
    inside = _make("add", _make("mul", input, 1 / 6), 0.5)
    below = _make("where", _make("ge", input, 3), 1, inside)
    return _make("where", _make("le", input, -3), 0, below)


def _softsign(input: Any) -> Node:
    return _make("div", input, _make("add", _make("abs", input), 1))


def _lerp(input: Any, end: Any, weight: Any) -> Node:
    return _make("add", input, _make("mul", weight, _make("sub", end, input)))


def _addcmul(input: Any, tensor1: Any, tensor2: Any, *, value: float = 1) -> Node:
    return _make("add", input, _make("mul", _make("mul", tensor1, value), tensor2))


def _addcdiv(input: Any, tensor1: Any, tensor2: Any, *, value: float = 1) -> Node:
    return _make("add", input, _make("div", _make("mul", tensor1, value), tensor2))


def _square(input: Any) -> Node:
    return _make("mul", input, input)


def _reciprocal(input: Any) -> Node:
    return _make("div", 1, input)


def _filled(value: float) -> Callable[[Any], Node]:
    return lambda input: _here().const(value)


def _full_like(input: Any, fill_value: float) -> Node:
    return _make("add", fill_value, 0)


def _float(input: Any) -> Node:
    """Of a condition 1 or 0."""
    if not input.is_condition:
        raise refuse("float: a cell is computed in the type of its layer")
    return _here().number(input)


def _logic(op: str) -> Callable[..., Node]:
    def rule(input: Any, other: Any = None) -> Node:
        operands = [input] if op == "not" else [input, other]
        if not all(isinstance(a, Node) and a.is_condition for a in operands):
            raise refuse(f"{op} is of comparisons, such as x.i > 0")
        return _here().make(op, *operands)

    return rule


_UNARY = "exp expm1 log log1p sqrt sin cos erf abs sign neg sigmoid tanh relu".split()
_RULES: dict[str, Callable[..., Node]] = {
    **{op: _operation(op, 1) for op in _UNARY},
    **{op: _operation(op, 2) for op in ("mul", "div", "maximum", "minimum", *sorted(COMPARISONS))},
    **{"add": _add, "sub": _sub, "rsub": _rsub, "where": _where, "clamp": _clamp, "pow": _pow},
    **{"rsqrt": _rsqrt, "square": _square, "reciprocal": _reciprocal, "lerp": _lerp},
    **{"addcmul": _addcmul, "addcdiv": _addcdiv, "logaddexp": _logaddexp},
    **{"zeros_like": _filled(0), "ones_like": _filled(1), "full_like": _full_like},
    **{"logical_and": _logic("and"), "logical_or": _logic("or"), "logical_not": _logic("not")},
    **{"clamp_min": lambda input, min: _clamp(input, min)},
    **{"clamp_max": lambda input, max: _clamp(input, None, max)},
    **{"max": lambda input, other: _make("maximum", input, other)},
    **{"min": lambda input, other: _make("minimum", input, other)},
}
_ALIASES = {
    "negative": "neg",
    "absolute": "abs",
    "multiply": "mul",
    "divide": "div",
    "true_divide": "div",
    "subtract": "sub",
    "clip": "clamp",
    "greater": "gt",
    "greater_equal": "ge",
    "less": "lt",
    "less_equal": "le",
    "not_equal": "ne",
    "bitwise_and": "logical_and",
    "bitwise_or": "logical_or",
    "bitwise_not": "logical_not",
}
_RULES |= {alias: _RULES[name] for alias, name in _ALIASES.items()}
_FUNCTIONAL: dict[str, Callable[..., Node]] = {
    **{op: _RULES[op] for op in ("sigmoid", "tanh", "relu")},
    **{"softplus": _softplus, "logsigmoid": _logsigmoid, "leaky_relu": _leaky_relu, "elu": _elu},
    **{"selu": _selu, "silu": _silu, "mish": _mish, "gelu": _gelu, "softsign": _softsign},
    **{"hardtanh": _hardtanh, "hardsigmoid": _hardsigmoid},
    **{"relu6": lambda input: _hardtanh(input, 0.0, 6.0)},
}
_SPECIAL = {
    **{op: _RULES[op] for op in ("expm1", "log1p", "erf")},
    "expit": _RULES["sigmoid"],
}
FUNCTIONS: dict[Any, Callable[..., Node]] = {
    **{getattr(F, name): rule for name, rule in _FUNCTIONAL.items()},
    **{getattr(torch.special, name): rule for name, rule in _SPECIAL.items()},
    **{getattr(torch, name): rule for name, rule in _RULES.items() if hasattr(torch, name)},
    **{getattr(Tensor, name): rule for name, rule in _RULES.items() if hasattr(Tensor, name)},
    Tensor.where: _method_where,
}
METHODS = {
    **{name: rule for name, rule in _RULES.items() if hasattr(Tensor, name)},
    "where": _method_where,
    "float": _float,
}


def _operator_rules() -> dict[str, Callable[..., Node]]:
    binary = {"add": "add", "sub": "sub", "mul": "mul", "truediv": "div"}
    found = {f"__{name}__": _RULES[rule] for name, rule in binary.items()}
    for name, rule in binary.items():
        found[f"__r{name}__"] = lambda a, b, rule=_RULES[rule]: rule(b, a)
    for op in COMPARISONS:
        found[f"__{op}__"] = _RULES[op]
    for name in ("and", "or"):
        found[f"__{name}__"] = found[f"__r{name}__"] = _RULES[f"logical_{name}"]
    found |= {"__neg__": _RULES["neg"], "__abs__": _RULES["abs"], "__pow__": _pow}
    return found | {"__rpow__": _rpow, "__invert__": _RULES["logical_not"]}


OPERATORS = _operator_rules()

# Torch hands these over where a tensor meets a symbol.
for _name, _rule in OPERATORS.items():
    if getattr(Tensor, _name, None) not in (None, *FUNCTIONS):
        FUNCTIONS[getattr(Tensor, _name)] = _rule
