"""RNN, LSTM, GRU and their cells, to be used wherever torch.nn's are.

The classes take the arguments of torch.nn's, draw the same parameters from one seed, read and write
the same ``state_dict`` and return the same results. They derive from ``nn.RNNBase`` and
``nn.RNNCellBase``, which hold parameters and checks, but not from ``nn.RNN``, ``nn.LSTM`` and
``nn.GRU``: ``torch.compile`` refuses every instance of those. So ``isinstance(module, nn.LSTM)`` is
False.

RNN, LSTM and GRU take one argument more, ``recompute=True``, for training in less memory. Between
forward and backward a layer then holds its input and initial states alone, not the tape of its
steps (per row and direction 6 H values for LSTM, 5 H for GRU, H for RNN). Its backward runs the
forward once more, uses the tape and drops it. So a stack holds the tape of one layer at a time, and
a training step takes longer by one forward, about a quarter. (A single layer frees memory for what
comes after it, but its own backward needs as much as ever.) The gradients are the same to the last
bit. It can be switched at any time (``module.recompute = True``), also after ``replace``.
``torch.compile`` of the native kernels keeps to it; ``torch.func``, forward mode and torch's own
operators take no notice.

Sizes in the docstrings: T steps, B sequences, I = ``input_size``, H = ``hidden_size``,
L = ``num_layers``, D = 2 if ``bidirectional`` else 1, P = ``proj_size`` or H. With an unbatched
input, B is missing everywhere.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, overload

import torch
from torch import Tensor, fx, nn
from torch.compiler import is_dynamo_compiling
from torch.nn.utils import parametrize
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from . import functional, scripting
from .torch_internals import is_any_autocast_enabled, is_tracing

__all__ = ["GRU", "LSTM", "RNN", "GRUCell", "LSTMCell", "RNNCell"]

Lengths = Tensor | Sequence[int]

if TYPE_CHECKING:  # what a call takes and gives: nn.Module's own type says Any
    _Pair = tuple[Tensor, Tensor]

    class _LayerCall(Protocol):
        @overload
        def __call__(
            self, input: Tensor, hx: Tensor | None = None, *, lengths: Lengths | None = None
        ) -> tuple[Tensor, Tensor]: ...
        @overload
        def __call__(
            self, input: PackedSequence, hx: Tensor | None = None
        ) -> tuple[PackedSequence, Tensor]: ...

    class _LSTMCall(Protocol):
        @overload
        def __call__(
            self, input: Tensor, hx: _Pair | None = None, *, lengths: Lengths | None = None
        ) -> tuple[Tensor, _Pair]: ...
        @overload
        def __call__(
            self, input: PackedSequence, hx: _Pair | None = None
        ) -> tuple[PackedSequence, _Pair]: ...

    class _CellCall(Protocol):
        def __call__(self, input: Tensor, hx: Tensor | None = None) -> Tensor: ...

    class _LSTMCellCall(Protocol):
        def __call__(self, input: Tensor, hx: _Pair | None = None) -> _Pair: ...


def _torchs_own(name: str) -> Any:
    """The class of torch.nn, also while a patch has one of another copy of this package there."""
    there = getattr(nn, name)
    return vars(there).get("torch_class", there)


class _TorchShaped(nn.Module):
    """A class of ours: which class of torch.nn it stands for, and how users write hidden states.

    Inside, states are h (which goes through W_hh) and c (which does not, or None). Outside, all
    classes but the LSTMs have h alone.
    """

    torch_class: ClassVar[Any]  # None: torch.nn has no such cell
    _usual_forward: ClassVar[Any]  # what ``called_directly`` may do the work of, or None

    def __prepare_scriptable__(self) -> nn.Module:
        """What ``torch.jit.script`` compiles instead: torch.nn's module, sharing all we have."""
        if not scripting.has_twin(self):
            return self
        twin = self.torch_class.__new__(self.torch_class)
        twin.__dict__.update(self.__dict__)
        if isinstance(twin, nn.RNNBase):
            twin._init_flat_weights()  # its own list, of the weights as they are now
        return twin

    def __setattr__(self, name: str, value: Any) -> None:
        self.__dict__.pop("_verified", None)
        super().__setattr__(name, value)

    def _is_usual(self) -> bool:
        """Whether checks against the weights are all that the module asks for: nobody replaced a
        method of it, or set a size to another than its weights have. Looked at once, until an
        attribute changes."""
        own = self.__dict__
        if is_tracing():  # a tracer would see how the sizes are read
            return False
        if "_verified" not in own and self._has_usual_checks() and self._has_usual_sizes():
            own["_verified"] = True
        return "_verified" in own

    def _has_usual_checks(self) -> bool:
        return True

    def _has_usual_sizes(self) -> bool:
        raise NotImplementedError

    def _width(self, name: str) -> int | None:
        """Columns of a weight, None if it is no parameter."""
        weight = self._parameters.get(name)
        return None if weight is None else weight.shape[-1]

    def _read(self, name: str) -> Any:
        """The attribute ``name``; for parameters, the usual case, much faster than getattr."""
        parameter = self._parameters.get(name)
        return getattr(self, name) if parameter is None else parameter

    def _fx_node(self, input: Any, hx: Any) -> Any:
        """The call as one node, if torch.fx is tracing a model that we are in; otherwise None.

        Its tracers take modules of torch.nn, known by their names, for leaves, and go into ours. As
        with torch.nn they also go into a user's subclass, whose forward is more than this.
        """
        if not isinstance(input, fx.Proxy):
            return None
        stands_for = vars(parametrize.type_before_parametrizations(self)).get("torch_class")
        if stands_for is None or not stands_for.__module__.startswith("torch.nn."):
            return None
        tracer: Any = input.tracer
        path = tracer.path_of_module(self)  # "" for what is traced itself, which is no node of it
        args = (input,) if hx is None else (input, hx)
        return tracer.create_proxy("call_module", path, args, {}) if path else None

    def _split_hidden(self, hx: Any) -> tuple[Tensor, Tensor | None]:
        return hx, None

    def _join_hidden(self, h: Tensor, c: Tensor | None) -> Any:
        return h


class _HiddenPair(_TorchShaped):
    """The LSTMs' form: a pair (h, c)."""

    _operator: ClassVar[str]  # the name in error messages

    def _split_hidden(self, hx: Any) -> tuple[Tensor, Tensor]:
        if isinstance(hx, Tensor):
            raise TypeError(
                f"{self._operator}(): argument 'hx' must be tuple of Tensors, not Tensor"
            )
        if len(hx) != 2:
            raise RuntimeError(f"{self._operator} expects two hidden states")
        return hx[0], hx[1]

    def _join_hidden(self, h: Tensor, c: Tensor | None) -> Any:
        return h, c


# Methods that torch.nn's forward calls, so that a subclass may override them.
_HOOKS = (
    "check_forward_args",
    "check_hidden_size",
    "check_input",
    "get_expected_cell_size",
    "get_expected_hidden_size",
    "permute_hidden",
)
_RANKS = {2: "unbatched 2-D", 3: "batched 3-D"}


class Recurrent(_TorchShaped, nn.RNNBase):
    """What RNN, LSTM and GRU share: from a user's call to ``functional.recurrent`` and back."""

    _wrong_input: ClassVar[str] = "{}: Expected input to be 2D or 3D, got {}D instead"
    _own_hooks: ClassVar[bool]  # whether _HOOKS are as here and in torch.nn
    recompute = False  # for instances that were torch.nn's, or pickled before it existed

    def __init__(self, mode: str, *args: Any, recompute: bool, **kwargs: Any) -> None:
        super().__init__(mode, *args, **kwargs)
        # torch.nn's raise the same at the first call.
        for name, value in (("bidirectional", self.bidirectional), ("recompute", recompute)):
            if not isinstance(value, bool):
                raise TypeError(f"{name} should be of type bool, got: {type(value).__name__}")
        if isinstance(self.num_layers, bool):
            raise TypeError("num_layers should be of type int, got: bool")
        self.recompute = recompute

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        hooks = [getattr(cls, name) for name in _HOOKS if hasattr(cls, name)]
        homes = (__name__, nn.RNNBase.__module__)
        cls._own_hooks = all(getattr(hook, "__module__", None) in homes for hook in hooks)
        cls._usual_forward = Recurrent.forward if cls._own_hooks else None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run ``forward`` and the hooks; the class says which shapes."""
        # nn.Module's own takes as long as a small step and mostly finds nothing to do.
        found = functional.called_directly(self, args, kwargs, self.mode.lower())
        return nn.Module.__call__(self, *args, **kwargs) if found is None else found

    def extra_repr(self) -> str:
        return super().extra_repr() + (", recompute=True" if self.recompute else "")

    def _has_usual_checks(self) -> bool:
        return self._own_hooks and self.__dict__.keys().isdisjoint(_HOOKS)

    def _has_usual_sizes(self) -> bool:
        return (
            self._width("weight_ih_l0") == self.input_size
            and self._width("weight_hh_l0") == (self.proj_size or self.hidden_size)
            and (self.proj_size == 0 or self._width("weight_hr_l0") == self.hidden_size)
        )

    def _zero_hidden(self, x: Tensor, batch: Any) -> Any:
        runs = self.num_layers * (2 if self.bidirectional else 1)
        return torch.zeros(
            runs, batch, self.proj_size or self.hidden_size, dtype=x.dtype, device=x.device
        )

    def _check_hidden_dim(self, hx: Any, dim: int) -> None:
        if hx.dim() != dim:
            raise RuntimeError(
                f"For {_RANKS[dim]} input, hx should also be {dim}-D but got {hx.dim()}-D tensor"
            )

    def _weight(self, index: int) -> Tensor:
        """The weight that the attribute of this name is now, whatever it was at construction.

        Parametrizations, ``functional_call``, and people who assign a plain tensor all change the
        attribute. One that was deleted is taken from where it was last seen, as in torch.nn.
        """
        try:
            return self._read(self._flat_weights_names[index])
        except AttributeError:
            last_seen: Any = self._flat_weights[index]
            return last_seen

    def _weights(self) -> list[Tensor]:
        parameters, names = self._parameters, self._flat_weights_names
        try:
            return [parameters[name] for name in names]  # type: ignore[misc]
        except KeyError:
            return [self._weight(i) for i in range(len(names))]

    def check_input(self, input: Tensor, batch_sizes: Tensor | None) -> None:
        weight_dtype = self._weight(0).dtype
        if input.dtype != weight_dtype and not is_any_autocast_enabled():
            raise ValueError(
                f"RNN input dtype ({input.dtype}) does not match weight dtype ({weight_dtype}). "
                f"Convert input: input.to({weight_dtype}), "
                f"or convert model: model.to({input.dtype})"
            )
        expected_dim = 3 if batch_sizes is None else 2
        if input.dim() != expected_dim:
            raise RuntimeError(f"input must have {expected_dim} dimensions, got {input.dim()}")
        if input.size(-1) != self.input_size:
            raise RuntimeError(
                "input.size(-1) must be equal to input_size. "
                f"Expected {self.input_size}, got {input.size(-1)}"
            )

    def check_hidden_size(
        self,
        hx: Tensor,
        expected_hidden_size: tuple[int, int, int],
        msg: str = "Expected hidden size {}, got {}",
    ) -> None:
        if is_dynamo_compiling():  # how many sequences are packed is known when the program runs
            for size, expected in zip(hx.size(), expected_hidden_size, strict=True):
                torch._check(size == expected)
        else:
            super().check_hidden_size(hx, expected_hidden_size, msg)

    def _present(self) -> int:
        return functional.present_bits(
            self.mode.lower(), biases=self.bias, projection=self.proj_size > 0
        )

    def _checked(self, input: Tensor, hx: Any, batch_sizes: Tensor | None) -> Any:
        """hx after torch.nn's checks, for which it has states of zeros where none are given. They
        are as many as the module says, and needed only if that is not what the weights say."""
        usual = self._own_hooks if is_dynamo_compiling() else self._is_usual()
        if hx is None and usual:
            self.check_input(input, batch_sizes)
            return None
        if hx is None:
            batch = input.size(self._batch_dim()) if batch_sizes is None else batch_sizes[0]
            hx = self._zero_hidden(input, batch)
        self.check_forward_args(input, hx, batch_sizes)
        return hx

    def _batch_dim(self) -> int:
        return 0 if self.batch_first else 1

    def _run(self, x: Tensor, hx: Any, batch_sizes: Tensor | None) -> tuple[Tensor, Any]:
        h0, c0 = (None, None) if hx is None else self._split_hidden(hx)
        y, h_n, c_n = functional.recurrent(
            self.mode.lower(),
            x,
            h0,
            c0,
            self._weights(),
            num_layers=self.num_layers,
            bidirectional=self.bidirectional,
            present=self._present(),
            batch_first=self.batch_first and batch_sizes is None,
            dropout=self.dropout,
            training=self.training,
            batch_sizes=batch_sizes,
            recompute=self.recompute,
        )
        return y, self._join_hidden(h_n, c_n)

    def forward(
        self, input: Tensor | PackedSequence, hx: Any = None, *, lengths: Lengths | None = None
    ) -> tuple[Any, Any]:
        """Return the outputs of the last layer and the last states; the class says which shapes."""
        if lengths is not None:
            return self._forward_lengths(input, hx, lengths)
        found = self._run_directly(input, hx)
        if found is not None:
            return found
        if isinstance(input, PackedSequence):
            return self._forward_packed(input, hx)
        if (node := self._fx_node(input, hx)) is not None:
            return node
        dim = input.dim()
        if dim not in _RANKS:
            raise ValueError(self._wrong_input.format(self.mode, dim))
        batch_dim = self._batch_dim()
        if hx is not None:
            self._check_hidden_dim(hx, dim)
        if dim == 2:
            input = input.unsqueeze(batch_dim)
            if hx is not None:
                h, c = self._split_hidden(hx)
                hx = self._join_hidden(h.unsqueeze(1), None if c is None else c.unsqueeze(1))
        hx = self._checked(input, hx, None)
        if hx is not None:
            hx = self.permute_hidden(hx, None)
        y, hx = self._run(input, hx, None)
        if dim == 2:
            h, c = self._split_hidden(hx)
            y, hx = (
                y.squeeze(batch_dim),
                self._join_hidden(h.squeeze(1), None if c is None else c.squeeze(1)),
            )
        return y, self.permute_hidden(hx, None)

    # What help() and editors show.
    __call__.__signature__ = inspect.signature(forward)  # type: ignore[attr-defined]

    def _run_directly(self, x: Any, hx: Any) -> tuple[Tensor, Any] | None:
        """``forward`` of a padded batch by one direct call, or None if it has to go all the way.

        The call checks x and hx against the weights, so no error is lost; overridden hooks would
        not be called.
        """
        if is_dynamo_compiling() or type(x) is not Tensor or not self._is_usual():
            return None
        if self.training and self.dropout or self.recompute and torch.is_grad_enabled():
            return None
        found: tuple[Tensor, Any] | None = functional.recurrent_directly(
            self.mode.lower(),
            x,
            hx,
            self._parameters,
            self._flat_weights_names,
            self.num_layers,
            self.bidirectional,
            self._present(),
            self.batch_first,
        )
        return found

    def _forward_lengths(self, input: Any, hx: Any, lengths: Lengths) -> tuple[Tensor, Any]:
        """A padded batch whose sequences have lengths of their own: packed, run, and padded."""
        if isinstance(input, PackedSequence):
            raise ValueError("lengths: expected None with a PackedSequence, which has its own")
        if input.dim() != 3:
            raise ValueError(f"lengths: expected input to be 3D, a batch, got {input.dim()}D")
        batch_dim = self._batch_dim()
        batch, steps = input.size(batch_dim), input.size(1 - batch_dim)
        counts = _checked_lengths(lengths, batch, steps)
        if batch == 0 or steps == 0:
            return self.forward(input, hx)
        if hx is not None:
            self._check_hidden_dim(hx, 3)
        if bool((counts == 0).any()):
            return self._forward_empty(input, hx, counts)
        packed = pack_padded_sequence(input, counts, self.batch_first, enforce_sorted=False)
        y, hx = self._forward_packed(packed, hx)
        return pad_packed_sequence(y, self.batch_first, total_length=steps)[0], hx

    def _forward_empty(self, input: Tensor, hx: Any, counts: Tensor) -> tuple[Tensor, Any]:
        """Where some sequences have no step: these run one over zeros, and nothing comes of it."""
        empty = (counts == 0).to(input.device).unsqueeze(-1)  # [B, 1]
        of_batch = empty.unsqueeze(1 - self._batch_dim())
        y, last = self._forward_lengths(input.masked_fill(of_batch, 0), hx, counts.clamp(min=1))
        begin = self._zero_hidden(input, input.size(self._batch_dim())) if hx is None else hx
        h, c = (
            s if s is None or first is None else torch.where(empty, first.to(s.dtype), s)
            for first, s in zip(self._split_hidden(begin), self._split_hidden(last), strict=True)
        )
        assert h is not None
        return y.masked_fill(of_batch, 0), self._join_hidden(h, c)

    def _forward_packed(self, input: PackedSequence, hx: Any) -> tuple[PackedSequence, Any]:
        functional.check_packed()
        rows, batch_sizes, sorted_indices, unsorted_indices = input
        if hx is None and torch.compiler.is_compiling():
            # How many sequences there are is in the data: a compiler takes it from the states.
            hx = self._zero_hidden(rows, batch_sizes[0])
        hx = self._checked(rows, hx, batch_sizes)
        if hx is not None:  # in the user's order, the kernels see the longest sequences first
            hx = self.permute_hidden(hx, sorted_indices)
        y, hx = self._run(rows, hx, batch_sizes)
        packed = PackedSequence(y, batch_sizes, sorted_indices, unsorted_indices)
        return packed, self.permute_hidden(hx, unsorted_indices)


def _checked_lengths(lengths: Lengths, batch: int, steps: int) -> Tensor:
    """[B] int64 on the CPU."""
    counts = torch.as_tensor(lengths) if len(lengths) else torch.zeros(0, dtype=torch.int64)
    if counts.is_floating_point() or counts.is_complex() or counts.dtype == torch.bool:
        raise TypeError(f"lengths: expected integers, got {counts.dtype}")
    if counts.shape != (batch,):
        raise ValueError(f"lengths: expected shape ({batch},), got {tuple(counts.shape)}")
    counts = counts.to("cpu", torch.int64)
    if bool(((counts < 0) | (counts > steps)).any()):
        raise ValueError(
            f"lengths: expected 0 to {steps}, the steps of input, got {counts.tolist()}"
        )
    return counts


class PairLayers(_HiddenPair, Recurrent):
    """Layers whose state is a pair (h, c)."""

    def _zero_hidden(self, x: Tensor, batch: Any) -> Any:
        h = super()._zero_hidden(x, batch)
        return h, torch.zeros(
            h.size(0), h.size(1), self.hidden_size, dtype=x.dtype, device=x.device
        )

    def _check_hidden_dim(self, hx: Any, dim: int) -> None:
        h, c = self._split_hidden(hx)
        if h.dim() != dim or c.dim() != dim:
            raise RuntimeError(
                f"For {_RANKS[dim]} input, hx and cx should also be {dim}-D "
                f"but got ({h.dim()}-D, {c.dim()}-D) tensors"
            )

    # The three below are nn.LSTM's, to be called and overridden: same names, arguments, messages.

    def get_expected_cell_size(
        self, input: Tensor, batch_sizes: Tensor | None
    ) -> tuple[int, int, int]:
        layers, batch, _ = self.get_expected_hidden_size(input, batch_sizes)
        return layers, batch, self.hidden_size

    def check_forward_args(self, input: Tensor, hidden: Any, batch_sizes: Tensor | None) -> None:
        self.check_input(input, batch_sizes)
        h, c = self._split_hidden(hidden)
        expected_h = self.get_expected_hidden_size(input, batch_sizes)
        self.check_hidden_size(h, expected_h, "Expected hidden[0] size {}, got {}")
        expected_c = self.get_expected_cell_size(input, batch_sizes)
        self.check_hidden_size(c, expected_c, "Expected hidden[1] size {}, got {}")

    def permute_hidden(self, hx: Any, permutation: Tensor | None) -> Any:
        if permutation is None:
            return hx
        h, c = hx
        return h.index_select(1, permutation), c.index_select(1, permutation)


def _refuse_projection(proj_size: object) -> None:
    if proj_size is not None:
        raise ValueError("proj_size argument is only supported for LSTM, not RNN or GRU")


class RNN(Recurrent):
    r"""A stack of Elman networks (Elman 1990, "Finding structure in time") over whole sequences.

    .. math::
        h_t = f(W_{ih} x_t + b_{ih} + W_{hh} h_{t-1} + b_{hh}),
        \qquad f = \tanh \text{ or } \mathrm{relu}

    Args:
        input_size: features I of an input step.
        hidden_size: units H of a layer and direction.
        num_layers: layers L; each reads the outputs of the one below.
        nonlinearity: ``"tanh"`` or ``"relu"``.
        bias: whether b_ih and b_hh exist.
        batch_first: whether input and output are [B, T, features]; states never are.
        dropout: probability of zeroing an output of any layer but the last, while training.
        bidirectional: add a direction that runs from the last step to the first.
        device, dtype: of the parameters.
        proj_size: refused, as in torch.nn: only LSTM has projections.
        recompute: hold less memory between forward and backward: a layer keeps its input alone, and
            its backward runs the forward once more. The gradients are the same to the last bit, a
            training step takes about a quarter longer. ``module.recompute = True`` does it later.

    Call ``module(input, hx=None, *, lengths=None)``:
        * input [T, B, I] ([B, T, I] if ``batch_first``) of T steps and B sequences, or one
          sequence [T, I] (then B is missing everywhere), or a PackedSequence;
        * hx [L*D, B, H], zeros if None; D is 2 if ``bidirectional``, else 1;
        * lengths [B], integers from 0 to T: the steps of each sequence. Outputs past its end are 0,
          the last states are those at its end, and the second direction begins there.

    Returns ``(output, h_n)``:
        * output [T, B, D*H], laid out like input, or a PackedSequence; forward units come first;
        * h_n [L*D, B, H], layer-major.

    Raises:
        TypeError, ValueError: constructor arguments out of range; input of another rank or dtype.
        RuntimeError: sizes, device or dtype of input and hx that do not fit; T = 0.

    Example:
        >>> rnn = fused_rnn.RNN(10, 20, num_layers=2)
        >>> output, h_n = rnn(torch.randn(5, 3, 10))
        >>> output.shape, h_n.shape
        (torch.Size([5, 3, 20]), torch.Size([2, 3, 20]))
    """

    torch_class = _torchs_own("RNN")
    if TYPE_CHECKING:
        __call__: _LayerCall
    _wrong_input = "RNN: Expected input to be 2D or 3D, got {1}D tensor instead"

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        nonlinearity: str = "tanh",
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        device: Any = None,
        dtype: Any = None,
        *,
        proj_size: None = None,
        recompute: bool = False,
    ) -> None:
        _refuse_projection(proj_size)
        if nonlinearity not in ("tanh", "relu"):
            raise ValueError(
                f"Unknown nonlinearity '{nonlinearity}'. Select from 'tanh' or 'relu'."
            )
        self.nonlinearity = nonlinearity
        super().__init__(
            f"RNN_{nonlinearity.upper()}",
            input_size,
            hidden_size,
            num_layers,
            bias,
            batch_first,
            dropout,
            bidirectional,
            device=device,
            dtype=dtype,
            recompute=recompute,
        )


class LSTM(PairLayers):
    r"""A stack of long short-term memories over whole sequences.

    Hochreiter & Schmidhuber 1997, with the forget gate of Gers, Schmidhuber & Cummins 2000 and, if
    ``proj_size`` is given, the projection of Sak, Senior & Beaufays 2014 (arXiv:1402.1128).

    .. math::
        i, f, o &= \sigma(W_{ih} x_t + b_{ih} + W_{hh} h_{t-1} + b_{hh}) \\
        g &= \tanh(W_{ih} x_t + b_{ih} + W_{hh} h_{t-1} + b_{hh}) \\
        c_t &= f \odot c_{t-1} + i \odot g \\
        h_t &= o \odot \tanh(c_t), \qquad \text{then } h_t = W_{hr} h_t \text{ if projected}

    The rows of every weight hold the gates in the order i, f, g, o.

    Args:
        input_size: features I of an input step.
        hidden_size: units H of a layer and direction.
        num_layers: layers L; each reads the outputs of the one below.
        bias: whether b_ih and b_hh exist.
        batch_first: whether input and output are [B, T, features]; states never are.
        dropout: probability of zeroing an output of any layer but the last, while training.
        bidirectional: add a direction that runs from the last step to the first.
        proj_size: width P < H that h is projected to; 0 for none.
        device, dtype: of the parameters.
        recompute: hold less memory between forward and backward: a layer keeps its input alone, and
            its backward runs the forward once more. The gradients are the same to the last bit, a
            training step takes about a quarter longer. ``module.recompute = True`` does it later.

    Call ``module(input, hx=None, *, lengths=None)``:
        * input [T, B, I] ([B, T, I] if ``batch_first``) of T steps and B sequences, or one
          sequence [T, I] (then B is missing everywhere), or a PackedSequence;
        * hx a pair (h_0 [L*D, B, P], c_0 [L*D, B, H]), zeros if None; D is 2 if
          ``bidirectional``, else 1, and P is H if nothing is projected;
        * lengths [B], integers from 0 to T: the steps of each sequence. Outputs past its end are 0,
          the last states are those at its end, and the second direction begins there.

    Returns ``(output, (h_n, c_n))``:
        * output [T, B, D*P], laid out like input, or a PackedSequence; forward units come first;
        * h_n [L*D, B, P] and c_n [L*D, B, H], layer-major.

    Raises:
        TypeError, ValueError: constructor arguments out of range; input of another rank or dtype;
            hx not a pair.
        RuntimeError: sizes, device or dtype of input and hx that do not fit; T = 0.

    Example:
        >>> rnn = fused_rnn.LSTM(10, 20, num_layers=2, bidirectional=True)
        >>> output, (h_n, c_n) = rnn(torch.randn(5, 3, 10))
        >>> output.shape, h_n.shape, c_n.shape
        (torch.Size([5, 3, 40]), torch.Size([4, 3, 20]), torch.Size([4, 3, 20]))
    """

    torch_class = _torchs_own("LSTM")
    if TYPE_CHECKING:
        __call__: _LSTMCall
    _operator = "lstm"

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
    ) -> None:
        super().__init__(
            "LSTM",
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
        )


class GRU(Recurrent):
    r"""A stack of gated recurrent units over whole sequences.

    Cho et al. 2014 (arXiv:1406.1078), with the reset gate applied after the product, as in
    torch.nn and cuDNN.

    .. math::
        r, z &= \sigma(W_{ih} x_t + b_{ih} + W_{hh} h_{t-1} + b_{hh}) \\
        n &= \tanh(W_{in} x_t + b_{in} + r \odot (W_{hn} h_{t-1} + b_{hn})) \\
        h_t &= (1 - z) \odot n + z \odot h_{t-1}

    The rows of every weight hold the gates in the order r, z, n.

    Args:
        input_size: features I of an input step.
        hidden_size: units H of a layer and direction.
        num_layers: layers L; each reads the outputs of the one below.
        bias: whether b_ih and b_hh exist.
        batch_first: whether input and output are [B, T, features]; states never are.
        dropout: probability of zeroing an output of any layer but the last, while training.
        bidirectional: add a direction that runs from the last step to the first.
        device, dtype: of the parameters.
        proj_size: refused, as in torch.nn: only LSTM has projections.
        recompute: hold less memory between forward and backward: a layer keeps its input alone, and
            its backward runs the forward once more. The gradients are the same to the last bit, a
            training step takes about a quarter longer. ``module.recompute = True`` does it later.

    Call ``module(input, hx=None, *, lengths=None)``:
        * input [T, B, I] ([B, T, I] if ``batch_first``) of T steps and B sequences, or one
          sequence [T, I] (then B is missing everywhere), or a PackedSequence;
        * hx [L*D, B, H], zeros if None; D is 2 if ``bidirectional``, else 1;
        * lengths [B], integers from 0 to T: the steps of each sequence. Outputs past its end are 0,
          the last states are those at its end, and the second direction begins there.

    Returns ``(output, h_n)``:
        * output [T, B, D*H], laid out like input, or a PackedSequence; forward units come first;
        * h_n [L*D, B, H], layer-major.

    Raises:
        TypeError, ValueError: constructor arguments out of range; input of another rank or dtype.
        RuntimeError: sizes, device or dtype of input and hx that do not fit; T = 0.

    Example:
        >>> rnn = fused_rnn.GRU(10, 20, batch_first=True)
        >>> output, h_n = rnn(torch.randn(3, 5, 10))
        >>> output.shape, h_n.shape
        (torch.Size([3, 5, 20]), torch.Size([1, 3, 20]))
    """

    torch_class = _torchs_own("GRU")
    if TYPE_CHECKING:
        __call__: _LayerCall

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        device: Any = None,
        dtype: Any = None,
        *,
        proj_size: None = None,
        recompute: bool = False,
    ) -> None:
        _refuse_projection(proj_size)
        super().__init__(
            "GRU",
            input_size,
            hidden_size,
            num_layers,
            bias,
            batch_first,
            dropout,
            bidirectional,
            device=device,
            dtype=dtype,
            recompute=recompute,
        )


_CELL_WEIGHTS = ["weight_ih", "weight_hh", "bias_ih", "bias_hh"]
_RNN_CELLS = {"tanh": "rnn_tanh", "relu": "rnn_relu"}


class _Cell(_TorchShaped, nn.RNNCellBase):
    """What the cells share: from a user's call to ``functional.step`` and back."""

    _hidden_name: ClassVar[str] = "hidden"

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run ``forward`` and the hooks; the class says which shapes."""
        # As in Recurrent.__call__.
        found = functional.called_directly(self, args, kwargs, self._cell(), _CELL_WEIGHTS)
        return super().__call__(*args, **kwargs) if found is None else found

    def _cell(self) -> str:
        raise NotImplementedError

    def _zero_hidden(self, x: Tensor) -> Any:
        return torch.zeros(x.size(0), self.hidden_size, dtype=x.dtype, device=x.device)

    def _weights(self) -> list[Any]:
        parameters = self._parameters
        try:
            return [parameters[name] for name in _CELL_WEIGHTS]
        except KeyError:
            return [self._read(name) for name in _CELL_WEIGHTS]

    def _has_usual_sizes(self) -> bool:
        return self._width("weight_hh") == self.hidden_size

    def _check_dim(self, tensor: Tensor, what: str) -> int:
        dim = tensor.dim()
        if dim not in (1, 2):
            raise ValueError(
                f"{self.torch_class.__name__}: Expected {what} to be 1D or 2D, got {dim}D instead"
            )
        return dim

    def forward(self, input: Tensor, hx: Any = None) -> Any:
        """Return the next state; the class says which shapes."""
        if type(input) is Tensor and not is_dynamo_compiling() and self._is_usual():
            parameters = self._parameters
            found = functional.step_directly(self._cell(), input, hx, parameters, _CELL_WEIGHTS)
            if found is not None:
                return found
        if (node := self._fx_node(input, hx)) is not None:
            return node
        batched = self._check_dim(input, "input") == 2
        x = input if batched else input.unsqueeze(0)
        h, c = self._split_hidden(self._zero_hidden(x) if hx is None else hx)
        if hx is not None:
            states: Any = (h, c) if isinstance(self, _HiddenPair) else (h,)
            for i, state in enumerate(states):
                self._check_dim(state, self._hidden_name.format(i))
            if not batched:
                h, c = h.unsqueeze(0), None if c is None else c.unsqueeze(0)
        h, c = functional.step(
            self._cell(),
            x,
            h,
            c,
            *self._weights(),
        )
        if not batched:
            h, c = h.squeeze(0), None if c is None else c.squeeze(0)
        return self._join_hidden(h, c)

    __call__.__signature__ = inspect.signature(forward)  # type: ignore[attr-defined]
    _usual_forward = forward


class RNNCell(_Cell):
    r"""One step of an Elman network; equation and source as in ``RNN``.

    Args:
        input_size: features I.
        hidden_size: units H.
        bias: whether b_ih and b_hh exist.
        nonlinearity: ``"tanh"`` or ``"relu"``.
        device, dtype: of the parameters.

    Call ``cell(input, hx=None)`` with input [B, I] of B sequences, or [I], and hx [B, H] or [H],
    zeros if None; returns the next h, like hx.

    Raises:
        ValueError: input or hx of another rank.
        RuntimeError: sizes, device or dtype that do not fit; an unknown nonlinearity, at the call.

    Example:
        >>> cell = fused_rnn.RNNCell(10, 20)
        >>> h = torch.zeros(3, 20)
        >>> for x in torch.randn(5, 3, 10):
        ...     h = cell(x, h)
    """

    torch_class = _torchs_own("RNNCell")
    if TYPE_CHECKING:
        __call__: _CellCall
    __constants__ = ["input_size", "hidden_size", "bias", "nonlinearity"]
    nonlinearity: str

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        nonlinearity: str = "tanh",
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__(input_size, hidden_size, bias, num_chunks=1, device=device, dtype=dtype)
        self.nonlinearity = nonlinearity

    def _cell(self) -> str:
        name = _RNN_CELLS.get(self.nonlinearity)
        if name is None:
            raise RuntimeError(f"Unknown nonlinearity: {self.nonlinearity}")
        return name


class LSTMCell(_HiddenPair, _Cell):
    r"""One step of a long short-term memory; equations, sources and gate order as in ``LSTM``.

    Args:
        input_size: features I.
        hidden_size: units H.
        bias: whether b_ih and b_hh exist.
        device, dtype: of the parameters.

    Call ``cell(input, hx=None)`` with input [B, I] of B sequences, or [I], and hx a pair (h, c),
    both [B, H] or [H], zeros if None; returns the next pair (h, c).

    Raises:
        TypeError, ValueError: hx not a pair; input, h or c of another rank.
        RuntimeError: sizes, device or dtype that do not fit.

    Example:
        >>> cell = fused_rnn.LSTMCell(10, 20)
        >>> h, c = torch.zeros(3, 20), torch.zeros(3, 20)
        >>> for x in torch.randn(5, 3, 10):
        ...     h, c = cell(x, (h, c))
    """

    torch_class = _torchs_own("LSTMCell")
    if TYPE_CHECKING:
        __call__: _LSTMCellCall
    _operator = "lstm_cell"
    _hidden_name = "hx[{}]"

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__(input_size, hidden_size, bias, num_chunks=4, device=device, dtype=dtype)

    def _cell(self) -> str:
        return "lstm"

    def _zero_hidden(self, x: Tensor) -> Any:
        zeros = super()._zero_hidden(x)
        return zeros, zeros


class GRUCell(_Cell):
    r"""One step of a gated recurrent unit; equations, source and gate order as in ``GRU``.

    Args:
        input_size: features I.
        hidden_size: units H.
        bias: whether b_ih and b_hh exist.
        device, dtype: of the parameters.

    Call ``cell(input, hx=None)`` with input [B, I] of B sequences, or [I], and hx [B, H] or [H],
    zeros if None; returns the next h, like hx.

    Raises:
        ValueError: input or hx of another rank.
        RuntimeError: sizes, device or dtype that do not fit.

    Example:
        >>> cell = fused_rnn.GRUCell(10, 20)
        >>> h = torch.zeros(3, 20)
        >>> for x in torch.randn(5, 3, 10):
        ...     h = cell(x, h)
    """

    torch_class = _torchs_own("GRUCell")
    if TYPE_CHECKING:
        __call__: _CellCall

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__(input_size, hidden_size, bias, num_chunks=3, device=device, dtype=dtype)

    def _cell(self) -> str:
        return "gru"
