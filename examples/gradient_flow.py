"""Why gradients vanish and explode: measured in the kernels, set against theory, and what helps.

d L / d h_t is measured at every step t of RNN (tanh, relu), GRU and LSTM, for a loss L at the last
step T, and drawn over the distance k = T - t. Theory is the product of Jacobians
d h_T / d h_t = prod diag(f') W_hh (Hochreiter 1991; Bengio et al. 1994; Pascanu et al. 2013,
eq. 5): its norm is at most (largest singular value of W_hh)^k where f' <= 1. Then come the
remedies: orthogonal initialisation, gates and their biases, additive paths, clipping; and two
tasks that only a gradient over the whole distance can solve.

    python examples/gradient_flow.py
    python examples/gradient_flow.py --adding-length 200 --steps 6000 --hidden 128
"""

from __future__ import annotations

import argparse
import functools
import math
from collections.abc import Callable
from typing import Any

import torch
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
    smooth,
    start,
    train_step,
)
from torch import Tensor, nn
from torch.nn import functional as F

Curves = dict[str, list[float]]  # norms, indexed by the distance k to the last step

# --- measuring -----------------------------------------------------------------------------------


def gradient_norms(layer: nn.RNNBase, x: Tensor, state: Any = None) -> Curves:
    """Norms of d L / d h_t, and of d L / d c_t if there is a c, at distances k = 0 ... T - 1.

    x is [T, B, I]; L = <v, h_T> with v a random unit vector for each sequence, so the norm at
    k = 0 is 1 for h. Over the batch it is the root of the mean square. The layer is called for one
    step at a time: then each state between two steps is a tensor that autograd can be asked for,
    and what passes from one to the next comes from the kernels.
    """
    states: list[tuple[Tensor, ...]] = []
    for x_t in x:
        _, state = layer(x_t[None], state)
        states.append(state if isinstance(state, tuple) else (state,))
    v = F.normalize(torch.randn_like(states[-1][0]), dim=-1)
    loss = (v * states[-1][0]).sum()
    names = ["h", "c"][: len(states[-1])]
    grads = torch.autograd.grad(loss, [s for step in states for s in step], allow_unused=True)
    norms: Curves = {name: [] for name in names}
    for i, grad in enumerate(reversed(grads)):
        # Backwards through (h_1, c_1, ..., h_T, c_T). c_T alone does not enter h_T: no gradient.
        norm = 0.0 if grad is None else rms_norm(grad)
        norms[names[-1 - i % len(names)]].append(norm)
    return norms


def rms_norm(gradient: Tensor) -> float:
    """The root of the mean over the batch of the squared norms; ``gradient`` is [..., B, H]."""
    return gradient.double().pow(2).sum(-1).mean().sqrt().item()


def recurrent(cell: str, hidden: int, inputs: int = 16, **options: Any) -> nn.RNNBase:
    """One layer in float64, so that norms down to 1e-300 can be drawn; biases are 0."""
    layer = find_cell(cell)(inputs, hidden, dtype=torch.float64, **options)
    for name, p in layer.named_parameters():
        if "bias" in name:
            nn.init.zeros_(p)
    return layer


def orthogonal_(layer: nn.RNNBase, gain: float = 1.0) -> nn.RNNBase:
    """Each gate's H x H block of W_hh becomes gain * Q: all its singular values are ``gain``."""
    with torch.no_grad():
        for block in layer.weight_hh_l0.split(layer.hidden_size):
            nn.init.orthogonal_(block, gain)
    return layer


def identity_(layer: nn.RNNBase) -> nn.RNNBase:
    """W_hh = I, no biases, small inputs: a relu layer starts as a sum that keeps every gradient
    (Le, Jaitly & Hinton 2015)."""
    for name, p in layer.named_parameters():
        if "bias" in name:
            nn.init.zeros_(p)
    nn.init.eye_(layer.weight_hh_l0)
    nn.init.normal_(layer.weight_ih_l0, std=0.03)
    return layer


def forget_bias_(layer: nn.RNNBase, bias: float) -> nn.RNNBase:
    """The LSTM's forget gate, the second of i, f, g, o, starts near sigma(bias)."""
    with torch.no_grad():
        layer.bias_hh_l0[layer.hidden_size : 2 * layer.hidden_size] = bias
    return layer


# --- studies of the untrained layer --------------------------------------------------------------


def singular_value_study(steps: int, hidden: int, gains: list[float]) -> dict[str, Curves]:
    """tanh RNN with W_hh = gain * Q. At rest, f' = 1 and the norm is gain^k exactly; with inputs
    f' < 1 and gain^k is an upper bound."""
    curves = {}
    for gain in gains:
        layer = orthogonal_(recurrent("rnn", hidden), gain)
        still = torch.zeros(steps, 8, layer.input_size, dtype=torch.float64)
        rest = 1e-9 * torch.randn(1, 8, hidden, dtype=torch.float64)
        driven = gradient_norms(layer, torch.randn_like(still))
        curves[f"{gain:g}"] = {
            "at rest": gradient_norms(layer, still, rest)["h"],
            "with inputs": driven["h"],
            "theory": [gain**k for k in range(steps)],
        }
    return curves


def gaussian_study(steps: int, hidden: int, radius: float) -> Curves:
    """tanh RNN at rest, W_hh Gaussian with variance radius^2 / H: its spectral radius is about
    ``radius`` and its largest singular value about twice that, so the bound is far from sharp."""
    layer = recurrent("rnn", hidden)
    nn.init.normal_(layer.weight_hh_l0, std=radius / hidden**0.5)
    w = layer.weight_hh_l0.detach()
    largest = torch.linalg.svdvals(w)[0].item()
    spectral = torch.linalg.eigvals(w).abs().max().item()
    still = torch.zeros(steps, 8, layer.input_size, dtype=torch.float64)
    rest = 1e-9 * torch.randn(1, 8, hidden, dtype=torch.float64)
    return {
        f"bound: largest singular value {largest:.2f}": [largest**k for k in range(steps)],
        f"spectral radius {spectral:.2f}": [spectral**k for k in range(steps)],
        "measured": gradient_norms(layer, still, rest)["h"],
    }


def relu_study(steps: int, hidden: int, gains: list[float]) -> dict[str, Curves]:
    """relu RNN with W_hh = gain * Q: half of the units are off, so a step keeps half of the squared
    norm and the norm falls as (gain / sqrt 2)^k (He et al. 2015 for layers)."""
    curves = {}
    for gain in gains:
        layer = orthogonal_(recurrent("rnn", hidden, nonlinearity="relu"), gain)
        x = torch.randn(steps, 8, layer.input_size, dtype=torch.float64)
        curves[f"{gain:.3g}"] = {
            "measured": gradient_norms(layer, x)["h"],
            "theory": [(gain / 2**0.5) ** k for k in range(steps)],
        }
    return curves


def cell_study(steps: int, hidden: int) -> Curves:
    """Layers as they are constructed (biases 0), with inputs; and what two remedies change."""
    x = torch.randn(steps, 8, 16, dtype=torch.float64)
    lstm = gradient_norms(recurrent("lstm", hidden), x)
    remembering = gradient_norms(forget_bias_(recurrent("lstm", hidden), 3.0), x)
    return {
        "RNN": gradient_norms(recurrent("rnn", hidden), x)["h"],
        "RNN, orthogonal": gradient_norms(orthogonal_(recurrent("rnn", hidden)), x)["h"],
        "RNN, relu, identity": gradient_norms(
            identity_(recurrent("rnn", hidden, nonlinearity="relu")), x
        )["h"],
        "GRU": gradient_norms(recurrent("gru", hidden), x)["h"],
        "LSTM h": lstm["h"],
        "LSTM c": lstm["c"],
        "LSTM c, forget bias 3": remembering["c"],
    }


def forget_study(steps: int, hidden: int, biases: list[float]) -> dict[str, Curves]:
    """LSTM's c path: d c_T / d c_t is the product of the forget gates if h is left out of account,
    so about sigma(bias)^k. A gate near zero forgets the gradient with the value."""
    x = torch.randn(steps, 8, 16, dtype=torch.float64)
    curves = {}
    for bias in biases:
        norms = gradient_norms(forget_bias_(recurrent("lstm", hidden), bias), x)["c"]
        gate = 1 / (1 + math.exp(-bias))
        curves[f"{bias:+g}"] = {
            # c reaches the loss through h_T = o tanh(c): from k = 1 on there is a gradient.
            "measured": norms[1:],
            "theory": [norms[1] * gate ** (k - 1) for k in range(1, steps)],
        }
    return curves


def skip_study(depth: int, width: int) -> Curves:
    """Gradient through a deep network x <- tanh(W x) and a residual one x <- x + tanh(W x)
    (He et al. 2016), W as nn.Linear draws it: the identity is to depth what c is to time."""
    layers = [nn.Linear(width, width, bias=False, dtype=torch.float64) for _ in range(depth)]
    curves = {}
    for name, skip in (("without skip", 0.0), ("with skip", 1.0)):
        x = torch.randn(8, width, dtype=torch.float64, requires_grad=True)
        values = [x]
        for layer in layers:
            values.append(skip * values[-1] + torch.tanh(layer(values[-1])))
        v = F.normalize(torch.randn_like(x), dim=-1)
        grads = torch.autograd.grad((v * values[-1]).sum(), values)
        curves[name] = [rms_norm(g) for g in reversed(grads)]
    return curves


# --- tasks ---------------------------------------------------------------------------------------


def adding_problem(length: int, batch: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """x [T, B, 2] of numbers in [0, 1] and marks, target [B]: the sum of the two marked numbers.

    One mark in each half (Hochreiter & Schmidhuber 1997, experiment 4, in today's usual form).
    """
    x = torch.zeros(length, batch, 2)
    x[..., 0] = torch.rand(length, batch, generator=generator)
    half = length // 2
    first = torch.randint(0, half, (batch,), generator=generator)
    second = torch.randint(half, length, (batch,), generator=generator)
    columns = torch.arange(batch)
    x[first, columns, 1] = x[second, columns, 1] = 1
    return x, x[first, columns, 0] + x[second, columns, 0]


ADDING_BASELINE = 1 / 6  # mean squared error of always answering 1: twice the variance 1/12


def copy_memory(delay: int, batch: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """x [T + 20, B, 10] one-hot, target [T + 20, B]: repeat 10 symbols after T = ``delay`` steps.

    8 symbols; number 8 is the blank, 9 asks for the answer (Arjovsky, Shah & Bengio 2016, 4.1).
    """
    symbols = torch.randint(0, 8, (10, batch), generator=generator)
    x = torch.full((delay + 20, batch), 8)
    target = x.clone()
    x[:10], target[-10:] = symbols, symbols
    x[delay + 9] = 9
    return F.one_hot(x, 10).float(), target


def copy_baseline(delay: int) -> float:
    """Cross entropy of blanks where they belong and guesses for the symbols: 10 ln 8 / (T + 20)."""
    return 10 * math.log(8) / (delay + 20)


class Reader(nn.Module):
    """A recurrent layer and a linear map of its last output ([B]) or of all ([T, B, classes])."""

    def __init__(
        self,
        cell: str | type[nn.RNNBase],
        inputs: int,
        hidden: int,
        classes: int | None = None,
        **options: Any,
    ):
        super().__init__()
        self.rnn = find_cell(cell)(inputs, hidden, **options)
        self.head = nn.Linear(hidden, classes or 1)
        self.classes = classes

    def forward(self, x: Tensor) -> Tensor:
        y, _ = self.rnn(x)
        return self.head(y) if self.classes else self.head(y[-1]).squeeze(-1)


def adding_loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Mean squared error."""
    return F.mse_loss(model(batch[0]), batch[1])


def copy_loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Cross entropy in nats, the mean over all steps."""
    return F.cross_entropy(model(batch[0]).flatten(0, 1), batch[1].flatten())


def learn(
    run: Run,
    name: str,
    model: nn.Module,
    draw_batch: Callable[[int, torch.Generator], tuple[Tensor, Tensor]],
    loss_of: Callable[[nn.Module, tuple[Tensor, Tensor]], Tensor],
    optimizer: torch.optim.Optimizer,
    steps: int,
    clip: float = 1.0,
) -> dict[str, Any]:
    """Train on fresh batches; losses, gradient norms before clipping, and the loss on 1000 more."""
    trained = run.distribute(model.to(run.device))
    schedule = cosine(optimizer, steps)
    losses, norms = [], []
    for step in run.progress(range(steps), desc=name, leave=False):
        batch = draw_batch(run.args.batch, run.generator(step))
        loss = loss_of(trained, tuple(part.to(run.device) for part in batch))
        norms.append(train_step(loss, model, optimizer, schedule, clip))
        losses.append(loss.item())
    with torch.no_grad():
        batch = draw_batch(1000, run.generator(-1))  # no step has these numbers
        final = loss_of(model, tuple(part.to(run.device) for part in batch)).item()
    return {"losses": losses, "norms": norms, "held_out_loss": final}


def initialised(name: str, inputs: int, hidden: int, classes: int | None = None) -> Reader:
    """The model of a curve's name: LSTM with forget bias 1 (Jozefowicz et al. 2015), the rest as
    constructed or as the name says."""
    cell = name.split(",")[0].lower()
    if "relu" in name:
        model = Reader(cell, inputs, hidden, classes, nonlinearity="relu")
        identity_(model.rnn)
    else:
        model = Reader(cell, inputs, hidden, classes)
    if "orthogonal" in name:
        orthogonal_(model.rnn)
    if cell == "lstm":
        forget_bias_(model.rnn, 1.0)
    return model


def adding_run(run: Run, name: str, length: int, steps: int, hidden: int) -> dict[str, Any]:
    """The adding problem for one cell or initialisation."""
    torch.manual_seed(run.args.seed)
    model = initialised(name, 2, hidden)
    lr = run.args.lr / 10 if "relu" in name else run.args.lr  # nothing bounds a relu's state
    optimizer = torch.optim.Adam(model.parameters(), lr)
    batches = functools.partial(adding_problem, length)
    return learn(run, f"adding, {name}", model, batches, adding_loss, optimizer, steps)


def copy_run(run: Run, name: str, delay: int, steps: int, hidden: int) -> dict[str, Any]:
    """Copy memory for one cell or initialisation."""
    torch.manual_seed(run.args.seed)
    model = initialised(name, 10, hidden, 10)
    optimizer = torch.optim.Adam(model.parameters(), run.args.lr)
    batches = functools.partial(copy_memory, delay)
    return learn(run, f"copy, {name}", model, batches, copy_loss, optimizer, steps)


def clipping_run(run: Run, clip: float, length: int, steps: int, hidden: int) -> dict[str, Any]:
    """Gradient descent with momentum on the adding problem, clipped by norm (Pascanu et al. 2013,
    algorithm 1). The relu RNN starts as a sum of its inputs, so its gradient is large."""
    torch.manual_seed(run.args.seed)
    model = initialised("RNN, relu, identity", 2, hidden)
    optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9)
    batches = functools.partial(adding_problem, length)
    return learn(run, f"clip {clip}", model, batches, adding_loss, optimizer, steps, clip)


# --- picture -------------------------------------------------------------------------------------

# One colour for each curve's name or place, the same in all panels.
CELL_COLOURS = {
    "RNN": COLOURS[2],
    "RNN, orthogonal": COLOURS[4],
    "RNN, relu, identity": "#6b4f9e",
    "GRU": COLOURS[0],
    "LSTM": COLOURS[1],
    "LSTM h": COLOURS[5],
    "LSTM c": COLOURS[1],
    "LSTM c, forget bias 3": COLOURS[3],
}
DASHES = (0, (4, 2))


def flow_panel(ax: Any, title: str, limits: tuple[float, float], what: str = "distance k") -> None:
    ax.set_yscale("log")
    ax.set_ylim(*limits)
    ax.set(title=title, xlabel=what, ylabel="gradient norm")
    ax.axhline(1, color=GREY, lw=0.8)
    ax.legend(fontsize=8)


def against_theory(ax: Any, curves: dict[str, Curves], label: str) -> None:
    """Solid lines are measured, dashed ones are theory."""
    for colour, (name, lines) in zip(COLOURS, curves.items(), strict=False):
        for kind, norms in lines.items():
            look = {"lw": 1.6, "label": f"{label} {name}"}
            if kind == "theory":
                look = {"lw": 3.2, "ls": DASHES, "alpha": 0.45}
            elif kind == "with inputs":
                look = {"lw": 1, "ls": (0, (1, 1.5))}
            ax.plot(norms, color=colour, **look)


def task_panel(
    ax: Any, results: dict[str, dict[str, Any]], baseline: float, title: str, unit: str, free: str
) -> None:
    """Learning curves and the baseline; ``free`` is where the legend hides nothing."""
    for name, result in results.items():
        losses = smooth(result["losses"], max(1, len(result["losses"]) // 40))
        ax.plot(losses, color=CELL_COLOURS[name], label=f"{name}: {result['held_out_loss']:.2g}")
    ax.axhline(baseline, color=GREY, ls=DASHES, label=f"baseline: {baseline:.2g}")
    ax.set(title=title, xlabel="training step", ylabel=unit, ylim=(0, 1.35 * baseline))
    ax.legend(title="on new sequences", title_fontsize=8, fontsize=8, loc=free)


def draw(run: Run, studies: dict[str, Any], tasks: dict[str, Any]) -> None:
    args = run.args
    with picture(run.path("gradient_flow.png"), figsize=(15, 12.5)) as figure:
        figure.suptitle(
            "Gradient of the last step's loss with respect to the state k steps before",
            x=0.01, ha="left",
        )  # fmt: skip
        axes = figure.subplots(3, 3).flatten()

        against_theory(axes[0], studies["singular_values"], "singular value")
        axes[0].plot([], [], color=GREY, lw=1, ls=(0, (1, 1.5)), label="the same with inputs")
        axes[0].plot([], [], color=GREY, lw=3.2, ls=DASHES, alpha=0.45, label="theory: value$^k$")
        flow_panel(axes[0], "tanh, W_hh = gain × orthogonal: gain$^k$ at rest", (1e-8, 1e6))

        looks = [(GREY, DASHES, 2), (COLOURS[1], DASHES, 2), (COLOURS[0], "-", 1.6)]
        for (colour, ls, lw), (name, norms) in zip(looks, studies["gaussian"].items(), strict=True):
            axes[1].plot(norms, color=colour, ls=ls, lw=lw, label=name)
        flow_panel(axes[1], "tanh, W_hh Gaussian: the bound may be loose", (1e-6, 1e12))

        against_theory(axes[2], studies["relu"], "gain")
        flow_panel(axes[2], r"relu, W_hh = gain × orthogonal: (gain / $\sqrt{2}$)$^k$", (1e-8, 1e6))

        for name, norms in studies["cells"].items():
            axes[3].plot(
                [n or math.nan for n in norms], color=CELL_COLOURS[name], label=name, lw=1.6
            )  # c_T does not reach the loss: no point at k = 0
        flow_panel(axes[3], "The cells at their initialisation, with inputs", (1e-12, 1e2))

        against_theory(axes[4], studies["forget"], "bias")
        flow_panel(axes[4], r"LSTM's c path and $\sigma$(forget bias)$^k$", (1e-12, 1e2))

        for colour, (name, norms) in zip(COLOURS, studies["skip"].items(), strict=False):
            axes[5].plot(norms, color=colour, label=f"layers of tanh {name}")
        c_path = studies["cells"]["LSTM c, forget bias 3"]
        axes[5].plot(
            [n or math.nan for n in c_path], color=CELL_COLOURS["LSTM c, forget bias 3"], ls=DASHES,
            label="LSTM c, forget bias 3",
        )  # fmt: skip
        flow_panel(
            axes[5], "A skip is to depth what c is to time", (1e-12, 1e4), "layers or steps back"
        )

        ax = axes[6]
        for colour, (name, result) in zip(COLOURS[1::-1], tasks["clipping"].items(), strict=True):
            losses = result["losses"]
            last = next((i for i, v in enumerate(losses) if not v < 1e12), len(losses))
            overflow = last < len(losses)
            ax.plot(
                range(1, last + 1), losses[:last], color=colour,
                marker="x" if overflow else None, markevery=[-1],
                label=f"{name}: overflow at step {last + 1}" if overflow else name,
            )  # fmt: skip
        ax.axhline(ADDING_BASELINE, color=GREY, ls=DASHES, label=f"baseline: {ADDING_BASELINE:.2g}")
        ax.set_yscale("log")
        ax.set(
            title="Clipping by norm: relu RNN, SGD with momentum", xlabel="training step",
            ylabel="mean squared error", ylim=(0.05, None),
        )  # fmt: skip
        ax.legend(fontsize=8)

        task_panel(
            axes[7], tasks["adding"], ADDING_BASELINE,
            f"Adding problem over {args.adding_length} steps", "mean squared error",
            "center right",
        )  # fmt: skip
        task_panel(
            axes[8], tasks["copy"], copy_baseline(args.copy_delay),
            f"Copy memory after {args.copy_delay} steps", "cross entropy (nats per step)",
            "lower left",
        )  # fmt: skip


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    p = arguments(__doc__, "gradient_flow", cell=None, hidden=64, batch=32, lr=1e-2, steps=2000)
    p.add_argument("--distance", type=positive, default=100, help="steps that gradients go back")
    p.add_argument("--adding-length", type=positive, default=80)
    p.add_argument("--copy-delay", type=positive, default=20)
    p.set_defaults(threads=1)  # so little work per step that a second thread does not pay
    return p.parse_args(argv)


def main() -> None:
    args = parse()
    run = start(args)
    k, h = args.distance, args.hidden
    studies = {
        "singular_values": singular_value_study(k, h, [0.9, 1.0, 1.1]),
        "gaussian": gaussian_study(k, 2 * h, 0.9),
        "relu": relu_study(k, 2 * h, [1.0, 2**0.5, 1.6]),
        "cells": cell_study(k, h),
        "forget": forget_study(k, h, [-3.0, 0.0, 1.0, 3.0]),
        "skip": skip_study(k, h),
    }
    length, steps = args.adding_length, args.steps
    clips = {"no clipping": math.inf, "clipped to norm 1": 1.0}
    tasks = {
        "clipping": {
            name: run.once(name, lambda c=clip: clipping_run(run, c, length, max(1, steps // 5), h))
            for name, clip in clips.items()
        },
        "adding": {
            name: run.once(f"adding {name}", lambda n=name: adding_run(run, n, length, steps, h))
            for name in ("RNN", "RNN, orthogonal", "RNN, relu, identity", "GRU", "LSTM")
        },
        "copy": {
            name: run.once(
                f"copy {name}", lambda n=name: copy_run(run, n, args.copy_delay, steps, h)
            )
            for name in ("RNN", "RNN, orthogonal", "GRU", "LSTM")
        },
    }
    draw(run, studies, tasks)
    rest = studies["singular_values"]
    figures = {
        # Largest relative distance of the tanh RNN at rest from gain^k, over all gains and k.
        "error_against_theory": max(
            abs(m / t - 1)
            for curves in rest.values()
            for m, t in zip(curves["at rest"], curves["theory"], strict=True)
        ),
        "adding_baseline": ADDING_BASELINE,
        **{f"adding_{name}": r["held_out_loss"] for name, r in tasks["adding"].items()},
        "copy_baseline": copy_baseline(args.copy_delay),
        **{f"copy_{name}": r["held_out_loss"] for name, r in tasks["copy"].items()},
        **{f"sgd_{name}": r["held_out_loss"] for name, r in tasks["clipping"].items()},
        "studies": studies,
        "tasks": tasks,
    }
    run.write(figures, "gradient_flow")


if __name__ == "__main__":
    launch(main)
