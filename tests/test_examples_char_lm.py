"""examples/char_lm.py, from a shell: it learns, the same way twice, and shows what it promises."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

for package in ("matplotlib", "tqdm"):
    pytest.importorskip(package)

from programs import CELLS, PAGE, ROOT, look_at  # noqa: E402

pytestmark = pytest.mark.examples

SMALL = "--hidden 64 --batch 16 --chunk 32 --lr 1e-2 --sample 80 --threads 1".split()


def run_char_lm(tmp_path: Path, *arguments: str) -> tuple[dict[str, Any], str]:
    """The JSON summary and the printed text of one short run, whose picture is checked here."""
    command = [sys.executable, str(ROOT / "examples" / "char_lm.py"), *SMALL, *arguments]
    done = subprocess.run(
        command,
        cwd=tmp_path,  # nothing may depend on where it is run
        env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "utf-8"},
        capture_output=True,
        encoding="utf-8",
        timeout=900,  # the first run of all may compile the kernels
    )
    assert done.returncode == 0, done.stderr[-2000:]
    summary, picture = sorted(path for path in tmp_path.rglob("*") if path.is_file())
    assert picture.suffix == ".png" and summary == picture.with_suffix(".json")
    look_at(picture, *PAGE)
    figures = json.loads(summary.read_text(encoding="utf-8"))
    assert figures["arguments"]["out"] == picture.relative_to(tmp_path).as_posix()
    return figures, done.stdout


def check(figures: dict[str, Any], steps: int) -> None:
    theirs, ours = (figures["contenders"][name] for name in ("torch.nn", "fused_rnn"))
    assert len(theirs["train_bits"]) == len(ours["train_bits"]) == steps

    # Rounding alone sets the two apart: float32 has 1e-7, training multiplies it.
    gaps = [abs(a - b) for a, b in zip(theirs["train_bits"], ours["train_bits"], strict=True)]
    assert max(gaps) <= 1e-3
    assert max(gaps[:20]) <= 1e-5
    assert abs(theirs["held_out_bits"] - ours["held_out_bits"]) <= 1e-3
    assert figures["largest_difference_bits"] == max(gaps)
    assert gaps[figures["largest_difference_step"] - 1] == max(gaps)

    for contender in (theirs, ours):
        assert contender["characters_per_second"] > 0
    assert figures["torch"] == torch.__version__
    assert figures["threads"] == 1
    assert len(figures["sample"]) == 80


def unigram_entropy(text: str) -> float:
    """Bits per character of the best model that knows nothing of context."""
    return -sum(n / len(text) * math.log2(n / len(text)) for n in Counter(text).values())


TEXT = "Größe, δοκιμή, 試験\n" * 10
TEXT += Path(json.__file__).with_name("decoder.py").read_text(encoding="utf-8") * 4


@pytest.mark.drawn(1)
@pytest.mark.parametrize("cell", CELLS)
def test_char_lm_learns_a_text_the_same_way_twice(tmp_path: Path, cell: str) -> None:
    text, folder = tmp_path / "text.txt", tmp_path / "run"
    text.write_text(TEXT, encoding="utf-8")
    folder.mkdir()
    learn = ["--cell", cell, "--text", str(text), "--steps", "150", "--layers", "2"]
    figures, printed = run_char_lm(folder, *learn)
    check(figures, steps=150)
    assert figures["arguments"]["out"] == f"out/char_lm_{cell}.png", "one picture for each cell"
    baseline = unigram_entropy(TEXT)
    assert figures["unigram_bits"] == pytest.approx(baseline, abs=0.1)
    for contender in figures["contenders"].values():
        assert contender["final_bits"] < baseline - 1
        assert contender["held_out_bits"] < baseline - 0.5
    assert figures["sample"] in printed and "\n1 thread;" in printed


def test_char_lm_reads_the_standard_library_by_default(tmp_path: Path) -> None:
    new = ["--out", "deeper/curves.png"]  # into a folder that is not there yet
    figures, printed = run_char_lm(tmp_path, "--steps", "10", "--control", *new)
    check(figures, steps=10)
    assert figures["characters"] > 1_000_000
    assert figures["control_largest_difference_bits"] <= 1e-5
    assert "largest difference" in printed and "fused_rnn / torch.nn" in printed


def test_char_lm_refuses_a_text_that_is_too_short(tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("too short", encoding="utf-8")
    with pytest.raises(AssertionError, match="too short for"):
        run_char_lm(tmp_path, "--text", str(tmp_path / "short.txt"))
