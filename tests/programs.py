"""What tests of the programs in examples/ share."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import common
import pytest
from helpers import native
from matplotlib import image

ROOT = Path(__file__).resolve().parents[1]
CELLS = ["rnn", "gru", "lstm"]
learns = pytest.mark.skipif(not native(), reason="training is slow on the reference path")


def run_of(tmp_path: Path, *argv: str) -> common.Run:
    parser = common.arguments("A test.", "test", steps=10)
    return common.start(parser.parse_args(["--out", str(tmp_path / "out"), *argv]))


def results(out: Path) -> dict[str, Any]:
    """The figures of a run, whose picture is looked at here."""
    (picture,) = out.glob("*.png")
    looked_at(picture, width=900, height=600)
    return json.loads((out / f"{picture.stem}.json").read_text(encoding="utf-8"))


def looked_at(picture: Path, width: int = 400, height: int = 400) -> None:
    """Nothing is drawn on a picture that is small or blank."""
    pixels = image.imread(picture)  # [height, width, RGBA]
    assert pixels.shape[0] >= height and pixels.shape[1] >= width
    assert pixels.std() > 0.05, f"{picture.name} is blank"
