"""The fixture of tests that watch direct calls."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from direct import Spy

from fused_rnn import ops


@pytest.fixture
def spy(monkeypatch: pytest.MonkeyPatch) -> Iterator[Spy]:
    spy = Spy()
    monkeypatch.setattr(ops.direct, "functions", spy)
    with torch.no_grad():
        yield spy
