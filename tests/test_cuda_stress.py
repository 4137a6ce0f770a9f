"""On a card: what shows only under load, and errors over many steps. The scenes are in stress.py.

A hang is one of the ways to fail: benchmarks/gpu_check.py gives every test its time.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import Case
from stress import (
    GIB,
    MIB,
    POOL,
    Card,
    Layer,
    Precision,
    beside_a_hog,
    many_keys,
    many_streams,
    many_threads,
    memory_taken_away,
    parity,
    parity_cases,
    streams_that_end,
)

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]

CARD = Card()
LOW = torch.bfloat16
KEPT = 64  # graphs, at most
# Of kinds that are replayed: a product a step on two streams, and kernels that keep their weights.
GRAPH = Case("lstm", 32, 33, bidirectional=True, batch=5, time=30)
RESIDENT = Case("gru", 64, 256, batch=16, time=64)
VARIANTS = ("graph", "steps", "")
PARITY = parity_cases((512, 1024), steps=256, batch=16)


@pytest.fixture(autouse=True)
def room() -> Any:
    """What a test leaves in the allocator's reserve is of no use to the next."""
    yield
    torch.cuda.empty_cache()


def some(number: int, **kind: Any) -> list[Layer]:
    """Layers that differ in the number of steps."""
    return [
        Layer(CARD, Case("gru", 16, 32, batch=4, time=10 + i, **kind), LOW) for i in range(number)
    ]


@pytest.mark.parametrize("taken", ["workspaces", "graphs"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_memory_that_is_taken_away(
    taken: str, variant: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FUSED_RNN_VARIANT", variant)
    layers = [
        Layer(CARD, case, dtype) for case in (GRAPH, RESIDENT) for dtype in (LOW, torch.double)
    ]

    def take() -> None:
        if taken == "workspaces":
            CARD.clear_workspaces()
        else:  # on every stream of torch's pool
            for _ in range(POOL):
                CARD.destroy_a_graph()

    memory_taken_away(CARD, layers, take, keep=4 * GIB)


@pytest.mark.parametrize(("case", "precision"), PARITY, ids=lambda v: getattr(v, "name", str(v)))
def test_errors_over_many_steps(
    case: Case, precision: Precision, monkeypatch: pytest.MonkeyPatch
) -> None:
    parity(CARD, case, precision, monkeypatch)


@pytest.mark.parametrize("case", [GRAPH, RESIDENT], ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
def test_forty_streams(variant: str, case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FUSED_RNN_VARIANT", variant)
    many_streams(CARD, case, LOW, streams=40, threads=4, calls=5)


def test_full_plans_beside_a_hog() -> None:
    """128 blocks each on a card of 132 multiprocessors, of which none may wait for another's."""
    large = [Case(cell, 1024, 1024, batch=64, time=256) for cell in ("lstm", "gru", "lstm")]
    beside_a_hog(CARD, large, LOW, calls=10, size=8192)


@pytest.mark.parametrize("layout", ["padded", "packed"])
def test_more_calls_than_graphs_are_kept(layout: str) -> None:
    many_keys(some(KEPT + 1, layout=layout))


def test_streams_that_end() -> None:
    streams_that_end(CARD, Layer(CARD, GRAPH, LOW), some(KEPT + 1), streams=3)


def test_a_thousand_threads() -> None:
    many_threads(CARD, Layer(CARD, GRAPH, LOW), threads=1000, growth=64 * MIB)
