"""A character language model: trained by truncated back-propagation, measured in bits, sampled.

An embedding (or one-hot vectors), a recurrent layer and a softmax predict each character of a text
from those before it. The text is read in chunks: the state is carried from chunk to chunk, the
gradient stops between them (Williams & Peng 1990). What the model needs per character of a held-out
text is set beside a character n-gram trained on the same text, and beside gzip and xz.

    python examples/language_model.py                            # the standard library's source
    python examples/language_model.py --data shakespeare.txt --cell gru --layers 2 --steps 20000
    python examples/language_model.py --resume --prime "class "  # draw from the finished model
    torchrun --nproc-per-node 2 examples/language_model.py       # each process reads its own part
"""

from __future__ import annotations

import argparse
import gzip
import itertools
import lzma
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
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
    smooth,
    start,
    train_step,
)
from text import Text, chunks, read_text
from torch import Tensor, nn
from torch.nn import functional as F

# --- model ---------------------------------------------------------------------------------------


class CharModel(nn.Module):
    """p(next character | all before), as logits [T, B, V] for characters [T, B].

    ``inputs`` is "embedding" (V vectors that are learned) or "one-hot" (the lecture's picture: the
    columns of W_ih are the embedding).
    """

    def __init__(
        self,
        cell: str | type[nn.RNNBase],
        symbols: int,
        hidden: int,
        layers: int = 1,
        inputs: str = "embedding",
    ):
        super().__init__()
        self.symbols = symbols
        self.embedding = nn.Embedding(symbols, hidden // 4) if inputs == "embedding" else None
        self.rnn = find_cell(cell)(hidden // 4 if self.embedding else symbols, hidden, layers)
        self.head = nn.Linear(hidden, symbols)

    def forward(self, x: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        dtype = self.head.weight.dtype
        x = self.embedding(x) if self.embedding else F.one_hot(x, self.symbols).to(dtype)
        y, state = self.rnn(x, state)
        return self.head(y), state


def cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    """Mean over all characters, in nats."""
    return F.cross_entropy(logits.flatten(0, 1), target.flatten())


# --- truncated back-propagation through time ---------------------------------------------------


def endless(ids: Tensor, batch: int, chunk: int) -> Iterator[tuple[bool, Tensor, Tensor]]:
    """Chunks [T, B] of input and target, pass after pass; the first value: do streams begin?"""
    while True:
        for i, (x, target) in enumerate(chunks(ids, batch, chunk)):
            yield i == 0, x, target


def gradient(model: nn.Module, x: Tensor, target: Tensor, chunk: int) -> dict[str, Tensor]:
    """Gradients, by name, of the mean loss over x [T, B], back-propagated through ``chunk`` steps.

    Chunk by chunk as in training: each starts from the state that the last one ended with, values
    without history. With ``chunk`` >= T this is full back-propagation through time.
    """
    model.zero_grad()
    state = None
    for part, wanted in zip(x.split(chunk), target.split(chunk), strict=True):
        logits, state = model(part, detach(state))
        (cross_entropy(logits, wanted) * len(part) / len(x)).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


def truncation(model: nn.Module, x: Tensor, target: Tensor) -> dict[int, float]:
    """How much of the full gradient of W_hh each chunk length finds: chunk -> cosine."""
    lengths = [2**i for i in range(len(x).bit_length()) if 2**i < len(x)] + [len(x)]
    found = {n: gradient(model, x, target, n)["rnn.weight_hh_l0"].flatten() for n in lengths}
    return {n: F.cosine_similarity(g, found[len(x)], 0).item() for n, g in found.items()}


# --- measuring -----------------------------------------------------------------------------------


@torch.no_grad()
def model_bits(model: nn.Module, text: Text, streams: int = 32, chunk: int = 256) -> float:
    """Bits per character of the held-out text, which is read in a few streams side by side."""
    device = next(model.parameters()).device
    ids = torch.cat([text.train[-1:], text.held_out])  # the first character is predicted too
    streams = min(streams, len(text.held_out))
    length = len(text.held_out) // streams
    begins = torch.arange(streams) * length
    x, target = (
        ids[begins + torch.arange(length)[:, None] + shift].to(device) for shift in (0, 1)
    )  # [N, B]
    total, state = 0.0, None
    for part, wanted in zip(x.split(chunk), target.split(chunk), strict=True):
        logits, state = model(part, state)
        total += cross_entropy(logits, wanted).item() * wanted.numel()
    return total / target.numel() * BITS


def ngram_bits(text: Text, longest: int = 8) -> dict[int, float]:
    """n -> bits per character of the held-out text under an n-gram of the training text.

    Interpolated Witten-Bell (Witten & Bell 1991; Chen & Goodman 1998, section 2.3): with c the
    count of a context's continuation s, N the context's count and t the number of its distinct
    continuations, p_n(s) = (c + t p_{n-1}(s)) / (N + t); a context never seen leaves p_{n-1}.
    """
    width = len(text.symbols).bit_length()  # a gram is one number, ``width`` bits a character
    longest = min(longest, 63 // width)
    both = torch.cat([text.train[-longest:], text.held_out])
    p = torch.full((len(text.held_out),), 1 / len(text.symbols), dtype=torch.float64)
    bits = {}
    for n in range(1, longest + 1):
        grams, counts = pack(text.train, n, width).unique(return_counts=True)
        contexts, of, kinds = (grams >> width).unique(return_inverse=True, return_counts=True)
        totals = torch.zeros_like(kinds).index_add_(0, of, counts)
        asked = pack(both[longest - n + 1 :], n, width)
        c = look_up(grams, counts, asked)
        total, t = (look_up(contexts, values, asked >> width) for values in (totals, kinds))
        p = torch.where(total > 0, (c + t * p) / (total + t).clamp(min=1), p)
        bits[n] = -p.log2().mean().item()
    return bits


def pack(ids: Tensor, n: int, width: int) -> Tensor:
    """All n-grams of ``ids`` [N], each as one number, the last character lowest: [N - n + 1]."""
    packed = torch.zeros(len(ids) - n + 1, dtype=torch.int64)
    for i in range(n):
        packed = packed << width | ids[i : len(ids) - n + 1 + i]
    return packed


def look_up(keys: Tensor, values: Tensor, asked: Tensor) -> Tensor:
    """The value of each key asked for, 0 where there is none; ``keys`` are sorted."""
    at = torch.searchsorted(keys, asked).clamp_(max=len(keys) - 1)
    return torch.where(keys[at] == asked, values[at], 0)


def compressor_bits(text: Text) -> dict[str, float]:
    """Bits per character of the held-out text for gzip and xz at their best.

    "after the training text" is what the held-out text adds to the training text's archive: these
    have seen what the model has seen, but gzip remembers 32 KB of it and xz all.
    """
    known, new = text.train_text.encode(), text.held_out_text.encode()
    bits = {}
    for name, pack_up in (
        ("gzip", lambda b: gzip.compress(b, 9)),
        ("xz", lambda b: lzma.compress(b, preset=9)),
    ):
        alone, after = len(pack_up(new)), len(pack_up(known + new)) - len(pack_up(known))
        bits[name] = 8 * alone / len(text.held_out_text)
        bits[f"{name} after the training text"] = 8 * after / len(text.held_out_text)
    return bits


# --- sampling ------------------------------------------------------------------------------------


@torch.no_grad()
def sample(
    model: nn.Module,
    text: Text,
    length: int,
    prime: str = "\n",
    temperature: float = 1.0,
    top_k: int | None = None,
    generator: torch.Generator | None = None,
) -> str:
    """``length`` characters that continue ``prime``, each drawn from softmax(logits / temperature).

    With ``top_k`` only the k likeliest characters can be drawn. A temperature of 0 always takes
    the likeliest.
    """
    if temperature < 0:
        raise ValueError(f"temperature {temperature} is negative")
    if not prime:
        raise ValueError("there must be at least one character to continue")
    device = next(model.parameters()).device
    logits, state = model(text.encode(prime)[:, None].to(device))
    drawn: list[int] = []
    for _ in range(length):
        scores = logits[-1, 0].cpu()
        scores[0] = -torch.inf  # symbol 0 stands for no character
        if top_k is not None:
            scores[scores < scores.topk(min(top_k, len(scores))).values[-1]] = -torch.inf
        if temperature == 0:
            drawn.append(int(scores.argmax()))
        else:
            p = (scores / temperature).softmax(-1)
            drawn.append(int(p.multinomial(1, generator=generator)))
        logits, state = model(torch.tensor([[drawn[-1]]], device=device), state)
    return text.decode(drawn)


# --- the lecture's toy ---------------------------------------------------------------------------


def hello(cell: str = "rnn", steps: int = 200, seed: int = 0) -> tuple[str, Tensor]:
    """ "hell" -> "ello" with one-hot vectors over h, e, l, o and 3 units.

    The first l is followed by l, the second by o: no rule for single characters can know both.
    Returns what the trained model writes and its probabilities [4, 4].
    """
    torch.manual_seed(seed)
    letters = "helo"
    x, target = (
        torch.tensor([[letters.index(c)] for c in word]) for word in ("hell", "ello")
    )  # [4, 1]
    model = CharModel(cell, len(letters), hidden=3, inputs="one-hot")
    optimizer = torch.optim.Adam(model.parameters(), 0.05)
    for _ in range(steps):
        train_step(cross_entropy(model(x)[0], target), model, optimizer)
    p = model(x)[0][:, 0].softmax(-1).detach()
    return "".join(letters[i] for i in p.argmax(-1)), p


# --- training ------------------------------------------------------------------------------------


def train(run: Run, text: Text, model: nn.Module, steps: int, stages: list[int]) -> dict[str, Any]:
    """Train with a checkpoint; at each stage (a step) measure held-out bits and write some text."""
    args = run.args
    optimizer = torch.optim.Adam(model.parameters(), args.lr)
    schedule = cosine(optimizer, steps)
    checkpoint = run.checkpoint(model=model, optimizer=optimizer, schedule=schedule)
    checkpoint.free |= {"prime", "temperature", "top_k", "length"}
    trained = run.distribute(model)
    first = checkpoint.load()
    kept = checkpoint.extra or {"bits": [], "held_out": {}, "texts": {}, "state": None}
    state = kept["state"] if run.is_main else None  # the other processes' streams begin anew
    mine = text.train.tensor_split(run.world)[run.rank]
    reading = itertools.islice(endless(mine, args.batch, args.chunk), first, None)
    bar = run.progress(range(first + 1, steps + 1), initial=first, total=steps, unit="step")
    for step in bar:
        begins, x, target = next(reading)
        state = None if begins else detach(state)  # carry the values, end the gradient
        logits, state = trained(x.to(run.device), state)
        loss = cross_entropy(logits, target.to(run.device))
        train_step(loss, model, optimizer, schedule)
        kept["bits"].append(loss.item() * BITS)
        if step in stages:
            kept["held_out"][step] = model_bits(model, text)
            kept["texts"][step] = sample(model, text, 240, "\n", 0.7, None, run.generator())
            bar.set_postfix_str(f"{kept['held_out'][step]:.3f} bits held out")
        kept["state"] = detach(state)
        checkpoint.save_now_and_then(step, kept)
    checkpoint.save(steps, kept)
    return kept


def compare_inputs(run: Run, text: Text, steps: int) -> dict[str, dict[str, Any]]:
    """A short run with learned embeddings and one with one-hot vectors, all else equal."""
    results = {}
    for inputs in ("embedding", "one-hot"):
        torch.manual_seed(run.args.seed)
        model = CharModel(run.args.cell, len(text.symbols), 128, 1, inputs).to(run.device)
        optimizer = torch.optim.Adam(model.parameters(), run.args.lr)
        schedule = cosine(optimizer, steps)
        state, bits = None, []
        reading = itertools.islice(endless(text.train, run.args.batch, run.args.chunk), steps)
        for begins, x, target in run.progress(reading, total=steps, desc=inputs, leave=False):
            logits, state = model(x.to(run.device), None if begins else detach(state))
            loss = cross_entropy(logits, target.to(run.device))
            train_step(loss, model, optimizer, schedule)
            bits.append(loss.item() * BITS)
        results[inputs] = {
            "parameters": count_parameters(model),
            "bits": bits,
            "held_out_bits": model_bits(model, text),
        }
    return results


# --- picture -------------------------------------------------------------------------------------


def draw(path: Path, kept: dict[str, Any], figures: dict[str, Any], args: Any) -> None:
    with picture(path, figsize=(15, 9)) as figure:
        source = args.data.name if args.data else "the Python standard library's source"
        figure.suptitle(
            f"{args.cell.upper()} character model of {source}: "
            f"{figures['bits_per_character']:.2f} bits per character",
            x=0.01, ha="left",
        )  # fmt: skip
        grid = figure.add_gridspec(2, 3, width_ratios=(1.2, 1, 1.2))

        ax = figure.add_subplot(grid[0, 0])
        bits, held = kept["bits"], figures["held_out_by_step"]
        steps = range(1, len(bits) + 1)
        ax.plot(steps, bits, color=COLOURS[0], lw=0.5, alpha=0.25)
        width = max(1, len(bits) // 50)
        ax.plot(steps, smooth(bits, width), color=COLOURS[0], label="training text")
        ax.plot(list(held), list(held.values()), "o", color=COLOURS[1], label="held-out text")
        ax.set(
            title="Training", xlabel="training step", ylabel="bits per character",
            ylim=(1, 6), xlim=(0, len(bits) * 1.02),
        )  # fmt: skip
        ax.legend()

        ax = figure.add_subplot(grid[0, 1])
        bars = {f"this {args.cell.upper()}": figures["bits_per_character"], **figures["baselines"]}
        colours = [COLOURS[1]] + [GREY] * (len(bars) - 1)
        drawn = ax.barh([name.replace(" after", "\nafter") for name in bars], bars.values(),
                        color=colours, height=0.6)  # fmt: skip
        ax.bar_label(drawn, fmt=" %.2f")
        ax.invert_yaxis()
        ax.set(
            title="Held-out text, and the baselines", xlabel="bits per character",
            xlim=(0, 1.2 * max(bars.values())),
        )  # fmt: skip
        ax.grid(axis="y", visible=False)

        ax = figure.add_subplot(grid[0, 2])
        for i, (name, result) in enumerate(figures["inputs"].items()):
            width = max(1, len(result["bits"]) // 20)
            ax.plot(
                range(1, len(result["bits"]) + 1), smooth(result["bits"], width),
                color=COLOURS[i], label=f"{name}: {result['held_out_bits']:.2f} bits held out, "
                f"{result['parameters'] / 1000:.0f} k parameters",
            )  # fmt: skip
        ax.set(
            title="Embedding or one-hot input (128 units)",
            xlabel="training step", ylabel="bits per character",
        )  # fmt: skip
        ax.legend()

        ax = figure.add_subplot(grid[1, 2])
        found = figures["truncation"]
        ax.plot(list(found), list(found.values()), "o-", color=COLOURS[2])
        ax.axvline(args.chunk, color=GREY, lw=1, ls=(0, (4, 3)))
        ax.annotate(
            "chunk of this training ", (args.chunk, min(found.values())),
            ha="right", fontsize=8, color=GREY,
        )  # fmt: skip
        ax.set_xscale("log", base=2)
        ax.set_xticks(list(found), [str(n) for n in found])
        ax.set(
            title="Gradient of W_hh: truncated against full",
            xlabel="chunk length (characters); the last is the whole sequence",
            ylabel="cosine of their angle",
        )  # fmt: skip

        ax = figure.add_subplot(grid[1, :2])
        ax.set_axis_off()
        ax.set_title("What it writes on the way (temperature 0.7)")
        y = 0.99
        for step, written in kept["texts"].items():
            ax.text(
                0, y, f"step {step}, {held[step]:.2f} bits", va="top", fontsize=8.5,
                weight="bold", color=COLOURS[1],
            )  # fmt: skip
            lines = [
                line for row in written.splitlines() if row.strip()
                for line in textwrap.wrap(row, 110, drop_whitespace=False)
            ][:4]  # fmt: skip
            shown = "\n".join(lines).encode("ascii", "replace").decode().replace("$", r"\$")
            ax.text(0, y - 0.05, shown, va="top", fontsize=8.8, family="monospace")
            y -= 1 / len(kept["texts"])


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    p = arguments(__doc__, "language_model", cell="gru", hidden=384, batch=32, lr=4e-3, steps=4000)
    p.add_argument("--data", type=Path, help="UTF-8 text or folder (default: Python's own source)")
    p.add_argument("--characters", type=positive, default=4_000_000, help="of the text, at most")
    p.add_argument("--layers", type=positive, default=1)
    p.add_argument("--input", choices=["embedding", "one-hot"], default="embedding")
    p.add_argument("--chunk", type=positive, default=64, help="characters back-propagated through")
    p.add_argument("--compare", type=positive, default=200, help="steps of the input comparison")
    p.add_argument("--prime", default="def ", help="what the final text continues")
    p.add_argument("--temperature", type=float, default=0.7)
    p.add_argument("--top-k", type=positive, help="draw from the k likeliest characters only")
    p.add_argument("--length", type=positive, default=600, help="characters of the final text")
    return p.parse_args(argv)


def main() -> None:
    args = parse()
    run = start(args)
    run.print(f'"hell" -> "{hello(args.cell)[0]}"')
    text = Text(read_text(args.data, args.characters))
    torch.manual_seed(args.seed)
    model = CharModel(args.cell, len(text.symbols), args.hidden, args.layers, args.input)
    model = model.to(run.device)
    stages = sorted({max(1, args.steps * percent // 100) for percent in (2, 10, 30, 100)})
    kept = train(run, text, model, args.steps, stages)

    if run.is_main:
        ngrams = ngram_bits(text)
        best = min(ngrams, key=lambda n: ngrams[n])
        compressors = compressor_bits(text)
        shown = {f"{best}-gram": ngrams[best], **{k: compressors[k] for k in ("gzip", "xz")}}
        xz_after = "xz after the training text"
        figures = {
            "bits_per_character": model_bits(model, text),
            "ngram_bits_per_character": ngrams[best],
            "gzip_bits_per_character": compressors["gzip"],
            "xz_bits_per_character": compressors["xz"],
            "xz_after_training_text_bits_per_character": compressors[xz_after],
            "parameters": count_parameters(model),
            "training_characters": len(text.train),
            "held_out_characters": len(text.held_out),
            "best_n": best,
            "ngrams": ngrams,
            "compressors": compressors,
            "baselines": shown | {xz_after: compressors[xz_after]},
            "held_out_by_step": kept["held_out"],
            "train_bits": kept["bits"],
            "inputs": compare_inputs(run, text, args.compare),
            "texts": kept["texts"],
        }
        x, target = next(chunks(text.held_out, 8, min(256, len(text.held_out) // 8 - 1)))
        figures["truncation"] = truncation(model, x.to(run.device), target.to(run.device))
        options = (args.prime, args.temperature, args.top_k, run.generator())
        figures["sample"] = args.prime + sample(model, text, args.length, *options)
        draw(run.path("language_model.png"), kept, figures, args)
        print(f"\n{figures['sample']}\n")
    else:
        figures = {}
    run.write(figures, "language_model")


if __name__ == "__main__":
    launch(main)
