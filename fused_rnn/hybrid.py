"""Classes that are ours and torch.nn's at once, or ours and a user's subclass of torch.nn's.

Code that asks ``isinstance(rnn, nn.LSTM)`` takes their instances for what they were, and they run
on our kernels. ``hybrid(nn.LSTM)`` derives from our LSTM, then from nn.LSTM. ``hybrid(Mine)`` of a
user's subclass derives from Mine, then from ``hybrid(nn.LSTM)``: all that Mine defines goes on
counting, and what it calls by ``super()`` is ours. ``obstacle`` says for which subclasses that
would not do.
"""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable
from threading import Lock
from typing import Any

from torch import nn

from .modules import GRU, LSTM, RNN, GRUCell, LSTMCell, RNNCell

Class = type[nn.Module]

OURS: dict[Class, Class] = {
    cls.torch_class: cls for cls in (RNN, LSTM, GRU, RNNCell, LSTMCell, GRUCell)
}

_making = Lock()


def torch_class(kind: Class) -> Class | None:
    """The class of torch.nn, of those that we stand for, that ``kind`` is or derives from."""
    return next((cls for cls in kind.__mro__ if cls in OURS), None)


def original(kind: Class) -> Class | None:
    """What a class of ours stands for; None for users' subclasses of it, and all other classes."""
    return vars(kind).get("torch_class")


def ours(kind: Class) -> Class:
    """The class of ours that ``kind`` is, or that it derives from."""
    return next(cls for cls in kind.__mro__ if cls in OURS.values())


def is_hybrid(kind: Class) -> bool:
    stands_for = original(kind)
    return stands_for is not None and issubclass(kind, stands_for)


def hybrid(kind: Class) -> Class:
    """The class that is ours and ``kind``, which is torch.nn's or a subclass. It is made once.

    Raises what ``kind`` itself raises when somebody derives from it.
    """
    with _making:
        return _hybrid(kind)


def _hybrid(kind: Class) -> Class:
    theirs = torch_class(kind)
    assert theirs is not None, f"{kind} is no recurrent class of torch.nn"
    # A class knows its subclasses while they are in use, so nobody else has to. Another copy of
    # this package may have made some too.
    for known in type.__subclasses__(kind):
        if original(known) is kind and OURS[theirs] in known.__mro__:
            return known
    body: dict[str, Any] = {
        "__doc__": f"{path(kind)} on the kernels of {path(OURS[theirs])}.",
        "__module__": __name__,
        "__qualname__": kind.__qualname__,
    }
    bases: tuple[Any, ...]
    if kind is theirs:
        bases = (_Copied, OURS[kind], kind)
        body["__init__"] = kind.__init__  # ours would come to it by super(), with other arguments
    else:
        bases = (kind, _hybrid(theirs))
    made: Any = types.new_class(kind.__name__, bases, exec_body=lambda new: new.update(body))
    made.torch_class = kind  # now, since what raised while it was made is among the subclasses, too
    return made


def path(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


class _Copied:
    """Copying and pickling of hybrids, which are in no module where they could be found by name."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        parts: Any = super().__reduce_ex__(protocol)
        kind: Any = type(self)
        if not is_hybrid(kind) or isinstance(parts, str) or parts[1][:1] != (kind,):
            return parts
        make, (_, *arguments), *state = parts
        # Classes of torch.nn go by the names of ours, since others may be in the place of theirs.
        stands_for = OURS.get(kind.torch_class, kind.torch_class)
        return _made_again, (stands_for, make, *arguments), *state


def _made_again(stands_for: Class, make: Callable[..., Any], *arguments: Any) -> Any:
    return make(hybrid(original(stands_for) or stands_for), *arguments)


# --- Which classes have one ----------------------------------------------------------------------

# What our forward has no use for: it reads the weights by name.
_WEIGHT_LISTS = ("_flat_weights", "_init_flat_weights", "_update_flat_weights")


def obstacle(kind: Class) -> str:
    """Why ``kind``, torch.nn's or a subclass, would do something else on our kernels, or not run
    there; "" if nothing is in the way.

    That is where its own forward does not go on to the one of torch.nn, and where it defines what
    only torch.nn's forward takes notice of, or what is a name of our own.
    """
    theirs = torch_class(kind)
    if theirs is None:
        return "it derives from a base class of torch.nn's layers, and runs code of its own"
    for cls in kind.__mro__[: kind.__mro__.index(theirs)]:
        for name in ("forward", "__call__"):
            if name in vars(cls) and not _goes_on(cls, name):
                return f"{path(cls)}.{name} does not call super().{name}"
        for name in _WEIGHT_LISTS:
            if name in vars(cls):
                return f"{path(cls)} defines {name}, which only torch.nn's forward reads"
        if taken := names_of_ours(kind) & vars(cls).keys():
            return f"{path(cls)} defines {min(taken)}, a name that ours use themselves"
    if theirs.forward.__module__ != theirs.__module__:
        return f"{path(theirs)}.forward was replaced by one of {theirs.forward.__module__}"
    return ""


def names_of_ours(kind: Class) -> set[str]:
    """What our class has and torch.nn's has not, and what instances and subclasses must not have.

    ``recompute`` and ``between_steps`` are no such names: modules keep them when they become
    torch.nn's again.
    """
    theirs = torch_class(kind)
    assert theirs is not None
    own = {n for cls in OURS[theirs].__mro__ if cls not in theirs.__mro__ for n in vars(cls)}
    return own - set(dir(theirs)) - {"recompute", "between_steps"}


def _goes_on(cls: Class, name: str) -> bool:
    """Whether a method of ``cls``, or another that it calls, speaks of ``super()`` and ``name``."""
    waiting, seen = [name], {name}
    while waiting:
        method = inspect.unwrap(vars(cls)[waiting.pop()])
        words = _words(getattr(method, "__code__", None))
        if {"super", name} <= words:
            return True
        new = {word for word in words if inspect.isfunction(vars(cls).get(word))} - seen
        waiting += new
        seen |= new
    return False


def _words(code: Any) -> set[str]:
    """The names in a function and in those inside it."""
    if not isinstance(code, types.CodeType):
        return set()
    return set(code.co_names).union(*(_words(constant) for constant in code.co_consts))
