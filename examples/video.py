"""Video: what is in a clip (many to one), and what happens in every frame (many to many).

A CNN reads each frame, a recurrent net reads the CNN's features in order. By default the clips show
a real handwritten digit that moves and bounces under heavy noise; to be told are

    digit    of the clip: no frame shows it well, but they add up, in whatever order
    start    of the clip: the direction of the first move, to be kept through all bounces
    moving   of every frame: the direction of the last move, which no single frame shows

Clips have all lengths. They are packed: CNN, recurrent net and loss see real frames only. The
baseline is the same net without recurrence, which judges single frames, or a clip by the mean of
what its frames say: good for what needs no order, and for nothing else. Films of one's own lie in
a folder for each class:

    python examples/video.py
    python examples/video.py --films DIR      # DIR/CLASS/*.gif, *.mp4, ... or folders of frames
    torchrun --nproc-per-node 2 examples/video.py --threads 1
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
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
    find_cell,
    launch,
    picture,
    positive,
    start,
    train_step,
)
from decoding import top_hidden
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence, pad_packed_sequence

# --- data ----------------------------------------------------------------------------------------


class Question(NamedTuple):
    """What is to be told: of each frame, or of the clip as a whole; and the possible answers."""

    of_frames: bool
    answers: list[str]


DIGIT_QUESTIONS = {
    "digit": Question(False, [str(d) for d in range(10)]),
    "start": Question(False, digits.DIRECTIONS),
    "moving": Question(True, digits.DIRECTIONS),
}


class Clips(NamedTuple):
    """A batch of B clips of N frames in all, and the true answers."""

    frames: PackedSequence  # data [N, channels, height, width]
    answers: dict[str, Tensor]  # of clips [B], of frames [N] in the order of ``frames``


def digit_clips(
    rng: np.random.Generator, count: int, lengths: tuple[int, int], held_out: bool = False
) -> Clips:
    """Moving digits; the number of frames is any from the first to the second of ``lengths``."""
    drawn = [digits.clip(rng, int(rng.integers(lengths[0], lengths[1] + 1)), held_out)
             for _ in range(count)]  # fmt: skip
    moving = pack_sequence([torch.from_numpy(c.directions) for c in drawn], enforce_sorted=False)
    return Clips(
        pack_sequence([torch.from_numpy(c.frames)[:, None] for c in drawn], enforce_sorted=False),
        {
            "digit": torch.tensor([c.digit for c in drawn]),
            "start": torch.tensor([c.directions[0] for c in drawn]),
            "moving": moving.data,
        },
    )


Batches = Callable[[np.random.Generator], Clips]


def to(clips: Clips, device: torch.device) -> Clips:
    answers = {name: answer.to(device) for name, answer in clips.answers.items()}
    return Clips(clips.frames.to(device), answers)


class Films:
    """Films in folders: DIR/CLASS/film, a fifth of each class held out.

    A film is a GIF or WebP file, a folder of images, or any file that PyAV reads. Of each, at most
    ``most`` frames are taken, evenly spaced, as squares of ``size`` pixels.
    """

    PICTURES = {".png", ".jpg", ".jpeg", ".bmp", ".webp"}

    def __init__(self, root: Path, size: int, most: int, seed: int) -> None:
        classes = sorted(p for p in root.glob("*") if p.is_dir())
        if len(classes) < 2:
            raise SystemExit(f"--films {root}: needs a folder for each of two or more classes")
        self.questions = {"class": Question(False, [c.name for c in classes])}
        self.train: list[tuple[Tensor, int]] = []
        self.held_out: list[tuple[Tensor, int]] = []
        rng = np.random.default_rng(seed)
        for number, folder in enumerate(classes):
            files = sorted(folder.iterdir())
            if len(files) < 2:
                raise SystemExit(f"{folder}: needs two films or more")
            films = [(read_film(file, size, most), number) for file in files]
            films = [films[i] for i in rng.permutation(len(films))]
            cut = max(1, len(films) // 5)
            self.held_out += films[:cut]
            self.train += films[cut:]

    def clips(self, films: list[tuple[Tensor, int]]) -> Clips:
        return Clips(
            pack_sequence([frames for frames, _ in films], enforce_sorted=False),
            {"class": torch.tensor([number for _, number in films])},
        )


def read_film(path: Path, size: int, most: int) -> Tensor:
    """Frames [T, 3, size, size] in 0..1, T <= ``most``."""
    from PIL import Image, ImageOps, ImageSequence

    if path.is_dir():
        files = sorted(p for p in path.iterdir() if p.suffix.lower() in Films.PICTURES)
        images = [Image.open(f).convert("RGB") for f in files]
    elif path.suffix.lower() in (".gif", ".webp"):
        with Image.open(path) as file:
            images = [frame.convert("RGB") for frame in ImageSequence.Iterator(file)]
    else:
        try:
            import av
        except ImportError:
            raise SystemExit(
                f"{path}: films other than GIF and WebP need: pip install av"
            ) from None
        with av.open(str(path)) as container:
            images = [frame.to_image() for frame in container.decode(video=0)]
    if not images:
        raise SystemExit(f"{path}: no frames in it")
    chosen = np.linspace(0, len(images) - 1, min(most, len(images))).round().astype(int)
    squares = [np.array(ImageOps.fit(images[i], (size, size))) for i in chosen]
    return torch.from_numpy(np.stack(squares)).permute(0, 3, 1, 2).float() / 255


# --- model ---------------------------------------------------------------------------------------


class Watcher(nn.Module):
    """CNN, recurrent layer, and a linear head for each question.

    Without a ``cell`` a linear layer stands in its place: the baseline, which sees single frames.
    """

    def __init__(
        self, cell: type[nn.RNNBase] | None, questions: dict[str, Question],
        shape: tuple[int, int, int], hidden: int,
    ) -> None:  # fmt: skip
        super().__init__()
        channels, height, width = shape
        self.questions = questions
        self.cnn = nn.Sequential(
            nn.Conv2d(channels, 16, 5, stride=2, padding=2, bias=False), nn.BatchNorm2d(16),
            nn.ReLU(),
            nn.Conv2d(16, 32, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU(),
            nn.Flatten(),
            nn.Linear(32 * -(-height // 4) * -(-width // 4), hidden), nn.ReLU(),
        )  # fmt: skip
        self.rnn = cell(hidden, hidden) if cell else None
        self.single = None if cell else nn.Sequential(nn.Linear(hidden, hidden), nn.ReLU())
        heads = {name: nn.Linear(hidden, len(q.answers)) for name, q in questions.items()}
        self.heads = nn.ModuleDict(heads)

    def watch(self, frames: PackedSequence) -> tuple[Tensor, Tensor | None]:
        """What is known at each frame [N, hidden], in the order of ``frames``, and, with
        recurrence, at the end of each clip [B, hidden]."""
        features = self.cnn(frames.data)
        if self.rnn is None:
            return self.single(features), None
        y, state = self.rnn(frames._replace(data=features))
        return y.data, top_hidden(state)

    def forward(self, frames: PackedSequence) -> dict[str, Tensor]:
        """Logits of every question at every frame, [N, answers], in the order of ``frames``."""
        y, _ = self.watch(frames)
        return {name: head(y) for name, head in self.heads.items()}

    def answer(self, frames: PackedSequence) -> dict[str, Tensor]:
        """Logits of each question, of frames [N, answers] or of clips [B, answers].

        Of a clip, the last state answers (many to one); the baseline, which has none, answers by
        the mean over all frames of its log probabilities.
        """
        y, last = self.watch(frames)
        logits = {}
        for name, question in self.questions.items():
            head = self.heads[name]
            if question.of_frames:
                logits[name] = head(y)
            elif last is not None:
                logits[name] = head(last)
            else:
                packed = frames._replace(data=head(y).log_softmax(-1))
                padded, lengths = pad_packed_sequence(packed)  # [T, B, answers], padding is 0
                logits[name] = padded.sum(0) / lengths[:, None].to(y.device)
        return logits


def loss_of(model: Watcher, logits: dict[str, Tensor], clips: Clips) -> Tensor:
    """The sum over the questions of the mean cross entropy, in nats.

    In training, the clip's answer is asked for at every frame (as Ng et al. 2015, arXiv:1503.08909,
    did): from its end alone little would be learned. Frame 0 has no move before it and is not
    asked for it.
    """
    first = int(clips.frames.batch_sizes[0])
    losses = []
    for name, question in model.questions.items():
        answer, y = clips.answers[name], logits[name]
        if question.of_frames:
            answer, y = answer[first:], y[first:]
        else:
            answer = of_every_frame(answer, clips.frames)
        losses.append(F.cross_entropy(y, answer))
    return torch.stack(losses).sum()


def of_every_frame(answer: Tensor, frames: PackedSequence) -> Tensor:
    """The clips' answers [B], repeated for each of their frames [N]."""
    by_length = answer if frames.sorted_indices is None else answer[frames.sorted_indices]
    return torch.cat([by_length[:size] for size in frames.batch_sizes.tolist()])


# --- training and use ----------------------------------------------------------------------------


def train(run: Run, model: Watcher, name: str, batches: Batches) -> list[float]:
    """Trains on ``batches(rng)``; returns all losses."""
    a = run.args
    optimizer = torch.optim.Adam(model.parameters(), a.lr)
    schedule = cosine(optimizer, a.steps, warmup=min(50, a.steps // 10))
    checkpoint = run.checkpoint(f"{name}.pt", model=model, optimizer=optimizer, schedule=schedule)
    first = checkpoint.load()
    losses = list(checkpoint.extra or [])
    trained = run.distribute(model)
    model.train()
    for step in (bar := run.progress(range(first, a.steps), desc=name, unit="step")):
        clips = to(batches(np.random.default_rng(run.generator(step).initial_seed())), run.device)
        loss = loss_of(model, trained(clips.frames), clips)
        train_step(loss, model, optimizer, schedule)
        losses.append(loss.item())
        bar.set_postfix_str(f"loss {losses[-1]:.3f}", refresh=False)
        checkpoint.save_now_and_then(step + 1, losses)
    checkpoint.save(a.steps, losses)
    model.eval()
    return losses


@torch.no_grad()
def judge(model: Watcher, clips: Clips) -> dict[str, float]:
    """Shares of right answers to each question, in percent."""
    first = int(clips.frames.batch_sizes[0])
    result = {}
    for name, y in model.answer(clips.frames).items():
        answer = clips.answers[name]
        if model.questions[name].of_frames:
            answer, y = answer[first:], y[first:]
        result[name] = percent(y, answer)
    return result


@torch.no_grad()
def judge_frames(model: Watcher, clips: Clips) -> dict[str, float]:
    """The same where each frame answers the questions about its clip."""
    logits = model(clips.frames)
    return {
        name: percent(logits[name], of_every_frame(clips.answers[name], clips.frames))
        for name, question in model.questions.items() if not question.of_frames
    }  # fmt: skip


def percent(logits: Tensor, answer: Tensor) -> float:
    return 100 * (logits.argmax(-1) == answer).double().mean().item()


def majority(clips: Clips) -> dict[str, float]:
    """The share of the commonest answer to each question, in percent."""
    return {
        name: 100 * answer.bincount().max().item() / len(answer)
        for name, answer in clips.answers.items()
    }


@torch.no_grad()
def by_frames_seen(model: Watcher, clips: Clips, name: str) -> list[float]:
    """Right answers to a question about clips, in percent, after 1, 2, ... frames.

    Of clips that are over, the answer at their end counts.
    """
    right = model(clips.frames)[name].argmax(-1) == of_every_frame(
        clips.answers[name], clips.frames
    )
    padded, lengths = pad_packed_sequence(clips.frames._replace(data=right.double()))  # [T, B]
    shares = []
    for t in range(len(padded)):
        until = torch.minimum(torch.tensor(t), lengths - 1).to(padded.device)
        shares.append(100 * padded.gather(0, until[None]).mean().item())
    return shares


# --- picture -------------------------------------------------------------------------------------


def draw(
    run: Run, model: Watcher, clips: Clips, figures: dict[str, Any], seen: dict[str, list[float]]
) -> None:
    """Accuracies against the baselines, what more frames bring, and some clips."""
    with picture(run.path("video.png"), figsize=(12, 8)) as figure:
        top, low = figure.subfigures(2, 1, height_ratios=(1, 1))
        left, right = top.subplots(1, 2)

        names = list(model.questions)
        bars = {
            "recurrent": COLOURS[0], "all frames, no order": GREY, "single frame": "#b9c0c7",
            "commonest answer": "#dde1e5",
        }  # fmt: skip
        for i, (kind, colour) in enumerate(bars.items()):
            for j, name in enumerate(names):
                value = figures["accuracies"][kind].get(name)
                if value is not None:
                    place = j + 0.2 * (i - 1.5)
                    left.bar(place, value, 0.19, color=colour, label=kind if j == 0 else None)
                    left.annotate(
                        f"{value:.0f}", (place, value), (0, 2), textcoords="offset points",
                        ha="center", fontsize=8,
                    )  # fmt: skip
        labels = [f"{n}\n(of the {'frame' if q.of_frames else 'clip'})"
                  for n, q in model.questions.items()]  # fmt: skip
        left.set_xticks(range(len(names)), labels)
        left.set(ylabel="right answers, held out (%)", ylim=(0, 128), yticks=range(0, 101, 20))
        left.grid(axis="x", visible=False)
        left.legend(loc="upper center", ncols=2)
        left.set_title("What order and memory are worth")

        for (name, shares), colour in zip(seen.items(), COLOURS, strict=False):
            right.plot(range(1, len(shares) + 1), shares, "o-", ms=4, color=colour, label=name)
        right.set(xlabel="frames seen", ylabel="right answers, held out (%)", ylim=(0, 101))
        right.legend(loc="lower right")
        right.set_title("Frames add up")
        draw_strips(low, model, clips)


@torch.no_grad()
def draw_strips(figure: Any, model: Watcher, clips: Clips, count: int = 3) -> None:
    """The first clips: answers before the frames; arrows below them, orange where wrong."""
    logits = model.answer(clips.frames)
    frames, lengths = pad_packed_sequence(clips.frames)  # [T, B, channels, height, width]
    shown = int(lengths[:count].max())
    told = {}
    for name, question in model.questions.items():
        told[name] = logits[name].argmax(-1)
        if question.of_frames:
            told[name], _ = pad_packed_sequence(clips.frames._replace(data=told[name]))
    truth = dict(clips.answers)
    for name, question in model.questions.items():
        if question.of_frames:
            truth[name], _ = pad_packed_sequence(clips.frames._replace(data=truth[name]))
    figure.suptitle("Held-out clips, and what is said of them (orange: wrong)", fontsize=11)
    for b, row in enumerate(figure.subplots(count, shown + 1, squeeze=False)):
        for axes in row:
            axes.axis("off")
        lines = []
        for name, question in model.questions.items():
            if not question.of_frames:
                answer = question.answers[told[name][b]]
                right = told[name][b] == truth[name][b]
                lines.append((f"{name}: {answer}", "black" if right else COLOURS[1]))
        for i, (text, colour) in enumerate(lines):
            row[0].text(
                0, 0.8 - 0.3 * i, text, color=colour, fontsize=9, transform=row[0].transAxes
            )
        for t in range(int(lengths[b])):
            image = frames[t, b].cpu().clamp(0, 1).permute(1, 2, 0).numpy()
            row[t + 1].imshow(image, cmap="gray", vmin=0, vmax=1)
            for name, question in model.questions.items():
                if question.of_frames and t > 0:
                    draw_arrow(row[t + 1], int(told[name][t, b]), int(truth[name][t, b]))


def draw_arrow(axes: Any, told: int, true: int) -> None:
    """Below a frame, the direction that was told: black, or orange where another one is true."""
    down, right = list(digits.COMPASS.values())[told]
    length = (down**2 + right**2) ** 0.5
    x, y = 0.5 - 0.18 * right / length, -0.28 + 0.18 * down / length
    axes.annotate(
        "", (0.5 + 0.18 * right / length, -0.28 - 0.18 * down / length), (x, y),
        "axes fraction", "axes fraction", annotation_clip=False,
        arrowprops=dict(arrowstyle="->", lw=1.8, color="black" if told == true else COLOURS[1]),
    )  # fmt: skip


# --- program -------------------------------------------------------------------------------------


def parser() -> argparse.ArgumentParser:
    p = arguments(__doc__, "video", cell="gru", hidden=128, batch=32, lr=3e-3, steps=2500)
    p.add_argument("--shortest", type=positive, default=6, help="frames of the shortest clip")
    p.add_argument("--longest", type=positive, default=16, help="frames, at most")
    p.add_argument("--held-out", type=positive, default=1000, help="clips to judge by")
    p.add_argument("--films", type=Path, help="folder of films of one's own, DIR/CLASS/film")
    p.add_argument("--size", type=positive, default=64, help="pixels, height and width, of --films")
    return p


def main() -> None:
    args = parser().parse_args()
    run = start(args)
    if args.films:
        films = Films(args.films, args.size, args.longest, args.seed)
        questions, held_out = films.questions, films.clips(films.held_out)

        def batches(rng: np.random.Generator) -> Clips:
            chosen = rng.integers(0, len(films.train), args.batch)
            return films.clips([films.train[i] for i in chosen])

    else:
        questions, lengths = DIGIT_QUESTIONS, (args.shortest, args.longest)
        held_out = digit_clips(
            np.random.default_rng(args.seed), args.held_out, lengths, held_out=True
        )

        def batches(rng: np.random.Generator) -> Clips:
            return digit_clips(rng, args.batch, lengths)

    shape = tuple(held_out.frames.data.shape[1:])
    held_out = to(held_out, run.device)
    models = {}
    for name, cell in (("recurrent", find_cell(args.cell)), ("single frame", None)):
        torch.manual_seed(args.seed)
        models[name] = Watcher(cell, questions, shape, args.hidden).to(run.device)
        train(run, models[name], name.replace(" ", "_"), batches)

    figures: dict[str, Any] = {}
    if run.is_main:
        model, baseline = models.values()
        all_frames, one_frame = judge(baseline, held_out), judge_frames(baseline, held_out)
        of_clips = list(one_frame)
        accuracies = {
            "recurrent": judge(model, held_out),
            "all frames, no order": {name: all_frames[name] for name in of_clips},
            "single frame": all_frames | one_frame,
            "commonest answer": majority(held_out),
        }
        figures |= {"accuracies": accuracies, "clips_held_out": int(held_out.frames.batch_sizes[0])}
        for kind, shares in accuracies.items():
            for name, share in shares.items():
                figures[f"{name} ({kind})"] = share
        figures["by_frames_seen"] = {n: by_frames_seen(model, held_out, n) for n in of_clips}
        draw(run, model, held_out, figures, figures["by_frames_seen"])
    run.write(figures)


if __name__ == "__main__":
    launch(main)
