"""Sequence to sequence: dates in free formats to ISO 8601, or translation, by two recurrent nets.

An encoder reads the source and leaves its last state (many to one); a decoder starts from it and
writes the target (one to many). Trained twice: as Sutskever, Vinyals and Le 2014 (arXiv:1409.3215)
did, with nothing but that state between the two, and with the attention of Bahdanau, Cho and
Bengio 2015 (arXiv:1409.0473). Sources of all lengths share a batch, packed.

    python examples/seq2seq.py                                  # "March 3rd '98" -> "1998-03-03"
    python examples/seq2seq.py --say "the day after Christmas 1999"
    python examples/seq2seq.py --pairs english_german.tsv       # a source and a target per line
    torchrun --nproc-per-node 2 examples/seq2seq.py --threads 1
"""

from __future__ import annotations

import argparse
import math
import random
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import dates
import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from common import (
    COLOURS,
    GREY,
    INK,
    Run,
    arguments,
    cosine,
    count_parameters,
    find_cell,
    launch,
    picture,
    positive,
    start,
    train_step,
)
from decoding import (
    BEGIN,
    PAD,
    Attention,
    Vocabulary,
    Written,
    beam_search,
    bleu,
    exact,
    greedy,
    top_hidden,
)
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence, pad_packed_sequence, pad_sequence

# --- data ----------------------------------------------------------------------------------------


class Pair(NamedTuple):
    """A source and its target as tokens; dates say as well how they were written."""

    source: list[str]
    target: list[str]
    kind: str = ""


def date_pairs(count: int, held_out: int, seed: int) -> tuple[list[Pair], list[Pair]]:
    """Training pairs, and pairs whose sources are not among them; characters are the tokens."""
    r = random.Random(seed)
    seen: set[str] = set()
    pairs: list[Pair] = []
    while len(pairs) < count + held_out:
        date = dates.random_date(r)
        if date.text not in seen:
            seen.add(date.text)
            pairs.append(Pair(list(date.text), list(date.iso), date.kind))
    return pairs[:count], pairs[count:]


def read_pairs(
    path: Path, unit: str, longest: int, most: int, seed: int
) -> tuple[list[Pair], list[Pair]]:
    """Pairs of a TSV file (source, tab, target; what follows is ignored), a twentieth held out.

    At most ``most`` sources are held out.
    A source with several targets stays on one side as a whole. Ends the program if a line has no
    tab or too few pairs remain that are at most ``longest`` tokens long.
    """

    def tokens(text: str) -> list[str]:
        return list(text) if unit == "character" else re.findall(r"\w+|[^\w\s]", text)

    pairs = []
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            columns = line.rstrip("\n").split("\t")
            if len(columns) < 2:
                raise SystemExit(f"{path}, line {number}: no tab between source and target")
            pair = Pair(tokens(columns[0]), tokens(columns[1]))
            if 0 < len(pair.source) <= longest and 0 < len(pair.target) <= longest:
                pairs.append(pair)
    sources = sorted({tuple(p.source) for p in pairs})
    random.Random(seed).shuffle(sources)
    held_out = set(sources[: min(most, len(sources) // 20)])
    if not held_out:
        raise SystemExit(f"{path}: {len(sources)} different sources are too few, 20 are needed")
    return (
        [p for p in pairs if tuple(p.source) not in held_out],
        [p for p in pairs if tuple(p.source) in held_out],
    )


# --- model ---------------------------------------------------------------------------------------


class Encoder(nn.Module):
    """Reads the source both ways, half of the H numbers of a note for each direction."""

    def __init__(self, cell: type[nn.RNNBase], symbols: int, hidden: int, layers: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(symbols, hidden // 2)
        self.rnn = cell(hidden // 2, hidden // 2, layers, bidirectional=True)

    def forward(self, source: PackedSequence) -> tuple[Tensor, Tensor, Any]:
        """Notes [S, B, H], which of them are real [S, B], and the last state, for a decoder."""
        embedded = source._replace(data=self.embedding(source.data))
        packed, state = self.rnn(embedded)
        notes, lengths = pad_packed_sequence(packed)
        is_real = torch.arange(len(notes))[:, None] < lengths
        return notes, is_real.to(notes.device), join_directions(state)


def join_directions(state: Any) -> Any:
    """Of both directions' states [2L, B, H/2], one state [L, B, H]."""
    if isinstance(state, tuple):
        return tuple(map(join_directions, state))
    layers = state.view(-1, 2, *state.shape[1:])  # [L, 2, B, H/2]
    return torch.cat([layers[:, 0], layers[:, 1]], -1)


class Translator(nn.Module):
    """Encoder and decoder. The decoder's state is (memory or None, state of its layers)."""

    def __init__(
        self,
        cell: type[nn.RNNBase],
        sources: int,
        targets: int,
        hidden: int,
        layers: int = 1,
        attends: bool = True,
    ) -> None:
        super().__init__()
        self.encoder = Encoder(cell, sources, hidden, layers)
        self.embedding = nn.Embedding(targets, hidden // 2)
        self.attention = Attention(hidden, hidden, hidden // 2) if attends else None
        context = hidden if attends else 0
        self.rnn = cell(hidden // 2 + context, hidden, layers)
        self.head = nn.Linear(hidden + context, targets)

    def read(self, source: PackedSequence) -> Any:
        """The state with which the decoder starts."""
        notes, is_real, state = self.encoder(source)
        return None if self.attention is None else self.attention.memory(notes, is_real), state

    def step(self, token: Tensor, state: Any) -> tuple[Tensor, Any, Tensor | None]:
        """From the last token [B] to logits of the next [B, V]; see ``decoding.Step``."""
        memory, state = state
        x = self.embedding(token)
        if self.attention is None:
            y, state = self.rnn(x[None], state)
            return self.head(y[0]), (None, state), None
        context, weights = self.attention(top_hidden(state), memory)
        y, state = self.rnn(torch.cat([x, context], -1)[None], state)
        return self.head(torch.cat([y[0], context], -1)), (memory, state), weights

    def forward(self, source: PackedSequence, target: Tensor, own: float = 0.0) -> Tensor:
        """Logits [T, B, V] for ``target`` [T, B], each given what comes before it.

        Before a token comes the true one (teacher forcing), or with probability ``own`` one that
        is drawn from the model's prediction (scheduled sampling: Bengio, Vinyals, Jaitly and
        Shazeer 2015, arXiv:1506.03099), so that training meets the model's own mistakes.
        """
        state = self.read(source)
        begin = torch.full_like(target[:1], BEGIN)
        before = torch.cat([begin, target[:-1]])
        if self.attention is None and own == 0:  # nothing depends on predictions: one call
            return self.head(self.rnn(self.embedding(before), state[1])[0])
        logits: list[Tensor] = []
        for t, token in enumerate(before):
            if own > 0 and t > 0:
                drawn = logits[-1].detach().softmax(-1).multinomial(1).squeeze(-1)
                token = torch.where(
                    torch.rand(token.shape, device=token.device) < own, drawn, token
                )
            scores, state, _ = self.step(token, state)
            logits.append(scores)
        return torch.stack(logits)


# --- training and use ----------------------------------------------------------------------------


class Task:
    """The pairs as numbers, and how well a model does on those held out."""

    def __init__(
        self, train: list[Pair], held_out: list[Pair], joint: str = "", device: Any = None
    ) -> None:
        """``joint`` is what stands between tokens in a text: a space, or nothing."""
        self.train, self.held_out, self.joint, self.device = train, held_out, joint, device
        self.is_dates = bool(train[0].kind)
        least = 2 if joint else 1  # a word that occurs once is learned by nobody
        self.sources = Vocabulary((p.source for p in train), least)
        self.targets = Vocabulary((p.target for p in train), least)
        encode_source, encode_target = self.sources.encode, self.targets.encode
        self.encoded = [(encode_source(p.source), encode_target(p.target)) for p in train]
        self.limit = max(len(p.target) for p in train) + 1

    def packed(self, sources: Sequence[Sequence[str]]) -> PackedSequence:
        encoded = [self.sources.encode(source) for source in sources]
        return pack_sequence(encoded, enforce_sorted=False).to(self.device)

    def batch(self, size: int, generator: torch.Generator) -> tuple[PackedSequence, Tensor]:
        """Random training pairs: sources packed, targets [T, B] filled up with PAD."""
        rows = torch.randint(len(self.encoded), (size,), generator=generator).tolist()
        sources, targets = zip(*(self.encoded[i] for i in rows), strict=True)
        packed = pack_sequence(sources, enforce_sorted=False)
        return packed.to(self.device), pad_sequence(targets, padding_value=PAD).to(self.device)

    def text(self, tokens: Sequence[str]) -> str:
        return self.joint.join(tokens)

    @torch.no_grad()
    def write(
        self, model: Translator, sources: Sequence[Sequence[str]], width: int = 0, part: int = 256
    ) -> tuple[list[str], Tensor]:
        """The targets written for ``sources`` and their log probabilities; width 0 is greedy."""
        texts, scores = [], []
        for begin in range(0, len(sources), part):
            some = sources[begin : begin + part]
            found = self.search(model, some, width)
            texts += [self.text(self.targets.decode(row)) for row in found.tokens.tolist()]
            scores.append(found.score)
        return texts, torch.cat(scores)

    @torch.no_grad()
    def search(self, model: Translator, sources: Sequence[Sequence[str]], width: int) -> Written:
        state = model.read(self.packed(sources))
        if width == 0:
            return greedy(model.step, state, len(sources), self.limit, self.device)
        # By their log probability long sentences lose against short ones. Dates have one length.
        penalty = 0.0 if self.is_dates else 1.0
        return beam_search(
            model.step, state, len(sources), self.limit, width, penalty, device=self.device
        )

    def score(self, written: list[str], pairs: list[Pair]) -> float:
        """In percent: exact matches for dates, BLEU for translations."""
        if self.is_dates:
            return 100 * exact(written, [[self.text(p.target)] for p in pairs])
        return bleu(written, [[self.text(p.target)] for p in pairs])


def train(
    run: Run, task: Task, model: Translator, name: str, watch: int = 250
) -> list[tuple[int, float]]:
    """Trains ``model``; returns (step, score on ``watch`` held-out pairs) along the way."""
    a = run.args
    optimizer = torch.optim.Adam(model.parameters(), a.lr)
    schedule = cosine(optimizer, a.steps, warmup=min(50, a.steps // 10))
    checkpoint = run.checkpoint(
        file_name(name), model=model, optimizer=optimizer, schedule=schedule
    )
    first = checkpoint.load()
    curve = [tuple(point) for point in checkpoint.extra or []]
    trained = run.distribute(model)
    every = max(1, a.steps // 15)
    for step in (bar := run.progress(range(first, a.steps), desc=name, unit="step")):
        source, target = task.batch(a.batch, run.generator(step))
        logits = trained(source, target, own=a.sampling * step / a.steps)
        loss = F.cross_entropy(logits.flatten(0, 1), target.flatten(), ignore_index=PAD)
        train_step(loss, model, optimizer, schedule)
        if (step + 1) % every == 0 or step + 1 == a.steps:
            some = task.held_out[:watch]
            written, _ = task.write(model, [p.source for p in some])
            curve.append((step + 1, task.score(written, some)))
            bar.set_postfix_str(f"loss {loss.item():.3f}, {curve[-1][1]:.1f} % held out")
            checkpoint.save_now_and_then(step + 1, curve)
    checkpoint.save(a.steps, curve)
    return curve


def file_name(name: str) -> str:
    """Of the checkpoint of a model."""
    return name.replace(" ", "_") + ".pt"


def nearest(task: Task) -> list[str]:
    """Baseline: copies the target of the training source most like the source.

    Alike is what shares rare pieces of 1 to 4 characters: cosine of TF-IDF vectors.
    """
    from sklearn.feature_extraction.text import TfidfVectorizer

    pieces = TfidfVectorizer(analyzer="char_wb", ngram_range=(1, 4), lowercase=True)
    known = pieces.fit_transform(task.text(p.source) for p in task.train)
    asked = pieces.transform(task.text(p.source) for p in task.held_out)
    best: list[int] = []
    for begin in range(0, asked.shape[0], 200):
        best += (asked[begin : begin + 200] @ known.T).toarray().argmax(1).tolist()
    return [task.text(task.train[i].target) for i in best]


def by_kind(task: Task, written: list[str]) -> dict[str, float]:
    """Exact matches in percent for each way of writing a date."""
    result = {}
    for kind in sorted({p.kind for p in task.held_out}):
        rows = [i for i, p in enumerate(task.held_out) if p.kind == kind]
        result[kind] = task.score([written[i] for i in rows], [task.held_out[i] for i in rows])
    return result


# --- picture -------------------------------------------------------------------------------------


def draw(
    run: Run,
    task: Task,
    model: Translator,
    curves: dict[str, list[tuple[int, float]]],
    figures: dict[str, Any],
) -> None:
    """Learning curves against the baselines, the kinds of dates, and where attention looked."""
    is_dates, attends = task.is_dates, model.attention is not None
    with picture(run.path("seq2seq.png"), figsize=(12, 9 if attends else 4.5)) as figure:
        top, *rest = figure.subfigures(2 if attends else 1, 1, squeeze=False).flat
        panels = top.subplots(1, 2) if is_dates else [top.subplots()]
        metric = "exact matches on held-out dates (%)" if is_dates else "BLEU on held-out pairs"
        axes = panels[0]
        for (name, curve), colour in zip(curves.items(), COLOURS, strict=False):
            axes.plot(*zip(*curve, strict=True), "o-", ms=3, color=colour, label=name)
        # (name, figure, style): those who did not learn
        lines = [("nearest training source", figures["nearest"], ":")]
        if is_dates:
            lines.append(("dateutil, a parser written by hand", figures["dateutil"], "--"))
        for name, height, dashes in lines:
            axes.axhline(height, color=GREY, ls=dashes, lw=1.5, label=name)
        axes.set(xlabel="training step", ylabel=metric, xlim=0)
        axes.set_ylim(0, 101 if is_dates else None)
        axes.set_title("Learned from examples, against two that do not learn")
        axes.legend(loc="center right", bbox_to_anchor=(1, 0.66))

        if is_dates:
            axes = panels[1]
            kinds = sorted(dates.KINDS, key=lambda k: figures["kinds"]["dateutil"][k])
            names = {next(iter(curves)): COLOURS[0], "dateutil": GREY, "nearest": "#c9cfd6"}
            for i, (name, colour) in enumerate(names.items()):
                values = [figures["kinds"][name][k] for k in kinds]
                places = [j + 0.27 * (1 - i) for j in range(len(kinds))]
                axes.barh(places, values, 0.25, color=colour, label=name)
                for place, value in zip(places, values, strict=True):
                    axes.annotate(
                        f"{value:.0f}", (value, place), (3, 0), textcoords="offset points",
                        va="center", fontsize=8,
                    )  # fmt: skip
            axes.set_yticks(range(len(kinds)), kinds)
            axes.set(xlabel="exact matches (%)", xlim=(0, 108))
            axes.grid(axis="y", visible=False)
            axes.set_title("By the way the date is written")
            axes.legend(loc="upper center", bbox_to_anchor=(0.4, -0.14), ncols=3)

        for low in rest:
            low.suptitle("Where attention looks while each token is written", fontsize=11)
            shown = examples(task)
            shape = (len(shown), 1) if is_dates else (1, len(shown))
            for axes, source in zip(low.subplots(*shape, squeeze=False).flat, shown, strict=True):
                draw_alignment(axes, task, model, source)


def examples(task: Task) -> list[list[str]]:
    """Held-out sources for the maps: long ones, each of another kind."""
    chosen: dict[str, list[str]] = {}
    for pair in sorted(task.held_out, key=lambda p: -len(p.source)):
        if pair.kind in ("in words", "by reckoning", "other languages", ""):
            chosen.setdefault(pair.kind or str(len(chosen)), pair.source)
    return list(chosen.values())[:3]


def draw_alignment(axes: plt.Axes, task: Task, model: Translator, source: list[str]) -> None:
    """The weights of attention: a column for each place of the source, a row for each token."""
    found = task.search(model, [source], 0)
    written = task.targets.decode(found.tokens[0].tolist())
    weights = found.weights[: len(written), 0, : len(source)].cpu().numpy()  # [T, S]
    axes.imshow(weights, cmap="Blues", vmin=0, vmax=1, aspect="auto")
    axes.set_xticks(range(len(source)), source, fontsize=8.5, family="monospace")
    axes.set_yticks(range(len(written)), written, fontsize=7, family="monospace")
    axes.tick_params(length=0, pad=2)
    if task.joint:
        axes.tick_params(axis="x", rotation=60)
    axes.grid(False)
    axes.set_ylabel("written" if task.joint else "", color=INK)
    for side in axes.spines.values():
        side.set_visible(False)


# --- program -------------------------------------------------------------------------------------


def parser() -> argparse.ArgumentParser:
    p = arguments(__doc__, "seq2seq", cell="gru", hidden=128, batch=64, lr=4e-3, steps=1500)
    p.add_argument("--layers", type=positive, default=1)
    p.add_argument("--attention", choices=["both", "yes", "no"], default="both")
    p.add_argument("--sampling", type=float, default=0.0, metavar="P",
                   help="scheduled sampling: how often, at the end of the training, the decoder is "
                   "given its own prediction instead of the truth")  # fmt: skip
    p.add_argument("--beam", type=positive, default=5, help="width of the beam search")
    p.add_argument("--pairs", type=Path, help="TSV file of sources and targets")
    p.add_argument("--unit", choices=["word", "character"], default="word", help="of --pairs")
    p.add_argument("--longest", type=positive, default=40, help="tokens, of --pairs")
    p.add_argument("--examples", type=positive, default=30000, help="dates to learn from")
    p.add_argument("--held-out", type=positive, default=2000, help="pairs to judge by, at most")
    p.add_argument("--say", metavar="TEXT", help="show what the model in --out makes of this")
    return p


def load_task(run: Run) -> Task:
    a = run.args
    if a.pairs:
        train_pairs, held_out = read_pairs(a.pairs, a.unit, a.longest, a.held_out, a.seed)
        return Task(train_pairs, held_out, " " if a.unit == "word" else "", run.device)
    return Task(*date_pairs(a.examples, a.held_out, a.seed), device=run.device)


def build(run: Run, task: Task, attends: bool) -> Translator:
    a = run.args
    torch.manual_seed(a.seed)
    cell = find_cell(a.cell)
    sizes = len(task.sources), len(task.targets), a.hidden, a.layers
    return Translator(cell, *sizes, attends).to(run.device)


def say(run: Run, task: Task, text: str) -> None:
    """Print what the model in --out writes for ``text``."""
    name = "without attention" if run.args.attention == "no" else "with attention"
    file = run.path(file_name(name))
    if not file.exists():
        raise SystemExit(f"--say: no trained model {file}")
    model = build(run, task, name == "with attention")
    model.load_state_dict(torch.load(file, map_location="cpu", weights_only=True)["parts"]["model"])
    source = re.findall(r"\w+|[^\w\s]", text) if task.joint else list(text)
    for kind, width in (("greedy", 0), (f"beam of {run.args.beam}", run.args.beam)):
        (written,), score = task.write(model, [source], width)
        print(f"{kind}: {written}   (probability {math.exp(score.item()):.3f})")


def main() -> None:
    args = parser().parse_args()
    run = start(args)
    task = load_task(run)
    if args.say:
        return say(run, task, args.say)
    metric = "exact" if task.is_dates else "bleu"
    figures: dict[str, Any] = {
        "pairs_to_learn_from": len(task.train),
        "pairs_held_out": len(task.held_out),
        "kinds": {},
    }
    models, curves = {}, {}
    for name, attends in (("with attention", True), ("without attention", False)):
        if args.attention in ("both", "yes" if attends else "no"):
            models[name] = build(run, task, attends)
            curves[name] = train(run, task, models[name], name)

    if run.is_main:
        sources = [p.source for p in task.held_out]
        for name, model in models.items():
            key = name.replace(" ", "_")
            written, plain = task.write(model, sources)
            by_beam, best = task.write(model, sources, args.beam)
            figures[f"{key}_{metric}_greedy"] = task.score(written, task.held_out)
            figures[f"{key}_{metric}_beam"] = task.score(by_beam, task.held_out)
            # A beam holds the greedy sentence until better ones push it out.
            figures[f"{key}_beam_found_likelier"] = int((best > plain + 1e-4).sum())
            figures[f"{key}_parameters"] = count_parameters(model)
            if task.is_dates:
                figures["kinds"][name] = by_kind(task, by_beam)
        copied = nearest(task)
        figures["nearest"] = task.score(copied, task.held_out)
        if task.is_dates:
            parsed = [dates.by_dateutil(task.text(s)) for s in sources]
            figures["dateutil"] = task.score(parsed, task.held_out)
            figures["kinds"] |= {
                "dateutil": by_kind(task, parsed), "nearest": by_kind(task, copied)
            }  # fmt: skip
        name, model = next(iter(models.items()))
        written, _ = task.write(model, sources[:12], args.beam)
        figures["samples"] = [
            {"source": task.text(s), "written": w, "right": task.text(p.target)}
            for s, w, p in zip(sources, written, task.held_out, strict=False)
        ]
        for sample in figures["samples"]:
            mark = "right" if sample["written"] == sample["right"] else sample["right"]
            run.print(f"{sample['source']!r:60} {sample['written']}   {mark}")
        draw(run, task, model, curves, figures)
    run.write(figures)


if __name__ == "__main__":
    launch(main)
