"""Pages whose code compiles or starts programs, carried out as they stand, from top to bottom."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytestmark = pytest.mark.compiling

ROOT = Path(__file__).resolve().parent.parent
GUIDES = ("export", "many-gpus", "realtime", "serving")
BLOCK = re.compile(r'^```(\w+)(?: title="([^"\n]+)")?\n(.*?)^```$', re.M | re.S)


@pytest.mark.drawn(1)  # they compile and start processes
@pytest.mark.parametrize("page", GUIDES)
def test_guide(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks with a title are files. All else is Python of one session, or a shell's lines."""
    if page == "export":
        pytest.importorskip("onnxruntime")
        pytest.importorskip("onnxscript")
    monkeypatch.chdir(tmp_path)
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    env = os.environ | {"PATH": path, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    names: dict[str, Any] = {"__name__": page}
    blocks = BLOCK.findall((ROOT / "docs" / f"{page}.md").read_text())
    assert blocks
    torch._dynamo.reset()
    for number, (kind, title, text) in enumerate(blocks):
        file = tmp_path / (
            title or f"block{number}"
        )  # torch.jit reads the source of what it compiles
        file.write_text(text)
        if title:
            continue
        if kind == "python":
            exec(compile(text, str(file), "exec"), names)
        else:
            assert kind == "sh"
            done = subprocess.run(
                ["bash", "-euc", text], env=env, capture_output=True, text=True, timeout=300
            )
            assert done.returncode == 0, text + done.stdout + done.stderr
