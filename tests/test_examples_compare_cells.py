"""examples/compare_cells.py: equal sizes, chosen rates, baselines."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest
from torch import nn

for package in ("matplotlib", "tqdm", "sklearn"):
    pytest.importorskip(package)

import common  # noqa: E402
import compare_cells  # noqa: E402
from programs import CELLS, Run, learns  # noqa: E402

pytestmark = [pytest.mark.examples, pytest.mark.usefixtures("one_thread")]
pytest_plugins = "program_fixtures"


@pytest.mark.parametrize("cell", CELLS)
def test_equal_parameters_are_equal(cell: str) -> None:
    def build(width: int) -> nn.Module:
        return compare_cells.PixelModel(cell, width)

    width = compare_cells.width_for(build, 20_000)
    size = common.count_parameters(build(width))
    assert 0.95 * 20_000 < size <= 20_000 < common.count_parameters(build(width + 1))
    with pytest.raises(ValueError, match="5 parameters are too few"):
        compare_cells.width_for(build, 5)


@pytest.mark.parametrize("better, chosen", [("lower", 0.1), ("higher", 0.3)])
def test_the_rate_is_chosen_by_the_end_of_training(
    tmp_path: Path, better: str, chosen: float
) -> None:
    class Task:
        title = "a task whose curve ends at its rate"

        def build(self, cell: str, width: int) -> nn.Module:
            return compare_cells.PixelModel(cell, width)

        def train(self, model: nn.Module, steps: int, seed: int, rate: float) -> list[float]:
            return [0.2] * (steps - 1) + [rate]

        def measure(self, model: nn.Module) -> float:
            return 0.5

    run = common.start(
        compare_cells.parse(["--out", str(tmp_path / "out"), "--rates", "0.3", "0.1", "0.2"])
    )
    task = Task()
    task.better = better
    found = compare_cells.compare(run, task, ["gru"], 1000, steps=10, seeds=2)["gru"]
    assert found["rate"] == chosen and found["results"] == [0.5, 0.5]


@learns
@pytest.mark.drawn(2, of="long training")
def test_every_cell_beats_the_baselines_at_equal_size(run: Run, tmp_path: Path) -> None:
    file = tmp_path / "text.txt"
    file.write_text(Path(argparse.__file__).read_text(encoding="utf-8"), encoding="utf-8")
    short = ("--steps", 120, "--seeds", 2, "--parameters", 20000, "--batch", 32, "--rates", 5e-3)
    figures = run(compare_cells, "--data", file, *short)
    for cell in CELLS:
        assert figures[f"characters_{cell}"] < figures["characters_baseline"] - 0.5
        assert len(figures["characters"][cell]["results"]) == 2
    for cell in ("gru", "lstm"):
        assert figures[f"pixels_{cell}"] > figures["pixels_baseline"] + 0.1
