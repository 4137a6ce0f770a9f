"""A stack of layers as a module: its constructor, and its parameters.

What a call does with them is in ``recurrent.py``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from . import engines
from .between import NOTHING, BetweenSteps, Options
from .packed import pack
from .reference import CELLS, present_bits, present_names
from .torch_shaped import TorchShaped

_LONG_NAMES = {"w": "weight", "b": "bias", "g": "gain", "s": "shift"}


def parameter_shapes(
    cell: str, present: int, inputs: int, hidden: int, width: int, blocks: int = 1
) -> dict[str, tuple[int, ...]]:
    """The tensors of one direction of a layer of ``width`` P, by the names that torch.nn gives to
    parameters. A cell's own keep theirs."""
    known = CELLS[cell]
    rows, rows_h = known.gates * hidden, known.recurrent_gates * hidden
    shapes: dict[str, tuple[int, ...]] = {
        "w_ih": (rows, inputs),
        "w_hh": (rows_h, width // blocks),
        "b_ih": (rows,),
        "b_hh": (rows_h,),
        "w_hr": (width, hidden),
        "g_ih": (rows,),
        "g_hh": (rows_h,),
        "g": (rows,),
    }
    found = {}
    for short in present_names(cell, present):
        kind, *rest = short.split("_")
        own = short in known.params
        long = short if own else "_".join([_LONG_NAMES.get(kind, kind), *rest])
        found[long] = shapes.get(short, (hidden,))
    return found


class Stack(TorchShaped, nn.RNNBase):
    """What a layer holds: sizes and options, and parameters with the names that torch.nn gives."""

    # For instances that were torch.nn's, or pickled before these existed.
    recompute = False
    between_steps = NOTHING

    def __init__(
        self,
        cell: str,
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
        recompute: bool,
        options: Options,
    ) -> None:
        between = BetweenSteps.of(type(self).__name__, options)
        # torch.nn's class knows four modes, and parameters of their sizes. Of a layer that has
        # others it makes the attributes and checks; its parameters, which take no memory and no
        # random numbers, go at once.
        own = between.reshapes or cell not in engines.TORCH_CELLS
        super().__init__(
            "RNN_TANH" if own else cell.upper(),
            input_size,
            hidden_size,
            num_layers,
            bias,
            batch_first,
            dropout,
            bidirectional,
            proj_size,
            "meta" if own else device,
            dtype,
        )
        # torch.nn's raise the same at the first call.
        for name, value in (("bidirectional", self.bidirectional), ("recompute", recompute)):
            if not isinstance(value, bool):
                raise TypeError(f"{name} should be of type bool, got: {type(value).__name__}")
        if isinstance(self.num_layers, bool):
            raise TypeError("num_layers should be of type int, got: bool")
        self.mode = cell.upper()
        self.recompute = recompute
        if between != NOTHING:
            self.between_steps = between.fitting(type(self).__name__, cell, hidden_size, proj_size)
        if own:
            self._make_parameters(device, dtype)

    def _make_parameters(self, device: Any, dtype: Any) -> None:
        for name in list(self._parameters):
            delattr(self, name)
        self._all_weights = [
            self._add_run(layer, suffix, device, dtype)
            for layer in range(self.num_layers)
            for suffix in ("", "_reverse")[: 1 + self.bidirectional]
        ]
        self._flat_weights_names = [name for run in self._all_weights for name in run]
        self._init_flat_weights()
        self.reset_parameters()

    def _add_run(self, layer: int, suffix: str, device: Any, dtype: Any) -> list[str]:
        """Make the parameters of one direction of a layer; their names, as torch.nn forms them."""
        width = self.proj_size or self.hidden_size
        inputs = self.input_size if layer == 0 else width * (1 + self.bidirectional)
        shapes = parameter_shapes(
            self.mode.lower(),
            self._present(),
            inputs,
            self.hidden_size,
            width,
            self.between_steps.blocks,
        )
        names = []
        for long, shape in shapes.items():
            names.append(f"{long}_l{layer}{suffix}")
            empty: Tensor = torch.empty(*shape, device=device, dtype=dtype)
            setattr(self, names[-1], nn.Parameter(empty))
        return names

    def reset_parameters(self) -> None:
        """Draw the parameters as torch.nn does; a layer that normalises begins with gains of 1 and
        shifts of 0."""
        places = self.between_steps.places
        if not places:
            return super().reset_parameters()
        bound = self.hidden_size**-0.5
        for name, parameter in self.named_parameters():
            if name.startswith(("gain_", "shift_")):
                nn.init.constant_(parameter, float(name.startswith("gain_")))
            else:
                nn.init.uniform_(parameter, -bound, bound)

    def flatten_parameters(self) -> None:
        """Put them side by side for cuDNN, where a layer is one of torch.nn's."""
        if self.mode.lower() in engines.TORCH_CELLS and not self.between_steps.reshapes:
            super().flatten_parameters()

    def __prepare_scriptable__(self) -> nn.Module:
        if options := ", ".join(self.between_steps.changed):
            raise RuntimeError(
                f"torch.jit.script compiles torch.nn's layers in place of ours, which have no "
                f"{options}: use torch.compile, torch.export or torch.jit.trace"
            )
        return super().__prepare_scriptable__()

    def extra_repr(self) -> str:
        words = [super().extra_repr(), *(["recompute=True"] if self.recompute else [])]
        words += [f"{name}={value!r}" for name, value in self.between_steps.changed.items()]
        return ", ".join(words)

    def _has_usual_sizes(self) -> bool:
        return (
            self._width("weight_ih_l0") == self.input_size
            and self._width("weight_hh_l0") == (self.proj_size or self.hidden_size)
            and (self.proj_size == 0 or self._width("weight_hr_l0") == self.hidden_size)
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

    def _pack(self, weights: Sequence[Tensor], dtype: torch.dtype | None) -> Tensor | None:
        return pack(
            self.mode.lower(),
            weights,
            num_layers=self.num_layers,
            bidirectional=self.bidirectional,
            present=self._present(),
            between=self.between_steps,
            dtype=dtype,
        )

    def _present(self) -> int:
        return present_bits(
            self.mode.lower(),
            biases=self.bias,
            projection=self.proj_size > 0,
            norm_at=self.between_steps.places,
        )
