"""Tables of other packages that know torch.nn's layers by their exact type.

Ours, and those that are torch.nn's too, get the entries that torch.nn's have: opacus says that it
cannot train them, and puts its own in their place; thop counts what they do.
"""

from __future__ import annotations

from functools import partial
from operator import attrgetter
from types import ModuleType

from .hybrid import OURS, hybrid
from .imports import when_imported

# Module that has them -> the tables in it.
_TABLES = {
    "opacus.validators": ("ModuleValidator.VALIDATORS", "ModuleValidator.FIXERS"),
    "thop.profile": ("register_hooks",),
}


def _enter(tables: tuple[str, ...], module: ModuleType) -> None:
    for name in tables:
        table = attrgetter(name)(module)
        for theirs, ours in OURS.items():
            if entry := table.get(theirs):
                table[ours] = table[hybrid(theirs)] = entry


for _module, _tables in _TABLES.items():
    when_imported(_module, partial(_enter, _tables))
