"""What the user's function is called with: symbols, each for one number per unit.

Torch hands its functions over by ``__torch_function__``, Python its operators by their methods.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from .errors import refuse
from .graph import Node
from .rules import FUNCTIONS, METHODS, OPERATORS


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
        return _apply(FUNCTIONS.get(func), name, args, kwargs or {})

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # what Python asks of any object
            raise AttributeError(name)
        if name not in METHODS and not callable(getattr(Tensor, name, None)) or name in _SHAPES:
            raise refuse(
                f".{name}: a gate, state or parameter stands for one number per unit; it has no "
                "shape, and the type of the layer"
            )
        return lambda *args, **kwargs: _apply(METHODS.get(name), name, (self, *args), kwargs)

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


for _name, _rule in OPERATORS.items():
    _enter(_name, _rule)
for _name in ("__matmul__", "__rmatmul__", "__floordiv__", "__rfloordiv__", "__mod__", "__rmod__"):
    _enter(_name, None)
for _name in ("add", "sub", "mul", "truediv", "pow", "and", "or", "matmul"):
    _enter_in_place(_name)


class Names:
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


class Recurrent(Names):
    """``r.i`` is short for ``r(s.h).i``."""

    _product: Callable[[str, Any], Symbol]

    def __init__(self, names: Sequence[str], product: Callable[[str, Any], Symbol]) -> None:
        super().__init__("gate", names, lambda name: product(name, None))
        self.__dict__["_product"] = product

    def __call__(self, operand: Any) -> Names:
        return Names("gate", self._names, lambda name: self._product(name, operand))
