"""The programs for other people's packages run, where the package is installed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.tools

ROOT = Path(__file__).resolve().parent.parent
RECIPES = sorted((ROOT / "examples" / "packages").glob("with_*.py"))


def test_each_is_on_the_page() -> None:
    page = (ROOT / "docs" / "other-packages.md").read_text()
    assert RECIPES and all(f"(../examples/packages/{path.name})" in page for path in RECIPES)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipe(path: Path, tmp_path: Path) -> None:
    """They compare results themselves, and say how long each way took."""
    pytest.importorskip(path.stem.removeprefix("with_"))
    done = subprocess.run(
        [sys.executable, str(path)],
        cwd=tmp_path,  # some leave files
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "times as fast" in done.stdout
