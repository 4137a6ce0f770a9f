"""examples/recurrent_ppo.py: what it computes, and that its policies learn."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from helpers import assert_close

for package in ("matplotlib", "tqdm", "numpy"):
    pytest.importorskip(package)

from common import find_cell  # noqa: E402
from programs import CELLS, Run, learns  # noqa: E402

pytestmark = [pytest.mark.examples, pytest.mark.usefixtures("one_thread")]
pytest_plugins = "program_fixtures"


@pytest.fixture
def ppo() -> ModuleType:
    pytest.importorskip("gymnasium")
    import recurrent_ppo

    return recurrent_ppo


def experience_of(ppo: ModuleType, cell: str, steps: int, rows: int) -> tuple[Any, Any]:
    """A policy, and what it meets in a world that many episodes have ended in."""
    policy = ppo.Policy(find_cell(cell), 8)
    world = ppo.World(rows, 5, torch.device("cpu"))
    random = torch.Generator().manual_seed(3)
    world.play(policy, 20, random)
    experience, _ = world.play(policy, steps, random)
    assert experience.begins[1:].any()
    return policy, experience


@pytest.mark.parametrize("cell", CELLS)
def test_policies_by_reset_and_by_loop_are_the_same(ppo: ModuleType, cell: str) -> None:
    """And both are what was thought step by step while playing."""
    policy, met = experience_of(ppo, cell, 50, 4)
    loop = ppo.LoopPolicy(find_cell(cell), 8)
    loop.load_state_dict(policy.state_dict())
    gain = ppo.advantages(met, 0.99, 0.95)
    found = []
    for each in (policy, loop):
        _, value, _ = each(met.seen, met.state, met.begins)
        assert_close(value.detach(), met.value, 1e-5)
        losses = ppo.losses_of(each, met, gain, torch.tensor([2, 0, 3]), 0.2)
        sum(losses.values()).backward()
        found.append([p.grad for p in each.parameters()])
    for ours, theirs in zip(*found, strict=True):
        assert_close(ours, theirs, 1e-5)


def test_advantages_end_with_their_episode(ppo: ModuleType) -> None:
    """As the sum over the rest of an episode, of one environment after the other."""
    _, met = experience_of(ppo, "gru", 40, 3)
    found = ppo.advantages(met, 0.9, 0.8)
    goes_on = ~torch.cat([met.begins[1:], met.next_begins[None]])
    following = torch.cat([met.value[1:], met.next_value[None]])
    for b in range(3):
        for t in range(40):
            expected, weight = 0.0, 1.0
            for k in range(t, 40):
                ahead = 0.9 * following[k, b].item() if goes_on[k, b] else 0.0
                reward = 0.1 * met.reward[k, b].item()
                expected += weight * (reward + ahead - met.value[k, b].item())
                weight *= 0.9 * 0.8
                if not goes_on[k, b]:
                    break
            assert found[t, b].item() == pytest.approx(expected, abs=1e-5)


def test_a_world_begins_where_it_says(ppo: ModuleType) -> None:
    """An episode is seen from its first place on, near the middle; returns are its steps."""
    policy = ppo.Policy(find_cell("gru"), 8)
    world = ppo.World(4, 1, torch.device("cpu"))
    met, finished = world.play(policy, 100, torch.Generator().manual_seed(0))
    assert met.begins[0].all() and len(finished) == int(
        met.begins[1:].sum() + met.next_begins.sum()
    )
    at_first = (met.seen[met.begins] * ppo.SCALE).abs()
    assert at_first.max() <= 0.05, "where CartPole begins"
    lengths = []
    for b in range(4):
        begins = torch.cat([met.begins[:, b], met.next_begins[b : b + 1]]).nonzero().flatten()
        lengths += begins.diff().tolist()
    assert sorted(lengths) == sorted(finished)


def test_recurrent_ppo_learns_alike_with_resets_and_by_a_loop(ppo: ModuleType, run: Run) -> None:
    figures = run(
        ppo, "--steps", 3, "--batch", 8, "--chunk", 32, "--hidden", 16, "--passes", 2, "--parts", 2,
    )  # fmt: skip
    assert figures["frames"] == 3 * 8 * 32
    assert figures["batches_until_curves_part"] >= 2
    ours, theirs = (figures[f"losses of all batches ({name})"] for name in ("reset", "loop"))
    assert ours[:2] == pytest.approx(theirs[:2], abs=1e-4)
    assert ours != figures["losses of all batches (no memory)"]


@learns
@pytest.mark.drawn(2, of="long training")
def test_a_pole_needs_memory(ppo: ModuleType, tmp_path: Path) -> None:
    command = ["--steps", "14", "--threads", "1", "--out", str(tmp_path)]
    run = ppo.start(ppo.parser().parse_args(command))
    with_memory, without = (ppo.train(run, name) for name in ("reset", "no memory"))
    assert with_memory.returns[-1] > 2 * without.returns[-1]
    assert with_memory.returns[-1] > 4 * with_memory.returns[0]
