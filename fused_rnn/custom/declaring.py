"""``fused_rnn.cell``: from a function to a class of layers, and that of a single step."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ..cells import CustomLayer
from ..compiler import CellError, Declaration
from ..recurrent import PairLayers, Recurrent
from ..reference import CELLS
from .family import MOST_PARAMS, Family, Initialiser
from .layers import GivenLayer, Layer, StatesLayer
from .single import SingleStep

_ARGUMENTS = tuple(inspect.signature(Recurrent.forward).parameters)  # of the call of any layer


def cell(
    *,
    gates: Sequence[str],
    states: Sequence[str] = ("h",),
    params: Sequence[str] | Mapping[str, Initialiser] = (),
    output: str | None = None,
    given: Sequence[str] = (),
) -> Callable[[Callable[..., Mapping[str, Any]]], type[Layer]]:
    """Make a layer of a function ``step(x, r, s, p, **hyperparameters)`` of one unit.

    Args:
        gates: names of the gates. ``x.i`` is the row of W_ih x + b_ih for gate i, ``r.i`` that of
            W_hh h + b_hh. Both have only those gates that the function asks for.
        states: names of what the function reads as ``s.h`` and returns, a dict of all of them. The
            first is h, which W_hh multiplies; ``r(s.c).i`` says that it is another, or any value
            that is known by then, as in ``r(reset * s.h).n``.
        params: names of trained numbers, one per unit, read as ``p.tau``. A dict gives for each how
            it begins: a number, a function of ``torch.nn.init``, or None for the usual draw.
        output: the state that is the layer's output; the first by default.
        given: names of values that the caller gives for each step, one per unit, read as
            ``x.decay`` like a gate that has an input part: ``layer(x, decay=decay)`` with [T, B, H]
            in the layout of x. All layers and directions get the same.

    Keyword arguments of the function with a default are hyperparameters: arguments of the layer,
    constants to its kernels.

    Returns:
        A class like ``fused_rnn.LSTM``, with the name and the docstring of the function; its
        ``Cell`` is the module of a single step, ``source()`` the header that is compiled, and
        ``explain()`` says what it comes to. ``hx`` is a tensor, or a tuple in the order of
        ``states``; shapes are those of ``LSTM``.

    Raises:
        CellError: the function cannot be compiled; the message says where and why.

    Examples:
        >>> @fused_rnn.cell(gates=("f", "g"))
        ... def Minimal(x, r, s, p):
        ...     f = torch.sigmoid(x.f + r.f)
        ...     return dict(h=f * s.h + (1 - f) * torch.tanh(x.g + r.g))
        >>> y, h_n = Minimal(10, 20, num_layers=2)(torch.randn(5, 3, 10))
    """
    named: dict[str, Initialiser] = (
        dict(params) if isinstance(params, Mapping) else dict.fromkeys(params)
    )

    def decorate(fn: Callable[..., Mapping[str, Any]]) -> type[Layer]:
        if not inspect.isfunction(fn):
            raise CellError(f"a cell is a plain function, got {type(fn).__name__}")
        declaration = Declaration(
            fn.__name__,
            tuple(gates),
            tuple(states),
            tuple(named),
            output or (*states, "")[0],
            tuple(given),
        )
        _check(fn, declaration)
        family = Family(fn, declaration, named)
        name = family.register({})
        one = len(states) == 1
        pair = len(states) == 2 and CELLS[name].states == declaration.states
        bases = (Layer,) if one else (Layer, PairLayers) if pair else (StatesLayer,)
        bases = (GivenLayer, *bases) if given else bases
        own = {
            "__module__": fn.__module__,
            "__qualname__": fn.__qualname__,
            "__doc__": fn.__doc__ or f"A layer of the cell {fn.__name__}, see ``fused_rnn.cell``.",
            "__signature__": family.signature(CustomLayer.__init__),
            "cell": name,
            "_family": family,
            "_operator": fn.__name__,
        }
        layer: type[Layer] = type(fn.__name__, bases, own)
        own = {key: value for key, value in own.items() if key != "_operator"}
        own["__qualname__"] = f"{fn.__qualname__}.Cell"
        own["__signature__"] = family.signature(SingleStep.__init__)
        layer.Cell = type("Cell", (SingleStep,), own)
        return layer

    return decorate


def _check(fn: Callable[..., Any], d: Declaration) -> None:
    where = f"{fn.__code__.co_filename}:{fn.__code__.co_firstlineno}: "
    kinds = {"gates": d.gates, "states": d.states, "params": d.params, "given": d.given}
    for kind, names in kinds.items():
        for name in names:
            if not isinstance(name, str) or not name.isidentifier() or not name.isascii():
                raise CellError(f"{where}{kind}: expected names, got {name!r}")
        if len(set(names)) < len(names):
            raise CellError(f"{where}{kind}: expected different names, got {', '.join(names)}")
    if not d.gates or not d.states:
        raise CellError(f"{where}a cell has gates and states, got {d.gates} and {d.states}")
    if d.output not in d.states:
        raise CellError(
            f"{where}output: expected one of the states {', '.join(d.states)}, got {d.output!r}"
        )
    for name in d.given:
        if name in d.gates or name in _ARGUMENTS:
            raise CellError(
                f"{where}given: expected names that no gate has and no argument of the call, got "
                f"{name!r}"
            )
    for kind in ("params", "given"):
        if (count := len(kinds[kind])) > MOST_PARAMS:
            raise CellError(f"{where}{kind}: expected at most {MOST_PARAMS}, got {count}")
