"""What tests of the programs in examples/ share."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import common
import pytest
from helpers import native
from matplotlib import image

ROOT = Path(__file__).resolve().parents[1]
CELLS = ["rnn", "gru", "lstm"]
PAGE = 600, 900  # height and width, at least
Run = Callable[..., dict[str, Any]]  # of a module and its arguments, to its figures
learns = pytest.mark.skipif(not native(), reason="training is slow on the reference path")


def run_of(tmp_path: Path, *argv: str) -> common.Run:
    parser = common.arguments("A test.", "test", steps=10)
    return common.start(parser.parse_args(["--out", str(tmp_path / "out"), *argv]))


# Programs that draw one picture, a page of plots.
ONE_PAGE = {"cell_search", "compare_cells", "gradient_flow", "language_model", "overview"}


def results(out: Path, program: str) -> dict[str, Any]:
    """The figures of a program's run, whose pictures are looked at here."""
    pictures, page = list(out.glob("*.png")), out / f"{program}.png"
    assert pictures == [page] if program in ONE_PAGE else page in pictures
    for path in pictures:
        look_at(path, *PAGE if program in ONE_PAGE else ())
    return json.loads((out / f"{program}.json").read_text(encoding="utf-8"))


def look_at(picture: Path, height: int = 400, width: int = 400) -> None:
    """It has so many pixels at least, and is not blank."""
    pixels = image.imread(picture)  # [height, width, RGBA]
    assert pixels.shape[0] >= height and pixels.shape[1] >= width, f"{picture.name} is small"
    assert pixels.std() > 0.05, f"{picture.name} is blank"
