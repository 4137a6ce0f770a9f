"""The five shapes of a recurrent network, each trained for some seconds and drawn as it ran.

    one to one       an image, one step                    -> which digit
    one to many      an image, at the first step           -> its name, letter by letter
    many to one      an image, a row of pixels a step      -> which digit, after the last row
    many to many     a bit a step                          -> at each step: odd so far?
    encoder-decoder  letters, then "go"                    -> the letters in reverse

(The figure of Karpathy 2015, "The unreasonable effectiveness of recurrent neural networks", and of
CS231n.) In the picture each box of states holds the numbers that the network had there, for
one held-out example.

    python examples/overview.py
    python examples/overview.py --cell lstm --steps 2000
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from common import (
    BITS,
    GREY,
    INK,
    Run,
    arguments,
    cosine,
    find_cell,
    launch,
    picture,
    start,
    train_step,
)
from matplotlib.patches import FancyBboxPatch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

NAMES = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
LETTERS = "abcdefghij"
ALPHABET = sorted(set("".join(NAMES))) + ["."]  # "." ends a name


class Network(nn.Module):
    """A recurrent layer and a linear map of its outputs, [T, B, I] -> logits [T, B, classes].

    With ``split``, a second layer of its own weights takes over at that step, from the state that
    the first ended with: encoder and decoder (Cho et al. 2014; Sutskever et al. 2014).
    """

    def __init__(
        self, cell: str, inputs: int, hidden: int, classes: int, split: int | None = None
    ) -> None:
        super().__init__()
        self.rnn = find_cell(cell)(inputs, hidden)
        self.split = split
        self.decoder = None if split is None else find_cell(cell)(inputs, hidden)
        self.head = nn.Linear(hidden, classes)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Logits, and all hidden states [T, B, H], which are drawn."""
        h, state = self.rnn(x[: self.split])
        if self.decoder is not None:
            h = torch.cat([h, self.decoder(x[self.split :], state)[0]])
        return self.head(h), h


class Batch(NamedTuple):
    """x [T, B, I]; target [T, B] with -1 where nothing is asked."""

    x: Tensor
    target: Tensor


class Shape(NamedTuple):
    """One of the five: data, sizes, and the words of its picture."""

    title: str
    task: str
    inputs: int
    classes: int
    draw_batch: Callable[[int, torch.Generator, bool], Batch]  # size, numbers, held out?
    symbols: list[str]  # of the outputs
    show_input: Callable[[Tensor], Any]  # one step's x [I] -> an image or a text, None for no input
    split: int | None = None  # the decoder's first step


# --- data ----------------------------------------------------------------------------------------


class Digits:
    """scikit-learn's 8 x 8 digits, 1400 to learn from, 397 held out."""

    def __init__(self) -> None:
        images, labels = load_digits(return_X_y=True)
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
        self.images = torch.tensor(images / 16, dtype=torch.float32)[order]  # [N, 64]
        self.labels = torch.tensor(labels)[order]

    def draw(self, size: int, numbers: torch.Generator, held_out: bool) -> tuple[Tensor, Tensor]:
        low, high = (1400, len(self.labels)) if held_out else (0, 1400)
        chosen = torch.randint(low, high, (size,), generator=numbers)
        return self.images[chosen], self.labels[chosen]

    def at_once(self, size: int, numbers: torch.Generator, held_out: bool) -> Batch:
        images, labels = self.draw(size, numbers, held_out)
        return Batch(images[None], labels[None])

    def spelled(self, size: int, numbers: torch.Generator, held_out: bool) -> Batch:
        images, labels = self.draw(size, numbers, held_out)
        x = torch.zeros(6, size, 64)
        x[0] = images  # afterwards the network has its state alone
        target = torch.full((6, size), -1)
        for column, label in enumerate(labels.tolist()):
            for row, letter in enumerate(NAMES[label] + "."):
                target[row, column] = ALPHABET.index(letter)
        return Batch(x, target)

    def by_rows(self, size: int, numbers: torch.Generator, held_out: bool) -> Batch:
        images, labels = self.draw(size, numbers, held_out)
        target = torch.full((8, size), -1)
        target[-1] = labels
        return Batch(images.view(size, 8, 8).transpose(0, 1).contiguous(), target)


def parity(size: int, numbers: torch.Generator, held_out: bool) -> Batch:
    """Bits, and after each whether the ones so far are odd. The held-out ones are twice as long."""
    bits = torch.randint(0, 2, (12 if held_out else 6, size), generator=numbers)
    return Batch(bits[..., None].float(), bits.cumsum(0) % 2)


def reversal(size: int, numbers: torch.Generator, held_out: bool) -> Batch:
    """Five letters, then five steps of "go"; the letters are asked for backwards.

    A word of 5 numbers is held out if the numbers' sum is a multiple of 5.
    """
    words = torch.randint(0, len(LETTERS), (5, 8 * size + 64), generator=numbers)
    words = words[:, (words.sum(0) % 5 == 0) == held_out][:, :size]
    go = torch.full_like(words, len(LETTERS))
    x = F.one_hot(torch.cat([words, go]), len(LETTERS) + 1).float()
    return Batch(x, torch.cat([torch.full_like(words, -1), words.flip(0)]))


def shapes() -> dict[str, Shape]:
    digits = Digits()

    def image(x: Tensor) -> Tensor | None:
        return x.view(8, 8) if x.any() else None

    def letter(x: Tensor) -> str:
        return [*LETTERS, "go"][int(x.argmax())]

    numerals = [str(i) for i in range(10)]
    return {
        "one to one": Shape(
            "One to one", "image → digit", 64, 10, digits.at_once, numerals, image
        ),
        "one to many": Shape(
            "One to many", "image → its name", 64, len(ALPHABET), digits.spelled, ALPHABET, image
        ),
        "many to one": Shape(
            "Many to one", "rows of an image → digit", 8, 10, digits.by_rows, numerals,
            lambda x: x.view(1, 8),
        ),
        "many to many": Shape(
            "Many to many, aligned", "bits → odd so far?", 1, 2, parity, ["even", "odd"],
            lambda x: str(int(x)),
        ),
        "encoder-decoder": Shape(
            "Many to many, encoder and decoder", "letters → the letters in reverse",
            len(LETTERS) + 1, len(LETTERS), reversal, list(LETTERS), letter, split=5,
        ),
    }  # fmt: skip


# --- training and measuring ----------------------------------------------------------------------


def loss_of(logits: Tensor, target: Tensor) -> Tensor:
    """Cross entropy in nats, where something is asked."""
    return F.cross_entropy(logits.flatten(0, 1), target.flatten(), ignore_index=-1)


def whole_right(guess: Tensor, target: Tensor) -> float:
    """Share of sequences [T, B] with every answer right."""
    return ((guess == target) | (target < 0)).all(0).float().mean().item()


def chance(target: Tensor) -> float:
    """The baseline: share that is right if each step says what is most frequent at that step."""
    most = torch.stack(
        [row[row >= 0].mode().values if (row >= 0).any() else row[0] for row in target]
    )
    return whole_right(most[:, None].expand_as(target), target)


def train(run: Run, name: str, shape: Shape, steps: int) -> tuple[Network, dict[str, float]]:
    """A trained network, its share of entirely right held-out sequences, and the baseline's."""
    torch.manual_seed(run.args.seed)
    model = Network(run.args.cell, shape.inputs, run.args.hidden, shape.classes, shape.split)
    model.to(run.device)
    optimizer = torch.optim.Adam(model.parameters(), run.args.lr)
    schedule = cosine(optimizer, steps)
    checkpoint = run.checkpoint(
        f"{name.replace(' ', '-')}.pt", model=model, optimizer=optimizer, schedule=schedule
    )
    trained = run.distribute(model)
    first = checkpoint.load()
    bar = run.progress(range(first, steps), initial=first, total=steps, desc=name, leave=False)
    for step in bar:
        x, target = shape.draw_batch(run.args.batch, run.generator(step), False)
        loss = loss_of(trained(x.to(run.device))[0], target.to(run.device))
        train_step(loss, model, optimizer, schedule)
        if step % 50 == 0:
            bar.set_postfix_str(f"{loss.item() * BITS:.3f} bits")
    checkpoint.save(steps)
    with torch.no_grad():
        x, target = shape.draw_batch(1000, run.generator(-1), True)
        guess = model(x.to(run.device))[0].argmax(-1).cpu()
    return model, {"right": whole_right(guess, target), "baseline": chance(target)}


# --- picture -------------------------------------------------------------------------------------

# Input, state, output as in the lecture; and the state of the decoder.
RED, GREEN, BLUE, YELLOW = "#f3c9bd", "#bfe3cf", "#c3d8ef", "#f6e3a1"


def box(ax: Any, x: float, y: float, colour: str, text: str = "", size: float = 9) -> None:
    ax.add_patch(
        FancyBboxPatch(
            (x - 0.34, y - 0.3),
            0.68,
            0.6,
            boxstyle="round,pad=0,rounding_size=0.08",
            fc=colour,
            ec=GREY,
            lw=0.8,
        )  # fmt: skip
    )
    ax.text(x, y, text, ha="center", va="center", fontsize=size, color=INK)


def arrow(ax: Any, start: tuple[float, float], end: tuple[float, float]) -> None:
    ax.annotate("", end, start, arrowprops={"arrowstyle": "-|>", "color": INK, "lw": 0.9})


def unrolled(ax: Any, shape: Shape, batch: Batch, logits: Tensor, states: Tensor) -> None:
    """The graph of one sequence: x below, the first 24 units of h_t in the middle, answers above.

    batch holds the one sequence (B = 1), logits is [T, classes], states [T, H].
    """
    steps = int((batch.target[:, 0] >= 0).nonzero().max()) + 1  # up to the last answer
    for t in range(steps):
        shown = shape.show_input(batch.x[t, 0])
        if shown is not None:
            box(ax, t, 0, RED, shown if isinstance(shown, str) else "", 10)
            arrow(ax, (t, 0.3), (t, 0.7))
            if not isinstance(shown, str):
                height = 0.25 if len(shown) > 1 else 0.05
                ax.imshow(
                    shown.numpy(), cmap="gray_r", vmin=0, vmax=1, aspect="auto", zorder=3,
                    extent=(t - 0.27, t + 0.27, -height, height),
                )  # fmt: skip
        box(ax, t, 1, GREEN if shape.split is None or t < shape.split else YELLOW)
        ax.imshow(
            states[t, :24].view(4, 6).numpy(), cmap="PuOr", vmin=-1, vmax=1, aspect="auto",
            zorder=3, extent=(t - 0.27, t + 0.27, 0.77, 1.23),
        )  # fmt: skip
        if t + 1 < steps:
            arrow(ax, (t + 0.34, 1), (t + 0.66, 1))
        if batch.target[t, 0] >= 0:
            p = logits[t].softmax(-1)
            best = int(p.argmax())
            box(ax, t, 2, BLUE, f"{shape.symbols[best]}\n{p[best]:.0%}", 8)
            arrow(ax, (t, 1.3), (t, 1.7))
    ax.set_xlim(-0.5, 11.5)
    ax.set_ylim(-0.45, 2.45)
    ax.set_aspect("equal")
    ax.set_axis_off()


def draw(path: Path, run: Run, trained: dict[str, tuple[Shape, Network, dict[str, float]]]) -> None:
    with picture(path, figsize=(11, 15)) as figure:
        figure.suptitle(
            f"Five shapes of one {run.args.cell.upper()}, unrolled as they ran on held-out data",
            x=0.02, ha="left",
        )  # fmt: skip
        axes = figure.subplots(len(trained), 1)
        for ax, (shape, model, result) in zip(axes, trained.values(), strict=True):
            batch = shape.draw_batch(1, run.generator(-2), True)
            with torch.no_grad():
                logits, states = model(batch.x.to(run.device))
            unrolled(ax, shape, batch, logits[:, 0].cpu(), states[:, 0].cpu())
            ax.set_title(
                f"{shape.title}: {shape.task}   ({result['right']:.1%} right, "
                f"baseline {result['baseline']:.1%})"
            )
        for y, text in enumerate(
            ("the input", "24 units of h: −1 orange, +1 violet", "the answer and its probability")
        ):
            axes[0].text(0.6, y, text, va="center", fontsize=10)


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    return arguments(
        __doc__, "overview", cell="gru", hidden=64, batch=64, lr=1e-2, steps=2500
    ).parse_args(argv)


def main() -> None:
    args = parse()
    run = start(args)
    trained, figures = {}, {}
    for name, shape in shapes().items():
        model, result = train(run, name, shape, args.steps)
        trained[name] = (shape, model, result)
        figures[name] = result["right"]
        figures[f"{name} baseline"] = result["baseline"]
    if run.is_main:
        draw(run.path("overview.png"), run, trained)
    run.write(figures, "overview")


if __name__ == "__main__":
    launch(main)
