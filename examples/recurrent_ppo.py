"""Recurrent reinforcement learning: PPO balances a pole whose speed it must remember.

A policy with a recurrent layer sees where the cart and the pole are (CartPole of gymnasium, its two
velocities hidden) and must find out from what it saw before how they move. Many environments run
side by side. Their episodes end when they end, so that a batch of T steps holds pieces of episodes
of all lengths, and the state must begin anew wherever one begins. Three policies learn, of the same
initial weights and with the same random numbers:

    reset      the layer gets the whole batch, and where episodes begin: rnn(x, reset=begins)
    loop       the same layer, called T times; before each call the state is set to zero by hand
    no memory  the baseline: the state begins anew at every step

The first two compute the same, and their curves part only by rounding, which in the end makes
another action be drawn; what differs is how long it takes. The algorithm is proximal policy
optimisation (Schulman et al. 2017, arXiv:1707.06347) with generalised advantages (Schulman et al.
2016, arXiv:1506.02438).

    python examples/recurrent_ppo.py          # needs: pip install gymnasium
    python examples/recurrent_ppo.py --cell gru --batch 64 --lr 2e-3
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import gymnasium
import numpy as np
import torch
import torch.nn.functional as F
from common import (
    COLOURS,
    GREY,
    Run,
    arguments,
    find_cell,
    launch,
    picture,
    positive,
    smooth,
    start,
    train_step,
)
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from torch import Tensor, nn

import fused_rnn

SEEN = [0, 2]  # of CartPole's four numbers: the place of the cart and the angle of the pole
SCALE = torch.tensor([2.4, 0.21])  # of these, where an episode ends
BEST = 500  # steps of the longest episode, and so its return
LOSSES = {"policy": 1.0, "value": 0.5, "entropy": -0.01}  # and their weights


# --- policy --------------------------------------------------------------------------------------


class Policy(nn.Module):
    """Which action to take, and what it will bring: from observations [T, B, 2] to logits
    [T, B, 2] and values [T, B], and the state."""

    def __init__(self, cell: type[nn.RNNBase], hidden: int) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(len(SEEN), hidden), nn.Tanh())
        self.rnn = cell(hidden, hidden)
        self.action, self.value = nn.Linear(hidden, 2), nn.Linear(hidden, 1)
        nn.init.orthogonal_(self.action.weight, 0.01)  # at first every action is as likely

    def forward(self, seen: Tensor, state: Any, begins: Tensor) -> tuple[Tensor, Tensor, Any]:
        """``begins`` [T, B] is true where an observation is the first of an episode."""
        h, state = self.remember(self.encoder(seen), state, begins)
        return self.action(h), self.value(h).squeeze(-1), state

    def remember(self, x: Tensor, state: Any, begins: Tensor) -> tuple[Tensor, Any]:
        return self.rnn(x, state, reset=begins)


class LoopPolicy(Policy):
    """The same by a loop over time."""

    def remember(self, x: Tensor, state: Any, begins: Tensor) -> tuple[Tensor, Any]:
        outputs = []
        for x_t, begins_t in zip(x, begins, strict=True):
            if state is not None:
                goes_on = (~begins_t).to(x)[:, None]  # [B, 1]
                state = each(state, lambda s, goes_on=goes_on: s * goes_on)
            h, state = self.rnn(x_t[None], state)
            outputs.append(h)
        return torch.cat(outputs), state


class ForgetfulPolicy(Policy):
    """The same without memory."""

    def remember(self, x: Tensor, state: Any, begins: Tensor) -> tuple[Tensor, Any]:
        return self.rnn(x, state, reset=torch.ones_like(begins))


POLICIES = {"reset": Policy, "loop": LoopPolicy, "no memory": ForgetfulPolicy}


def each(state: Any, fn: Callable[[Tensor], Tensor]) -> Any:
    """``fn`` of h, or of the LSTM's (h, c)."""
    return tuple(map(fn, state)) if isinstance(state, tuple) else fn(state)


# --- experience ----------------------------------------------------------------------------------


class Experience(NamedTuple):
    """T steps of B environments."""

    seen: Tensor  # [T, B, 2]
    begins: Tensor  # [T, B] bool, whether ``seen`` is the first of an episode
    action: Tensor  # [T, B]
    log_p: Tensor  # [T, B], of the action, when it was taken
    value: Tensor  # [T, B], as was thought then
    reward: Tensor  # [T, B]
    next_begins: Tensor  # [B], as ``begins`` after the last step
    next_value: Tensor  # [B]
    state: Any  # before the first step


class World:
    """B environments that go on from batch to batch, and what the policy remembers of them."""

    def __init__(self, count: int, seed: int, device: torch.device) -> None:
        self.device = device
        self.environments = SyncVectorEnv(
            [lambda: gymnasium.make("CartPole-v1") for _ in range(count)],
            autoreset_mode=AutoresetMode.SAME_STEP,  # after the last step the next episode is seen
        )
        self.seen = self._tensor(self.environments.reset(seed=seed)[0])
        self.begins = torch.ones(count, dtype=torch.bool, device=device)
        self.state: Any = None
        self.returns = np.zeros(count)  # of the episodes under way

    def _tensor(self, observations: np.ndarray) -> Tensor:
        return (torch.from_numpy(observations[:, SEEN]) / SCALE).to(self.device)

    @torch.no_grad()
    def play(
        self, policy: Policy, steps: int, random: torch.Generator
    ) -> tuple[Experience, list[float]]:
        """So many steps, and the returns of the episodes that ended in them."""
        rows: list[list[Tensor]] = []
        finished: list[float] = []
        before = self.state
        for _ in range(steps):
            logits, value, self.state = policy(self.seen[None], self.state, self.begins[None])
            log_p = logits[0].log_softmax(-1)
            action = torch.multinomial(log_p.exp().cpu(), 1, generator=random).to(self.device)
            taken = log_p.gather(1, action).squeeze(1)
            played = self.environments.step(action.squeeze(1).cpu().numpy())
            observations, reward, ended, cut_off, _ = played
            rows.append([self.seen, self.begins, action.squeeze(1), taken, value[0],
                         torch.from_numpy(reward).to(value)])  # fmt: skip
            over = ended | cut_off
            self.returns += reward
            finished += self.returns[over].tolist()
            self.returns[over] = 0
            self.seen = self._tensor(observations)
            self.begins = torch.from_numpy(over).to(self.device)
        next_value = policy(self.seen[None], self.state, self.begins[None])[1][0]
        if before is None:
            before = each(self.state, torch.zeros_like)
        columns = map(torch.stack, zip(*rows, strict=True))
        return Experience(*columns, self.begins, next_value, before), finished


def advantages(e: Experience, discount: float, trace: float) -> Tensor:
    """How much better than expected each action went, [T, B]: Schulman et al., arXiv:1506.02438.

    A_t = d_t + discount trace A_{t+1}, d_t = r_t + discount V_{t+1} - V_t within an episode, where
    rewards are so scaled that at most 1 is to come. One that was cut off after ``BEST`` steps
    counts as ended.
    """
    goes_on = (~torch.cat([e.begins[1:], e.next_begins[None]])).to(e.value)
    reward = (1 - discount) * e.reward
    surprise = reward + discount * goes_on * torch.cat([e.value[1:], e.next_value[None]])
    surprise -= e.value
    found, last = [], torch.zeros_like(e.next_value)
    for t in reversed(range(len(surprise))):
        last = surprise[t] + discount * trace * goes_on[t] * last
        found.append(last)
    return torch.stack(found[::-1])


# --- learning ------------------------------------------------------------------------------------


def losses_of(
    policy: nn.Module, e: Experience, gain: Tensor, rows: Tensor, clip: float
) -> dict[str, Tensor]:
    """Of the environments ``rows``: whole sequences, which begin with the state they had."""
    state = each(e.state, lambda s: s[:, rows])
    logits, value, _ = policy(e.seen[:, rows], state, e.begins[:, rows])
    every = logits.log_softmax(-1)
    log_p = every.gather(2, e.action[:, rows, None]).squeeze(2)
    ratio = (log_p - e.log_p[:, rows]).exp()
    better = (gain[:, rows] - gain.mean()) / (gain.std() + 1e-8)
    held = torch.minimum(ratio * better, ratio.clamp(1 - clip, 1 + clip) * better)
    return {
        "policy": -held.mean(),
        "value": F.mse_loss(value, (gain + e.value)[:, rows]),
        "entropy": -(every.exp() * every).sum(-1).mean(),
    }


class Trained(NamedTuple):
    """What is told of a policy's training; lists have a number for every batch."""

    returns: list[float]  # mean of the episodes that ended in the batch; NaN where none did
    losses: list[float]  # in the first pass over each batch
    play_s: float
    learn_s: float
    begins: list[list[bool]]  # [T][B], of the first batch


def train(run: Run, name: str) -> Trained:
    a = run.args
    torch.manual_seed(a.seed)
    policy = POLICIES[name](find_cell(a.cell), a.hidden).to(run.device)
    optimizer = torch.optim.Adam(policy.parameters(), a.lr, eps=1e-5)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1, 0.1, a.steps)
    trained = run.distribute(policy)
    world = World(a.batch, 1000 * a.seed + 100 * run.rank, run.device)
    found = Trained([], [], 0.0, 0.0, [])
    play_s = learn_s = 0.0
    for step in (bar := run.progress(range(a.steps), desc=name, unit="batch")):
        random = run.generator(step)
        began = time.perf_counter()
        experience, finished = world.play(policy, a.chunk, random)
        played = time.perf_counter()
        gain = advantages(experience, a.discount, a.trace)
        for passed in range(a.passes):
            order = torch.randperm(a.batch, generator=random)
            total = 0.0
            for rows in order.chunk(a.parts):
                parts = losses_of(trained, experience, gain, rows.to(run.device), a.clip)
                loss = torch.stack([LOSSES[k] * part for k, part in parts.items()]).sum()
                train_step(loss, policy, optimizer, clip=0.5)
                total += loss.item() * len(rows) / a.batch
            if passed == 0:
                found.losses.append(total)
        schedule.step()
        play_s += played - began
        learn_s += time.perf_counter() - played
        found.returns.append(float(np.mean(finished)) if finished else float("nan"))
        if step == 0:
            found.begins.extend(experience.begins.tolist())
        bar.set_postfix_str(f"return {found.returns[-1]:.0f}", refresh=False)
    return found._replace(play_s=play_s, learn_s=learn_s)


# --- picture -------------------------------------------------------------------------------------


def filled(values: list[float]) -> list[float]:
    """The last number before in the place of NaN."""
    kept, last = [], 0.0
    for value in values:
        last = last if np.isnan(value) else value
        kept.append(last)
    return kept


def draw(run: Run, trained: dict[str, Trained], speed: dict[str, dict[str, float]]) -> None:
    """Learning curves, frames per second, and the episodes in a batch."""
    a = run.args
    colours = {"reset": COLOURS[0], "loop": COLOURS[1], "no memory": GREY}
    with picture(run.path("recurrent_ppo.png"), figsize=(12, 7)) as figure:
        grid = figure.add_gridspec(2, 2, width_ratios=(3, 2))
        curves, bars, batch = (
            figure.add_subplot(grid[place]) for place in ((slice(None), 0), (0, 1), (1, 1))
        )
        frames = a.chunk * a.batch * run.world
        for name, t in trained.items():
            x = [(i + 1) * frames / 1000 for i in range(len(t.returns))]
            curves.plot(
                x, smooth(filled(t.returns), 3), "--" if name == "loop" else "-",
                color=colours[name], label=name, lw=2,
            )  # fmt: skip
        curves.set(xlabel="frames (thousands)", ylabel="mean return", ylim=(0, BEST * 1.05))
        curves.legend(loc="upper left")
        curves.set_title("CartPole without velocities: memory balances the pole")

        for i, kind in enumerate(("learning", "all")):
            for j, name in enumerate(("reset", "loop")):
                value = speed[name][kind]
                place = i + 0.38 * (j - 0.5)
                bars.bar(place, value, 0.36, color=colours[name], label=name if i == 0 else None)
                bars.annotate(
                    f"{value:,.0f}", (place, value), (0, 2), textcoords="offset points",
                    ha="center", fontsize=9,
                )  # fmt: skip
        bars.set_xticks([0, 1], ["learning", "playing and learning"])
        bars.set(ylabel="frames per second")
        bars.margins(y=0.15)
        bars.grid(axis="x", visible=False)
        bars.legend()
        bars.set_title("The same policy, with reset= and by a loop")

        begins = np.array(trained["reset"].begins).T  # [B, T]
        shade = np.cumsum(begins, 1) % 2
        batch.imshow(shade, aspect="auto", cmap="Blues", vmin=-0.5, vmax=1.8)
        batch.set(xlabel="step", ylabel="environment")
        batch.grid(visible=False)
        batch.set_title("Episodes in the first batch, shade by shade")


# --- program -------------------------------------------------------------------------------------


def parser() -> argparse.ArgumentParser:
    p = arguments(__doc__, "recurrent_ppo", cell="lstm", hidden=64, batch=32, lr=3e-3, steps=40)
    p.add_argument("--chunk", type=positive, default=128, help="steps of a batch")
    p.add_argument("--passes", type=positive, default=4, help="over every batch")
    p.add_argument("--parts", type=positive, default=4, help="of a batch, an update for each")
    p.add_argument("--discount", type=float, default=0.99, help="of rewards to come")
    p.add_argument("--trace", type=float, default=0.95, help="lambda of the advantages")
    p.add_argument("--clip", type=float, default=0.2, help="how far a ratio may go from 1")
    return p


def main() -> None:
    args = parser().parse_args()
    run = start(args)
    fused_rnn.backend_info()  # compiles the kernels, if need be: nobody's time
    trained = {
        name: Trained(*run.once(name, lambda name=name: list(train(run, name))))
        for name in POLICIES
    }
    frames = args.steps * args.chunk * args.batch * run.world
    speed = {
        name: {"learning": frames / t.learn_s, "all": frames / (t.learn_s + t.play_s)}
        for name, t in trained.items()
    }
    late = max(1, args.steps // 5)
    figures: dict[str, Any] = {"frames": frames}
    for name, t in trained.items():
        figures[f"return ({name})"] = float(np.mean(filled(t.returns)[-late:]))
    for name in ("reset", "loop"):
        figures[f"frames per second ({name})"] = speed[name]["all"]
        figures[f"frames per second, learning alone ({name})"] = speed[name]["learning"]
    first, other = trained["reset"], trained["loop"]
    alike = [x == y for x, y in zip(filled(first.returns), filled(other.returns), strict=True)]
    figures["batches_until_curves_part"] = (alike + [False]).index(False)
    figures["first_losses_differ_by"] = abs(first.losses[0] - other.losses[0])
    for name, t in trained.items():
        figures[f"returns of all batches ({name})"] = t.returns
        figures[f"losses of all batches ({name})"] = t.losses
    if run.is_main:
        draw(run, trained, speed)
    run.write(figures)


if __name__ == "__main__":
    launch(main)
