"""What our classes share that stand for those of torch.nn, layers and cells."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor, fx, nn
from torch.nn.utils import parametrize

from . import scripting
from .frozen import Freezable
from .torch_internals import is_tracing


def torchs_own(name: str) -> Any:
    """The class of torch.nn, also while a patch has one of another copy of this package there."""
    there = getattr(nn, name)
    return vars(there).get("torch_class", there)


class TorchShaped(Freezable):
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

    def _fx_node(
        self,
        input: Any,
        hx: Any,
        lengths: Any = None,
        reset: Any = None,
        reset_to: Any = None,
        return_states: Any = False,
    ) -> Any:
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
        given = {"lengths": lengths, "reset": reset, "reset_to": reset_to}
        given = {name: value for name, value in given.items() if value is not None}
        if return_states is not False:
            given["return_states"] = return_states
        return tracer.create_proxy("call_module", path, args, given) if path else None

    def _split_hidden(self, hx: Any) -> tuple[Tensor, Tensor | None]:
        return hx, None

    def _join_hidden(self, h: Tensor, c: Tensor | None) -> Any:
        return h


class HiddenPair(TorchShaped):
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
