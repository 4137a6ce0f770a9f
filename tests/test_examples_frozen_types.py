"""examples/frozen_types.py, from a shell."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

for package in ("matplotlib", "tqdm", "sklearn"):
    pytest.importorskip(package)

from programs import ROOT  # noqa: E402

pytestmark = pytest.mark.examples


def test_frozen_types(tmp_path: Path) -> None:
    """Fewer bits cost little, and cannot be free."""
    small = "--hidden 64 --steps 30 --digits-steps 3 --widths 16 --rounds 2 --characters 60000"
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / "frozen_types.py"), *small.split(), "--threads=1"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    figures = json.loads((tmp_path / "out" / "frozen_types.json").read_text())
    bits = figures["bits"]
    assert bits.keys() == {"not frozen", "float32", "bfloat16", "int8"}
    assert 0 < abs(bits["int8"] - bits["not frozen"]) < 0.02
    assert abs(bits["float32"] - bits["not frozen"]) < 1e-5
    assert all(0 <= share <= 1 for share in figures["answers"].values())
    assert len(figures["clock"]) == 15 and f"{bits['int8']:.5f}" in done.stdout
