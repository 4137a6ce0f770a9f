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
Run = Callable[..., dict[str, Any]]  # of a module and its arguments, to its figures
learns = pytest.mark.skipif(not native(), reason="training is slow on the reference path")


def run_of(tmp_path: Path, *argv: str) -> common.Run:
    parser = common.arguments("A test.", "test", steps=10)
    return common.start(parser.parse_args(["--out", str(tmp_path / "out"), *argv]))


def results(out: Path, program: str) -> dict[str, Any]:
    """The figures of a program's run, whose pictures are looked at here."""
    pictures = list(out.glob("*.png"))
    assert out / f"{program}.png" in pictures
    for path in pictures:
        look_at(path)
    return json.loads((out / f"{program}.json").read_text(encoding="utf-8"))


def look_at(picture: Path) -> None:
    pixels = image.imread(picture)  # [height, width, RGBA]
    assert min(pixels.shape[:2]) >= 400, f"{picture.name} is small: {pixels.shape}"
    assert pixels.std() > 0.05, f"{picture.name} is blank"
