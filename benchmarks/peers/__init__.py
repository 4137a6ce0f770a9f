"""Who is measured. One file per peer; the only place where other libraries are imported.

A peer module has one function, ``peer() -> Peer``. Importing it imports no library; a peer that is
not there says why (``missing``), and so does one that cannot run a case (``refuses``).
"""

from __future__ import annotations

import importlib
import importlib.metadata
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..cases import Case
from ..problem import Problem

# In the order of the table's columns.
NAMES = (
    "ours",
    "torch_nn",
    "torch_nn_around",
    "torch_nn_graph",
    "torchrl",
    "loop",
    "zoo_loop",
    "torchrecurrent",
    "torch_compile",
    "onnxruntime",
    "openvino",
    "haste",
    "flashrnn",
    "rtneural",
    "rtneural_xsimd",
    "ours_exported",
    "ours_frozen",
    "ours_int8",
    "torch_int8",
    "ours_invariant",
    "ours_recompute",
    "ours_baseline",
    "ours_plain",
    "ours_header",
    "reference",
)


@dataclass(frozen=True)
class Prepared:
    """``call`` is what is timed. ``results`` calls it and names tensors, to be compared.

    The names are those of ``problem.outputs``; a peer may leave out gradients that it holds in
    another layout, and the record says what was compared.
    """

    call: Callable[[], Any]
    results: Callable[[], dict[str, Tensor]]


class Peer(ABC):
    name: ClassVar[str]
    title: ClassVar[str]  # in tables
    devices: ClassVar[tuple[str, ...]] = ("cpu",)
    has_cells: ClassVar[bool] = False  # of single steps
    has_zoo: ClassVar[bool] = False  # cells of fused_rnn.zoo; which, says ``refuses``
    rounds_to: ClassVar[str | None] = None  # the type of its weights, if not the case's
    has_between: ClassVar[frozenset[str]] = frozenset()  # which of ``Case.between``

    def missing(self, device: str) -> str | None:
        """Why it cannot run here at all, or None."""
        if device not in self.devices:
            return f"does not run on {device}"
        if device == "cuda" and not torch.cuda.is_available():
            return "no CUDA device"
        return self.absent()

    def absent(self) -> str | None:
        """Why the library cannot be used, or None."""
        return None

    def refuses(self, case: Case) -> str | None:
        """Why it cannot run this case, or None."""
        return None

    def refuses_at_all(self, case: Case) -> str | None:
        """``refuses``, or the whole kind of case."""
        if case.loops and not self.has_cells:
            return "has no cells of single steps"
        if bool(case.zoo) > self.has_zoo:
            return "has not this cell"
        if lacking := sorted(case.between - self.has_between):
            return f"has no {' and no '.join(lacking)}"
        return self.refuses(case)

    def case(self, case: Case) -> Case:
        """What it runs when that case is measured: another one, if it shows what something costs.
        Its results are then compared with what is right for the other."""
        return case

    def versions(self) -> dict[str, str]:
        return {}

    def regime(self, case: Case) -> str | None:
        """Which of its ways the library takes, where that is known."""
        return None

    @abstractmethod
    def prepare(self, problem: Problem) -> Prepared:
        """Everything that a user does once: modules, sessions, graphs."""


def load(name: str) -> Peer:
    """A peer by the name of its file; other names are imported as ``module:function``."""
    if name in NAMES:
        return importlib.import_module(f"{__name__}.{name}").peer()
    module, colon, function = name.partition(":")
    if not colon:
        raise ValueError(f"no peer {name!r}; there are {', '.join(NAMES)}")
    return getattr(importlib.import_module(module), function)()


def version(package: str) -> str | None:
    """Of an installed distribution, without importing it."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
