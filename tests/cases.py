"""What the tests run over: configurations, inputs, and pairs of torch.nn's module and ours."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence

import fused_rnn

# Name -> class, arguments. "lstm_proj" has a projection to about half its units.
LAYERS: dict[str, tuple[str, dict[str, Any]]] = {
    "rnn_tanh": ("RNN", {}),
    "rnn_relu": ("RNN", {"nonlinearity": "relu"}),
    "lstm": ("LSTM", {}),
    "lstm_proj": ("LSTM", {"proj_size": True}),
    "gru": ("GRU", {}),
}
# Of cells that torch.nn does not have.
OWN_LAYERS: dict[str, tuple[str, dict[str, Any]]] = {"peephole_lstm": ("PeepholeLSTM", {})}
CELLS: dict[str, tuple[str, dict[str, Any]]] = {
    "rnn_tanh": ("RNNCell", {}),
    "rnn_relu": ("RNNCell", {"nonlinearity": "relu"}),
    "lstm": ("LSTMCell", {}),
    "gru": ("GRUCell", {}),
}
CLASSES = ["RNN", "LSTM", "GRU", "RNNCell", "LSTMCell", "GRUCell"]
SIZES = [1, 3, 17, 33, 65, 193]


@dataclass(frozen=True)
class Case:
    """One module and its input. ``layout``: padded, unbatched, packed or unsorted (packed too)."""

    cell: str = "gru"
    input_size: int = 5
    hidden_size: int = 7
    num_layers: int = 1
    bidirectional: bool = False
    bias: bool = True
    batch_first: bool = False
    dropout: float = 0.0
    training: bool = True
    layout: str = "padded"
    batch: int = 3
    time: int = 4
    hx: bool = True

    def __str__(self) -> str:
        words = [
            self.cell,
            f"I{self.input_size}",
            f"H{self.hidden_size}",
            f"B{self.batch}",
            f"T{self.time}",
        ]
        words += [self.layout, f"L{self.num_layers}"]
        words += ["bi"] * self.bidirectional + ["nobias"] * (not self.bias) + ["hx"] * self.hx
        words += ["bf"] * self.batch_first + [f"drop{'' if self.training else '_eval'}"] * (
            self.dropout > 0
        )
        return "-".join(words)

    @property
    def valid(self) -> bool:
        return (self.cell != "lstm_proj" or self.hidden_size > 1) and (
            self.dropout == 0 or self.num_layers > 1
        )

    def modules(self, dtype: torch.dtype = torch.float64) -> tuple[nn.Module, nn.Module]:
        """torch.nn's module and ours, with the same parameters (drawn twice, from one seed).

        Of cells that torch.nn does not have it is ours twice.
        """
        name, kwargs = (LAYERS | OWN_LAYERS)[self.cell]
        if "proj_size" in kwargs:
            kwargs = {"proj_size": (self.hidden_size + 1) // 2}
        return pair(
            name,
            self.input_size,
            self.hidden_size,
            dtype=dtype,
            train=self.training,
            num_layers=self.num_layers,
            bias=self.bias,
            batch_first=self.batch_first,
            dropout=self.dropout,
            bidirectional=self.bidirectional,
            **kwargs,
        )

    def lengths(self) -> list[int]:
        """Lengths of the sequences of a packed input; the longest is ``time``, ties are likely."""
        lengths = [self.time, *torch.randint(1, self.time + 1, (self.batch - 1,)).tolist()]
        if self.batch > 1:  # not all equal, which torch.nn's LSTM treats as padded
            lengths[-1] = max(1, self.time - 1)
        lengths.sort(reverse=True)
        if self.layout == "unsorted":
            lengths = [lengths[i] for i in torch.randperm(self.batch).tolist()]
        return lengths

    def inputs(self, dtype: torch.dtype = torch.float64) -> tuple[Tensor | PackedSequence, Any]:
        """A random input and a hidden state (or None)."""
        x: Tensor | PackedSequence
        if self.layout in ("packed", "unsorted"):
            rows = [torch.randn(n, self.input_size, dtype=dtype) for n in self.lengths()]
            x = pack_sequence(rows, enforce_sorted=self.layout == "packed")
        elif self.layout == "unbatched":
            x = torch.randn(self.time, self.input_size, dtype=dtype)
        else:
            shape = (self.batch, self.time) if self.batch_first else (self.time, self.batch)
            x = torch.randn(*shape, self.input_size, dtype=dtype)
        if not self.hx:
            return x, None
        runs = self.num_layers * (2 if self.bidirectional else 1)
        lead = (runs,) if self.layout == "unbatched" else (runs, self.batch)
        width = (self.hidden_size + 1) // 2 if self.cell == "lstm_proj" else self.hidden_size
        h = torch.randn(*lead, width, dtype=dtype)
        if "lstm" not in self.cell:
            return x, h
        return x, (h, torch.randn(*lead, self.hidden_size, dtype=dtype))


def pair(
    name: str, *args: Any, dtype: torch.dtype = torch.float32, train: bool = True, **kwargs: Any
) -> tuple[nn.Module, nn.Module]:
    """The same construction in torch.nn and in fused_rnn, from the same state of the generator."""
    state = torch.get_rng_state()
    theirs = getattr(nn if hasattr(nn, name) else fused_rnn, name)(*args, dtype=dtype, **kwargs)
    torch.set_rng_state(state)
    ours = getattr(fused_rnn, name)(*args, dtype=dtype, **kwargs)
    return theirs.train(train), ours.train(train)


GRID: dict[str, Sequence[Any]] = {
    "cell": list(LAYERS),
    "num_layers": [1, 2],
    "bidirectional": [False, True],
    "bias": [True, False],
    "batch_first": [False, True],
    "layout": ["padded", "unbatched", "packed", "unsorted"],
    "dropout": [0.0, 0.5],
    "training": [True, False],
    "hx": [True, False],
    "input_size": SIZES,
    "hidden_size": SIZES,
    "batch": [1, 3, 7, 17],
    "time": [1, 2, 5],
}


def pairwise(grid: dict[str, Sequence[Any]] = GRID, tries: int = 40) -> list[Case]:
    """Few valid cases in which every two values of two settings meet at least once.

    Greedy: of ``tries`` random cases, keep the one with most pairs not seen yet. The list is the
    same in every run.
    """
    rng = random.Random(0)

    def pairs(case: Case) -> set[Any]:
        return set(itertools.combinations([(key, getattr(case, key)) for key in grid], 2))

    def draw() -> Case:
        while True:
            case = Case(**{key: rng.choice(values) for key, values in grid.items()})
            if case.valid:
                return case

    unseen = set().union(*(pairs(draw()) for _ in range(3000)))
    cases = []
    while unseen:
        best = max((draw() for _ in range(tries)), key=lambda case: len(pairs(case) & unseen))
        if gained := pairs(best) & unseen:
            unseen -= gained
            cases.append(best)
        else:
            tries *= 2
    return cases


def full_grid() -> Iterator[Case]:
    """All valid combinations of everything but the sizes, which cycle through their values."""
    switches = {
        key: values
        for key, values in GRID.items()
        if len(values) < 6 and key not in ("batch", "time")
    }
    sizes = itertools.cycle(itertools.product(SIZES, SIZES[::-1], (1, 3, 7, 17), (1, 2, 5)))
    skip = itertools.count()
    for values in itertools.product(*switches.values()):
        for _ in range(next(skip) % 7):
            next(sizes)
        i, h, b, t = next(sizes)
        case = Case(
            **dict(zip(switches, values, strict=True)), input_size=i, hidden_size=h, batch=b, time=t
        )
        if case.valid:
            yield case


def small(**settings: Any) -> list[Case]:
    """One small case for each kind of layer."""
    return [replace(Case(), cell=cell, **settings) for cell in LAYERS]


def ids(cases: Iterable[Case]) -> list[str]:
    return [str(case) for case in cases]
