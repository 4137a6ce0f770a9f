"""Keras 3's recurrent layers, on its torch backend, run by our kernels.

fused_rnn.keras.enable()              # from here on, layers and models made before included
with fused_rnn.keras.enable(): ...    # for a while
fused_rnn.keras.disable()

``LSTM``, ``GRU`` and ``SimpleRNN``, ``RNN`` around one of their cells, and ``Bidirectional`` around
one of the three take our kernels wherever these compute what Keras would, whatever the mask. All
else goes Keras' own way. Layers, their weights and saved files stay Keras' own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial, wraps
from importlib import import_module
from threading import RLock
from types import TracebackType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import embedding

from .functional import recurrent

__all__ = ["Enabled", "disable", "enable", "is_enabled"]

_lock = RLock()
_replaced: dict[tuple[type, str], tuple[Any, Any]] = {}  # by place: Keras' method, and ours


class Enabled:
    """What ``enable`` returns: at the end of a ``with`` it is as it was before ``enable``."""

    def __init__(self, before: bool) -> None:
        self._before = before

    def __enter__(self) -> Enabled:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if not self._before:
            disable()


def enable() -> Enabled:
    """Let Keras' recurrent layers run on our kernels from now on. Done twice, it is done once.

    What does not fit goes Keras' own way: layers with other activations than the usual ones (tanh
    and sigmoid; for SimpleRNN tanh or relu), ``GRU(reset_after=False)``, ``recurrent_dropout``
    while training, ``use_cudnn=False``, classes derived from Keras' cells, and masked calls inside
    ``torch.compile`` and exporters.

    Raises:
        ImportError: without Keras 3.
        RuntimeError: if Keras runs on another backend than torch.
    """
    backend = _keras().config.backend()
    if backend != "torch":
        raise RuntimeError(
            f"fused_rnn.keras: expected Keras on the torch backend, got {backend}: set "
            "KERAS_BACKEND=torch in the environment before Keras is imported"
        )
    with _lock:
        before = is_enabled()
        if not before:
            layers, names = _keras().layers, _names()
            for layer in (layers.RNN, layers.LSTM, layers.GRU):
                _replace(layer, "inner_loop", partial(_inner_loop, names))
            _replace(layers.Bidirectional, "call", partial(_bidirectional_call, names))
        return Enabled(before)


def disable() -> None:
    """Let them go Keras' own way again. Does nothing where it is not enabled."""
    with _lock:
        for (cls, name), (theirs, ours) in _replaced.items():
            if vars(cls)[name] is ours:  # and nobody else's by now
                setattr(cls, name, theirs)
        _replaced.clear()


def is_enabled() -> bool:
    return bool(_replaced)


def _keras() -> Any:
    try:
        return import_module("keras")
    except ModuleNotFoundError as error:
        raise ImportError(
            f"fused_rnn.keras needs Keras 3 on the torch backend, but {error}: pip install "
            "fused_rnn[keras], and set KERAS_BACKEND=torch before Keras is imported"
        ) from error


def _replace(cls: type, name: str, make: Callable[[Any], Any]) -> None:
    theirs = vars(cls)[name]
    ours = wraps(theirs)(make(theirs))
    _replaced[cls, name] = theirs, ours
    setattr(cls, name, ours)


# --- In the place of Keras' methods ---------------------------------------------------------------


def _inner_loop(names: _Names, theirs: Callable[..., Any]) -> Callable[..., Any]:
    """Of a layer: returns the last output, the outputs of all steps, and the last states."""

    def inner_loop(
        self: Any, sequences: Any, initial_state: Any, mask: Any, training: Any = False
    ) -> Any:
        kernel = _kernel_of_layer(names, self, training)
        states, of_steps = _listed(initial_state), _listed(mask)[0]
        if kernel is None or not _runs(sequences, states, of_steps, self):
            return theirs(self, sequences, initial_state, mask, training=training)
        x = sequences
        if training and self.cell.dropout:
            x = x * self.cell.get_dropout_mask(x[:, 0]).unsqueeze(1)
        if self.go_backwards:
            x, of_steps = x.flip(1), None if of_steps is None else of_steps.flip(1)
        if self.stateful:  # Keras writes the new states into the tensors of the old ones
            states = [state.clone() for state in states]
        y, last = _run(
            names,
            kernel,
            [self.cell],
            x,
            [state.unsqueeze(0) for state in states],
            of_steps,
            zeros=self.zero_output_for_mask,
        )
        ends = _last_outputs(last[0], of_steps, zeros=self.zero_output_for_mask)[0]
        outputs = y if self.return_sequences else ends.unsqueeze(1)
        return ends, outputs, [state[0] for state in last]

    return inner_loop


def _bidirectional_call(names: _Names, theirs: Callable[..., Any]) -> Callable[..., Any]:
    """Of ``Bidirectional``: both directions in one call of a kernel."""

    def call(
        self: Any, sequences: Any, initial_state: Any = None, mask: Any = None, training: Any = None
    ) -> Any:
        kernel, of_steps = _kernel_of_both(names, self), _listed(mask)[0]
        layers = (self.forward_layer, self.backward_layer)
        states = initial_state
        if kernel is not None and states is None:
            batch = sequences.shape[0]
            states = [s for layer in layers for s in layer.get_initial_state(batch)]
        if kernel is None or not _runs(sequences, states, of_steps, layers[0]):
            kwargs = {"initial_state": initial_state, "mask": mask, "training": training}
            return theirs(self, sequences, **kwargs)
        half = len(states) // 2
        pairs = [torch.stack(pair) for pair in zip(states[:half], states[half:], strict=True)]
        cells = [layer.cell for layer in layers]
        y, last = _run(names, kernel, cells, sequences, pairs, of_steps, zeros=True)
        if not self.return_sequences:
            y = torch.cat(tuple(_last_outputs(last[0], of_steps, zeros=False)), -1)
        output = y if self.merge_mode == "concat" else _MERGED[self.merge_mode](*y.chunk(2, -1))
        if not self.return_state:
            return output
        of_both = [state[direction] for direction in (0, 1) for state in last]
        return (*_listed(output), *of_both)

    return call


_MERGED: dict[str | None, Callable[[Tensor, Tensor], Any]] = {
    "sum": torch.add,
    "mul": torch.mul,
    "ave": lambda y, y_rev: (y + y_rev) / 2,
    None: lambda y, y_rev: (y, y_rev),
}


def _listed(value: Any) -> list[Any]:
    """One value or several."""
    return list(value) if isinstance(value, (list, tuple)) else [value]


# --- What the kernels compute ---------------------------------------------------------------------


class _Names(NamedTuple):
    """What Keras calls that which our kernels have."""

    layers: tuple[type, ...]
    cells: dict[type, str]
    tanh: tuple[Any, ...]
    relu: tuple[Any, ...]
    sigmoid: tuple[Any, ...]
    tensor: Callable[..., Tensor]  # of a variable of Keras, in the dtype that it has in this call


def _names() -> _Names:
    keras = _keras()
    layers, functions, ops = keras.layers, keras.activations, keras.ops
    return _Names(
        (layers.SimpleRNN, layers.LSTM, layers.GRU),
        {layers.SimpleRNNCell: "rnn", layers.LSTMCell: "lstm", layers.GRUCell: "gru"},
        (functions.tanh, ops.tanh, torch.tanh),
        (functions.relu, ops.relu, torch.relu),
        (functions.sigmoid, ops.sigmoid, torch.sigmoid),
        ops.convert_to_tensor,
    )


def _kernel(names: _Names, cell: Any) -> str | None:
    """The cell of ours that computes what Keras' does, or None."""
    kernel = names.cells.get(type(cell))
    if kernel == "rnn":
        if cell.activation in names.tanh:
            return "rnn_tanh"
        return "rnn_relu" if cell.activation in names.relu else None
    if kernel is None or cell.activation not in names.tanh:
        return None
    fits = cell.recurrent_activation in names.sigmoid and getattr(cell, "reset_after", True)
    return kernel if fits else None


def _kernel_of_layer(names: _Names, layer: Any, training: Any) -> str | None:
    """The cell of ours that computes what the layer does, for any input; or None."""
    cell = layer.cell
    kernel = _kernel(names, cell)
    if kernel is None or cell.compute_dtype != layer.compute_dtype:
        return None
    if getattr(layer, "use_cudnn", "auto") is False:
        return None
    if training and (cell.dropout or cell.recurrent_dropout):
        # Keras may draw a mask for each gate, and for a rate of 1 some of its cells drop nothing.
        by_gate = getattr(cell, "dropout_mask_count", None) is not None
        if cell.recurrent_dropout or by_gate or cell.dropout == 1:
            return None
    return kernel


def _kernel_of_both(names: _Names, wrapper: Any) -> str | None:
    """The cell of ours for both directions of a ``Bidirectional`` whose layers do no more than to
    go over the steps; or None."""
    pair = (wrapper.forward_layer, wrapper.backward_layer)
    kernels = {
        _kernel_of_layer(names, layer, False) if type(layer) in names.layers else None
        for layer in pair
    }
    if len(kernels) > 1 or None in kernels or pair[0].go_backwards:
        return None
    for layer in pair:
        cell = layer.cell
        if not layer.built or layer.stateful or layer.activity_regularizer is not None:
            return None
        if cell.dropout or cell.recurrent_dropout or layer.compute_dtype != wrapper.compute_dtype:
            return None
        if layer.zero_output_for_mask != layer.return_sequences:
            return None
        if (cell.units, cell.use_bias) != (pair[0].cell.units, pair[0].cell.use_bias):
            return None
    return kernels.pop()


def _runs(x: Any, states: Sequence[Any], mask: Any, layer: Any) -> bool:
    """Whether there is something for a kernel to do with these tensors."""
    if not isinstance(x, Tensor) or x.dim() != 3 or x.is_meta or x.shape[1] == 0:
        return False
    if len(states) % len(layer.state_size):
        return False
    shape = (x.shape[0], layer.state_size[0])
    if not all(isinstance(state, Tensor) and state.shape == shape for state in states):
        return False
    if mask is None:
        return True
    # Masks are read, which no tracer lets us do.
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return False
    return isinstance(mask, Tensor) and mask.shape == x.shape[:2] and bool(mask.any())


def _weights(names: _Names, kernel: str, cell: Any) -> list[Tensor]:
    """W_ih, W_hh and the biases, if any, as torch.nn has them. Keras has gates in columns, those of
    a GRU in the order z, r, n, and a second bias in GRUs alone."""
    tensor = names.tensor
    weights = [tensor(cell.kernel).T, tensor(cell.recurrent_kernel).T]
    if cell.bias is not None:
        bias = tensor(cell.bias)
        weights += bias.unbind() if bias.dim() == 2 else [bias, torch.zeros_like(bias)]
    if kernel == "gru":
        gates = [weight.chunk(3) for weight in weights]
        weights = [torch.cat((r, z, n)) for z, r, n in gates]
    return weights


def _run(
    names: _Names,
    kernel: str,
    cells: Sequence[Any],
    x: Tensor,
    states: list[Tensor],
    mask: Tensor | None,
    *,
    zeros: bool,
) -> tuple[Tensor, list[Tensor]]:
    """One cell forward, or a second one backward, over x [B, T, I], from states [D, B, H].

    Returns y [B, T, D*H] and the last states. A step that is masked changes no state; its output is
    that of the step before, at the beginning 0, or always 0 if ``zeros``.
    """
    weights = [_weights(names, kernel, cell) for cell in cells]
    dtype = weights[0][0].dtype
    x, states = x.to(dtype), [state.to(dtype) for state in states]

    def run(x: Tensor, states: list[Tensor], batch_sizes: Tensor | None) -> Any:
        y, *last = recurrent(
            kernel,
            x,
            states[0],
            states[1] if len(states) > 1 else None,
            [weight for of_cell in weights for weight in of_cell],
            num_layers=1,
            bidirectional=len(cells) > 1,
            present=(1 << len(weights[0])) - 1,
            batch_first=batch_sizes is None,
            batch_sizes=batch_sizes,
        )
        return y, [state for state in last if state is not None]

    if mask is None:
        return run(x, states, None)
    mask = mask.to(x.device, torch.bool)
    packed = _pack(mask)
    y, found = run(
        embedding(packed.take, x.flatten(0, 1)),
        [state.index_select(1, packed.sequences) for state in states],
        packed.batch_sizes,
    )
    last = [
        old.index_copy(1, packed.sequences, new) for old, new in zip(states, found, strict=True)
    ]
    nothing = mask.logical_not() if zeros else packed.nothing_yet
    return embedding(packed.give, y).masked_fill(nothing.unsqueeze(-1), 0), last


class _Packed(NamedTuple):
    """Where the steps that count stand in a packed batch. R rows, of N sequences that have any."""

    batch_sizes: Tensor
    sequences: Tensor  # [N], the longest first
    take: Tensor  # [R], which of B*T steps a row is
    give: Tensor  # [B, T], the row of this step, or of the last one before that counts
    nothing_yet: Tensor  # [B, T], where there is none


def _pack(mask: Tensor) -> _Packed:
    steps = mask.shape[1]
    counts, order = mask.sum(1).sort(descending=True, stable=True)
    rows = torch.arange(steps, device=mask.device).unsqueeze(1) < counts  # [T, B]
    ones_that_count = mask.logical_not().byte().argsort(dim=1, stable=True)  # they come first
    take = (order * steps + ones_that_count[order].t())[rows]
    batch_sizes = rows.sum(1).cpu()
    batch_sizes = batch_sizes[batch_sizes > 0]
    numbers = rows.flatten().cumsum(0).view_as(rows) - 1
    latest = mask.cumsum(1) - 1
    give = numbers[latest.clamp(min=0), order.argsort().unsqueeze(1)]
    return _Packed(batch_sizes, order[: int(batch_sizes[0])], take, give, latest < 0)


def _last_outputs(h: Tensor, mask: Tensor | None, *, zeros: bool) -> Tensor:
    """The outputs of the last steps, [D, B, H]: the last h, unless all is masked, or the end."""
    if mask is None:
        return h
    shown = mask[:, -1] if zeros else mask.any(1)
    return h.masked_fill(shown.logical_not().unsqueeze(-1), 0)
