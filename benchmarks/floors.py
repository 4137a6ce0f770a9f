"""The least time a case can take on a machine, from its FLOPs, its bytes and measured limits.

Counted are the products with W_ih, W_hh and W_hr (gate math is free) at the best rate that anyone
reached, and, where it takes longer, reading the recurrent weights once per step from the level of
memory that holds each core's share of them. The rest can overlap with these, so it is left out: a
floor is a bound, not a forecast. Keeping a part of the weights in a nearer level can beat it a bit.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass
from typing import Any

from .cases import BYTES, GATES, Case


@dataclass(frozen=True)
class Work:
    """FLOPs of a forward: all, and those of one row's recurrent product in one layer-direction."""

    flops: float
    projection: list[float]  # FLOPs of one row, per layer
    recurrent: float  # FLOPs of one row


def work(case: Case) -> Work:
    gates, rows = GATES[case.cell], case.rows
    recurrent = 2.0 * (gates * case.H * case.width / case.blocks + case.H * case.proj)
    widths = [case.I] + [case.directions * case.width] * (case.layers - 1)
    projection = [2.0 * gates * case.H * width for width in widths]
    flops = rows * case.directions * (case.layers * recurrent + sum(projection))
    return Work(flops, projection, recurrent)


def flops(case: Case) -> float:
    """Of the whole pass: a backward makes each product's two derivatives."""
    todo = work(case)
    without = 0.0 if case.wants_dx else case.rows * case.directions * sum(todo.projection)
    return 3 * todo.flops - without if case.trains else todo.flops


def gemm_rate(limits: dict[str, Any], dtype: str) -> float:
    """FLOP/s: the best of all ways of multiplying that were measured for the dtype."""
    rates = limits.get("gemm", {}).get(dtype) or {}
    return max((rate for rate in rates.values() if rate), default=0.0) * 1e9


def bandwidth(limits: dict[str, Any], share: float) -> tuple[float, str]:
    """Bytes/s of all threads together, and the level, for a share of so many bytes per thread."""
    levels = limits.get("bandwidth") or []  # from the nearest to the farthest
    for level in levels:
        if level["capacity"] is None or share <= level["capacity"]:
            return level["gb_per_s"] * 1e9, level["name"]
    return 0.0, "memory"


@dataclass(frozen=True)
class Floor:
    seconds: float
    bound: str  # "compute", or the level of memory that takes most of the time


def floor(case: Case, limits: dict[str, Any]) -> Floor | None:
    """None when the limits were not measured, and for a cell of the zoo."""
    rate = gemm_rate(limits, case.dtype)
    if not rate or case.zoo:
        return None
    todo = work(case)
    spent: dict[str, float] = defaultdict(float)

    def spend(flops: float, weights: float, times: int = 1) -> None:
        """The longer of computing and of reading the weights once, so many times."""
        speed, level = bandwidth(limits, weights / max(1, limits.get("threads", 1)))
        computing, reading = flops / rate, weights / speed if speed else 0.0
        bound = "compute" if computing >= reading else level
        spent[bound] += times * max(computing, reading)

    size = BYTES[case.dtype]
    training = case.trains
    lengths = case.lengths()
    running = Counter(sum(length > t for length in lengths) for t in range(case.T))
    for projection in todo.projection * case.directions:
        spend(case.rows * projection, projection / 2 * size)
        for batch, steps in running.items():  # the chain of a backward goes the same way back
            recurrent = todo.recurrent
            spend(batch * recurrent, recurrent / 2 * size, steps * (2 if training else 1))
        if training:  # dX, and dW of both weights
            spend(case.rows * ((1 + case.wants_dx) * projection + todo.recurrent), 0)
    return Floor(sum(spent.values()), max(spent, key=lambda level: spent[level]))
