"""Captions for images: a convolutional net looks, a recurrent net says what is there.

The CNN is pretrained (to tell which words belong to a picture of one thing), then frozen; its
features enter the recurrent net in one of three ways:

    first    once, in place of a word before the first: Show and Tell, Vinyals et al. 2015
             (arXiv:1411.4555)
    always   with every word, h' = f(W_x x + W_h h + W_i v): Karpathy and Fei-Fei 2015
             (arXiv:1412.2306), the form of the CS231n lecture
    attend   with every word a mean of the places of the feature map, weighted anew by attention:
             Show, Attend and Tell, Xu et al. 2015 (arXiv:1502.03044)

The pictures are scenes of real handwritten digits, those held out by people who wrote none of the
others; captions are sentences such as "a large seven left of a small two". Any data set in COCO's
format will do as well:

    python examples/captioning.py
    python examples/captioning.py --coco captions_train2017.json --images train2017 --size 96
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import digits
import numpy as np
import torch
import torch.nn.functional as F
from common import (
    COLOURS,
    GREY,
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
from torch.nn.utils.rnn import pad_sequence

VARIANTS = ["first", "always", "attend"]

# --- data ----------------------------------------------------------------------------------------


class Captioned(NamedTuple):
    """Images [N, channels, size, size] and of each all its captions."""

    images: Tensor
    captions: list[list[str]]


def scenes(seed: int, count: int, held_out: bool = False, things: int | None = None) -> Captioned:
    """Generated scenes of one or two digits, or of exactly ``things``."""
    rng = np.random.default_rng(seed)
    drawn = [digits.scene(rng, held_out, things) for _ in range(count)]
    return Captioned(digits.as_images([d[0] for d in drawn]), [d[1] for d in drawn])


def read_coco(annotations: Path, folder: Path, size: int, most: int) -> Captioned:
    """Images and captions in COCO's format; at most ``most`` images, as squares of ``size`` pixels.

    ``annotations`` is JSON with "images": [{"id", "file_name"}] and "annotations": [{"image_id",
    "caption"}]; the file names lie in ``folder``. Images are cut to their middle square.
    """
    from PIL import Image, ImageOps

    content = json.loads(annotations.read_text(encoding="utf-8"))
    captions: dict[Any, list[str]] = {}
    for annotation in content["annotations"]:
        words = re.findall(r"\w+", annotation["caption"].lower())
        captions.setdefault(annotation["image_id"], []).append(" ".join(words))
    entries = [e for e in content["images"] if captions.get(e["id"])][:most]
    if len(entries) < 20:
        raise SystemExit(f"{annotations}: {len(entries)} images with captions, 20 are needed")
    images = torch.empty(len(entries), 3, size, size)
    for image, entry in zip(images, entries, strict=True):
        with Image.open(folder / entry["file_name"]) as file:
            square = ImageOps.fit(file.convert("RGB"), (size, size))
        image.copy_(torch.from_numpy(np.array(square)).permute(2, 0, 1) / 255)
    return Captioned(images, [captions[e["id"]] for e in entries])


class Data(NamedTuple):
    """What the CNN is pretrained on, what captions are learned from, what they are judged on."""

    pretraining: Captioned
    train: Captioned
    held_out: Captioned


def load(a: argparse.Namespace) -> Data:
    if a.coco:
        if not a.images:
            raise SystemExit("--coco needs --images, the folder of the images")
        every = read_coco(a.coco, a.images, a.size, a.examples)
        cut = len(every.captions) - max(1, len(every.captions) // 10)
        train = Captioned(every.images[:cut], every.captions[:cut])
        return Data(train, train, Captioned(every.images[cut:], every.captions[cut:]))
    seeds = np.random.SeedSequence(a.seed).generate_state(3)
    return Data(
        scenes(seeds[0], a.examples, things=1),
        scenes(seeds[1], a.examples),
        scenes(seeds[2], a.held_out, held_out=True),
    )


# --- model ---------------------------------------------------------------------------------------


class Look(nn.Module):
    """A small CNN: [N, channels, size, size] to a map of features [N, F, size/4, size/4].

    Its head, for the pretraining, tells from the largest value of every feature which of the
    ``words`` belong to the image.
    """

    def __init__(self, channels: int, words: int, features: int) -> None:
        super().__init__()

        def block(inputs: int, outputs: int) -> list[nn.Module]:
            convolution = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
            return [convolution, nn.BatchNorm2d(outputs), nn.ReLU()]

        self.map = nn.Sequential(
            *block(channels, 16), nn.MaxPool2d(2), *block(16, 32), nn.MaxPool2d(2),
            *block(32, features), *block(features, features),
        )  # fmt: skip
        self.head = nn.Linear(features, words)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.map(images).amax((2, 3)))


class Captioner(nn.Module):
    """Writes words about a map of features; ``variant`` is one of VARIANTS."""

    def __init__(
        self, cell: type[nn.RNNBase], shape: tuple[int, int, int], words: int, hidden: int,
        variant: str,
    ) -> None:  # fmt: skip
        super().__init__()
        features, height, width = shape
        self.variant = variant
        self.embedding = nn.Embedding(words, hidden)
        self.dropout = nn.Dropout(0.2)
        if variant == "attend":
            # The map is the same wherever a thing lies: what tells places apart is added to it.
            self.place = nn.Parameter(torch.randn(height * width, 1, hidden) / hidden**0.5)
            self.of_map = nn.Linear(features, hidden)
            self.attention = Attention(hidden, hidden, hidden // 2)
            self.rnn = cell(2 * hidden, hidden)
            self.head = nn.Linear(2 * hidden, words)
        else:
            # The strongest of 2 x 2 places, then all places in a row: v knows what is where.
            self.of_map = nn.Linear(features * (height // 2) * (width // 2), hidden)
            self.rnn = cell(hidden if variant == "first" else 2 * hidden, hidden)
            self.head = nn.Linear(hidden, words)

    def see(self, maps: Tensor) -> tuple[Any, Any]:
        """The state before the first word: (what is remembered of the image, hidden state).

        ``maps`` is [B, F, height, width].
        """
        if self.variant == "attend":
            notes = self.of_map(maps.flatten(2).permute(2, 0, 1)) + self.place  # [S, B, H]
            # Its first look at the image is the mean of it, as if that were the word before BEGIN.
            mean = notes.mean(0, keepdim=True)
            _, state = self.rnn(torch.cat([torch.zeros_like(mean), mean], -1))
            return self.attention.memory(notes), state
        v = self.of_map(self.dropout(F.max_pool2d(maps, 2).flatten(1)))[None]  # [1, B, H]
        if self.variant == "first":
            return None, self.rnn(v)[1]
        return v, None

    def step(self, token: Tensor, state: Any) -> tuple[Tensor, Any, Tensor | None]:
        """From the last word [B] to logits of the next [B, V]; see ``decoding.Step``."""
        memory, state = state
        x = self.dropout(self.embedding(token))
        if self.variant == "attend":
            context, weights = self.attention(top_hidden(state), memory)
            y, state = self.rnn(torch.cat([x, context], -1)[None], state)
            return self.head(torch.cat([y[0], context], -1)), (memory, state), weights
        y, state = self.rnn(self.input(x[None], memory), state)
        return self.head(y[0]), (memory, state), None

    def input(self, x: Tensor, v: Tensor | None) -> Tensor:
        """Words [T, B, H], and beside each of them the image v [1, B, H], if it is seen always.

        With W_ih = [W_x W_i], the layer's W_ih [x; v] is the lecture's W_x x + W_i v.
        """
        return x if v is None else torch.cat([x, v.expand_as(x)], -1)

    def forward(self, maps: Tensor, target: Tensor) -> Tensor:
        """Logits [T, B, V] for ``target`` [T, B], each word given the true ones before it."""
        state = self.see(maps)
        before = torch.cat([torch.full_like(target[:1], BEGIN), target[:-1]])
        if self.variant == "attend":
            logits = []
            for token in before:
                scores, state, _ = self.step(token, state)
                logits.append(scores)
            return torch.stack(logits)
        x = self.input(self.dropout(self.embedding(before)), state[0])
        return self.head(self.rnn(x, state[1])[0])


# --- training and use ----------------------------------------------------------------------------


def words_present(captions: list[list[str]], vocabulary: Vocabulary) -> Tensor:
    """1 where a word stands in one of the captions of an image, else 0: [N, V]."""
    present = torch.zeros(len(captions), len(vocabulary))
    for row, sentences in zip(present, captions, strict=True):
        row[torch.cat([vocabulary.encode(s.split())[:-1] for s in sentences])] = 1
    return present


def pretrain(run: Run, look: Look, data: Captioned, vocabulary: Vocabulary, steps: int) -> float:
    """Teaches the CNN which words belong to an image; returns the last losses' mean (nats/word)."""
    optimizer = torch.optim.Adam(look.parameters(), 3e-3)
    schedule = cosine(optimizer, steps)
    checkpoint = run.checkpoint("cnn.pt", look=look, optimizer=optimizer, schedule=schedule)
    first = checkpoint.load()
    present = words_present(data.captions, vocabulary)
    losses = list(checkpoint.extra or [])
    trained = run.distribute(look)
    for step in (bar := run.progress(range(first, steps), desc="CNN", unit="step")):
        rows = torch.randint(len(present), (run.args.batch,), generator=run.generator(step))
        logits = trained(data.images[rows].to(run.device))
        loss = F.binary_cross_entropy_with_logits(logits, present[rows].to(run.device))
        train_step(loss, look, optimizer, schedule)
        losses.append(loss.item())
        bar.set_postfix_str(f"loss {losses[-1]:.4f}", refresh=False)
        checkpoint.save_now_and_then(step + 1, losses)
    checkpoint.save(steps, losses)
    look.requires_grad_(False).eval()  # frozen from here on
    return sum(losses[-50:]) / len(losses[-50:])


@torch.no_grad()
def features(look: Look, images: Tensor, device: Any, part: int = 256) -> Tensor:
    """The maps of features [N, F, height, width] of all images, computed once and for all."""
    return torch.cat([look.map(some.to(device)) for some in images.split(part)])


def train(
    run: Run, model: Captioner, maps: Tensor, captions: list[list[str]], vocabulary: Vocabulary
) -> list[float]:
    """Learns captions, of an image with several a random one each time; returns all losses."""
    a = run.args
    encoded = [[vocabulary.encode(s.split()) for s in sentences] for sentences in captions]
    optimizer = torch.optim.Adam(model.parameters(), a.lr)
    schedule = cosine(optimizer, a.steps, warmup=min(50, a.steps // 10))
    parts = {"model": model, "optimizer": optimizer, "schedule": schedule}
    checkpoint = run.checkpoint(f"{model.variant}.pt", **parts)
    first = checkpoint.load()
    losses = list(checkpoint.extra or [])
    trained = run.distribute(model)
    model.train()
    for step in (bar := run.progress(range(first, a.steps), desc=model.variant, unit="step")):
        generator = run.generator(step)
        rows = torch.randint(len(encoded), (a.batch,), generator=generator)
        chosen = torch.rand(a.batch, generator=generator).tolist()
        targets = [encoded[i][int(c * len(encoded[i]))] for i, c in zip(rows, chosen, strict=True)]
        target = pad_sequence(targets, padding_value=PAD).to(run.device)
        logits = trained(maps[rows.to(maps.device)], target)
        loss = F.cross_entropy(logits.flatten(0, 1), target.flatten(), ignore_index=PAD)
        train_step(loss, model, optimizer, schedule)
        losses.append(loss.item())
        bar.set_postfix_str(f"loss {losses[-1]:.3f}", refresh=False)
        checkpoint.save_now_and_then(step + 1, losses)
    checkpoint.save(a.steps, losses)
    model.eval()
    return losses


@torch.no_grad()
def search(model: Captioner, maps: Tensor, width: int = 0, limit: int = 30) -> Written:
    """Captions of the ``maps``, by greedy search (``width`` 0) or a beam."""
    state = model.see(maps)
    if width == 0:
        return greedy(model.step, state, len(maps), limit, maps.device)
    return beam_search(model.step, state, len(maps), limit, width, 1.0, maps.device)


def write(model: Captioner, maps: Tensor, vocabulary: Vocabulary, width: int = 0) -> list[str]:
    """Captions as text."""
    found = [search(model, some, width).tokens.tolist() for some in maps.split(250)]
    return [" ".join(vocabulary.decode(row)) for part in found for row in part]


def nearest(known: Tensor, captions: list[list[str]], asked: Tensor) -> list[str]:
    """Baseline: the first caption of the training image nearest in the CNN's feature space.

    Alike is what has a large cosine of the maps of features, taken as one vector each.
    """
    known, asked = (F.normalize(m.flatten(1), dim=1) for m in (known, asked))
    best = torch.cat([(some @ known.T).argmax(1) for some in asked.split(250)])
    return [captions[i][0] for i in best.tolist()]


# --- picture -------------------------------------------------------------------------------------


def shown(image: Tensor) -> np.ndarray:
    """An image [channels, size, size] as matplotlib takes it."""
    return image.clamp(0, 1).permute(1, 2, 0).numpy()


def draw(
    run: Run, data: Captioned, written: Sequence[str], figures: dict[str, Any], columns: int = 4
) -> None:
    """Figures of all models and the baseline, and a contact sheet with captions."""
    with picture(run.path("captioning.png"), figsize=(12, 9)) as figure:
        top, low = figure.subfigures(2, 1, height_ratios=(1, 3.3))
        axes = top.subplots()
        names = {
            "nearest": "nearest training image (baseline)", "first": "image first (Show and Tell)",
            "always": "image with every word", "attend": "attention (Show, Attend and Tell)",
        }  # fmt: skip
        names = {k: v for k, v in names.items() if f"{k}_bleu" in figures}
        for i, name in enumerate(names):
            value = figures[f"{name}_bleu"]
            axes.barh(i, value, color=GREY if name == "nearest" else COLOURS[0], height=0.65)
            text = f"{value:.1f}; {figures[f'{name}_exact']:.0f} % word for word"
            axes.annotate(text, (value, i), (4, 0), textcoords="offset points", va="center")
        axes.set_yticks(range(len(names)), names.values())
        axes.set(xlabel="BLEU on held-out images", xlim=(0, 130), xticks=range(0, 101, 20))
        axes.grid(axis="y", visible=False)
        axes.set_title("How good the captions are")

        low.suptitle("Captions of the first held-out images (orange: not true)", fontsize=11)
        for i, axes in enumerate(low.subplots(3, columns).flat):
            axes.axis("off")
            if i < len(written):
                axes.imshow(shown(data.images[i]), cmap="gray", vmin=0, vmax=1)
                true = written[i] in data.captions[i]
                words = wrapped(written[i], 26)
                axes.set_title(
                    words, fontsize=9, fontweight="normal", loc="center",
                    color="black" if true else COLOURS[1],
                )  # fmt: skip


def wrapped(text: str, width: int) -> str:
    """The text in lines of about ``width`` characters."""
    lines = [""]
    for word in text.split():
        if len(lines[-1]) + len(word) > width:
            lines.append("")
        lines[-1] += f"{word} "
    return "\n".join(lines)


def draw_attention(
    run: Run, model: Captioner, data: Captioned, maps: Tensor, vocabulary: Vocabulary
) -> None:
    """For some images, where attention looks while it writes each word."""
    found = search(model, maps)
    sentences = [vocabulary.decode(row) for row in found.tokens.tolist()]
    longest = max(map(len, sentences))
    size = (1.3 * longest, 1.6 * len(maps))
    with picture(run.path("attention.png"), figsize=size, layout="none") as figure:
        figure.suptitle("Where attention looks while it writes each word")
        rows = figure.subplots(len(maps), longest, squeeze=False)
        # All axes are alike: to find out where they go would take longer than to draw them.
        figure.subplots_adjust(0.01, 0.01, 0.99, 0.91, wspace=0.05, hspace=0.25)
        for i, row in enumerate(rows):
            for t, axes in enumerate(row):
                axes.axis("off")
                if t < len(sentences[i]):
                    weights = found.weights[t, i].view(maps.shape[2:]).cpu().numpy()
                    axes.imshow(shown(data.images[i]), cmap="gray", vmin=0, vmax=1)
                    size = data.images.shape[-1]
                    axes.imshow(
                        weights / weights.max(), cmap="inferno", alpha=0.6, vmin=0, vmax=1,
                        extent=(-0.5, size - 0.5, size - 0.5, -0.5), interpolation="bilinear",
                    )  # fmt: skip
                    axes.set_title(sentences[i][t], fontsize=10, loc="center", fontweight="normal")


# --- program -------------------------------------------------------------------------------------


def parser() -> argparse.ArgumentParser:
    p = arguments(__doc__, "captioning", cell="lstm", hidden=128, batch=64, lr=3e-3, steps=3000)
    p.add_argument("--variant", choices=["all", *VARIANTS], default="all")
    p.add_argument("--cnn-steps", type=positive, default=800, help="of the pretraining")
    p.add_argument("--features", type=positive, default=64, help="channels of the CNN's map")
    p.add_argument("--beam", type=positive, default=3, help="width of the beam search")
    p.add_argument("--examples", type=positive, default=10000, help="images to learn from, at most")
    p.add_argument("--held-out", type=positive, default=1000, help="scenes to judge by")
    p.add_argument("--coco", type=Path, help="captions in COCO's format (JSON)")
    p.add_argument("--images", type=Path, help="folder of the images of --coco")
    p.add_argument("--size", type=positive, default=64, help="pixels, height and width, of --coco")
    return p


def main() -> None:
    args = parser().parse_args()
    run = start(args)
    data = load(args)
    sentences = [s.split() for captions in data.train.captions for s in captions]
    vocabulary = Vocabulary(sentences, least=3)

    look = Look(data.train.images.shape[1], len(vocabulary), args.features).to(run.device)
    loss = pretrain(run, look, data.pretraining, vocabulary, args.cnn_steps)
    known = features(look, data.train.images, run.device)
    asked = features(look, data.held_out.images, run.device)

    copied = nearest(known, data.train.captions, asked)
    figures: dict[str, Any] = {
        "images_to_learn_from": len(known),
        "images_held_out": len(asked),
        "words": len(vocabulary) - 4,
        "cnn_loss": loss,
        "nearest_bleu": bleu(copied, data.held_out.captions),
        "nearest_exact": 100 * exact(copied, data.held_out.captions),
    }
    written: list[str] = []
    for variant in VARIANTS if args.variant == "all" else [args.variant]:
        torch.manual_seed(args.seed)
        shape = tuple(known.shape[1:])
        cell = find_cell(args.cell)
        model = Captioner(cell, shape, len(vocabulary), args.hidden, variant).to(run.device)
        train(run, model, known, data.train.captions, vocabulary)
        if run.is_main:
            written = write(model, asked, vocabulary, args.beam)
            figures[f"{variant}_bleu"] = bleu(written, data.held_out.captions)
            figures[f"{variant}_exact"] = 100 * exact(written, data.held_out.captions)
            figures[f"{variant}_parameters"] = count_parameters(model)
            if variant == "attend":
                draw_attention(run, model, data.held_out, asked[:6], vocabulary)
    if run.is_main:
        figures["samples"] = [
            {"written": w, "true": t}
            for w, t in zip(written[:12], data.held_out.captions, strict=False)
        ]
        draw(run, data.held_out, written, figures)
    run.write(figures)


if __name__ == "__main__":
    launch(main)
