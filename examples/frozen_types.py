"""What freezing in fewer bits costs: a text model and a classifier, in each type of `freeze`.

The text model reads the standard library's own source and is judged by the bits that it needs for a
character of text that it never saw; the classifier is shown a digit pixel by pixel and judged by
the share of right answers. Both are frozen in float32, bfloat16 and int8 after training, which
knows nothing of it. Beside that stands what a call takes, for layers of several widths. A JSON file
has all figures.

    python examples/frozen_types.py
    python examples/frozen_types.py --cell lstm --only bits answers
    python examples/frozen_types.py --threads 1 --only clock
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from char_lm import CharModel
from common import BITS, CELLS, detach
from compare_cells import PixelModel
from sklearn.datasets import load_digits
from text import Text, chunks, standard_library_source
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

import fused_rnn

TYPES = {"float32": None, "bfloat16": torch.bfloat16, "int8": torch.int8}


def parse_arguments() -> argparse.Namespace:
    p = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    p.add_argument("--cell", choices=["gru", "lstm", "rnn"], default="gru")
    p.add_argument("--hidden", type=int, default=256, help="units of the text model")
    p.add_argument("--steps", type=int, default=500, help="of the text model")
    p.add_argument("--digits-hidden", type=int, default=64)
    p.add_argument("--digits-steps", type=int, default=800)
    p.add_argument("--widths", type=int, nargs="*", default=[512, 1024], help="for the clock")
    p.add_argument("--rounds", type=int, default=60, help="of the clock")
    p.add_argument("--only", nargs="*", choices=list(PARTS), default=list(PARTS))
    p.add_argument("--characters", type=int, default=2_000_000, help="of text")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--threads", type=int, default=torch.get_num_threads())
    p.add_argument("--out", type=Path, default=Path("out/frozen_types.json"))
    return p.parse_args()


def frozen(model: nn.Module) -> dict[str, nn.Module]:
    types = {
        name: fused_rnn.freeze(model, inplace=False, dtype=dtype) for name, dtype in TYPES.items()
    }
    return {"not frozen": model.eval(), **types}


# --- a text, character by character ---------------------------------------------------------------


def text_model(a: argparse.Namespace) -> dict[str, float]:
    """Bits per character of held-out text, in each type."""
    text = Text(standard_library_source(a.characters))
    torch.manual_seed(a.seed)
    model = CharModel(CELLS[a.cell], len(text.symbols), a.hidden, 1)
    optimizer = torch.optim.Adam(model.parameters(), 4e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, a.steps)
    state: Any = None
    for x, target in tqdm(itertools.islice(endless(text.train), a.steps), total=a.steps):
        loss, state = model.loss(x, target, None if state is None else detach(state))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return {name: bits(m, text.held_out) for name, m in frozen(model).items()}


def endless(ids: Tensor) -> Any:
    while True:
        yield from chunks(ids, 32, 64)


@torch.no_grad()
def bits(model: nn.Module, ids: Tensor) -> float:
    losses, state = [], None
    for x, target in chunks(ids, 16, 64):
        loss, state = model.loss(x, target, state)
        losses.append(loss.item() * BITS)
    return statistics.fmean(losses)


# --- digits, pixel by pixel -----------------------------------------------------------------------


def classifier(a: argparse.Namespace) -> dict[str, float]:
    """The share of right answers, in each type."""
    images, labels = load_digits(return_X_y=True)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    x = torch.tensor(images / 16, dtype=torch.float32)[order].t()[..., None]  # [64, N, 1]
    y = torch.tensor(labels)[order]
    held_out = len(y) * 2 // 3
    torch.manual_seed(a.seed)
    model = PixelModel(a.cell, a.digits_hidden)
    optimizer = torch.optim.Adam(model.parameters(), 4e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, a.digits_steps)
    for _ in tqdm(range(a.digits_steps)):
        batch = torch.randint(held_out, (64,))
        loss = F.cross_entropy(model(x[:, batch]), y[batch])
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return {name: right(m, x[:, held_out:], y[held_out:]) for name, m in frozen(model).items()}


@torch.no_grad()
def right(model: nn.Module, x: Tensor, y: Tensor) -> float:
    return (model(x).argmax(-1) == y).float().mean().item()


# --- the clock ------------------------------------------------------------------------------------


def clock(a: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Microseconds of a call, in each type."""
    return {
        f"{cell}, {width} units, {batch} x {steps}": microseconds(
            cell, width, batch, steps, a.rounds
        )
        for cell in ("lstm", "gru", "rnn")
        for width in a.widths
        for batch, steps in ((1, 1), (1, 50), (8, 1), (16, 1), (16, 20))
    }


@torch.no_grad()
def microseconds(cell: str, width: int, batch: int, steps: int, rounds: int) -> dict[str, float]:
    """Of a layer of as many inputs as units, in each type in turn: the tenth percentile of so many
    rounds, which other programs delayed little."""
    models = frozen(CELLS[cell](width, width))
    x = torch.randn(steps, batch, width)
    state = models["not frozen"](x)[1]
    calls = min(1000, max(1, 2_000_000 // (width * width * batch * steps)))
    seconds: dict[str, list[float]] = {name: [] for name in models}
    for round_ in range(1 + rounds):
        for name, model in models.items():
            begin = time.perf_counter()
            for _ in range(calls):
                model(x, state)
            if round_ > 0:  # the first one touches everything
                seconds[name].append((time.perf_counter() - begin) / calls)
    return {name: sorted(each)[len(each) // 10] * 1e6 for name, each in seconds.items()}


# What is measured, and how it is shown.
PARTS: dict[str, tuple[str, Callable[[argparse.Namespace], Any], Callable[[float], str]]] = {
    "bits": ("bits per character, held out", text_model, "{:.5f}".format),
    "answers": ("right answers, held out", classifier, "{:.2%}".format),
    "clock": ("microseconds, sequences x steps", clock, "{:.1f}".format),
}


def table(title: str, rows: dict[str, dict[str, float]], show: Callable[[float], str]) -> None:
    names = list(next(iter(rows.values())))
    print(f"\n| {title} | {' | '.join(names)} |\n|---{'|---' * len(names)}|")
    for row, values in rows.items():
        print(f"| {row} | {' | '.join(map(show, values.values()))} |")


def main() -> None:
    a = parse_arguments()
    torch.set_num_threads(a.threads)
    found = {}
    for part in a.only:
        title, measure, show = PARTS[part]
        found[part] = measure(a)
        several = part == "clock"
        table(title, found[part] if several else {a.cell: found[part]}, show)
    arguments = {name: str(value) for name, value in vars(a).items()}
    a.out.parent.mkdir(parents=True, exist_ok=True)
    a.out.write_text(json.dumps({"arguments": arguments, **found}, indent=1))


if __name__ == "__main__":
    main()
