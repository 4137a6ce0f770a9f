"""What is measured: one case is one layer stack, one input and one pass. Suites are lists of cases.

Suites are data, ``suites/NAME.json``: ``about`` (what the shapes stand for), ``phases``, and
``groups``. A group gives fields of ``Case``, each as one value or as a list; lists multiply.
``BTH`` gives triples, for shapes that are no grid. ``peers`` narrows who runs a group.
"""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

SUITES = Path(__file__).with_name("suites")

# The passes. inference: no_grad, eval. forward: what the backward needs is saved. training: forward
# and backward, dx included. decode: one step of one stream that carries its state, no_grad. stream:
# T steps of one that began with zeros, likewise. loop: a cell of single steps, called from Python
# for each of them, and the backward of the last state, dx included; loop_weights: the same without
# dx.
PHASES = ("inference", "forward", "training", "decode", "stream", "loop", "loop_weights")
LOOPS = ("loop", "loop_weights")
WHOLE = ("inference", "forward", "training")  # of whole sequences from zeros
CELLS = ("lstm", "gru", "rnn", "rnn_relu")
ZOO = "zoo."  # before the name of a cell of fused_rnn.zoo, as in "zoo.MGU"
GATES = {"lstm": 4, "gru": 3, "rnn": 1, "rnn_relu": 1}
# Fields of Case for what happens between two steps, and their values for a layer as of torch.nn.
BETWEEN: dict[str, Any] = {"resets": 0.0, "blocks": 1, "norm": ""}
BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class Case:
    """Sizes as everywhere: B sequences, T steps, I inputs (0: as many as H), H units."""

    cell: str
    B: int
    T: int
    H: int
    I: int = 0  # noqa: E741
    layers: int = 1
    bidirectional: bool = False
    bias: bool = True
    proj: int = 0
    shortest: float = 1.0  # < 1: packed, lengths uniform in [shortest * T, T]
    resets: float = 0.0  # how likely the state begins anew before a step of a sequence
    blocks: int = 1  # on the diagonal of W_hh
    norm: str = ""  # "layer" or "rms": what fused_rnn's argument of that name does
    phase: str = "inference"
    dtype: str = "float32"
    device: str = "cpu"

    def __post_init__(self) -> None:
        known = self.cell in CELLS or self.zoo
        if not known or self.phase not in PHASES or self.dtype not in BYTES:
            raise ValueError(f"no such cell, phase or dtype: {self}")
        if min(self.B, self.T, self.H, self.layers) < 1 or not 0 < self.shortest <= 1:
            raise ValueError(f"sizes out of range: {self}")
        if self.loops and (self.layers > 1 or self.bidirectional or self.proj or self.ragged):
            raise ValueError(f"a cell is one layer and direction without projection: {self}")
        if not 0 <= self.resets <= 1 or self.blocks < 1 or self.H % self.blocks:
            raise ValueError(f"resets or blocks out of range: {self}")
        if self.norm not in ("", "layer", "rms"):
            raise ValueError(f"no such norm: {self}")
        alone = self.layers == self.directions == 1 and not (self.proj or self.ragged)
        if self.between and not (alone and self.phase in WHOLE):
            raise ValueError(f"resets, blocks and norm are for one padded layer: {self}")
        if self.zoo and not (self.between <= {"blocks"} and alone and self.phase in WHOLE):
            raise ValueError(f"a cell of the zoo is one padded layer, in blocks or not: {self}")
        if self.I == 0:
            object.__setattr__(self, "I", self.H)

    @property
    def zoo(self) -> str:
        """The name in fused_rnn.zoo of a cell that torch.nn does not have."""
        return self.cell.removeprefix(ZOO) if self.cell.startswith(ZOO) else ""

    @property
    def loops(self) -> bool:
        """Whether it is about a cell of single steps."""
        return self.phase in LOOPS

    @property
    def carries(self) -> bool:
        """Whether a call goes on from the states of the one before."""
        return self.phase in ("decode", "stream")

    @property
    def trains(self) -> bool:
        """Whether there is a backward."""
        return self.phase == "training" or self.loops

    @property
    def keeps(self) -> bool:
        """Whether what a backward needs is kept, be there one or not."""
        return self.trains or self.phase == "forward"

    @property
    def wants_dx(self) -> bool:
        return self.phase in ("training", "loop")

    @property
    def between(self) -> frozenset[str]:
        """What happens between two steps that torch.nn does not have."""
        return frozenset(name for name in BETWEEN if getattr(self, name) != BETWEEN[name])

    @property
    def plain(self) -> Case:
        """The same without it."""
        return replace(self, **BETWEEN)

    @property
    def directions(self) -> int:
        return 2 if self.bidirectional else 1

    @property
    def width(self) -> int:
        """Of h, and so of an output of one direction."""
        return self.proj or self.H

    @property
    def ragged(self) -> bool:
        return self.shortest < 1

    def lengths(self) -> list[int]:
        """Of every sequence; the first is the longest, so that there are T steps."""
        if not self.ragged:
            return [self.T] * self.B
        draw = random.Random(self.B * 1_000_003 + self.T)
        low = max(1, round(self.shortest * self.T))
        return [self.T, *(draw.randint(low, self.T) for _ in range(self.B - 1))]

    @property
    def rows(self) -> int:
        """Valid steps of all sequences: what there is to compute."""
        return sum(self.lengths())

    @property
    def shape(self) -> str:
        parts = [f"B{self.B}", f"T{self.T}", f"H{self.H}"]
        if self.I != self.H:
            parts.append(f"I{self.I}")
        if self.layers > 1:
            parts.append(f"{self.layers} layers")
        if self.bidirectional:
            parts.append("bi")
        if self.proj:
            parts.append(f"proj {self.proj}")
        if not self.bias:
            parts.append("no bias")
        if self.ragged:
            parts.append("ragged")
        if self.resets:
            parts.append(f"resets {100 * self.resets:g}%")
        if self.blocks > 1:
            parts.append(f"blocks {self.blocks}")
        if self.norm:
            parts.append(f"norm {self.norm}")
        return " ".join(parts)

    @property
    def label(self) -> str:
        return f"{self.cell} {self.shape} {self.phase} {self.dtype} {self.device}"

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


FIELDS = tuple(field.name for field in fields(Case))


@dataclass(frozen=True)
class Item:
    """A case of a suite, and the only peers that run it (None: all)."""

    case: Case
    peers: tuple[str, ...] | None = None


def suite_names() -> list[str]:
    return sorted(path.stem for path in SUITES.glob("*.json"))


def read_suite(name: str) -> dict[str, Any]:
    """A suite by its name, or by the path of a file of one's own."""
    path = Path(name) if name.endswith(".json") else SUITES / f"{name}.json"
    if not path.is_file():
        raise ValueError(f"no suite {name!r}; there are {', '.join(suite_names())}")
    return json.loads(path.read_text())


def load_suite(
    name: str,
    *,
    device: str = "cpu",
    dtypes: list[str] | None = None,
    cells: list[str] | None = None,
    phases: list[str] | None = None,
    match: str = "",
) -> list[Item]:
    """The cases of a suite, each once, in its order; the arguments narrow the choice."""
    suite = read_suite(name)
    items: dict[Case, Item] = {}
    for group in suite["groups"]:
        own = group.get("phases", suite.get("phases", ["inference"]))
        for case in _expand({"phase": own, **group}):
            own_dtype = "dtype" in group
            for dtype in [case.dtype] if own_dtype else dtypes or ["float32"]:
                case = replace(case, dtype=dtype, device=device)
                peers = tuple(group["peers"]) if "peers" in group else None
                items.setdefault(case, Item(case, peers))
    return [
        item
        for item in items.values()
        if (not cells or item.case.cell in cells or item.case.cell.split("_")[0] in cells)
        and (not phases or item.case.phase in phases)
        and (not dtypes or item.case.dtype in dtypes)
        and match in item.case.label
    ]


def _expand(group: dict[str, Any]) -> Iterator[Case]:
    """The product of all lists, the first field slowest. A decode step has B = T = 1."""
    axes = {k: v for k, v in group.items() if k not in ("about", "phases", "peers", "BTH")}
    if unknown := axes.keys() - set(FIELDS):
        raise ValueError(f"a suite's group has unknown fields: {', '.join(sorted(unknown))}")
    lists = {k: v if isinstance(v, list) else [v] for k, v in axes.items()}
    phases, others = lists.pop("phase"), lists
    for triple in group.get("BTH", [None]):
        sizes = dict(zip("BTH", triple, strict=True)) if triple else {}
        for values in itertools.product(*others.values()):
            for phase in phases:
                own = {**sizes, **dict(zip(others, values, strict=True)), "phase": phase}
                if phase == "decode":
                    own |= {"B": own.get("B", 1), "T": 1}
                yield Case(**own)
