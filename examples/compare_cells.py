"""RNN, GRU and LSTM with equally many parameters, on two tasks: which learns more from the same?

A layer of the LSTM has four times the weights of an RNN's of equal width, so equal widths compare
sizes, not cells. Here every cell gets the largest width that stays within one number of parameters
(embedding, layer and head together). Task one is a character language model, where most of what
helps is near; task two reads images of digits pixel by pixel and is asked at the end, 64 steps
later. Several seeds each, so that a difference can be told from luck; and several rates of
learning, of which each cell keeps the one that it learned its training data best with, since one
rate for all would compare tastes. (Chung et al. 2014 and Jozefowicz et al. 2015 compare like this.)

    python examples/compare_cells.py
    python examples/compare_cells.py --parameters 300000 --steps 3000 --seeds 5
"""

from __future__ import annotations

import argparse
import functools
import itertools
import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from common import (
    BITS,
    CELLS,
    GREY,
    Run,
    arguments,
    cell_colour,
    cosine,
    count_parameters,
    detach,
    find_cell,
    launch,
    picture,
    positive,
    smooth,
    start,
    train_step,
)
from language_model import CharModel, cross_entropy, endless, model_bits
from sklearn.datasets import load_digits
from text import Text, read_text
from torch import Tensor, nn
from torch.nn import functional as F


def width_for(build: Callable[[int], nn.Module], parameters: int) -> int:
    """The largest width whose model has at most so many parameters; they grow with the width.

    Raises ``ValueError`` if even width 4 is too much.
    """
    low, high = 4, 8
    if count_parameters(build(low)) > parameters:
        raise ValueError(f"{parameters} parameters are too few")
    while count_parameters(build(high)) <= parameters:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        if count_parameters(build(middle)) <= parameters:
            low = middle
        else:
            high = middle
    return low


# --- two tasks -----------------------------------------------------------------------------------


class Characters:
    """Bits per character on held-out text; the baseline knows the frequencies of characters."""

    title, unit, better = "Character language model", "bits per character", "lower"

    def __init__(self, run: Run) -> None:
        self.run, self.text = run, Text(read_text(run.args.data, 2_000_000))
        shares = torch.bincount(self.text.train, minlength=len(self.text.symbols)) + 1.0
        p = shares / shares.sum()
        self.baseline = -p[self.text.held_out].log2().mean().item()

    def build(self, cell: str | type[nn.RNNBase], width: int) -> nn.Module:
        return CharModel(cell, len(self.text.symbols), width)

    def train(self, model: nn.Module, steps: int, seed: int, rate: float) -> list[float]:
        """The loss in bits at every step."""
        optimizer = torch.optim.Adam(model.parameters(), rate)
        schedule = cosine(optimizer, steps)
        trained = self.run.distribute(model)
        mine = self.text.train.tensor_split(self.run.world)[self.run.rank]
        skip = seed * steps % 500  # every seed begins elsewhere in the text
        reading = endless(mine, self.run.args.batch // 2, 64)
        state, bits = None, []
        for begins, x, target in itertools.islice(reading, skip, skip + steps):
            logits, state = trained(x.to(self.run.device), None if begins else detach(state))
            loss = cross_entropy(logits, target.to(self.run.device))
            train_step(loss, model, optimizer, schedule)
            bits.append(loss.item() * BITS)
        return bits

    def measure(self, model: nn.Module) -> float:
        return model_bits(model, self.text)


class PixelModel(nn.Module):
    """Logits [B, 10] from pixels [T, B, 1], after the last one."""

    def __init__(self, cell: str, width: int) -> None:
        super().__init__()
        self.rnn = find_cell(cell)(1, width)
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(x)[0][-1])


class Pixels:
    """Share of right answers on scikit-learn's 8 x 8 digits, read pixel by pixel, row by row."""

    title, unit, better = "Digits, pixel by pixel (64 steps)", "accuracy", "higher"

    def __init__(self, run: Run) -> None:
        self.run = run
        images, labels = load_digits(return_X_y=True)
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
        x = torch.tensor(images / 16, dtype=torch.float32)[order].t()[..., None]  # [64, N, 1]
        y = torch.tensor(labels)[order]
        self.x, self.x_test = x[:, :1400].to(run.device), x[:, 1400:].to(run.device)
        self.y, self.y_test = y[:1400].to(run.device), y[1400:].to(run.device)
        # Always the digit that is most frequent in training.
        self.baseline = (self.y_test == self.y.mode().values).float().mean().item()

    def build(self, cell: str, width: int) -> nn.Module:
        return PixelModel(cell, width)

    def train(self, model: nn.Module, steps: int, seed: int, rate: float) -> list[float]:
        """The share of right answers in every batch."""
        optimizer = torch.optim.Adam(model.parameters(), rate)
        schedule = cosine(optimizer, steps)
        trained, right = self.run.distribute(model), []
        for step in range(steps):
            generator = self.run.generator(seed * steps + step)
            batch = torch.randint(len(self.y), (self.run.args.batch,), generator=generator)
            batch = batch.to(self.run.device)
            logits = trained(self.x[:, batch])
            train_step(F.cross_entropy(logits, self.y[batch]), model, optimizer, schedule)
            right.append((logits.argmax(-1) == self.y[batch]).float().mean().item())
        return right

    @torch.no_grad()
    def measure(self, model: nn.Module) -> float:
        return (model(self.x_test).argmax(-1) == self.y_test).float().mean().item()


# --- the comparison ------------------------------------------------------------------------------


def compare(
    run: Run, task: Any, cells: list[str], parameters: int, steps: int, seeds: int
) -> dict[str, dict[str, Any]]:
    """For each cell: its width, rate, curve (mean over the seeds), and its result per seed."""
    results = {}
    for cell in cells:
        width = width_for(lambda w, cell=cell: task.build(cell, w), parameters)
        trials = {
            rate: [
                run.once(
                    f"{task.title}, {cell}, {rate}, {seed}",
                    functools.partial(train_one, run, task, cell, width, steps, seed, rate),
                )
                for seed in run.progress(
                    range(seeds), desc=f"{task.title}: {cell}, rate {rate:g}", leave=False
                )
            ]
            for rate in run.args.rates
        }
        best = max if task.better == "higher" else min  # of the last tenth of training
        rate = best(trials, key=lambda r, t=trials: statistics.fmean(map(final, t[r])))
        runs = trials[rate]
        values = [r["result"] for r in runs]
        results[cell] = {
            "width": width,
            "parameters": count_parameters(task.build(cell, width)),
            "rate": rate,
            "results": values,
            "mean": statistics.fmean(values),
            "deviation": statistics.stdev(values) if seeds > 1 else math.nan,
            "milliseconds_per_step": sum(r["seconds"] for r in runs) / seeds / steps * 1000,
            "curve": [statistics.fmean(s) for s in zip(*(r["curve"] for r in runs), strict=True)],
        }
    return results


def train_one(
    run: Run, task: Any, cell: str, width: int, steps: int, seed: int, rate: float
) -> dict[str, Any]:
    """One model from its seed: curve, seconds of training, result on held-out data."""
    torch.manual_seed(run.args.seed + seed)
    model = task.build(cell, width).to(run.device)
    began = time.perf_counter()
    curve = task.train(model, steps, seed, rate)
    seconds = time.perf_counter() - began
    return {"curve": curve, "seconds": seconds, "result": task.measure(model)}


def final(trial: dict[str, Any]) -> float:
    """Mean of the last tenth of the training curve: what a rate is chosen by."""
    return statistics.fmean(trial["curve"][-max(1, len(trial["curve"]) // 10) :])


def table(task: Any, results: dict[str, dict[str, Any]]) -> str:
    """What is printed: one row a cell, best first."""
    order = sorted(results, key=lambda c: results[c]["mean"], reverse=task.better == "higher")
    rows = [f"{task.title} ({task.unit}, {task.better} is better; baseline {task.baseline:.3f})"]
    rows.append(
        f"  {'cell':6}{'width':>6}{'parameters':>12}{'rate':>8}{'result':>17}{'ms/step':>9}"
    )
    for cell in order:
        r = results[cell]
        rows.append(
            f"  {cell:6}{r['width']:6}{r['parameters']:12,}{r['rate']:8g}"
            f"{r['mean']:9.3f} ± {r['deviation']:.3f}{r['milliseconds_per_step']:9.1f}"
        )
    return "\n".join(rows)


def draw(path: Path, tasks: list[Any], results: list[dict[str, dict[str, Any]]], args: Any) -> None:
    """A row for each task: learning curves, and the results of all seeds beside the baseline."""
    with picture(path, figsize=(12, 8)) as figure:
        figure.suptitle(
            f"Cells at equal size: at most {args.parameters:,} parameters, {args.seeds} seeds",
            x=0.01, ha="left",
        )  # fmt: skip
        axes = figure.subplots(2, 2, width_ratios=(1.5, 1))
        for (left, right), task, found in zip(axes, tasks, results, strict=True):
            for cell, result in found.items():
                colour, curve = cell_colour(cell), result["curve"]
                label = f"{cell.upper()}, {result['width']} units, rate {result['rate']:g}"
                left.plot(
                    range(1, len(curve) + 1), smooth(curve, max(1, len(curve) // 25)),
                    color=colour, label=label,
                )  # fmt: skip
            left.set(
                title=f"{task.title}: training", xlabel="training step", ylabel=task.unit,
                ylim=(0, 1) if task.better == "higher" else (1.5, 5),
            )  # fmt: skip
            left.legend()
            for i, (cell, result) in enumerate(found.items()):
                values = result["results"]
                right.plot(values, [i] * len(values), "o", color=cell_colour(cell), alpha=0.5)
                right.plot([result["mean"]], [i], "|", ms=26, mew=2.5, color=cell_colour(cell))
                right.annotate(
                    f"{result['mean']:.3f}", (result["mean"], i), (0, 17), ha="center",
                    textcoords="offset points", fontsize=9,
                )  # fmt: skip
            right.axvline(task.baseline, color=GREY, ls=(0, (4, 3)), label="baseline")
            right.set_yticks(range(len(found)), [cell.upper() for cell in found])
            right.set_ylim(-0.6, len(found) - 0.3)
            right.set(
                title="Held out, each seed and mean",
                xlabel=f"{task.unit} ({task.better} is better)",
            )
            right.legend(loc="lower left" if task.better == "lower" else "lower right")


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    p = arguments(__doc__, "compare_cells", cell=None, hidden=None, batch=64, lr=None, steps=500)
    p.add_argument("--cells", nargs="+", type=str.lower, choices=sorted(CELLS), help="default: all")
    p.add_argument("--parameters", type=positive, default=60_000, help="of a model, at most")
    p.add_argument("--rates", nargs="+", type=float, default=[5e-3, 1e-3], help="to choose from")
    p.add_argument("--seeds", type=positive, default=3)
    p.add_argument("--data", type=Path, help="UTF-8 text or folder (default: Python's own source)")
    return p.parse_args(argv)


def main() -> None:
    args = parse()
    run = start(args)
    cells = args.cells or list(CELLS)
    tasks = [Characters(run), Pixels(run)]
    results = [compare(run, task, cells, args.parameters, args.steps, args.seeds) for task in tasks]
    draw(run.path("compare_cells.png"), tasks, results, args)
    figures: dict[str, Any] = {}
    for name, task, found in zip(("characters", "pixels"), tasks, results, strict=True):
        run.print(table(task, found) + "\n")
        figures[f"{name}_baseline"] = task.baseline
        figures |= {f"{name}_{cell}": result["mean"] for cell, result in found.items()}
        figures[name] = found
    run.write(figures, "compare_cells")


if __name__ == "__main__":
    launch(main)
