"""examples/overview.py: its data, and that all five shapes learn."""

from __future__ import annotations

import pytest
import torch

for package in ("matplotlib", "tqdm", "sklearn"):
    pytest.importorskip(package)

import overview  # noqa: E402
from programs import Run, learns  # noqa: E402

pytestmark = [pytest.mark.examples, pytest.mark.usefixtures("one_thread")]
pytest_plugins = "program_fixtures"


@learns
@pytest.mark.drawn(2, of="long training")
def test_all_five_shapes_learn(run: Run) -> None:
    figures = run(overview, "--steps", 600)
    for name in overview.shapes():
        assert figures[name] > figures[f"{name} baseline"] + 0.5, name


def test_overview_data_asks_what_it_says() -> None:
    generator = torch.Generator().manual_seed(0)
    x, target = overview.parity(50, generator, True)
    assert torch.equal(x[:, :, 0].cumsum(0).long() % 2, target)
    x, target = overview.reversal(50, generator, False)
    assert x.shape == (10, 50, 11) and torch.equal(x[:5].argmax(-1).flip(0), target[5:])
    words = {
        held_out: {
            tuple(w) for w in overview.reversal(500, generator, held_out)[1][5:].t().tolist()
        }
        for held_out in (False, True)
    }
    assert words[True] and not words[True] & words[False]
    x, target = overview.Digits().spelled(20, generator, False)
    assert not x[1:].any()
    names = ["".join(overview.ALPHABET[i] for i in column if i >= 0) for column in target.t()]
    assert {name.rstrip(".") for name in names} <= set(overview.NAMES)
    assert all(name.endswith(".") for name in names)
