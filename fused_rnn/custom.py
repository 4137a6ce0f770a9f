"""``fused_rnn.cell``: a recurrent cell from a function of ten lines, as a layer like torch.nn's.

The function says what one unit does in one step, in elementwise functions of torch. It runs as it
is on the reference path, and is compiled for the kernels (``compiler``), with its backward, when a
layer of it first needs them. ``docs/cells.md`` says how to write one.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from . import functional
from .between import Options
from .cells import CustomLayer
from .compiler import CellError, Compiled, Declaration, trace
from .recurrent import PairLayers, Recurrent
from .reference import CELLS, Cell, Step, present_bits
from .stack import parameter_shapes
from .torch_internals import is_any_autocast_enabled

if TYPE_CHECKING:
    from .call_types import Call

__all__ = ["CellError", "cell"]

_OPTIONS = tuple(Options.__annotations__)  # arguments of all layers that are no hyperparameters
MOST_GATES, MOST_PARAMS = 16, 16  # of csrc/core/params.h
_ARGUMENTS = tuple(inspect.signature(Recurrent.forward).parameters)  # of the call of any layer

Initialiser = Callable[[Tensor], Any] | float | None


def cell(
    *,
    gates: Sequence[str],
    states: Sequence[str] = ("h",),
    params: Sequence[str] | Mapping[str, Initialiser] = (),
    output: str | None = None,
    given: Sequence[str] = (),
) -> Callable[[Callable[..., Mapping[str, Any]]], type[_Layer]]:
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

    def decorate(fn: Callable[..., Mapping[str, Any]]) -> type[_Layer]:
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
        made = _Made(fn, declaration, named)
        name = made.register({})
        one = len(states) == 1
        pair = len(states) == 2 and CELLS[name].states == declaration.states
        bases = (_Layer,) if one else (_Layer, PairLayers) if pair else (_StatesLayer,)
        bases = (_GivenLayer, *bases) if given else bases
        own = {
            "__module__": fn.__module__,
            "__qualname__": fn.__qualname__,
            "__doc__": fn.__doc__ or f"A layer of the cell {fn.__name__}, see ``fused_rnn.cell``.",
            "__signature__": made.signature(CustomLayer.__init__),
            "cell": name,
            "_made": made,
            "_operator": fn.__name__,
        }
        layer: type[_Layer] = type(fn.__name__, bases, own)
        own = {key: value for key, value in own.items() if key != "_operator"}
        own["__qualname__"] = f"{fn.__qualname__}.Cell"
        own["__signature__"] = made.signature(_Single.__init__)
        layer.Cell = type("Cell", (_Single,), own)
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


class _Values:
    """``x.i`` of tensors."""

    def __init__(self, names: Sequence[str], values: Sequence[Tensor]) -> None:
        for name, value in zip(names, values, strict=True):
            setattr(self, name, value)


class _Products:
    """``r.i``, or ``r(operand).i`` of tensors.

    ``of_state`` are the gates of the product that is made already; which state it is of is known
    from the trace. ``others`` make one of an operand.
    """

    def __init__(
        self,
        of_state: Mapping[str, Tensor],
        others: Mapping[str, Callable[[Tensor], Tensor]],
        operand: Any,
    ) -> None:
        self._of_state, self._others, self._operand = of_state, others, operand

    def __call__(self, operand: Any) -> _Products:
        return _Products(self._of_state, self._others, operand)

    def __getattr__(self, gate: str) -> Tensor:
        made = self._of_state.get(gate)
        return self._others[gate](self._operand) if made is None else made


def _shape_text(shape: tuple[Any, ...]) -> str:
    return f"[{', '.join(map(str, shape))}]"


class _Made:
    """What the layers of a function share."""

    def __init__(
        self,
        fn: Callable[..., Mapping[str, Any]],
        declaration: Declaration,
        initialisers: Mapping[str, Initialiser],
    ) -> None:
        self.fn, self.declaration, self.initialisers = fn, declaration, initialisers
        self.where = f"{fn.__code__.co_filename}:{fn.__code__.co_firstlineno}: "
        first, *rest = self._arguments()
        self.defaults = {p.name: p.default for p in rest}
        self._names: dict[tuple[Any, ...], str] = {}
        self.recurrent = ""

    def _arguments(self) -> list[inspect.Parameter]:
        """x and, behind x, r, s and p, the hyperparameters."""
        found = list(inspect.signature(self.fn).parameters.values())
        variadic = [p for p in found if p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
        missing = [p.name for p in found[4:] if p.default is p.empty]
        if len(found) < 4 or variadic or missing:
            raise CellError(
                f"{self.where}expected the arguments x, r, s, p and hyperparameters with defaults, "
                f"got {inspect.signature(self.fn)}"
            )
        return [found[0], *found[4:]]

    def signature(self, init: Callable[..., Any]) -> inspect.Signature:
        """Of the constructor, with the hyperparameters."""
        own = [p for p in list(inspect.signature(init).parameters.values())[1:]]
        own = [p for p in own if p.kind is not p.VAR_KEYWORD]
        more = [p.replace(kind=p.KEYWORD_ONLY) for p in self._arguments()[1:]]
        return inspect.Signature([*own, *more])

    def full(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """All hyperparameters."""
        for name in given:
            if name in _OPTIONS or name not in self.defaults:
                known = ", ".join(self.defaults) or "none"
                raise TypeError(
                    f"{self.declaration.name}: unexpected keyword argument {name!r}; "
                    f"hyperparameters are {known}"
                )
        return {**self.defaults, **given}

    def together(
        self, owner: str, given: Mapping[str, Any], rows: Tensor, shape: tuple[Any, ...]
    ) -> Tensor | None:
        """The values of a call for each step, side by side, after checks against its input."""
        names = self.declaration.given
        for name in given:
            if name not in names:
                known = ", ".join(names) or "nothing"
                raise TypeError(
                    f"{owner}: got an unexpected keyword argument {name!r}; given for each step is "
                    f"{known}"
                )
        values: list[Any] = [
            v.data if isinstance(v, PackedSequence) else v for v in map(given.get, names)
        ]
        for name, value in zip(names, values, strict=True):
            if not isinstance(value, Tensor):
                raise TypeError(
                    f"{owner}: {name}: expected a tensor {_shape_text(shape)}, which this cell is "
                    f"given for each step, got {type(value).__name__}"
                )
            if value.shape != shape:
                raise ValueError(
                    f"{owner}: {name}: expected {_shape_text(shape)}, got {list(value.shape)}"
                )
            if value.device != rows.device:
                raise ValueError(
                    f"{owner}: {name}: expected it on {rows.device}, as the input is, got "
                    f"{value.device}"
                )
            if value.dtype != rows.dtype and not is_any_autocast_enabled():
                raise ValueError(
                    f"{owner}: {name}: expected {rows.dtype}, as the input is, got {value.dtype}"
                )
        return torch.cat(values, -1) if len(values) > 1 else values[0] if values else None

    def register(self, given: Mapping[str, Any]) -> str:
        """The name that the cell with these hyperparameters has in ``CELLS``."""
        values = self.full(given)
        key = tuple(repr(value) for value in values.values())
        if key not in self._names:
            compiled = Compiled(trace(self.fn, self.declaration, values))
            self._check_counts(compiled)
            self.recurrent = self.recurrent or compiled.trace.recurrent
            if compiled.trace.recurrent != self.recurrent:  # hx would have another form
                raise CellError(
                    f"{self.where}the state that W_hh multiplies depends on a hyperparameter: "
                    f"{self.recurrent} or {compiled.trace.recurrent}"
                )
            CELLS.setdefault(compiled.name, self._known(compiled, values))
            self._names[key] = compiled.name
        return self._names[key]

    def _check_counts(self, compiled: Compiled) -> None:
        found = compiled.trace
        for kind, gates in (("an input part", found.gates_x), ("a product", found.gates_h)):
            if len(gates) > MOST_GATES:
                raise CellError(
                    f"{self.where}expected at most {MOST_GATES} gates with {kind}, got "
                    f"{', '.join(gates)}: more are not supported"
                )

    def _known(self, compiled: Compiled, values: Mapping[str, Any]) -> Cell:
        found, d = compiled.trace, self.declaration
        # W_hh multiplies the first.
        states = (found.recurrent, *(name for name in d.states if name != found.recurrent))
        return Cell(
            _step(self.fn, compiled, states, values),
            gates=len(found.gates_x),
            states=states,
            params=d.params,
            output=states.index(d.output),
            gates_h=len(found.gates_h),
            reads_h=found.reads_h,
            adds=found.adds,
            source=compiled,
            given=d.given,
            products=found.products if found.operands else (),
        )


def _step(
    fn: Callable[..., Mapping[str, Any]],
    compiled: Compiled,
    states: Sequence[str],
    values: Mapping[str, Any],
) -> Step:
    """The function as ``reference.Cell`` wants it."""
    trace, d = compiled.trace, compiled.trace.declaration
    gates_x, of_state = (*trace.gates_x, *d.given), trace.gates_h[: trace.products[0]]
    later = list(enumerate(trace.gates_h))[len(of_state) :]
    first, others = states[0], states[1:]

    def step(
        gx: Tensor,
        gh: Tensor | None,
        h: Tensor,
        c: Tensor | None,
        *params: Tensor,
        product: Callable[[int, Tensor], Tensor] | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        parts = gx.chunk(len(gates_x), -1)
        like = parts[0]
        x = _Values(gates_x, parts)
        s = _Values(states, (h, *(() if c is None else c.chunk(len(others), -1))))
        made = () if gh is None else gh.chunk(len(of_state), -1)

        def made_of(gate: int) -> Callable[[Tensor], Tensor]:
            assert product is not None
            return lambda operand: product(gate, _full(operand, like))

        r = _Products(
            dict(zip(of_state, made, strict=True)),
            {name: made_of(gate) for gate, name in later},
            getattr(s, d.states[0]),
        )
        new = fn(x, r, s, _Values(d.params, params), **values)
        rest = [_full(new[name], like) for name in others]
        return _full(new[first], like), torch.cat(rest, -1) if rest else None

    return step


def _full(value: Any, like: Tensor) -> Tensor:
    """What may be a constant, or made of parameters alone, as numbers of all rows."""
    if not isinstance(value, Tensor):
        return torch.full_like(like, value)
    return value.to(like.dtype).expand_as(like)


class _OfCell:
    """A method of the class and of its instances, whose hyperparameters may differ."""

    def __init__(self, method: Callable[[Any], str]) -> None:
        self.method = method
        self.__doc__ = method.__doc__

    def __get__(self, instance: Any, owner: Any) -> Callable[[], str]:
        return functools.partial(self.method, owner if instance is None else instance)


class _Compiled:
    """What a layer and a single step of a compiled cell share."""

    cell: Any
    _made: ClassVar[_Made]

    def _choose(self, hyperparameters: Mapping[str, Any]) -> None:
        """Before any parameter is made."""
        self.hyperparameters = self._made.full(hyperparameters)
        self.cell = self._made.register(hyperparameters)

    @_OfCell
    def source(self) -> str:
        """The C++ header that is compiled."""
        text: str = CELLS[self.cell].source.header
        return text

    @_OfCell
    def explain(self) -> str:
        """What the compiler made of the cell: gates, what is kept, what is computed again."""
        text: str = CELLS[self.cell].source.explanation
        return text

    def _initialise(self, suffix: str) -> None:
        for name, initialiser in self._made.initialisers.items():
            with torch.no_grad():
                if callable(initialiser):
                    initialiser(getattr(self, name + suffix))
                elif initialiser is not None:
                    getattr(self, name + suffix).fill_(initialiser)

    def _shown(self) -> str:
        defaults = self._made.defaults
        return "".join(
            f", {name}={value!r}"
            for name, value in self.hyperparameters.items()
            if value != defaults[name]
        )


class _Layer(_Compiled, CustomLayer):
    """Base of all layers that ``fused_rnn.cell`` makes."""

    Cell: ClassVar[type[_Single]]
    if TYPE_CHECKING:
        __call__: Call[Any]

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        proj_size: int = 0,
        device: Any = None,
        dtype: Any = None,
        *,
        recompute: bool = False,
        **hyperparameters: Any,
    ) -> None:
        options = {n: hyperparameters.pop(n) for n in _OPTIONS if n in hyperparameters}
        self._choose(hyperparameters)
        source: Compiled = CELLS[self.cell].source
        if proj_size and source.tape.reads_new_h:
            raise ValueError(
                f"proj_size: expected 0, since the backward of {type(self).__name__} reads h unit "
                f"by unit, got {proj_size}"
            )
        super().__init__(
            input_size,
            hidden_size,
            num_layers,
            bias,
            batch_first,
            dropout,
            bidirectional,
            proj_size,
            device,
            dtype,
            recompute=recompute,
            **options,
        )

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._choose(state["hyperparameters"])  # this process may not have had them
        super().__setstate__(state)

    def reset_parameters(self) -> None:
        super().reset_parameters()
        if self.mode == self.cell.upper():  # not yet where torch.nn's constructor asks for it
            for run in self._all_weights:
                self._initialise(run[0].removeprefix("weight_ih"))

    def _has_usual_sizes(self) -> bool:
        if CELLS[self.cell].recurrent_gates:
            return super()._has_usual_sizes()
        return self._width("weight_ih_l0") == self.input_size

    def extra_repr(self) -> str:
        return super().extra_repr() + self._shown()


class _StatesLayer(_Layer):
    """Layers whose hidden state is a tuple of any tensors, in the order of the declaration."""

    def _place(self) -> int:
        """Of h among the states."""
        return self._made.declaration.states.index(CELLS[self.cell].states[0])

    def _widths(self) -> list[int]:
        widths = [self.hidden_size] * (len(self._made.declaration.states) - 1)
        widths[self._place() : self._place()] = super()._widths()
        return widths

    def _check_count(self, hx: Any) -> None:
        names = self._made.declaration.states
        if isinstance(hx, Tensor) or len(hx) != len(names):
            kind = "a tensor" if isinstance(hx, Tensor) else f"{len(hx)}"
            raise TypeError(
                f"{type(self).__name__}: hx: expected a tuple of {len(names)} tensors "
                f"({', '.join(names)}), got {kind}"
            )

    def _split_hidden(self, hx: Any) -> tuple[Tensor, Tensor]:
        self._check_count(hx)
        rest = list(hx)
        h = rest.pop(self._place())
        return h, torch.cat(rest, -1)

    def _join_hidden(self, h: Tensor, c: Tensor | None) -> Any:
        assert c is not None
        states = list(c.split(self.hidden_size, -1))
        states.insert(self._place(), h)
        return tuple(states)

    def _zero_hidden(self, x: Tensor, batch: Any) -> Any:
        h = super()._zero_hidden(x, batch)
        others = len(self._made.declaration.states) - 1
        return self._join_hidden(h, h.new_zeros(*h.shape[:-1], others * self.hidden_size))

    def _check_hidden_dim(self, hx: Any, dim: int) -> None:
        self._check_count(hx)
        for state in hx:
            super()._check_hidden_dim(state, dim)

    def check_forward_args(self, input: Tensor, hidden: Any, batch_sizes: Tensor | None) -> None:
        self.check_input(input, batch_sizes)
        self._check_count(hidden)
        layers, batch, width = self.get_expected_hidden_size(input, batch_sizes)
        for i, state in enumerate(hidden):
            expected = (layers, batch, width if i == self._place() else self.hidden_size)
            self.check_hidden_size(state, expected, f"Expected hidden[{i}] size {{}}, got {{}}")

    def permute_hidden(self, hx: Any, permutation: Tensor | None) -> Any:
        if permutation is None:
            return hx
        return tuple(state.index_select(1, permutation) for state in hx)


class _GivenLayer(_Layer):
    """Layers to whose call the caller gives more for each step."""

    def forward(
        self,
        input: Any,
        hx: Any = None,
        *,
        lengths: Any = None,
        reset: Tensor | None = None,
        reset_to: Any = None,
        return_states: bool = False,
        **given: Any,
    ) -> Any:
        """As of other layers; what is given is [T, B, H] each, in the layout of the input, or like
        it packed rows."""
        asked = self._asked(input, reset, reset_to, return_states)
        rows = input.data if isinstance(input, PackedSequence) else input
        shape = (*rows.shape[:-1], self.hidden_size)
        together = self._made.together(type(self).__name__, given, rows, shape)
        assert together is not None
        if rows is input and rows.dim() == 2:
            together = together.unsqueeze(1)
        elif rows is input and self.batch_first:
            together = together.transpose(0, 1)
        return self._forward(input, hx, lengths, asked._replace(given=together))


class _Single(_Compiled, nn.Module):
    """One step, as ``torch.nn.LSTMCell`` is one of ``torch.nn.LSTM``.

    Call ``cell(input, hx=None)`` with input [B, I] or [I] and hx like what it returns: the new
    state [B, H] or [H], or a tuple of them in the order of the declaration.
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        device: Any = None,
        dtype: Any = None,
        **hyperparameters: Any,
    ) -> None:
        super().__init__()
        self._choose(hyperparameters)
        for name, size in (("input_size", input_size), ("hidden_size", hidden_size)):
            if not isinstance(size, int) or size < 1:
                raise ValueError(f"{name}: expected a positive integer, got {size!r}")
        self.input_size, self.hidden_size, self.bias = input_size, hidden_size, bias
        present = present_bits(self.cell, biases=bias, projection=False)
        shapes = parameter_shapes(self.cell, present, input_size, hidden_size, hidden_size)
        self._names = list(shapes)
        for name, shape in shapes.items():
            empty = torch.empty(*shape, device=device, dtype=dtype)
            self.register_parameter(name, nn.Parameter(empty))
        self.reset_parameters()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._choose(self.hyperparameters)

    def reset_parameters(self) -> None:
        """Draw all as ``torch.nn`` does, then those that begin with something of their own."""
        bound = self.hidden_size**-0.5
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -bound, bound)
        self._initialise("")

    def extra_repr(self) -> str:
        bias = "" if self.bias else ", bias=False"
        return f"{self.input_size}, {self.hidden_size}{bias}{self._shown()}"

    def forward(self, input: Tensor, hx: Any = None, **given: Any) -> Any:
        """Return the new states. What is given is [B, H] or [H]."""
        if input.dim() not in (1, 2):
            raise ValueError(
                f"{self._made.declaration.name}.Cell: expected input to be 1D or 2D, got "
                f"{input.dim()}D"
            )
        if input.shape[-1] != self.input_size:
            raise RuntimeError(
                f"input has inconsistent input_size: got {input.shape[-1]} expected "
                f"{self.input_size}"
            )
        batched, names = input.dim() == 2, self._made.declaration.states
        x = input if batched else input.unsqueeze(0)
        h, c = (
            (None, None) if hx is None else self._states(hx, (*input.shape[:-1], self.hidden_size))
        )
        bits = present_bits(self.cell, biases=self.bias, projection=False)
        owner, shape = f"{self._made.declaration.name}.Cell", (*input.shape[:-1], self.hidden_size)
        together = self._made.together(owner, given, input, shape)
        _, h_n, c_n = functional.recurrent(
            self.cell,
            x.unsqueeze(0),
            h,
            c,
            [getattr(self, name) for name in self._names],
            num_layers=1,
            bidirectional=False,
            present=bits,
            given=None if together is None else together.reshape(1, -1, together.shape[-1]),
        )
        order = CELLS[self.cell].states
        new = [h_n, *(() if c_n is None else c_n.split(self.hidden_size, -1))]
        new = [state.squeeze(0) if batched else state.squeeze(0).squeeze(0) for state in new]
        return tuple(new[order.index(name)] for name in names) if len(names) > 1 else new[0]

    def _states(self, hx: Any, shape: tuple[int, ...]) -> tuple[Tensor, Tensor | None]:
        """h and all others, [1, B, ..]."""
        names = self._made.declaration.states
        states = (hx,) if len(names) == 1 and isinstance(hx, Tensor) else hx
        if isinstance(states, Tensor) or len(states) != len(names):
            raise TypeError(
                f"{self._made.declaration.name}.Cell: hx: expected a tensor for each of the states "
                f"{', '.join(names)}"
            )
        for name, state in zip(names, states, strict=True):
            if state.shape != shape:
                raise RuntimeError(f"hx: expected {name} {list(shape)}, got {list(state.shape)}")
        by_name = dict(zip(names, states, strict=True))
        h, *others = (
            by_name[name].reshape(1, -1, self.hidden_size) for name in CELLS[self.cell].states
        )
        return h, torch.cat(others, -1) if others else None
