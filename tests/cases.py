"""What the tests run over: configurations, as modules and as arguments of the operators; inputs;
pairs of torch.nn's module and ours."""

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
from fused_rnn import cells, reference

# Name -> class, arguments. "lstm_proj" is projected to about half its units, if not told otherwise.
LAYERS: dict[str, tuple[str, dict[str, Any]]] = {
    "rnn_tanh": ("RNN", {}),
    "rnn_relu": ("RNN", {"nonlinearity": "relu"}),
    "lstm": ("LSTM", {}),
    "lstm_proj": ("LSTM", {}),
    "gru": ("GRU", {}),
}
# Of cells that torch.nn does not have.
OWN_LAYERS: dict[str, tuple[str, dict[str, Any]]] = {
    getattr(cells, name).cell: (name, {}) for name in cells.__all__
}
# The cells of csrc/cells, and none that a test has declared in Python.
KERNELS = [name for name, known in reference.CELLS.items() if known.source is None]

CELLS: dict[str, tuple[str, dict[str, Any]]] = {
    "rnn_tanh": ("RNNCell", {}),
    "rnn_relu": ("RNNCell", {"nonlinearity": "relu"}),
    "lstm": ("LSTMCell", {}),
    "gru": ("GRUCell", {}),
}
LAYER_CLASSES = ["RNN", "LSTM", "GRU"]
CELL_CLASSES = ["RNNCell", "LSTMCell", "GRUCell"]
CLASSES = LAYER_CLASSES + CELL_CLASSES


def some_input(name: str) -> Tensor:
    """Of a class with three inputs: two sequences, or a step of them."""
    return torch.randn(2, 3) if name in CELL_CLASSES else torch.randn(5, 2, 3)


SIZES = [1, 3, 17, 33, 65, 193]
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Case:
    """A stack of layers and its input.

    ``cell`` is one of LAYERS and OWN_LAYERS; the operators' cells are these without "_proj".
    ``layout`` is padded, unbatched, packed or unsorted (packed too).
    """

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
    proj_size: int = 0
    dtype: torch.dtype = torch.float64

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
        words += [f"P{self.proj_size}"] * (self.proj_size > 0)
        words += [str(self.dtype).removeprefix("torch.")] * (self.dtype != torch.float64)
        return "-".join(words)

    @property
    def valid(self) -> bool:
        return (self.cell != "lstm_proj" or self.hidden_size > 1) and (
            self.dropout == 0 or self.num_layers > 1
        )

    @property
    def directions(self) -> int:
        return 2 if self.bidirectional else 1

    @property
    def kernel(self) -> str:
        """Of reference.CELLS."""
        return self.cell.removesuffix("_proj")

    @property
    def projection(self) -> int:
        """Width of h, or 0 where that is the number of units."""
        if self.cell == "lstm_proj" and not self.proj_size:
            return (self.hidden_size + 1) // 2
        return self.proj_size

    @property
    def width(self) -> int:
        """Of h."""
        return self.projection or self.hidden_size

    @property
    def packed(self) -> bool:
        return self.layout in ("packed", "unsorted")

    def modules(self, dtype: torch.dtype | None = None) -> tuple[nn.Module, nn.Module]:
        """torch.nn's module and ours, with the same parameters (drawn twice, from one seed).

        Of cells that torch.nn does not have it is ours twice.
        """
        name, kwargs = (LAYERS | OWN_LAYERS)[self.cell]
        if self.projection:
            kwargs = {**kwargs, "proj_size": self.projection}
        return pair(
            name,
            self.input_size,
            self.hidden_size,
            dtype=dtype or self.dtype,
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

    def inputs(self, dtype: torch.dtype | None = None) -> tuple[Tensor | PackedSequence, Any]:
        """A random input and a hidden state (or None)."""
        dtype = dtype or self.dtype
        x: Tensor | PackedSequence
        if self.packed:
            rows = [torch.randn(n, self.input_size, dtype=dtype) for n in self.lengths()]
            x = pack_sequence(rows, enforce_sorted=self.layout == "packed")
        elif self.layout == "unbatched":
            x = torch.randn(self.time, self.input_size, dtype=dtype)
        else:
            shape = (self.batch, self.time) if self.batch_first else (self.time, self.batch)
            x = torch.randn(*shape, self.input_size, dtype=dtype)
        if not self.hx:
            return x, None
        runs = self.num_layers * self.directions
        lead = (runs,) if self.layout == "unbatched" else (runs, self.batch)
        h = torch.randn(*lead, self.width, dtype=dtype)
        if "lstm" not in self.cell:
            return x, h
        return x, (h, torch.randn(*lead, self.hidden_size, dtype=dtype))

    # --- as an operator takes it ---

    @property
    def present(self) -> int:
        return reference.present_bits(self.kernel, biases=self.bias, projection=self.projection > 0)

    @property
    def names(self) -> tuple[str, ...]:
        """Of ``arguments``."""
        weights = reference.present_names(self.kernel, self.present)
        runs = [f"{i}{'_r' * d}" for i in range(self.num_layers) for d in range(self.directions)]
        return ("x", "h0", "c0", *(f"{name}_{run}" for run in runs for name in weights))

    def rest(self, batch_sizes: Tensor | None) -> tuple[Any, ...]:
        """What stands behind the weights in the engines' calls, without dropout."""
        return None, batch_sizes, self.num_layers, self.directions, self.present

    def rest_of_schema(self, batch_sizes: Tensor | None) -> tuple[Any, ...]:
        """The same in the operators' schemas: with nothing between two steps, without TF32 and
        packed weights."""
        masks, batch_sizes, *shape = self.rest(batch_sizes)
        return masks, batch_sizes, None, None, None, *shape, 1, 0, 0.0, False, False, None

    def arguments(self) -> tuple[list[Tensor | None], Tensor | None]:
        """(x, h0, c0, *weights) with unit-scale entries, and batch_sizes."""
        cell = reference.CELLS[self.kernel]
        units = self.hidden_size
        rows, rows_h = cell.gates * units, cell.recurrent_gates * units

        def draw(*shape: int, scale: float = 1.0) -> Tensor:
            return (torch.randn(*shape, dtype=torch.float64) * scale).to(self.dtype)

        batch_sizes = None
        if self.packed:
            lengths = self.lengths()
            batch_sizes = torch.tensor([sum(n > t for n in lengths) for t in range(self.time)])
            x = draw(sum(lengths), self.input_size)
        elif self.batch_first:
            x = draw(self.batch, self.time, self.input_size).transpose(0, 1)
        else:
            x = draw(self.time, self.batch, self.input_size)
        runs, others = self.num_layers * self.directions, len(cell.states) - 1
        c0 = draw(runs, self.batch, others * units) if others else None
        weights: list[Tensor | None] = []
        for run in range(runs):
            first = run < self.directions
            shapes = {
                "w_ih": (rows, self.input_size if first else self.directions * self.width),
                "w_hh": (rows_h, self.width),
                "b_ih": (rows,),
                "b_hh": (rows_h,),
                "w_hr": (self.projection, units),
            }
            weights += [
                draw(*shapes.get(name, (units,)), scale=units**-0.5)
                for name in reference.present_names(self.kernel, self.present)
            ]
        return [x, draw(runs, self.batch, self.width), c0, *weights], batch_sizes

    def call(
        self, fn: Any, tensors: Sequence[Tensor | None], batch_sizes: Tensor | None = None
    ) -> tuple[Any, ...]:
        """``fn``, an operator or its reference, of ``arguments``."""
        x, h0, c0, *weights = tensors
        return fn(self.kernel, x, h0, c0, weights, *self.rest(batch_sizes))


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


def random_case(generator: Any, cell: str | None = None) -> Case:
    """For the operators, of this cell or of any."""

    def pick(*options: Any) -> Any:
        return options[int(torch.randint(len(options), (), generator=generator))]

    cell = cell or pick("lstm", "gru", *KERNELS)
    H = pick(1, 3, 16, 17, 33, 64, 65, 130, 193)
    dtype = pick(*DTYPES)
    if cell == "rnn_relu":  # any rounding may flip its derivative; test_parity keeps off the kink
        dtype = torch.float64
    return Case(
        cell,
        time=pick(1, 2, 5, 9),
        batch=pick(1, 2, 3, 7, 16, 33),
        input_size=pick(1, 3, 17, 33, 64, 65),
        hidden_size=H,
        num_layers=pick(1, 1, 2, 3),
        bidirectional=pick(False, True),
        proj_size=pick(0, max(1, H // 3)) if cell.endswith("lstm") and H > 1 else 0,
        bias=pick(True, True, False),
        layout=pick("packed", "padded", "padded"),
        batch_first=pick(True, False, False),
        dtype=dtype,
    )
