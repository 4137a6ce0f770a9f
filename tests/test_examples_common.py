"""What the programs of examples/ share: arguments, random numbers, checkpoints, figures."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from torch import nn

for package in ("matplotlib", "tqdm", "sklearn"):
    pytest.importorskip(package)

import common  # noqa: E402
import compare_cells  # noqa: E402
import gradient_flow  # noqa: E402
import language_model  # noqa: E402
import overview  # noqa: E402
from programs import run_of  # noqa: E402

pytestmark = [pytest.mark.examples, pytest.mark.usefixtures("one_thread")]
pytest_plugins = "program_fixtures"


def test_cells_are_found_by_name() -> None:
    assert {"rnn", "gru", "lstm"} <= common.CELLS.keys()
    assert common.find_cell("Lstm")(2, 3).mode == "LSTM"
    with pytest.raises(
        ValueError, match="no cell 'foo'; there are blockgru, gru, lstm, peepholelstm, rnn"
    ):
        common.find_cell("foo")


def test_random_numbers_depend_on_seed_and_step(tmp_path: Path) -> None:
    run, other = run_of(tmp_path), run_of(tmp_path, "--seed", "1")
    draw = [torch.rand(3, generator=r.generator(s)) for r in (run, other) for s in (0, 1)]
    assert len({tuple(d.tolist()) for d in draw}) == 4
    assert torch.equal(draw[0], torch.rand(3, generator=run.generator(0)))


def test_a_checkpoint_of_other_arguments_is_refused(tmp_path: Path) -> None:
    layer = nn.Linear(2, 2)
    run_of(tmp_path).checkpoint(layer=layer).save(7, {"seen": [1.0]})
    before = layer.weight.clone()
    nn.init.zeros_(layer.weight)
    same = run_of(tmp_path, "--resume", "--steps", "99").checkpoint(layer=layer)
    assert same.load() == 7 and same.extra == {"seen": [1.0]}
    assert torch.equal(layer.weight, before)
    assert run_of(tmp_path).checkpoint(layer=layer).load() == 0  # not asked to resume
    with pytest.raises(SystemExit, match="--hidden 128 .now 5."):
        run_of(tmp_path, "--resume", "--hidden", "5").checkpoint(layer=layer).load()


def test_what_is_finished_is_not_done_again(tmp_path: Path) -> None:
    calls = []
    run_of(tmp_path).once("a", lambda: calls.append(1) or {"loss": math.nan})
    kept = run_of(tmp_path, "--resume").once("a", lambda: calls.append(1))
    assert math.isnan(kept["loss"]) and calls == [1]


def test_nan_is_null_in_json(tmp_path: Path) -> None:
    run_of(tmp_path).write({"a": math.nan, "b": [math.inf, 1.5]}, "figures")
    figures = json.loads((tmp_path / "out" / "figures.json").read_text())
    assert figures["a"] is None and figures["b"] == [None, 1.5]


@pytest.mark.parametrize(
    "program", ["overview", "language_model", "gradient_flow", "compare_cells"]
)
def test_help_names_the_cells_and_defaults(program: str, capsys: pytest.CaptureFixture) -> None:
    module = {m.__name__: m for m in (overview, language_model, gradient_flow, compare_cells)}
    with pytest.raises(SystemExit) as end:
        module[program].parse(["--help"])
    assert end.value.code == 0
    shown = capsys.readouterr().out
    assert "of all random numbers (default: 0)" in " ".join(shown.split())
    assert "--resume" in shown
