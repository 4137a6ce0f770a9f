"""Interpretable hidden units: what single numbers in a character model have learned to track.

A character model is trained on source code. Nobody tells it about strings, comments, brackets or
indentation; yet single units come to follow them (Karpathy, Johnson and Fei-Fei 2015,
arXiv:1506.02078). This program finds such units by itself: it computes from the text where it is
inside a string, how far into the line, ..., and ranks all units by how well they tell it, on text
that training never saw.

    python examples/hidden_units.py                 # see out/hidden_units/hidden_units.html
    python examples/hidden_units.py --data DIR --cell gru --layers 2

Fair play: a unit is chosen on one part of the held-out text and judged on another, and held against
the best of as many units without training, the current character alone, and moved labels.
"""

from __future__ import annotations

import argparse
import html
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from common import (
    BITS,
    COLOURS,
    GREY,
    Run,
    arguments,
    cosine,
    count_parameters,
    detach,
    find_cell,
    launch,
    picture,
    positive,
    start,
    train_step,
)
from scipy.stats import rankdata
from text import Text, read_text
from torch import Tensor, nn

# --- what units could track ----------------------------------------------------------------------

# A triple-quoted string, a string of one line, or a comment; whichever begins first.
TOKEN = re.compile(
    r"""(?P<docstring>\"{3}|'{3})(?:\\.|[^\\])*?(?P=docstring)"""
    r"""|(?P<string>["'])(?:\\.|(?!(?P=string))[^\\\n])*(?P=string)"""
    r"""|(?P<comment>\#)[^\n]*""",
    re.DOTALL,
)


def properties(text: str) -> dict[str, np.ndarray]:
    """What is true after each character of Python code has been read, each [len(text)].

    Booleans: whether the next character belongs to a string, a comment, ...; integers: how deep or
    how far. All follow from the characters up to there.
    """
    n = len(text)
    characters = np.array(list(text))
    inside = {kind: np.zeros(n, bool) for kind in ("string", "docstring", "comment")}
    code = np.ones(n, bool)  # no bracket counts in what is none
    for match in TOKEN.finditer(text):
        kind = match.lastgroup
        # Known from the last character of the opening quote on, until the closing one is complete.
        opening = len(match[kind])
        closing = 0 if kind == "comment" else 1
        inside[kind][match.start() + opening - 1 : match.end() - closing] = True
        code[match.start() : match.end()] = False

    is_open, is_close = np.isin(characters, list("([{")), np.isin(characters, list(")]}"))
    depth = np.cumsum((is_open & code).astype(int) - (is_close & code))
    depth -= np.minimum.accumulate(np.minimum(depth, 0))  # one closing too many opens nothing

    place = np.arange(n)
    ends = characters == "\n"
    column = place - np.maximum.accumulate(np.where(ends, place, -1))  # 0 after a newline
    blank = (characters == " ") | (characters == "\t") | ends
    # The last place in a line that is not blank tells that its indentation is over.
    begun = np.maximum.accumulate(np.where(blank, -1, place)) > place - column
    first = np.maximum.accumulate(np.where(begun & ~np.roll(begun, 1), place, 0))
    indentation = np.where(begun, column[first] - 1, column)
    return {
        "inside a string": inside["string"],
        "inside a docstring": inside["docstring"],
        "inside a comment": inside["comment"],
        "inside brackets": depth > 0,
        "before a line's first word": ~begun,
        "position in the line": column,
        "indentation of the line": indentation,
        "depth of brackets": depth,
    }


# --- model ---------------------------------------------------------------------------------------


class CharModel(nn.Module):
    """Embedding, recurrent layers, softmax over the next character."""

    def __init__(self, cell: type[nn.RNNBase], symbols: int, hidden: int, layers: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(symbols, hidden // 2)
        self.rnn = cell(hidden // 2, hidden, layers)
        self.head = nn.Linear(hidden, symbols)

    def forward(self, x: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        """Logits [T, B, symbols] for characters ``x`` [T, B], and the state after them."""
        y, state = self.rnn(self.embedding(x), state)
        return self.head(y), state


def batch(ids: Tensor, step: int, size: int, chunk: int) -> tuple[Tensor, Tensor, bool]:
    """Input and target [T, B] of a step, and whether the streams begin anew with it.

    The text is cut into B streams that are read side by side, a chunk per step: each goes on where
    the last one ended, and so does the state.
    """
    streams = ids[: len(ids) // size * size].view(size, -1).t()  # [N, B]
    parts = (len(streams) - 1) // chunk
    if parts < 1:
        raise SystemExit(f"the text is too short for {size} streams of more than {chunk}")
    begin = step % parts * chunk
    part = streams[begin : begin + chunk + 1]
    return part[:-1].contiguous(), part[1:].contiguous(), begin == 0


def train(run: Run, model: CharModel, text: Text) -> list[float]:
    """Truncated back-propagation through time; returns the losses in bits per character."""
    a = run.args
    mine = text.train.chunk(run.world)[run.rank].to(run.device)
    optimizer = torch.optim.Adam(model.parameters(), a.lr)
    schedule = cosine(optimizer, a.steps, warmup=min(50, a.steps // 10))
    checkpoint = run.checkpoint(model=model, optimizer=optimizer, schedule=schedule)
    first = checkpoint.load()
    losses = list(checkpoint.extra or [])
    trained, state = run.distribute(model), None
    for step in (bar := run.progress(range(first, a.steps), unit="step")):
        x, target, anew = batch(mine, step, a.batch, a.chunk)
        logits, state = trained(x, None if anew else state)
        loss = F.cross_entropy(logits.flatten(0, 1), target.flatten())
        train_step(loss, model, optimizer, schedule)
        state = detach(state)
        losses.append(loss.item() * BITS)
        bar.set_postfix_str(f"{losses[-1]:.3f} bits", refresh=False)
        checkpoint.save_now_and_then(step + 1, losses)
    checkpoint.save(a.steps, losses)
    return losses


def memory(state: Any) -> Tensor:
    """What the units of all layers hold, [L, B, H], in -1..1: an LSTM's tanh(c), others' h."""
    return state[1].double().tanh() if isinstance(state, tuple) else state.double()


@torch.no_grad()
def record(model: CharModel, ids: Tensor) -> tuple[np.ndarray, float]:
    """What all units hold after each of N characters, [N, units]; and the loss in bits.

    One call per character: outputs alone would not show an LSTM's c.
    """
    state, kept, outputs = None, [], []
    for x in model.embedding(ids)[:, None, None]:  # [1, 1, E] each
        y, state = model.rnn(x, state)
        kept.append(memory(state).flatten())
        outputs.append(y[0, 0])
    logits = model.head(torch.stack(outputs[:-1]))
    return torch.stack(kept).cpu().numpy(), F.cross_entropy(logits, ids[1:]).item() * BITS


# --- search --------------------------------------------------------------------------------------


def agreement(ranks: np.ndarray, label: np.ndarray) -> np.ndarray:
    """How well numbers with these ``ranks`` [N, units] tell ``label`` [N]; -1..1, 0 is nothing.

    For a boolean 2 AUC - 1: AUC is the chance that the number is larger where it is true than where
    it is false (Mann and Whitney 1947). For a number Spearman's rank correlation.
    """
    if label.dtype == bool:
        true, false = int(label.sum()), int((~label).sum())
        if true == 0 or false == 0:
            raise ValueError("the label is the same everywhere")
        auc = (ranks[label].sum(0) - true * (true + 1) / 2) / (true * false)
        return 2 * auc - 1
    r = ranks - ranks.mean(0)
    l = rankdata(label) - (len(label) + 1) / 2  # noqa: E741
    scale = np.sqrt((r**2).sum(0) * (l**2).sum())
    return np.divide(l @ r, scale, out=np.zeros(ranks.shape[1]), where=scale > 0)


class Found(NamedTuple):
    """The unit that tells a property best."""

    unit: int
    sign: int  # -1 if it is low where the property is true or large
    score: float  # on text that it was not chosen on: AUC, or correlation


class Part(NamedTuple):
    """A part of the held-out text: what all units held, as ranks, and the properties."""

    text: str
    units: np.ndarray  # [N, units]
    ranks: np.ndarray
    labels: dict[str, np.ndarray]


def best_unit(choose: Part, judge: Part, label: tuple[np.ndarray, np.ndarray]) -> Found:
    """The best of all units on ``choose``, with its score on ``judge``; labels for either."""
    found = agreement(choose.ranks, label[0])
    unit = int(np.abs(found).argmax())
    sign = 1 if found[unit] > 0 else -1
    score = sign * agreement(judge.ranks[:, [unit]], label[1])[0]
    return Found(unit, sign, displayed(score, label[0]))


def displayed(score: float, label: np.ndarray) -> float:
    """An agreement as AUC for booleans, and as it is for numbers."""
    return float((score + 1) / 2 if label.dtype == bool else score)


def moved(choose: Part, judge: Part, name: str, times: int, seed: int) -> list[float]:
    """Scores where the labels are moved along the text, so that they belong to other places.

    Moved, not shuffled one by one: runs stay as long as they are, and chance agreement as likely.
    """
    rng, scores = np.random.default_rng(seed), []
    for _ in range(times):
        pair = []
        for part in (choose, judge):
            label = part.labels[name]
            pair.append(np.roll(label, rng.integers(len(label) // 10, len(label) * 9 // 10)))
        scores.append(best_unit(choose, judge, (pair[0], pair[1])).score)
    return scores


def by_character(choose: Part, judge: Part, name: str) -> float:
    """The score of the label's mean given the current character, learned on ``choose``."""
    label = choose.labels[name].astype(float)
    known, which = np.unique(list(choose.text), return_inverse=True)
    means = dict(zip(known, np.bincount(which, label) / np.bincount(which), strict=True))
    guess = np.array([means.get(c, label.mean()) for c in judge.text])
    score = agreement(rankdata(guess)[:, None], judge.labels[name])[0]
    return displayed(score, judge.labels[name])


def search(
    trained: tuple[Part, Part], untrained: tuple[Part, Part], times: int, seed: int
) -> dict[str, dict[str, Any]]:
    """For each property the best unit and its score, and those that it is held against."""
    result = {}
    for name, label in trained[0].labels.items():
        labels = label, trained[1].labels[name]
        found = best_unit(*trained, labels)
        chance = moved(*trained, name, times, seed)
        result[name] = {
            "measure": "AUC" if label.dtype == bool else "correlation",
            "unit": found.unit,
            "sign": found.sign,
            "score": found.score,
            "untrained": best_unit(*untrained, labels).score,
            "character": by_character(*trained, name),
            "moved_mean": float(np.mean(chance)),
            "moved_largest": max(chance),
        }
    return result


# --- page ----------------------------------------------------------------------------------------

LEVELS = 10  # of colour, on either side of white
LOW, HIGH = (120, 180, 232), (247, 158, 64)  # blue and orange, light enough for black text on them


def level(values: np.ndarray) -> np.ndarray:
    """Activations -1..1 as whole numbers -LEVELS..LEVELS."""
    return np.rint(np.clip(values, -1, 1) * LEVELS).astype(int)


def shade(level: int) -> tuple[int, int, int]:
    """The colour of a level: white at 0."""
    end, share = (HIGH if level > 0 else LOW), abs(level) / LEVELS
    red, green, blue = (round(255 + share * (c - 255)) for c in end)
    return red, green, blue


def passage(part: Part, name: str, length: int) -> slice:
    """Where in the text the property varies most: whole lines, chosen by the label alone."""
    label = part.labels[name].astype(float)
    starts = [i + 1 for i, c in enumerate(part.text[: len(label) - length]) if c == "\n"][::5]
    if not starts:
        return slice(0, length)
    changes = np.abs(np.diff(label, prepend=label[0])) > 0
    best = max(
        starts, key=lambda i: label[i : i + length].std() * changes[i : i + length].sum() ** 0.5
    )
    end = part.text.rfind("\n", best, best + length)
    return slice(best, end if end > best else best + length)


def coloured(text: str, levels: Sequence[int], marked: Sequence[bool]) -> str:
    """HTML of the text, coloured by level; ``marked`` characters are underlined."""
    pieces, begin = [], 0
    for i in range(1, len(text) + 1):
        if i == len(text) or (levels[i], marked[i]) != (levels[begin], marked[begin]):
            name = f"l{levels[begin] + LEVELS}" + (" m" if marked[begin] else "")
            pieces.append(f'<span class="{name}">{html.escape(text[begin:i])}</span>')
            begin = i
    return "".join(pieces)


def page(part: Part, found: dict[str, dict[str, Any]], title: str, length: int = 1500) -> str:
    """A page of its own, without scripts or anything from elsewhere: figures and coloured text."""
    colours = "".join(
        f".l{i + LEVELS}{{background:rgb{shade(i)}}}" for i in range(-LEVELS, LEVELS + 1)
    )
    sections, rows = [], []
    for name, f in found.items():
        anchor = name.replace(" ", "-").replace("'", "")
        where = passage(part, name, length)
        label = part.labels[name]
        values = f["sign"] * part.units[where, f["unit"]]
        marked = label[where] if label.dtype == bool else np.zeros(len(values), bool)
        hint = " Underlined: where it is true." if label.dtype == bool else ""
        sign = "" if f["sign"] > 0 else ", sign turned"
        sections.append(
            f'<section id="{anchor}"><h2>{html.escape(name.capitalize())}</h2>'
            f"<p>Unit {f['unit']}{sign}: {f['measure']} {f['score']:.3f} on held-out text.{hint}"
            f'</p><pre tabindex="0">'
            f"{coloured(part.text[where], level(values).tolist(), marked.tolist())}</pre></section>"
        )
        cells = "".join(
            f"<td>{f[key]:.3f}</td>"
            for key in ("score", "character", "untrained", "moved_mean", "moved_largest")
        )
        link = f'<a href="#{anchor}">{html.escape(name)}</a>'
        head = f'<th scope="row">{link}</th><td>{f["measure"]}</td><td>{f["unit"]}</td>'
        rows.append(f"<tr>{head}{cells}</tr>")
    scale = "".join(
        f'<span class="l{i + LEVELS}">{i / LEVELS:+.1f}</span>'
        for i in range(-LEVELS, LEVELS + 1, 2)
    )
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{html.escape(title)}</title>
<style>
body{{font:16px/1.5 system-ui,sans-serif;color:#111;background:#fff;max-width:62rem;
margin:2rem auto;padding:0 1rem}}
h1{{font-size:1.5rem}} h2{{font-size:1.15rem;margin:2rem 0 .3rem}} p{{margin:.3rem 0}}
a{{color:#00558a}}
table{{border-collapse:collapse;font-variant-numeric:tabular-nums}}
th,td{{padding:.25rem .7rem;border-bottom:1px solid #ccc;text-align:right}}
th:first-child,td:nth-child(2){{text-align:left}} thead th{{vertical-align:bottom}}
tbody th{{font-weight:normal}} td:nth-child(4){{font-weight:bold}}
.wide{{overflow-x:auto}}
pre{{font:13px/1.6 ui-monospace,monospace;overflow-x:auto;border:1px solid #ccc;padding:.6rem}}
.scale span{{font:13px ui-monospace,monospace;padding:.2rem .4rem}}
.m{{text-decoration:underline;text-underline-offset:3px}}
{colours}
</style>
</head>
<body>
<h1>{html.escape(title)}</h1>
<p>Each character of the text is coloured by what one unit of the network holds after reading it.
The unit was chosen on other text. Passages were chosen by the property alone, where it varies
most.</p>
<p class="scale">{scale}</p>
<div class="wide"><table>
<thead><tr><th scope="col">property</th><th scope="col">measure</th><th scope="col">unit</th>
<th scope="col">this unit</th><th scope="col">current<br>character</th>
<th scope="col">best unit,<br>untrained</th><th scope="col">moved labels,<br>mean</th>
<th scope="col">moved labels,<br>largest</th></tr></thead>
<tbody>{"".join(rows)}</tbody>
</table></div>
<p>AUC: 0.5 is chance, 1 is perfect. Correlation is of ranks: 0 is chance, 1 is perfect.</p>
{"".join(sections)}
</body>
</html>
"""


# --- picture -------------------------------------------------------------------------------------


def draw(run: Run, part: Part, found: dict[str, dict[str, Any]], width: int = 96) -> None:
    """Scores above, and below some lines of text coloured by the best unit."""
    with picture(run.path("hidden_units.png"), figsize=(12, 11)) as figure:
        top, low = figure.subfigures(2, 1, height_ratios=(1, 1.55))
        kinds = {
            "AUC": (0.4, "AUC on held-out text (0.5 is chance)"),
            "correlation": (-0.1, "rank correlation on held-out text (0 is chance)"),
        }
        ratios = [sum(f["measure"] == kind for f in found.values()) + 1.3 for kind in kinds]
        panels = top.subplots(2, 1, height_ratios=ratios)
        looks = {
            "score": ("the best unit", dict(marker="o", ms=10, color=COLOURS[0])),
            "untrained": ("the best unit without training", dict(marker="s", color=COLOURS[1])),
            "character": ("the current character alone", dict(marker="D", color=COLOURS[2])),
            "moved_largest": (
                "moved labels, the largest",
                dict(marker="|", ms=11, mew=2, color=GREY),
            ),
        }
        for axes, (kind, (left, label)) in zip(panels, kinds.items(), strict=True):
            names = [name for name, f in found.items() if f["measure"] == kind][::-1]
            for key, (meaning, look) in list(looks.items())[::-1]:
                values = [found[name][key] for name in names]
                axes.plot(values, range(len(names)), ls="", label=meaning, **look)
            axes.set_yticks(range(len(names)), names)
            axes.set(xlabel=label, xlim=(left, 1.02), ylim=(-0.6, len(names) - 0.4))
        handles, labels = panels[0].get_legend_handles_labels()
        top.legend(handles[::-1], labels[::-1], loc="outside upper center", ncols=4)

        shown = ["inside a string", "inside brackets", "inside a docstring"]
        for axes, name in zip(low.subplots(len(shown), 1), shown, strict=True):
            f = found[name]
            where = passage(part, name, 400)
            values = level(f["sign"] * part.units[where, f["unit"]])
            label = part.labels[name][where]
            marked = label if label.dtype == bool else np.zeros(len(label), bool)
            draw_text(axes, part.text[where], values, marked, width, lines=8)
            axes.set_title(f"Unit {f['unit']}: {name}", pad=4)
        low.supxlabel(
            "Blue: the unit holds -1; white: 0; orange: +1. Underlined: where it is true.",
            fontsize=9,
        )


def draw_text(
    axes: Any, text: str, levels: np.ndarray, marked: np.ndarray, width: int, lines: int
) -> None:
    """The first lines of a text in a grid, each character on the colour of its level."""
    row, column = 0, 0
    grid = np.ones((lines, width, 3))
    for character, value, mark in zip(text, levels.tolist(), marked.tolist(), strict=True):
        if character == "\n":
            row, column = row + 1, 0
            if row == lines:
                break
        else:
            if column < width:
                grid[row, column] = np.array(shade(value)) / 255
                axes.text(
                    column, row, character, ha="center", va="center_baseline", fontsize=8,
                    family="monospace", color="black",
                )  # fmt: skip
                if mark:
                    axes.plot([column - 0.5, column + 0.5], [row + 0.4] * 2, color="black", lw=1)
            column += 1
    axes.imshow(grid, aspect="auto")
    axes.axis("off")


# --- program -------------------------------------------------------------------------------------


def parser() -> argparse.ArgumentParser:
    p = arguments(__doc__, "hidden_units", cell="lstm", hidden=256, batch=32, lr=3e-3, steps=4000)
    p.add_argument("--layers", type=positive, default=1)
    p.add_argument("--chunk", type=positive, default=100, help="characters per step of training")
    p.add_argument("--data", type=Path, help="file or folder of Python code to read")
    p.add_argument("--look", type=positive, default=60000, help="held-out characters to look at")
    p.add_argument("--moves", type=positive, default=20, help="times the labels are moved")
    return p


def parts(model: CharModel, text: Text, every: str, look: int) -> tuple[tuple[Part, Part], float]:
    """The held-out text in two halves, with what all units of ``model`` held; and the loss in bits.

    ``every`` is the whole text: only from its beginning on is it known what is inside what.
    """
    begin = len(text.train)
    look = min(look, len(text.held_out))
    labels = {name: label[begin : begin + look] for name, label in properties(every).items()}
    device = next(model.parameters()).device
    units, bits = record(model, text.held_out[:look].to(device))
    halves = []
    for where in (slice(0, look // 2), slice(look // 2, look)):
        ranks = rankdata(units[where], axis=0)
        some = {name: label[where] for name, label in labels.items()}
        halves.append(Part(text.held_out_text[where], units[where], ranks, some))
    return (halves[0], halves[1]), bits


def main() -> None:
    args = parser().parse_args()
    run = start(args)
    every = read_text(args.data)
    text = Text(every)
    figures: dict[str, Any] = {}
    models = {}
    for name in ("untrained", "trained"):
        torch.manual_seed(args.seed)
        cell = find_cell(args.cell)
        model = CharModel(cell, len(text.symbols), args.hidden, args.layers).to(run.device)
        models[name] = model
    train(run, models["trained"], text)
    if run.is_main:
        run.print("looking at what the units hold ...")
        trained, bits = parts(models["trained"], text, every, args.look)
        untrained, _ = parts(models["untrained"], text, every, args.look)
        found = search(trained, untrained, args.moves, args.seed)
        shares = torch.bincount(text.train) / len(text.train)
        figures = {
            "characters": len(every),
            "units": trained[0].units.shape[1],
            "parameters": count_parameters(models["trained"]),
            "held_out_bits": bits,
            "single_character_bits": torch.special.entr(shares).sum().item() * BITS,
            "found": found,
        }
        title = f"What single units of the {args.cell.upper()} follow in source code"
        run.path("hidden_units.html").write_text(page(trained[1], found, title), encoding="utf-8")
        draw(run, trained[1], found)
        print(f"{'':28}unit  score  character  untrained  moved labels: mean  largest")
        for name, f in found.items():
            print(
                f"{name:27} {f['unit']:4}  {f['score']:.3f}  {f['character']:9.3f}  "
                f"{f['untrained']:9.3f}  {f['moved_mean']:18.3f}  {f['moved_largest']:7.3f}"
            )
    run.write(figures)


if __name__ == "__main__":
    launch(main)
