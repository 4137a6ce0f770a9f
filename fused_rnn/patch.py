"""Put our classes in torch.nn's place, for packages whose code nobody wants to touch.

fused_rnn.patch_torch()                # before the packages that are to use ours are imported
with fused_rnn.patch_torch(): ...      # for a while
python -m fused_rnn run SCRIPT.py ...  # for a whole program
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from threading import RLock
from types import ModuleType, TracebackType
from typing import Any

from torch import nn

from .hybrid import OURS, Class, hybrid, original, path
from .imports import when_imported

_PLACES: tuple[ModuleType, ...] = (nn, nn.modules, nn.modules.rnn)

_lock = RLock()
_in_force: list[Patch] = []  # the last one counts
_dynamo_setting: list[bool] = []  # Dynamo's own allow_rnn, while it is ours that counts


class Patch:
    """What ``patch_torch`` did, to be undone by ``undo`` or at the end of a ``with``.

    Printed, it says which classes are in whose place, and what goes on using torch.nn's: names in
    modules imported before, and classes derived before (``missed``, looked for when it is asked).
    """

    def __init__(self, keep_isinstance: bool) -> None:
        self.classes: dict[Class, Class] = {
            theirs: hybrid(theirs) if keep_isinstance else ours for theirs, ours in OURS.items()
        }
        self._blocks = 0

    @property
    def missed(self) -> list[str]:
        """What goes on using torch.nn's classes, one line for each."""
        return sorted(_missed())

    def apply(self) -> Patch:
        """Put the classes in their places. Done twice, it has to be undone twice."""
        with _lock:
            _in_force.append(self)
            _exchange()
        return self

    def undo(self) -> None:
        """Put there what would be there without this patch. Does nothing where it is undone."""
        with _lock:
            if self in _in_force:
                _in_force.remove(self)
                _exchange()

    def __enter__(self) -> Patch:
        with _lock:
            if self._blocks == 0 and self in _in_force:  # as patch_torch() left it
                _in_force.remove(self)
            self._blocks += 1
            return self.apply()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with _lock:
            self._blocks -= 1
            self.undo()

    def __str__(self) -> str:
        lines = [f"torch.nn.{theirs.__name__} -> {path(c)}" for theirs, c in self.classes.items()]
        return "\n".join([*lines, *(f"missed: {what}" for what in self.missed)])


def patch_torch(*, keep_isinstance: bool = False) -> Patch:
    """Let RNN, LSTM, GRU and the cells of torch.nn be ours, for all who look them up from now on.

    They are exchanged in torch.nn, torch.nn.modules and torch.nn.modules.rnn, so that
    ``nn.LSTM(...)``, ``from torch.nn import LSTM``, ``class Mine(nn.LSTM)`` and
    ``isinstance(rnn, nn.LSTM)`` all mean ours. Models that are made so are pickled with the names
    of this package, and load anywhere. Modules and classes made before, and names imported before,
    go on meaning torch.nn's: patch first, import then.

    Args:
        keep_isinstance: put those there that are both ours and torch.nn's, as ``replace`` has them.
            Their instances are torch.nn's also for code that imported its names before, or asks
            after the patch was undone.

    Returns:
        The patch: print it to see what was done and what was missed, call its ``undo()``, or use it
        as a context manager. Patches may be nested, and undone in any order.

    While a patch is in force, ``torch._dynamo.config.allow_rnn`` is True: Dynamo takes ours for
    torch.nn's then, and would leave them out of its graphs.
    """
    return Patch(keep_isinstance).apply()


def _exchange() -> None:
    """Put the classes of the last patch in their places, or torch.nn's if there is none."""
    classes = _in_force[-1].classes if _in_force else {}
    for place in _PLACES:
        for theirs in OURS:
            name = theirs.__name__
            there = vars(place)[name]
            if there is theirs or original(there) is theirs:  # and not somebody else's
                setattr(place, name, classes.get(theirs, theirs))
    if config := sys.modules.get("torch._dynamo.config"):
        _set_up_dynamo(config)


def _set_up_dynamo(config: Any) -> None:
    if _in_force and not _dynamo_setting:
        _dynamo_setting.append(config.allow_rnn)
        config.allow_rnn = True
    elif _dynamo_setting and not _in_force:
        config.allow_rnn = _dynamo_setting.pop()


when_imported("torch._dynamo.config", _set_up_dynamo)


def _missed() -> Iterator[str]:
    """What holds on to torch.nn's classes, outside of torch itself."""
    theirs = {id(cls): path(cls) for cls in OURS}
    modules = {id(module): (name, module) for name, module in reversed(sys.modules.items())}
    for name, module in modules.values():  # some have several names
        if name.split(".")[0] not in ("torch", __package__):
            for attribute, value in list(getattr(module, "__dict__", {}).items()):
                if id(value) in theirs:
                    yield f"{name}.{attribute} is {theirs[id(value)]}"
    for cls in OURS:
        for derived in _all_subclasses(cls):
            if derived.__module__.split(".")[0] not in ("torch", __package__):
                yield f"{path(derived)} derives from {path(cls)}"


def _all_subclasses(cls: Any) -> Iterator[Any]:
    for derived in type.__subclasses__(cls):
        yield derived
        yield from _all_subclasses(derived)
