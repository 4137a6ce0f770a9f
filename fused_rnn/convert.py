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
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.utils import parametrize

from .modules import GRU, LSTM, RNN, GRUCell, LSTMCell, RNNCell

Filter = Callable[[str, nn.Module], bool]

Classes = dict[type[nn.Module], type[nn.Module]]

_OURS: Classes = {cls.torch_class: cls for cls in (RNN, LSTM, GRU, RNNCell, LSTMCell, GRUCell)}
_TORCH: Classes = {ours: theirs for theirs, ours in _OURS.items()}


@dataclass(frozen=True)
class Finding:
    """One recurrent module of a model and what ``replace`` would do, or why it would not."""

    name: str  # the path inside the model, "" for the model itself
    type: str
    swapped_for: str | None
    reason: str = ""

    def __str__(self) -> str:
        target = f"-> {self.swapped_for}" if self.swapped_for else f"stays: {self.reason}"
        return f"{self.name or '(model)'}: {self.type} {target}"


def replace(
    model: nn.Module, filter_fn: Filter | None = None, *, inplace: bool = True
) -> nn.Module:
    """Turn torch.nn's RNN, LSTM, GRU and cells in ``model`` into ours, keeping their parameters.

    Args:
        model: any module, itself included.
        filter_fn: ``filter_fn(name, module) -> bool`` says which to take; all if None.
        inplace: change ``model``; otherwise a deep copy.

    Returns:
        The model. ``survey(model)``, asked before, tells what is swapped, what is not, and why.

    Only the exact classes are taken. Subclasses may rely on ``isinstance``, or on code of their own
    around the operator, and stay; so do scripted modules.
    """
    return _swap(model, _OURS, filter_fn, inplace)


def restore(
    model: nn.Module, filter_fn: Filter | None = None, *, inplace: bool = True
) -> nn.Module:
    """The inverse of ``replace``, with the same arguments: turn our modules into torch.nn's."""
    return _swap(model, _TORCH, filter_fn, inplace)


def survey(model: nn.Module, filter_fn: Filter | None = None) -> list[Finding]:
    """What ``replace(model, filter_fn)`` would do with each recurrent module. Changes nothing."""
    scripted_names = {cls.__name__ for cls in _OURS}
    findings = []
    for name, module in model.named_modules():
        kind = parametrize.type_before_parametrizations(module)
        target, reason = None, ""
        if isinstance(module, torch.jit.ScriptModule):
            if getattr(module, "original_name", "") not in scripted_names:
                continue
            reason = "scripted, its code is compiled already"
        elif not isinstance(module, (nn.RNNBase, nn.RNNCellBase)):
            continue
        elif kind in _TORCH:
            reason = "already ours"
        elif kind not in _OURS:
            reason = "a subclass, not one of torch.nn's own classes"
        elif filter_fn is not None and not filter_fn(name, module):
            reason = "filter_fn said no"
        else:
            target = f"{__package__}.{_OURS[kind].__name__}"
        findings.append(Finding(name, f"{kind.__module__}.{kind.__qualname__}", target, reason))
    return findings


def _swap(model: nn.Module, classes: Classes, filter_fn: Filter | None, inplace: bool) -> nn.Module:
    if not inplace:
        model = copy.deepcopy(model)
    for name, module in list(model.named_modules()):
        target = classes.get(parametrize.type_before_parametrizations(module))
        if target is not None and (filter_fn is None or filter_fn(name, module)):
            _set_class(module, target)
    return model


def _set_class(module: nn.Module, target: type[nn.Module]) -> None:
    if parametrize.is_parametrized(module):
        # torch gave the module a class of its own, derived from the original, with properties for
        # the weights. Make the same one over the new class.
        body = {k: v for k, v in vars(type(module)).items() if k not in ("__dict__", "__weakref__")}
        target = type(f"Parametrized{target.__name__}", (target,), body)
    module.__class__ = target
