"""Trains one character language model twice: on torch.nn's recurrent layer and on fused_rnn's.

Both start from the same seed, so from the same weights, and see the same batches. They should
learn the same thing; what may differ is the time. In the end there is a picture of both loss
curves and of their distance (--out), a JSON file with all figures beside it, and a text that the
fused model wrote.

    python examples/char_lm.py                       # GRU on the standard library's own source
    python examples/char_lm.py --cell lstm --text novel.txt
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from common import BITS, GREY, detach, picture, smooth
from text import Text, chunks, standard_library_source
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

import fused_rnn

LAYERS: dict[str, dict[str, Callable[..., nn.Module]]] = {
    "torch.nn": {"gru": nn.GRU, "lstm": nn.LSTM, "rnn": nn.RNN},
    "fused_rnn": {"gru": fused_rnn.GRU, "lstm": fused_rnn.LSTM, "rnn": fused_rnn.RNN},
}


def parse_arguments() -> argparse.Namespace:
    p = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    p.add_argument("--text", type=Path, help="UTF-8 text (default: the standard library's source)")
    p.add_argument("--cell", choices=["gru", "lstm", "rnn"], default="gru")
    p.add_argument("--layers", type=int, default=1)
    p.add_argument("--hidden", type=int, default=256)
    p.add_argument("--batch", type=int, default=32, help="text streams read side by side")
    p.add_argument("--chunk", type=int, default=64, help="characters per step of each stream")
    p.add_argument("--steps", type=int, default=1000)
    p.add_argument("--lr", type=float, default=4e-3, help="peak rate; falls to 0 as a cosine")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--threads", type=int, default=torch.get_num_threads())
    p.add_argument("--temperature", type=float, default=0.6, help="of the sampled text")
    p.add_argument("--sample", type=int, default=600, help="characters to sample")
    p.add_argument("--control", action="store_true", help="a third run: torch.nn, nudged by 1 ulp")
    p.add_argument("--out", type=Path, help="picture (default: out/char_lm_CELL.png)")
    a = p.parse_args()
    a.out = a.out or Path(f"out/char_lm_{a.cell}.png")
    return a


# --- model ---------------------------------------------------------------------------------------


class CharModel(nn.Module):
    """Embedding, recurrent layer, softmax: knows nothing of whose layer it is given."""

    def __init__(self, layer: Callable[..., nn.Module], symbols: int, hidden: int, layers: int):
        super().__init__()
        self.embedding = nn.Embedding(symbols, hidden // 2)
        self.rnn = layer(hidden // 2, hidden, layers)
        self.head = nn.Linear(hidden, symbols)

    def forward(self, x: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        y, state = self.rnn(self.embedding(x), state)
        return self.head(y), state

    def loss(self, x: Tensor, target: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        """Cross entropy in nats per character."""
        logits, state = self(x, state)
        return F.cross_entropy(logits.flatten(0, 1), target.flatten()), state


# --- training ------------------------------------------------------------------------------------


class Contender:
    """One model in training, with its loss at every step and its clock."""

    def __init__(self, name: str, layer: Callable[..., nn.Module], text: Text, a: Any) -> None:
        self.name, self.text, self.batch, self.chunk = name, text, a.batch, a.chunk
        torch.manual_seed(a.seed)
        self.model = CharModel(layer, len(text.symbols), a.hidden, a.layers)
        self.optimizer = torch.optim.Adam(self.model.parameters(), a.lr)
        self.schedule = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, a.steps)
        self.batches: Iterator[tuple[Tensor, Tensor]] = iter(())
        self.state: Any = None
        self.bits: list[float] = []  # training loss of every step, per character
        self.speeds: list[float] = []  # characters per second of every block of steps

    def warm_up(self) -> None:
        """What happens once (compiling, first touches) happens here, on a copy, off the clock."""
        model = copy.deepcopy(self.model)
        for _ in range(3):
            model.loss(*next(chunks(self.text.train, self.batch, self.chunk)))[0].backward()

    def next_batch(self) -> tuple[Tensor, Tensor]:
        batch = next(self.batches, None)
        if batch is None:  # the streams have ended: begin again, remembering nothing
            self.batches = chunks(self.text.train, self.batch, self.chunk)
            self.state = None
            batch = next(self.batches)
        return batch

    def step(self) -> None:
        x, target = self.next_batch()
        loss, state = self.model.loss(x, target, self.state)
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.schedule.step()
        self.state = detach(state)
        self.bits.append(loss.item() * BITS)

    def train(self, steps: int, bar: tqdm) -> None:
        begin = time.perf_counter()
        for _ in range(steps):
            self.step()
            bar.update()
        self.speeds.append(steps * self.batch * self.chunk / (time.perf_counter() - begin))
        bar.set_postfix_str(f"{self.name} {self.bits[-1]:.3f} bits")

    @property
    def speed(self) -> float:
        return statistics.median(self.speeds)

    @torch.no_grad()
    def held_out_bits(self) -> float:
        losses, state = [], None
        batch = min(self.batch, len(self.text.held_out) // (2 * self.chunk)) or 1
        for x, target in chunks(self.text.held_out, batch, self.chunk):
            loss, state = self.model.loss(x, target, state)
            losses.append(loss.item() * BITS)
        return statistics.fmean(losses)

    @torch.no_grad()
    def sample(self, length: int, temperature: float, seed: int) -> str:
        """Text drawn from the model one character at a time, begun at the start of a line."""
        generator = torch.Generator().manual_seed(seed)
        x, state, drawn = torch.tensor([[self.text.index.get("\n", 0)]]), None, []
        for _ in range(length):
            logits, state = self.model(x, state)
            logits[..., 0] = -torch.inf  # symbol 0 stands for no character
            x = (logits[0] / temperature).softmax(-1).multinomial(1, generator=generator)
            drawn.append(self.text.symbols[x.item()])
        return "".join(drawn)


def nudge(model: nn.Module) -> None:
    """Moves every weight to the next float: the least difference that there can be."""
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.nextafter(p, torch.full_like(p, torch.inf)))


def race(contenders: list[Contender], steps: int, block: int = 20) -> None:
    """Trains all, in turns of a few steps, so that a slow spell of the machine hits each alike."""
    for contender in contenders:
        contender.warm_up()
    with tqdm(total=steps * len(contenders), unit="step", smoothing=0.05) as bar:
        for turn, begin in enumerate(range(0, steps, block)):
            for contender in contenders[:: -1 if turn % 2 else 1]:  # A B, B A, ...: no order helps
                contender.train(min(block, steps - begin), bar)


# --- report --------------------------------------------------------------------------------------


def of_threads(number: int) -> str:
    return f"{number} thread{'s' if number != 1 else ''}"


def distance(a: Contender, b: Contender) -> list[float]:
    return [abs(x - y) for x, y in zip(a.bits, b.bits, strict=True)]


def report(contenders: list[Contender], text: Text, a: argparse.Namespace) -> dict[str, Any]:
    """All figures of the run. Losses are in bits per character, steps count from 1."""
    theirs, ours = contenders[:2]
    gap = distance(ours, theirs)
    shares = torch.bincount(text.train) / len(text.train)
    figures: dict[str, Any] = {
        "arguments": {k: str(v) if isinstance(v, Path) else v for k, v in vars(a).items()},
        "torch": torch.__version__,
        "fused_rnn": fused_rnn.__version__,
        "backend": fused_rnn.backend_info()["backend"],
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "characters": len(text.train) + len(text.held_out),
        "symbols": len(text.symbols),
        "unigram_bits": torch.special.entr(shares).sum().item() * BITS,
        "largest_difference_bits": max(gap),
        "largest_difference_step": gap.index(max(gap)) + 1,
        "speed_ratio": ours.speed / theirs.speed,
        "contenders": {
            c.name: {
                "characters_per_second": c.speed,
                "held_out_bits": c.held_out_bits(),
                "final_bits": statistics.fmean(c.bits[-20:]),
                "train_bits": c.bits,
                "block_characters_per_second": c.speeds,
            }
            for c in contenders
        },
        "sample": ours.sample(a.sample, a.temperature, a.seed),
    }
    if a.control:
        figures["control_largest_difference_bits"] = max(distance(contenders[2], theirs))
    return figures


def draw(contenders: list[Contender], figures: dict[str, Any], a: argparse.Namespace) -> None:
    """Both loss curves above; their distance, and the control's, below over the same steps."""
    theirs, ours = contenders[:2]
    steps = range(1, a.steps + 1)
    width = max(1, a.steps // 50)
    amber, navy = "#f5a742", "#173f6b"
    with picture(a.out, figsize=(9, 6.6)) as figure:
        top, low = figure.subplots(2, 1, sharex=True, height_ratios=(1.9, 1))
        source = a.text.name if a.text else "the Python standard library"
        top.set_title(
            f"{a.cell.upper()} character model trained twice: torch.nn and fused_rnn",
            loc="left", fontsize=13, fontweight="bold", pad=26,
        )  # fmt: skip
        top.annotate(
            f"same seed, same batches of {source} · {a.layers} × {a.hidden} units · "
            f"{a.batch} × {a.chunk} characters per step · {of_threads(figures['threads'])}",
            (0, 1), (0, 9), "axes fraction", "offset points", fontsize=9.5, color="#5f6770",
        )  # fmt: skip

        # One curve wide and light, the other thin and dark on top of it: both stay visible.
        looks = {theirs: dict(color=amber, lw=5.5), ours: dict(color=navy, lw=1.4)}
        top.plot(steps, ours.bits, color=navy, lw=0.6, alpha=0.22)
        for contender, look in looks.items():
            result = figures["contenders"][contender.name]
            name = contender.name
            if contender is ours and figures["backend"] != "native":
                name += " (reference path)"
            label = (
                f"{name}: {result['held_out_bits']:.3f} bits on held-out text, "
                f"{result['characters_per_second'] / 1000:.1f} k characters/s"
            )
            top.plot(steps, smooth(contender.bits, width), label=label, **look)
        top.axhline(figures["unigram_bits"], color=GREY, lw=1, ls=(0, (4, 3)))
        top.annotate(
            "entropy of single characters", (a.steps, figures["unigram_bits"]), (0, -5),
            textcoords="offset points", ha="right", va="top", fontsize=9, color="#6d757e",
        )  # fmt: skip
        top.set_ylabel("training loss (bits per character)")
        top.set_ylim(bottom=0, top=1.12 * max(*ours.bits, figures["unigram_bits"]))
        top.legend(loc="upper right", fontsize=9.5)

        # Losses are float32: differences below this are not resolved, 0 included.
        floor = torch.finfo(torch.float32).eps
        gaps = [(ours, navy, "|fused_rnn − torch.nn|")]
        if a.control:
            gaps.insert(0, (contenders[2], GREY, "|torch.nn, weights nudged by 1 ulp − torch.nn|"))
        for contender, color, label in gaps:
            gap = [max(g, floor) for g in distance(contender, theirs)]
            low.plot(steps, gap, color=color, lw=0.6, alpha=0.35)
            typical = smooth([math.log(g) for g in gap], width)
            low.plot(steps, [math.exp(g) for g in typical], color=color, lw=1.6, label=label)
        worst, at = figures["largest_difference_bits"], figures["largest_difference_step"]
        circle = dict(ms=7, mfc="none", mec="#c0392b", mew=1.6)
        low.plot([at], [max(worst, floor)], "o", clip_on=False, zorder=5, **circle)
        low.annotate(
            f"largest: {worst:.2g} at step {at}", (at, max(worst, floor)),
            (-9 if at > a.steps / 2 else 9, 6), textcoords="offset points",
            ha="right" if at > a.steps / 2 else "left", fontsize=9, color="#c0392b",
        )  # fmt: skip
        low.axhspan(floor / 4, floor, color="#f0f1f3", lw=0)
        low.set_yscale("log")
        low.set_ylim(floor / 4, max(worst, 1e-4) * 20)
        low.set_xlim(0, a.steps)
        low.set_ylabel("difference\n(bits per character)")
        low.set_xlabel("training step")
        low.legend(loc="lower left", bbox_to_anchor=(-0.01, 0.98), ncols=2, fontsize=9)
        figure.align_ylabels()


def main() -> None:
    a = parse_arguments()
    torch.set_num_threads(a.threads)
    text = Text(a.text.read_text(encoding="utf-8") if a.text else standard_library_source())
    contenders = [Contender(name, cells[a.cell], text, a) for name, cells in LAYERS.items()]
    theirs, ours = contenders
    if a.control:
        contenders.append(Contender("control", LAYERS["torch.nn"][a.cell], text, a))
        nudge(contenders[-1].model)
    weights = zip(theirs.model.parameters(), ours.model.parameters(), strict=True)
    if not all(torch.equal(w, v) for w, v in weights):
        raise SystemExit("one seed gave two different models")

    race(contenders, a.steps)
    figures = report(contenders, text, a)
    a.out.parent.mkdir(parents=True, exist_ok=True)
    draw(contenders, figures, a)
    a.out.with_suffix(".json").write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")

    print(f"\n{figures['sample']}\n")
    print(f"{'':12}characters/s   held-out bits/character")
    for name, result in figures["contenders"].items():
        speed, bits = result["characters_per_second"], result["held_out_bits"]
        print(f"{name:12}{speed:12,.0f}   {bits:.4f}")
    print(f"{of_threads(figures['threads'])}; backend of fused_rnn: {figures['backend']}")
    print(f"speed: fused_rnn / torch.nn = {figures['speed_ratio']:.2f}")
    print(
        f"largest difference of the training losses: {figures['largest_difference_bits']:.2g} bits "
        f"per character, at step {figures['largest_difference_step']} of {a.steps}"
    )
    if a.control:
        print(
            "torch.nn differs from itself, weights nudged by 1 ulp, by up to "
            f"{figures['control_largest_difference_bits']:.2g}"
        )
    print(f"{a.out}, {a.out.with_suffix('.json')}")


if __name__ == "__main__":
    main()
