"""Two or more ways to do the same: equal results, and how long each takes."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def compare(ways: dict[str, Callable[[], Any]], *, seconds: float = 1.0, tol: float = 1e-4) -> None:
    """Print the best time of each, by turns for ``seconds``. Tensors they return must be equal."""
    first, *others = (way() for way in ways.values())
    for other in others:
        if isinstance(first, Tensor):
            torch.testing.assert_close(other, first, rtol=tol, atol=tol)
    best = dict.fromkeys(ways, float("inf"))
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        for name, way in ways.items():
            begin = time.perf_counter()
            way()
            best[name] = min(best[name], time.perf_counter() - begin)
    slowest = max(best.values())
    for name, each in best.items():
        print(f"{name:24} {1e3 * each:8.2f} ms  {slowest / each:5.1f} times as fast as the slowest")
