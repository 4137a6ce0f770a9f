"""examples/cell_search.py: its cells are cells, its record survives, its search goes on."""

from __future__ import annotations

import argparse
import ast
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers import assert_close
from torch import nn

for package in ("matplotlib", "tqdm", "sklearn", "optuna"):
    pytest.importorskip(package)

import cell_search  # noqa: E402
from cell_search import bare, declared, draw_cell, flops, is_cell, layer_of, mutate  # noqa: E402
from programs import learns, results  # noqa: E402

pytestmark = [pytest.mark.examples, pytest.mark.usefixtures("one_thread")]
pytest_plugins = "program_fixtures"

KNOWN = cell_search.known_cells()


def test_known_cells_are_cells() -> None:
    assert {"RNN", "LSTM", "GRU", "PeepholeLSTM", "MUT1", "SLSTM", "SRU"} <= KNOWN.keys()
    assert all(map(is_cell, KNOWN.values()))
    assert KNOWN["RNN"] == (
        "@fused_rnn.cell(gates=('a',), states=('h',))\n"
        "def RNN(x, r, s, p):\n    return dict(h=torch.tanh(x.a + r.a))\n"
    )
    with pytest.raises(SystemExit):  # it is given more than x
        cell_search.parse(["--known", "GRUD"])


def test_gru_is_that_of_torch() -> None:
    cell = nn.GRUCell(3, 5, dtype=torch.float64)
    x, h = torch.randn(2, 3, dtype=torch.float64), torch.randn(2, 5, dtype=torch.float64)
    of_x = torch.nn.functional.linear(x, cell.weight_ih, cell.bias_ih).chunk(3, -1)
    of_h = torch.nn.functional.linear(h, cell.weight_hh, cell.bias_hh).chunk(3, -1)
    space: dict[str, Any] = {"torch": torch}
    exec(cell_search.GRU, space)
    parts = [SimpleNamespace(**dict(zip("rzn", of, strict=True))) for of in (of_x, of_h)]
    assert_close(space["GRU"](*parts, SimpleNamespace(h=h), None)["h"], cell(x, h), 1e-12)


@pytest.mark.parametrize("name", ["RNN", "LSTM", "MUT1", "SLSTM", "MultiplicativeLSTM"])
def test_a_mutated_cell_is_a_cell(name: str) -> None:
    text, rng = KNOWN[name], random.Random(name)
    for _ in range(10):
        child = mutate(text, rng)
        assert child != text
        layer = layer_of(child)(3, 4)  # compiled or not, it can be made
        states = [keyword.arg for keyword in cell_search.returned(bare(child))]
        assert states == [keyword.arg for keyword in cell_search.returned(bare(KNOWN[name]))]
        assert layer.weight_ih_l0.shape[1] == 3, "it sees its input"
        assert declared(bare(child)) == child, "a text that is read again is the same"
        text = child


def test_drawn_cells_differ_and_depend_on_the_seed_alone() -> None:
    drawn = [draw_cell(random.Random(seed)) for seed in (0, 1, 2, 0)]
    assert len(set(drawn)) == 3 and drawn[0] == drawn[3]
    assert all(map(is_cell, drawn))


def test_what_is_read_is_declared_and_the_rest_left_out() -> None:
    text = "def F(x, r, s, p):\n q = x.q\n b = s.c * p.w\n return dict(h=r(b).a + x.e, c=s.h)"
    ast.parse(text)
    assert declared(bare(text)).splitlines() == [
        "@fused_rnn.cell(gates=('a', 'e'), states=('h', 'c'), params=('w',))",
        "def F(x, r, s, p):",
        "    b = s.c * p.w",
        "    return dict(h=r(b).a + x.e, c=s.h)",
    ]


def test_operations_are_those_of_the_products_and_more() -> None:
    inputs, width, symbols = 7, 11, 5
    for name, of_input, of_state in (("RNN", 1, 1), ("GRU", 3, 3), ("MinGRU", 2, 0)):
        products = 2 * width * (of_input * inputs + of_state * width + symbols)
        others = flops(layer_of(KNOWN[name]), inputs, width, symbols) - products
        assert others > 0 and others % width == 0


# --- the search ----------------------------------------------------------------------------------


@pytest.fixture
def search(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Runs the program, ``trained`` by a function of text and parameters; returns its figures."""
    data = tmp_path / "text.txt"
    data.write_text(Path(argparse.__file__).read_text(encoding="utf-8"), encoding="utf-8")

    def search(out: str, *arguments: str, trained: Any = None) -> dict[str, Any]:
        if trained is not None:
            monkeypatch.setattr(cell_search.Tasks, "measure", lambda _, *asked: trained(*asked))
        shared = ["--data", str(data), "--known", "RNN", "LSTM", "--threads", "1"]
        cell_search.main([*shared, "--out", str(tmp_path / out), *arguments])
        return results(tmp_path / out, "cell_search")

    return search


def pretended(text: str, parameters: int) -> dict[str, float]:
    """Results that depend on the cell alone."""
    draw = random.Random(f"{text} {parameters}")
    return {"bits": draw.uniform(2, 5), "adding": draw.random(), "flops": 1e5, "width": 9}


def test_a_search_that_was_interrupted_ends_as_it_would_have(search: Any) -> None:
    whole = search("whole", "--cells", "6", trained=pretended)
    assert whole["trained"] == 6 + 2 * 2 and whole["failed"] == 0  # two sizes of each known cell
    assert len({cell["cell"] for cell in whole["cells"]}) == 6 + 2
    assert whole["on_the_front"] == sum(cell["front"] for cell in whole["cells"]) > 0
    seen = []

    def interrupted(text: str, parameters: int) -> dict[str, float]:
        seen.append(text)
        if len(seen) in (2, 7):
            raise KeyboardInterrupt
        return pretended(text, parameters)

    for resume in ([], ["--resume"]):
        with pytest.raises(KeyboardInterrupt):
            search("parts", "--cells", "6", *resume, trained=interrupted)
    parts = search("parts", "--cells", "6", "--resume", trained=interrupted)
    assert parts["cells"] == whole["cells"]
    count = len(seen)
    assert search("parts", "--cells", "6", "--resume")["cells"] == whole["cells"]
    assert len(seen) == count, "nothing is trained twice"
    more = search("parts", "--cells", "8", "--resume")
    assert len(seen) == count + 2 and more["trained"] == 12


def test_what_cannot_be_trained_is_recorded(search: Any) -> None:
    def failing(text: str, parameters: int) -> dict[str, float]:
        if "def RNN" in text:
            raise ArithmeticError("bits is nan")
        return pretended(text, parameters)

    figures = search("failing", "--cells", "3", "--parameters", "9000", trained=failing)
    assert figures["trained"] == 4 and figures["failed"] == 1
    (failed,) = (cell for cell in figures["cells"] if "error" in cell)
    assert failed["name"] == "RNN" and failed["error"] == "ArithmeticError: bits is nan"
    assert not failed["front"] and "bits" not in failed


def test_searches_share_a_storage(search: Any, tmp_path: Path) -> None:
    storage = ["--storage", f"sqlite:///{tmp_path / 'shared.db'}"]
    assert search("one", *storage, "--cells", "1", trained=pretended)["trained"] == 5
    other = search("other", *storage, "--cells", "3")
    assert other["trained"] == 7
    with pytest.raises(SystemExit, match=r"other arguments: --steps 400 \(now 7\)"):
        search("third", *storage, "--steps", "7")


@learns
@pytest.mark.drawn(2, of="long training")
def test_cells_are_compiled_and_learn(search: Any) -> None:
    short = ["--steps", "80", "--adding-length", "6", "--adding-steps", "150", "--batch", "32"]
    figures = search("real", "--cells", "1", "--parameters", "9000", *short)
    assert figures["trained"] + figures["failed"] == 3
    for name in ("RNN", "LSTM"):
        (cell,) = (cell for cell in figures["cells"] if cell["name"] == name)
        assert cell["bits"] < figures["bits_baseline"] - 0.3
        assert cell["adding"] < figures["adding_baseline"]
        assert cell["flops"] == pytest.approx(2 * 9000, rel=0.3), "two for each weight, and more"
