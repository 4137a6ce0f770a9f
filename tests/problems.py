"""Problems: a layer with any of its options, of any cell, and a call of it.

A ``Config`` says one in words and numbers, so it can be drawn at random, written down and made
smaller. ``make`` makes the layer and its tensors of NumPy's numbers, which do not depend on the
processor. What the layer has to give, ``plain`` says for the cells of the package.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import Named
from random_cells import Drawn
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

import fused_rnn
from fused_rnn import ops, reference, zoo
from fused_rnn.reference import CELLS, Cell

# The classes of the package.
KINDS = ("RNN", "LSTM", "GRU", "PeepholeLSTM", "BlockGRU")
ZOO = tuple(f"zoo.{name}" for name in zoo.__all__ if isinstance(getattr(zoo, name), type))
OPTIONS = (
    "lengths",
    "packed",
    "reset",
    "reset_to",
    "reset_to of each step",
    "return_states",
    "norm",
    "zoneout",
    "recurrent_dropout",
    "dropout_over_time",
    "weight_dropout",
    "blocks",
    "projection",
    "recompute",
)
NEVER_TOGETHER = [
    {"lengths", "packed"},
    {"reset_to", "reset_to of each step"},
    {"projection", "zoneout"},
    {"projection", "blocks"},
]


@dataclass(frozen=True)
class Config:
    """``cell`` is a name in fused_rnn, such as "LSTM" or "zoo.LEM", or one of ``random_cells``.

    ``layout`` is padded, unbatched, lengths, or packed. ``reset`` is none, or what states begin
    with: "zeros", "states", or of each step, "steps". ``single`` is one step of the cell's module.
    """

    cell: str | Drawn = "GRU"
    input_size: int = 1
    hidden_size: int = 1
    num_layers: int = 1
    bias: bool = True
    batch_first: bool = False
    dropout: float = 0.0
    bidirectional: bool = False
    nonlinearity: str = "tanh"
    proj_size: int = 0
    recompute: bool = False
    norm: str | None = None
    norm_at: tuple[str, ...] | None = None
    norm_eps: float = 1e-5
    zoneout: float | tuple[float, float] = 0.0
    recurrent_dropout: float = 0.0
    dropout_over_time: bool = False
    weight_dropout: float = 0.0
    blocks: int = 1
    training: bool = True
    single: bool = False
    time: int = 1
    batch: int = 1
    layout: str = "padded"
    hx: bool = False
    reset: str = ""
    states: bool = False
    strided: bool = False
    threads: int = 1
    dtype: str = "float64"
    seed: int = 0

    def __repr__(self) -> str:
        return f"Config({', '.join(f'{name}={value!r}' for name, value in self.changed.items())})"

    @property
    def changed(self) -> dict[str, Any]:
        """What is not as small as it can be."""
        found = {f.name: getattr(self, f.name) for f in fields(self)}
        return {f.name: found[f.name] for f in fields(self) if found[f.name] != f.default}

    @property
    def known(self) -> Cell:
        return cell_of(self.cell, self.nonlinearity)

    @property
    def pair(self) -> bool:
        return len(self.known.states) > 1

    @property
    def projects(self) -> bool:
        return can_have(self.cell, "projection")

    @property
    def fits(self) -> bool:
        """Whether there is such a layer and such a call."""
        places = self.known.norm_places
        norm_at = self.norm_at or ()
        recurrent = self.known.recurrent_gates > 0
        drops = self.recurrent_dropout or self.weight_dropout or self.blocks > 1
        return (
            self.hidden_size % self.blocks == 0
            and (self.cell == "RNN" or self.nonlinearity == "tanh")
            and (not self.proj_size or (self.projects and self.proj_size < self.hidden_size))
            and not (self.proj_size and (self.zoneout or self.blocks > 1))
            and (self.norm is None) == (self.norm_at is None)
            and set(norm_at) <= set(places)
            and not ("sum" in norm_at and {"input", "recurrent"} & set(norm_at))
            and (self.pair or not isinstance(self.zoneout, tuple))
            and (recurrent or not drops)
            and (not self.dropout or self.num_layers > 1)
            and (not self.single or (self.time == 1 and self.batch > 0 and self.steps_alone))
        )

    @property
    def steps_alone(self) -> bool:
        """Whether all is as the module of a single step has it."""
        own = {"cell", "input_size", "hidden_size", "bias", "nonlinearity", "batch", "hx"}
        own |= {"single", "strided", "threads", "dtype", "seed"}
        changed = self.changed.keys() - own
        return not changed and self.cell not in KINDS[3:]

    def arguments(self) -> dict[str, Any]:
        """Of the constructor, but the sizes."""
        names = ["bias", "dtype"]
        if not self.single:
            names += ["num_layers", "batch_first", "dropout", "bidirectional", "recompute"]
        names += [name for name in fused_rnn.between.Options.__annotations__]
        found = {name: getattr(self, name) for name in names if name in self.changed}
        if self.cell == "RNN":
            found["nonlinearity"] = self.nonlinearity
        if self.proj_size:
            found["proj_size"] = self.proj_size
        return found | {"dtype": getattr(torch, self.dtype)}


@functools.lru_cache(maxsize=64)
def kind_of(cell: str | Drawn) -> Any:
    """The class of its layers."""
    if isinstance(cell, Drawn):
        return cell.declare()
    return functools.reduce(getattr, cell.split("."), fused_rnn)


def cell_of(cell: str | Drawn, nonlinearity: str = "tanh") -> Cell:
    own = {"RNN": f"rnn_{nonlinearity}", "LSTM": "lstm", "GRU": "gru"}
    name = own.get(cell) if isinstance(cell, str) else None
    return CELLS[name or kind_of(cell).cell]


@functools.lru_cache(maxsize=1024)
def can_have(cell: str | Drawn, option: str) -> bool:
    """Whether there are layers of a cell with this one of ``OPTIONS``."""
    known = cell_of(cell)
    if option in ("recurrent_dropout", "weight_dropout", "blocks"):
        return known.recurrent_gates > 0
    if option == "projection":
        return known.projectable
    return True


def fit(options: Sequence[str]) -> bool:
    return not any(pair <= set(options) for pair in NEVER_TOGETHER)


@functools.lru_cache(maxsize=1024)
def smooth(cell: str | Drawn) -> bool:
    """Whether there is no place where a rounding may flip a derivative, or a value."""
    source = cell_of(cell).source
    return not (source and re.search(r" \? |\b(relu|abs|sign|maximum|minimum)", source.header))


def some_options(
    rng: random.Random, often: float, known: Sequence[str] = OPTIONS
) -> tuple[str, ...]:
    """Each of them as often as that, and none that do not go together."""
    while True:
        options = tuple(o for o in known if rng.random() < often)
        if fit(options):
            return options


# --- Drawing one ----------------------------------------------------------------------------------

# Of T, B, I and H; few numbers, odd ones, and what takes several threads, tiles and packed weights.
SMALL = ((1, 2, 3, 5), (1, 2, 3), (1, 3, 4), (1, 2, 3, 4))
MIDDLE = ((1, 2, 5, 13), (1, 2, 3, 8, 17), (1, 3, 8, 65, 100), (1, 2, 3, 16, 17, 33, 65))
LARGE = ((5, 20), (16, 33, 64), (64, 193, 256), (96, 193, 256))
Sizes = tuple[tuple[int, ...], ...]


def draw(
    rng: random.Random,
    options: Sequence[str] = (),
    *,
    cells: Sequence[str | Drawn] = KINDS,
    sizes: Sizes = SMALL,
    dtypes: Sequence[str] = ("float64",),
) -> Config:
    """A random layer that has these of ``OPTIONS``, and a call that uses them."""
    cell = rng.choice([c for c in cells if all(can_have(c, o) for o in options)])
    dtype = rng.choice(dtypes) if smooth(cell) else "float64"
    T, B, I, H = (rng.choice(some) for some in sizes)  # noqa: E741
    found: dict[str, Any] = dict(cell=cell, input_size=I, time=T, batch=B, dtype=dtype)
    if cell == "RNN" and dtype == "float64":
        found["nonlinearity"] = rng.choice(["tanh", "relu"])
    known = cell_of(cell, found.get("nonlinearity", "tanh"))
    pair = len(known.states) > 1
    if "blocks" in options:
        found["blocks"] = rng.choice([2, 3])
        H = found["blocks"] * max(1, round(H / found["blocks"]))
    if "projection" in options:
        H = max(2, H)
        found["proj_size"] = rng.randint(1, H - 1)
    found["hidden_size"] = H
    found["bias"] = rng.random() < 0.8
    found["strided"] = rng.random() < 0.2
    found["hx"] = rng.random() < 0.7
    found["threads"] = rng.choice([1, 2, 2, 3])
    found["seed"] = rng.randrange(1 << 31)
    alone = Config(**found, single=True)
    if not options and T == 1 and alone.fits and rng.random() < 0.5:
        return alone
    layers = 2 if "dropout_over_time" in options else rng.choice([1, 1, 2, 3])
    found |= dict(num_layers=layers, bidirectional=rng.random() < 0.5)
    found |= dict(batch_first=rng.random() < 0.5, training=rng.random() < 0.75)
    if layers > 1 and rng.random() < 0.3 or "dropout_over_time" in options:
        found["dropout"] = 0.4
    if "norm" in options:
        places = [place for place in known.norm_places if place != "sum"]
        at = tuple(rng.sample(places, rng.randint(1, len(places))))
        if "sum" in known.norm_places and rng.random() < 0.3:
            at = ("sum", "cell") if known.shows_c and rng.random() < 0.5 else ("sum",)
        found |= dict(norm=rng.choice(["layer", "rms"]), norm_at=at, norm_eps=0.1)
    if "zoneout" in options:
        found["zoneout"] = (0.3, rng.choice([0.0, 0.2])) if pair else 0.25
    for name in ("recurrent_dropout", "weight_dropout"):
        if name in options:
            found[name] = 0.4
    for name in ("dropout_over_time", "recompute"):
        found[name] = name in options
    if {"lengths", "packed"} & set(options):
        found["layout"] = "lengths" if "lengths" in options else "packed"
    elif rng.random() < 0.15:
        found |= dict(layout="unbatched", batch=1)
    kinds = {"reset": "zeros", "reset_to": "states", "reset_to of each step": "steps"}
    for name, kind in kinds.items():
        if name in options:
            found["reset"] = kind
    found["states"] = "return_states" in options
    return Config(**found)


# --- Making it ------------------------------------------------------------------------------------


@dataclass
class Problem:
    """A layer and a call of it. Tensors are padded and time first."""

    config: Config
    module: Any
    x: Tensor
    hx: list[Tensor]  # zeros where the call has none
    given: Named  # for each step, to a cell that asks for it
    lengths: list[int] | None = None
    reset: Tensor | None = None
    reset_to: list[Tensor] | None = None

    def to(self, dtype: torch.dtype) -> Problem:
        """The same numbers of another type."""
        cast = lambda t: t.detach().to(dtype).requires_grad_(t.requires_grad)  # noqa: E731
        found = copy.copy(self)
        found.module, found.x = copy.deepcopy(self.module).to(dtype), cast(self.x)
        found.hx = [cast(s) for s in self.hx]
        found.given = {name: cast(value) for name, value in self.given.items()}
        if self.reset_to is not None:
            found.reset_to = [cast(s) for s in self.reset_to]
        return found


def make(config: Config) -> Problem:
    """The layer, with numbers of the config's seed."""
    c, rng = config, np.random.default_rng(config.seed)
    dtype = getattr(torch, c.dtype)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return torch.from_numpy(rng.standard_normal(shape) * scale).to(dtype)

    def leaf(*shape: int) -> Tensor:
        return normal(*shape).requires_grad_()

    kind = kind_of(c.cell)
    if c.single:
        kind = getattr(kind, "Cell", None) or getattr(fused_rnn, f"{c.cell}Cell")
    torch.manual_seed(c.seed)  # for what a cell from Python begins with in its own way
    module = kind(c.input_size, c.hidden_size, **c.arguments()).train(c.training)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if name.startswith(("weight", "bias", "gain", "shift")):
                parameter.copy_(normal(*parameter.shape, scale=0.6 * c.hidden_size**-0.5))
            if name.startswith("gain"):
                parameter.add_(1)
    T, B = c.time, c.batch
    runs = c.num_layers * (1 + c.bidirectional)
    sizes = [
        c.proj_size if c.proj_size and name == c.known.states[0] else c.hidden_size
        for name in states_of(c)
    ]
    found = Problem(c, module, leaf(T, B, c.input_size), [], {})
    found.hx = [leaf(runs, B, n) if c.hx else normal(runs, B, n).zero_() for n in sizes]
    found.given = {
        name: torch.from_numpy(rng.random((T, B, c.hidden_size))).to(dtype).requires_grad_()
        for name in c.known.given
    }
    if c.layout in ("lengths", "packed"):
        found.lengths = rng.integers(int(c.layout == "packed"), T + 1, B).tolist()
        if c.layout == "packed":
            found.lengths[int(rng.integers(B))] = T
    if c.reset:
        found.reset = torch.from_numpy(rng.random((T, B)) < rng.choice([0.1, 0.5]))
    if c.reset == "states":
        found.reset_to = [leaf(runs, B, n) for n in sizes]
    if c.reset == "steps":
        found.reset_to = [leaf(T, runs, B, n) for n in sizes]
    return found


def states_of(config: Config) -> tuple[str, ...]:
    """The names of the states as the caller has them in hx."""
    own = getattr(kind_of(config.cell), "_made", None)
    return own.declaration.states if own else config.known.states


# --- Calling it -----------------------------------------------------------------------------------


def formed(states: list[Tensor]) -> Any:
    """As a user has them."""
    return tuple(states) if len(states) > 1 else states[0]


def strided(t: Tensor) -> Tensor:
    """The same values with gaps between them."""
    return torch.stack([t, t], -1)[..., 0] if t.numel() else t


def call(problem: Problem, module: Any = None) -> list[Tensor]:
    """What the layer gives: y, last states, states after each step, all padded, time first."""
    module, c = module or problem.module, problem.config
    x: Any = strided(problem.x) if c.strided else problem.x
    if c.single:
        last = module(x[0], formed([s[0] for s in problem.hx]) if c.hx else None, **{
            name: value[0] for name, value in problem.given.items()
        })  # fmt: skip
        return [*last] if isinstance(last, tuple) else [last]
    own: dict[str, Any] = {**problem.given}
    if problem.reset is not None:
        own["reset"] = problem.reset
    hx, reset_to = problem.hx, problem.reset_to
    if c.layout == "packed":
        counts = torch.tensor(problem.lengths)
        packed = {n: pack_padded_sequence(t, counts, enforce_sorted=False) for n, t in own.items()}
        x = pack_padded_sequence(x, counts, enforce_sorted=False)
        own = {name: rows.data for name, rows in packed.items()}
    elif c.layout == "unbatched":
        x, own = x.squeeze(1), {name: t.squeeze(1) for name, t in own.items()}
        hx = [s.squeeze(-2) for s in hx]
        reset_to = reset_to and [s.squeeze(-2) for s in reset_to]
    elif c.batch_first:
        x, own = x.transpose(0, 1), {name: t.transpose(0, 1) for name, t in own.items()}
    if reset_to is not None:
        own["reset_to"] = formed(reset_to)
    if c.states:
        own["return_states"] = True
    if c.layout == "lengths":
        own["lengths"] = problem.lengths
    y, last, *states = module(x, formed(hx) if c.hx else None, **own)
    last, states = ([*s] if isinstance(s, tuple) else [s] for s in (last, (states or [()])[0]))
    if c.layout == "packed":
        states = [
            pad_packed_sequence(PackedSequence(s.transpose(0, 1), *y[1:]), total_length=c.time)[0]
            for s in states
        ]
        states = [s.permute(2, 0, 1, 3) for s in states]
        y = pad_packed_sequence(y, total_length=c.time)[0]
    elif c.layout == "unbatched":
        y, last = y.unsqueeze(1), [s.unsqueeze(1) for s in last]
        states = [s.unsqueeze(2) for s in states]
    elif c.batch_first:
        y = y.transpose(0, 1)
    return [y, *last, *states]


def leaves(problem: Problem) -> Named:
    found = {"x": problem.x, **problem.given, **dict(problem.module.named_parameters())}
    if problem.config.hx:
        found |= {f"hx {i}": s for i, s in enumerate(problem.hx)}
    return found | {f"reset_to {i}": s for i, s in enumerate(problem.reset_to or ())}


def with_gradients(
    problem: Problem, outputs: list[Tensor], rounded_to: torch.dtype | None = None
) -> Named:
    """Outputs, and gradients of all leaves for cotangents that the config's seed draws."""
    rng = np.random.default_rng((problem.config.seed, 1))
    cotangents = [
        torch.from_numpy(rng.standard_normal(tuple(o.shape))).to(rounded_to or o.dtype).to(o.dtype)
        for o in outputs
    ]
    wanted = leaves(problem)
    found = {f"output {i}": o.detach() for i, o in enumerate(outputs)}
    wrt = [(o, g) for o, g in zip(outputs, cotangents, strict=True) if o.requires_grad]
    grads: Any = torch.autograd.grad(
        [o for o, _ in wrt], list(wanted.values()), [g for _, g in wrt], allow_unused=True
    )
    for (name, leaf), grad in zip(wanted.items(), grads, strict=True):
        found[f"d {name}"] = torch.zeros_like(leaf) if grad is None else grad
    return found


# --- On the other path, with the same random numbers ----------------------------------------------


@contextlib.contextmanager
def on_reference() -> Iterator[None]:
    """Plain torch does the work, and rounds what it computes to the type of the call."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reference.layers, "_wide", lambda dtype: dtype)
        patch.setattr(ops, "supports", lambda *_: False)
        patch.setattr(ops.direct, "functions", False)
        yield


class Draws:
    """The random numbers of a call: drawn the first time, and the same, of any type, afterwards."""

    def __init__(self, seed: int) -> None:
        self.seed, self.drawn = seed, list[Tensor]()

    @contextlib.contextmanager
    def used(self) -> Iterator[None]:
        first, before, rest = not self.drawn, (F.dropout, torch.bernoulli), iter(self.drawn)

        def mask(drawn: Any, dtype: torch.dtype) -> Tensor:
            if first:
                self.drawn.append(drawn())
                return self.drawn[-1]
            return next(rest).to(dtype)

        def dropout(t: Tensor, p: float = 0.5, training: bool = True, **_: Any) -> Tensor:
            if not training or not p:
                return t
            return t * mask(lambda: before[0](torch.ones_like(t), p), t.dtype)

        def bernoulli(p: Tensor, **_: Any) -> Tensor:
            return mask(lambda: before[1](p), p.dtype)

        torch.manual_seed(self.seed)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(F, "dropout", dropout)
            patch.setattr(torch, "bernoulli", bernoulli)
            yield
