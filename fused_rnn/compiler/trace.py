"""The user's function on symbols: what it computes of gates, states and parameters.

A symbol stands for one number per unit. Torch hands its functions over by ``__torch_function__``;
each has a rule here that says what it is in the operations of the graph.
"""

from __future__ import annotations

import inspect
import math
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .errors import CellError, refuse
from .graph import COMPARISONS, Graph, Node, reachable

_graph = Graph()  # of the trace under way
_one_at_a_time = threading.RLock()


# --- What is declared, and what comes of it ---------------------------------------------------


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


# --- Symbols ----------------------------------------------------------------------------------


class Symbol:
    """A value that is known when the cell runs."""

    def __init__(self, node: Node) -> None:
        self.node = node

    @classmethod
    def __torch_function__(
        cls,
        func: Any,
        types: Any,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        name = getattr(func, "__name__", str(func))
        return _apply(_FUNCTIONS.get(func), name, args, kwargs or {})

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # what Python asks of any object
            raise AttributeError(name)
        if name not in _METHODS and not callable(getattr(Tensor, name, None)) or name in _SHAPES:
            raise refuse(
                f".{name}: a gate, state or parameter stands for one number per unit; it has no "
                "shape, and the type of the layer"
            )
        return lambda *args, **kwargs: _apply(_METHODS.get(name), name, (self, *args), kwargs)

    def __bool__(self) -> bool:
        raise refuse(
            "the value is not known when the cell is compiled: use torch.where, and & | ~ for "
            "and, or, not"
        )

    def __float__(self) -> float:
        raise refuse(
            "the value is not known when the cell is compiled: use torch.exp and the like, not "
            "math.exp, float() or .item()"
        )

    def _no_elements(self, *_: Any) -> Any:
        raise refuse(
            "a gate, state or parameter stands for one number per unit: it has no elements"
        )

    __int__ = __index__ = __complex__ = __float__
    __iter__ = __len__ = __getitem__ = __contains__ = _no_elements
    __hash__ = object.__hash__


def _apply(rule: Any, name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Symbol:
    if rule is None:
        raise refuse(_complaint(name))
    if kwargs.get("inplace") or kwargs.get("out") is not None:
        raise refuse(_complaint(f"{name}_"))
    given = {key: value for key, value in kwargs.items() if key not in ("inplace", "out")}
    found = [_unwrapped(value) for value in args]
    named = {key: _unwrapped(value) for key, value in given.items()}
    try:
        inspect.signature(rule).bind(*found, **named)
    except TypeError:
        raise refuse(f"{name}: these arguments are not for a cell, which is elementwise") from None
    return Symbol(rule(*found, **named))


def _unwrapped(value: Any) -> Any:
    """A node, a number, or what a rule takes beside them."""
    if isinstance(value, Symbol):
        return value.node
    if isinstance(value, Tensor):
        raise refuse(
            "a tensor from outside of the cell: make it one of params, or a number by .item()"
        )
    return value


_MIXING = set(
    """sum mean prod var std norm softmax log_softmax softmin logsumexp cumsum cumprod layer_norm
    group_norm batch_norm instance_norm rms_norm normalize argmax argmin amax amin any all max min
    median sort topk flip roll cat stack einsum""".split()
)
_PRODUCTS = set("matmul mm bmm mv dot linear bilinear addmm __matmul__ __rmatmul__".split())
_RANDOM = set(
    """rand_like randn_like randint_like dropout alpha_dropout feature_dropout bernoulli normal
    multinomial rrelu poisson empty_like""".split()
)
_SHAPES = set(
    """shape size dim ndim numel view reshape expand expand_as unsqueeze squeeze transpose t T
    permute flatten chunk split repeat to type dtype device double half bfloat16 type_as view_as
    reshape_as contiguous data grad cpu cuda""".split()
)


def _complaint(name: str) -> str:
    """Why there is no rule for a function."""
    plain = name.strip("_")
    if name in _PRODUCTS:
        return f"{plain}: products with matrices are the layer's: make it a gate"
    if name in _MIXING:
        return f"{name} mixes units; a cell is elementwise"
    if name in _RANDOM:
        return (
            f"{name}: randomness would differ between forward and backward: draw it outside of the "
            "cell"
        )
    if name in _SHAPES:
        return f"{name}: a gate, state or parameter stands for one number per unit; it has no shape"
    if name == "item":
        return (
            "item: the value is not known when the cell is compiled: use torch.exp and the like, "
            "not math.exp, float() or .item()"
        )
    if name.endswith("_") and not name.startswith("__"):
        return (
            f"{plain} in place changes the caller's tensor where the function itself runs: write "
            f"c = {plain}(c)"
        )
    return f"{plain} is not among the elementwise functions that a cell may use"


# --- Rules: functions of torch in the operations of the graph -----------------------------------


def _make(op: str, *args: Any) -> Node:
    for value in args:
        if not isinstance(value, (Node, int, float)):
            raise refuse(f"{type(value).__name__} in the arithmetic of a cell: use a number")
    return _graph.make(op, *args)


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
        return _make("add", input, 0) if n else _graph.const(1)
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
    return lambda input: _graph.const(value)


def _full_like(input: Any, fill_value: float) -> Node:
    return _make("add", fill_value, 0)


def _float(input: Any) -> Node:
    """Of a condition 1 or 0."""
    if not input.is_condition:
        raise refuse("float: a cell is computed in the type of its layer")
    return _graph.number(input)


def _logic(op: str) -> Callable[..., Node]:
    def rule(input: Any, other: Any = None) -> Node:
        operands = [input] if op == "not" else [input, other]
        if not all(isinstance(a, Node) and a.is_condition for a in operands):
            raise refuse(f"{op} is of comparisons, such as x.i > 0")
        return _graph.make(op, *operands)

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
_FUNCTIONS: dict[Any, Callable[..., Node]] = {
    **{getattr(F, name): rule for name, rule in _FUNCTIONAL.items()},
    **{getattr(torch.special, name): rule for name, rule in _SPECIAL.items()},
    **{getattr(torch, name): rule for name, rule in _RULES.items() if hasattr(torch, name)},
    **{getattr(Tensor, name): rule for name, rule in _RULES.items() if hasattr(Tensor, name)},
    Tensor.where: _method_where,
}
_METHODS = {
    **{name: rule for name, rule in _RULES.items() if hasattr(Tensor, name)},
    "where": _method_where,
    "float": _float,
}


def _operators() -> dict[str, Callable[..., Node]]:
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


def _enter(name: str, rule: Callable[..., Node] | None) -> None:
    def method(self: Symbol, *args: Any) -> Any:
        return _apply(rule, name, (self, *args), {})

    setattr(Symbol, name, method)


def _enter_in_place(name: str) -> None:
    def method(self: Symbol, other: Any) -> Any:
        raise refuse(
            "in place, the caller's tensor changes where the function itself runs: write "
            "c = c + ... in place of c += ..."
        )

    setattr(Symbol, f"__i{name}__", method)


for _name, _rule in _operators().items():
    _enter(_name, _rule)
    if getattr(Tensor, _name, None) not in (None, *_FUNCTIONS):
        _FUNCTIONS[getattr(Tensor, _name)] = _rule  # of a tensor and a symbol
for _name in ("__matmul__", "__rmatmul__", "__floordiv__", "__rfloordiv__", "__mod__", "__rmod__"):
    _enter(_name, None)
for _name in ("add", "sub", "mul", "truediv", "pow", "and", "or", "matmul"):
    _enter_in_place(_name)


# --- The arguments of a cell --------------------------------------------------------------------


class _Names:
    """``x.i`` is the symbol of i, which is noted as used."""

    _kind: str
    _names: Sequence[str]
    _symbol: Callable[[str], Symbol]

    def __init__(self, kind: str, names: Sequence[str], symbol: Callable[[str], Symbol]) -> None:
        own = {"_kind": kind, "_names": tuple(names), "_symbol": symbol}
        self.__dict__.update(own)

    def __getattr__(self, name: str) -> Symbol:
        if name.startswith("__"):  # what Python asks of any object
            raise AttributeError(name)
        if name not in self._names:
            known = (
                f"{self._kind}s are {', '.join(self._names)}" if self._names else "there is none"
            )
            raise refuse(f"no {self._kind} {name}; {known}")
        return self._symbol(name)

    def __setattr__(self, name: str, value: Any) -> None:
        raise refuse(f"{name} cannot be assigned: give the new value its own name, and return it")


class _Recurrent(_Names):
    """``r.i`` is short for ``r(s.h).i``."""

    _product: Callable[[str, Any], Symbol]

    def __init__(self, names: Sequence[str], product: Callable[[str, Any], Symbol]) -> None:
        super().__init__("gate", names, lambda name: product(name, None))
        self.__dict__["_product"] = product

    def __call__(self, operand: Any) -> _Names:
        return _Names("gate", self._names, lambda name: self._product(name, operand))


# --- The trace ----------------------------------------------------------------------------------


def trace(
    fn: Callable[..., Any], declaration: Declaration, hyperparameters: Mapping[str, Any]
) -> Trace:
    """Run the function on symbols. Raises CellError."""
    with _one_at_a_time:
        return _trace(fn, declaration, hyperparameters)


def _trace(
    fn: Callable[..., Any], declaration: Declaration, hyperparameters: Mapping[str, Any]
) -> Trace:
    global _graph
    d, outer = declaration, _graph
    _graph = graph = Graph()
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
        _Names("gate", (*d.gates, *d.given), lambda name: symbol("x", name)),
        _Recurrent(d.gates, product),
        _Names("state", d.states, lambda name: symbol("s", name)),
        _Names("parameter", d.params, lambda name: symbol("p", name)),
    )
    names: dict[str, Symbol] = {}
    try:
        with _locals_of(fn, names) as line:
            returned = fn(*arguments, **hyperparameters)
        new = _new_states(returned, d, f"{fn.__code__.co_filename}:{line[0]}")
    finally:
        _graph = outer
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


def _new_states(returned: Any, d: Declaration, where: str) -> dict[str, Node]:
    states = ", ".join(d.states)
    if not isinstance(returned, Mapping):
        raise CellError(
            f"{where}: returned {type(returned).__name__}; expected a dict of the new states "
            f"{states}"
        )
    missing = [name for name in d.states if name not in returned]
    extra = [name for name in returned if name not in d.states]
    if missing or extra:
        said = [f"missing: {', '.join(missing)}"] * bool(missing)
        said += [f"no state: {', '.join(map(str, extra))}"] * bool(extra)
        raise CellError(
            f"{where}: returned {', '.join(map(str, returned)) or 'nothing'}; states are {states} "
            f"({'; '.join(said)})"
        )
    new = {}
    for name in d.states:
        value = returned[name]
        if not isinstance(value, (Symbol, int, float)):
            raise CellError(f"{where}: state {name}: expected a value, got {type(value).__name__}")
        new[name] = _graph.make("add", value.node if isinstance(value, Symbol) else value, 0)
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
