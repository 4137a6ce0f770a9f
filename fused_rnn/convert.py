"""Swap torch.nn's recurrent modules in a model for ours, and back.

A swap changes the class of the module and nothing else: the object, its parameters, buffers, hooks,
training flag and parametrizations stay, so optimizers, shared modules and references elsewhere go
on working.

    print(*fused_rnn.survey(model), sep="\n")  # what would be swapped, what not, and why
    model = fused_rnn.replace(model)           # torch.nn -> ours
    model = fused_rnn.restore(model)           # back, e.g. before torch.ao's quantize_dynamic
"""

from __future__ import annotations

import copy
import types
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import nn
from torch.nn.utils import parametrize

from .hybrid import (
    OURS,
    Class,
    hybrid,
    is_hybrid,
    names_of_ours,
    obstacle,
    original,
    ours,
    path,
)
from .recurrent import Recurrent

Filter = Callable[[str, nn.Module], bool]
Model = TypeVar("Model", bound=nn.Module)

_GIVEN_UP = "a full graph in torch.compile unless torch._dynamo.config.allow_rnn is set"


@dataclass(frozen=True)
class Finding:
    """One recurrent module of a model and what ``replace`` would do, or why it would not.

    Attributes:
        name: its path inside the model, "" for the model itself.
        type: its class.
        swapped_for: the class that it would get; None if it stays.
        reason: why it stays.
        gives_up: what it could do and cannot once it is swapped.
    """

    name: str
    type: str
    swapped_for: str | None
    reason: str = ""
    gives_up: str = ""

    def __str__(self) -> str:
        target = f"-> {self.swapped_for}" if self.swapped_for else f"stays: {self.reason}"
        price = f" (gives up {self.gives_up})" if self.gives_up else ""
        return f"{self.name or '(model)'}: {self.type} {target}{price}"


def replace(
    model: Model,
    filter_fn: Filter | None = None,
    *,
    inplace: bool = True,
    keep_isinstance: bool = False,
) -> Model:
    """Turn torch.nn's RNN, LSTM, GRU and cells in ``model`` into ours, keeping their parameters.

    Args:
        model: any module, itself included.
        filter_fn: ``filter_fn(name, module) -> bool`` says which to take; all if None.
        inplace: change ``model``; otherwise a deep copy.
        keep_isinstance: let every module remain an instance of what it is, for code that asks
            ``isinstance(rnn, nn.LSTM)``. Users' subclasses of torch.nn's classes are taken too, if
            they go on to torch.nn's forward.

    Returns:
        The model. ``survey``, asked before with the same arguments, tells what is swapped, what is
        not, and why.

    Without ``keep_isinstance`` only the exact classes are taken, and ``isinstance(rnn, nn.LSTM)``
    is False afterwards. With it, ``torch.compile`` leaves these modules out of its graph, as it
    does with torch.nn's, and ``fullgraph=True`` raises: Dynamo refuses all that is an instance of
    nn.RNN, nn.LSTM or nn.GRU. It takes them, and makes a full graph of ours, after
    ``torch._dynamo.config.allow_rnn = True``.

    Tools that ask for the type itself, ``type(rnn) is nn.LSTM``, see neither kind: torch.ao's
    ``quantize_dynamic`` is one. ``restore`` the model for them.
    """
    return _swap(model, lambda module: _ours(module, keep_isinstance), filter_fn, inplace)


def restore(model: Model, filter_fn: Filter | None = None, *, inplace: bool = True) -> Model:
    """The inverse of ``replace``: turn our modules into what they stand for.

    Args:
        model: any module, itself included.
        filter_fn: ``filter_fn(name, module) -> bool`` says which to take; all if None.
        inplace: change ``model``; otherwise a deep copy.

    Returns:
        The model.

    Warns:
        UserWarning: of modules that have to stay: their ``forward`` was set on the instance
            meanwhile, or they have options that torch.nn has not.

    Layers that stand for none of torch.nn's, such as ``BlockGRU``, stay as they are.
    """
    return _swap(model, _theirs, filter_fn, inplace, warn=True)


def survey(
    model: nn.Module, filter_fn: Filter | None = None, *, keep_isinstance: bool = False
) -> list[Finding]:
    """What ``replace`` would do with each recurrent module of ``model``. Changes nothing.

    Args:
        model: any module, itself included.
        filter_fn: as for ``replace``.
        keep_isinstance: as for ``replace``.

    Returns:
        A finding for each, in the order of ``model.named_modules()``; printed, it is one line.
        Modules that are recurrent and none of torch.nn's are named too: scripted ones, quantized
        ones, and layers of Keras.
    """
    findings = []
    for name, module in model.named_modules():
        found = _ours(module, keep_isinstance)
        if found is None:
            continue
        target, reason, gives_up = None, "", ""
        if isinstance(found, str):
            reason = found
        elif filter_fn is not None and not filter_fn(name, module):
            reason = "filter_fn said no"
        else:
            target = f"{__package__}.{ours(found).__name__}"
            gives_up = _GIVEN_UP if is_hybrid(found) and issubclass(found, nn.RNNBase) else ""
        kind = path(parametrize.type_before_parametrizations(module))
        findings.append(Finding(name, kind, target, reason, gives_up))
    return findings


# --- What becomes of a module: its new class, or why it stays; None if nothing is to be said ------

Choice = Callable[[nn.Module], "Class | str | None"]

_NAMES = {cls.__name__ for cls in OURS}

# Where there are classes of these names that are none of torch.nn's, and what they are.
_ELSEWHERE = {
    "torch.ao": "torch.ao's, which quantizes or stands in for it with code of its own",
    "keras": "a Keras layer, which loops over time itself: fused_rnn.keras.enable() is for these",
}


def _ours(module: nn.Module, keep_isinstance: bool) -> Class | str | None:
    kind = parametrize.type_before_parametrizations(module)
    if isinstance(module, torch.jit.ScriptModule):
        scripted = getattr(module, "original_name", "") in _NAMES
        return "scripted, its code is compiled already" if scripted else None
    for cls in kind.__mro__:
        for package, what in _ELSEWHERE.items():
            if cls.__name__ in _NAMES and cls.__module__.startswith(f"{package}."):
                return what
    if not isinstance(module, (nn.RNNBase, nn.RNNCellBase)):
        return None
    if isinstance(module, (Recurrent, *OURS.values())):
        if not keep_isinstance or kind not in OURS.values():
            return "already ours"
        kind = original(kind) or kind
    elif reason := obstacle(kind):
        return reason
    if reason := _attribute(module, names_of_ours(kind)):
        return reason
    if not keep_isinstance and kind not in OURS:
        return "a subclass, which only keep_isinstance=True takes"
    if not keep_isinstance:
        return OURS[kind]
    try:
        return hybrid(kind)
    except Exception as error:  # of its metaclass or __init_subclass__: of any type
        return f"it cannot be derived from: {type(error).__name__}: {error}"


def _theirs(module: nn.Module) -> Class | str | None:
    theirs = original(parametrize.type_before_parametrizations(module))
    return theirs and (_attribute(module) or _options(module) or theirs)


def _options(module: nn.Module) -> str:
    """What only a layer of ours does."""
    names = module.between_steps.changed if isinstance(module, Recurrent) else ()
    return f"torch.nn has no {', '.join(names)}" if names else ""


def _attribute(module: nn.Module, names: Iterable[str] = ()) -> str:
    """Why this very module must keep its class: for an attribute that does not go with another."""
    if "forward" in vars(module):
        return "its forward was set on the instance, and may hold on to the one of its class"
    if taken := vars(module).keys() & names:
        return f"its attribute {min(taken)} was set on the instance, and is a name of ours"
    return ""


def _swap(
    model: Model, choose: Choice, filter_fn: Filter | None, inplace: bool, warn: bool = False
) -> Model:
    if not inplace:
        model = copy.deepcopy(model)
    for name, module in list(model.named_modules()):
        target = choose(module)
        if target is None or filter_fn is not None and not filter_fn(name, module):
            continue
        if isinstance(target, type):
            _set_class(module, target)
        elif warn:
            warnings.warn(f"{name or '(model)'} stays ours: {target}", stacklevel=3)
    return model


def _set_class(module: nn.Module, target: Class) -> None:
    if parametrize.is_parametrized(module):
        # torch gave the module a class of its own, derived from the original, with properties for
        # the weights. Make the same one over the new class.
        body = {k: v for k, v in vars(type(module)).items() if k not in ("__dict__", "__weakref__")}
        target = types.new_class(
            f"Parametrized{target.__name__}", (target,), exec_body=lambda new: new.update(body)
        )
    vars(module).pop("_verified", None)  # it may have changed while it was torch.nn's
    vars(module).pop("_frozen", None)
    module.__class__ = target
