"""``torch.jit.script``, which compiles torch.nn's modules in place of ours.

It asks each module of a model for ``__prepare_scriptable__``, and writes what it gets into the
model itself, which would from then on run on torch.nn's modules. So it is given a copy of the
model, with containers of its own around parameters, buffers and all else, which are shared. Models
without modules of ours are left to torch.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch.jit._script
from torch import nn


def has_twin(module: nn.Module) -> bool:
    """Whether the module is exactly of a class of ours, for which torch.nn's can be compiled.

    Not of a user's subclass, whose forward is not ours to replace, nor of a cell that torch.nn does
    not have.
    """
    return vars(type(module)).get("torch_class") is not None


def _copied(model: nn.Module) -> nn.Module:
    """A model that may be changed without changing ``model``; that itself if there is no need."""
    copies: dict[int, nn.Module] = {}
    needed = False

    def copy(value: Any) -> Any:
        nonlocal needed
        if not isinstance(value, nn.Module) or isinstance(value, torch.jit.ScriptModule):
            return value
        if has_twin(value):
            needed = True
            return value
        if id(value) not in copies:
            twin = copies[id(value)] = type(value).__new__(type(value))
            for name, held in value.__dict__.items():
                if name == "_modules":
                    twin.__dict__[name] = {key: copy(module) for key, module in held.items()}
                else:
                    twin.__dict__[name] = copy(held)
        return copies[id(value)]

    twin: nn.Module = copy(model)
    return twin if needed else model


def _preparing_a_copy(prepare: Callable[[Any], Any]) -> Callable[[Any], Any]:
    @functools.wraps(prepare)
    def call(obj: Any) -> Any:
        return prepare(_copied(obj) if isinstance(obj, nn.Module) else obj)

    call._copies_models = True  # type: ignore[attr-defined]
    return call


_torch: Any = torch.jit._script
# Once in a process, however often this module is imported.
if not hasattr(_torch.call_prepare_scriptable_func, "_copies_models"):
    _torch.call_prepare_scriptable_func = _preparing_a_copy(_torch.call_prepare_scriptable_func)
