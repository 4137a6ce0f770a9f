"""Modules whose weights are packed once, for serving: ``freeze``."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling, is_exporting
from torch.nn import Parameter

from . import ops
from .packed import NOT_PACKED, Packed
from .torch_internals import transformed

Model = TypeVar("Model", bound=nn.Module)


class Frozen:
    """What kernels made of the weights of a module, in which type, and of which weights.

    ``packed`` is for calls, and without a tensor where there is nothing to pack; ``words`` says to
    direct calls where that tensor is, and how many words it has. Copied or pickled it is empty:
    then it is of no weights, and the module that comes out packs its own, in the same type.
    """

    __slots__ = ("_memory", "_stamps", "_weights", "dtype", "packed", "words")

    def __init__(
        self,
        dtype: torch.dtype | None,
        weights: Sequence[Tensor] = (),
        tensor: Tensor | None = None,
    ) -> None:
        self.dtype = dtype
        self.packed = Packed(tensor, dtype is torch.int8 and all(map(_has_int8, weights)))
        self.words = None if tensor is None else (tensor.data_ptr(), tensor.numel())
        self._weights = list(weights)
        self._stamps = [_stamp(w) for w in weights]
        # Nobody else gets this memory: kernels know weights by their addresses and versions.
        self._memory = [w.detach() for w in weights]

    def is_empty(self) -> bool:
        return not self._weights

    def is_of(self, weights: Sequence[Tensor]) -> bool:
        """Whether it is of these very tensors, whatever was written to them since."""
        return len(weights) == len(self._weights) and all(
            w is mine for w, mine in zip(weights, self._weights, strict=True)
        )

    def is_up_to_date(self) -> bool:
        return all(_stamp(w) == s for w, s in zip(self._weights, self._stamps, strict=True))

    def __reduce__(self) -> Any:
        return Frozen, (self.dtype,)


def _has_int8(weight: Tensor) -> bool:
    return weight.is_cpu and weight.dtype in (torch.float32, torch.bfloat16, torch.float16)


def _stamp(weight: Tensor) -> tuple[int, int]:
    return weight.data_ptr(), -1 if weight.is_inference() else weight._version


class Freezable(nn.Module):
    """A module that ``freeze`` can freeze: it has weights that kernels pack."""

    _frozen: Frozen | None = None

    def _pack(self, weights: Sequence[Tensor], dtype: torch.dtype | None) -> Tensor | None:
        """The ``Packed.tensor`` of these weights; None if there is nothing to pack."""
        raise NotImplementedError

    def _weights(self) -> list[Any]:
        """The weights of a call; those that are missing may be None."""
        raise NotImplementedError

    def _freeze(self, dtype: torch.dtype | None) -> None:
        """Pack the weights as they are."""
        with torch.inference_mode(False), torch.no_grad():
            for name, p in list(self._parameters.items()):
                if p is not None and p.is_inference():  # torch does not know when it is written to
                    setattr(self, name, Parameter(p.clone(), requires_grad=False))
            weights = [w for w in self._weights() if w is not None]
            self._frozen = Frozen(dtype, weights, self._pack(weights, dtype))

    def _packed(self, weights: Sequence[Tensor | None]) -> Packed:
        """What is packed of the weights of a call, made anew if they were written to. Nothing is of
        weights that are not the module's own."""
        frozen = self._frozen
        if frozen is None:
            return NOT_PACKED
        if ops.wants_grad(weights):
            raise RuntimeError(
                f"{type(self).__name__}: frozen for inference, but its weights require gradients: "
                "train the model that it was before, or a copy"
            )
        if is_compiling():  # kernels see themselves whether it is of these weights
            return NOT_PACKED if is_exporting() else frozen.packed
        there = [w for w in weights if w is not None]
        if transformed() or not frozen.is_empty() and not frozen.is_of(there):
            return NOT_PACKED
        if frozen.is_empty() or not frozen.is_up_to_date():
            self._freeze_again()
        frozen = self._frozen
        return NOT_PACKED if frozen is None else frozen.packed

    def train(self, mode: bool = True) -> Any:
        if mode and self._frozen is not None:
            raise RuntimeError(
                f"{type(self).__name__}: frozen for inference, and cannot train: train the model "
                "that it was before, which freeze(model, inplace=False) leaves as it is"
            )
        return super().train(mode)

    # Where weights change as a whole, they are packed at once: compiled programs take what there
    # is, and never ask.

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        frozen = self.__dict__.get("_frozen")
        if frozen is not None and name in self._parameters:
            self._frozen = Frozen(frozen.dtype)  # until a call: more weights may follow

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._freeze_again()

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        module = super()._apply(fn, recurse)
        self._freeze_again()
        return module

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._freeze_again()

    def _freeze_again(self) -> None:
        if self._frozen is not None:
            self._freeze(self._frozen.dtype)


def freeze(model: Model, *, inplace: bool = True, dtype: torch.dtype | None = None) -> Model:
    """Make ``model`` ready for serving: its layers pack their weights once, and not at every call.

    Args:
        model: a layer or cell of this package, or any module that has some in it.
        inplace: freeze ``model`` itself; otherwise a deep copy, and ``model`` can go on training.
        dtype: of the packed W_ih and W_hh: None for that in which layers compute; torch.bfloat16,
            half as many bytes, to which they are rounded; or torch.int8, a quarter as many. Of
            bfloat16 products and sums are in float32: single steps through layers of 512 units and
            more, which wait for memory, are faster then, and smaller layers slower. Layers of
            float64 stay in it. Of int8 see below.

    Returns:
        The model, in eval mode, of whose parameters none requires gradients. It is called as
        before, has the same parameters and ``state_dict``, and can be copied, pickled, compiled and
        exported. Several threads may call it at once, with one copy of the packed weights.

    Raises:
        TypeError: ``model`` is no module.
        ValueError: it has no layer of this package; another dtype; torch.int8 for layers of
            float64, not on the CPU, or with more than 65536 inputs or units.

    With ``dtype=torch.int8`` products are of integers, as in Alvarez, Prabhavalkar and Bakhtin 2016
    (arXiv:1607.04683). A row of W_ih or W_hh, and in each step the row of a sequence in x or h, is
    ``scale * n``, where the scale is its largest number in magnitude divided by 127, and n are
    integers from -127 to 127. Their products are summed exactly, in 32 bits, and multiplied with
    both scales in float32; biases, gates and states are those of any layer. A row of x or h with
    an infinity or NaN gives NaN. Where there are no kernels, plain torch computes the same
    integers.

    Beside its parameters a frozen layer holds the packed copy, without ``dtype`` of about their
    size (of 16-bit parameters twice that). Each call looks whether the copy still is of these
    parameters:

    - Training raises a RuntimeError: ``train()``, and a call with gradients on where a parameter
      requires them. Gradients of the input are as ever.
    - Changed weights are packed again: after ``load_state_dict``, ``to`` and other conversions at
      once; after a new parameter or a write into one (``copy_``, an optimizer's step) at the next
      call. Nobody sees what is written through ``parameter.data`` or NumPy: freeze again then.
    - Calls with other weights (``torch.func.functional_call``, a parametrization, autocast) run as
      if the layer was not frozen, and so do calls that want the gradient of the input. So do layers
      on tile units, but for int8, on CUDA, and in exported programs.

    Without ``dtype`` results are those of the model before, up to rounding; to the last bit where
    that packs its weights at every call, as it does for 16-bit types and most sequences, but not
    for single steps.

    Examples:
        >>> model = fused_rnn.freeze(fused_rnn.LSTM(10, 20))
        >>> with torch.inference_mode():
        ...     output, (h, c) = model(torch.randn(1, 1, 10))
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a module, got {type(model).__name__}")
    if not any(isinstance(module, Freezable) for module in model.modules()):
        raise ValueError(
            f"model: expected layers of fused_rnn, got {type(model).__name__} without any: "
            "fused_rnn.replace puts them in the place of torch.nn's"
        )
    if dtype not in (None, torch.bfloat16, torch.int8):
        raise ValueError(f"dtype: expected None, torch.bfloat16 or torch.int8, got {dtype}")
    for module in model.modules() if dtype is torch.int8 else ():
        if isinstance(module, Freezable):
            _check_int8(module)
    if not inplace:
        model = copy.deepcopy(model)
    model.eval().requires_grad_(False)
    for module in model.modules():
        if isinstance(module, Freezable):
            module._freeze(dtype)
    return model


def _check_int8(module: Freezable) -> None:
    for weight in module._weights():
        if weight is not None and not _has_int8(weight):
            raise ValueError(
                "dtype: torch.int8 is for layers of float32, bfloat16 or float16 on the CPU, got "
                f"{type(module).__name__} of {weight.dtype} on {weight.device}"
            )
