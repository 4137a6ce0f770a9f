"""The file of results, and the statistics that tables, plots and comparisons share.

A file holds one machine, the runs made on it (date, commit, versions, limits), and rows. A row is
one case; for each contender it has the median of every round, or why there is none. Ratios are
formed inside one round, where contenders met the same state of the machine, and then summed up.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .cases import FIELDS, Case

FORMAT = 1
OURS = "ours"

Row = dict[str, Any]


class Results:
    """Rows by key, in order; ``save`` writes them in a way that a kill cannot spoil."""

    def __init__(
        self, path: Path, machine: dict[str, Any], rows: Iterable[Row] = (), runs: Any = ()
    ):
        self.path, self.machine, self.runs = path, machine, list(runs)
        self.rows = {row["key"]: row for row in rows}

    @classmethod
    def read(cls, path: Path) -> Results:
        data = json.loads(path.read_text())
        if data.get("format") != FORMAT:
            raise ValueError(f"{path} is not a file of results of this version")
        return cls(path, data["machine"], data["rows"], data["runs"])

    @classmethod
    def open(cls, path: Path, machine: dict[str, Any]) -> Results:
        """To go on with a file, or to begin one. Raises ValueError for another machine's."""
        if not path.exists():
            return cls(path, machine)
        found = cls.read(path)
        if found.machine != machine:
            differing = [k for k in machine if found.machine.get(k) != machine[k]]
            raise ValueError(
                f"{path} holds results of another machine ({', '.join(differing)} differ): "
                "choose another file, or --fresh"
            )
        return found

    def save(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        data = {"format": FORMAT, "machine": self.machine, "runs": self.runs}
        # One row per line, so that version control shows which rows changed.
        rows = ",\n  ".join(json.dumps(_rounded(row)) for row in self.rows.values())
        text = json.dumps(data, indent=1)[:-2] + f',\n "rows": [\n  {rows}\n ]\n}}\n'
        temporary = self.path.with_suffix(".tmp")
        temporary.write_text(text)
        temporary.replace(self.path)

    def has(self, key: str, peers: Iterable[str], run: dict[str, Any], limit_s: float) -> bool:
        """Whether a row needs no measuring: same sources, same versions, same contenders.

        One that a time limit cut is tried again under a longer limit.
        """
        row = self.rows.get(key)
        if row is None:
            return False
        then = self.runs[row["run"]]
        same = all(then[name] == run[name] for name in ("source", "versions", "environment"))
        cut = any("skipped" in peer for peer in row["peers"].values())
        longer = limit_s > then["settings"]["limit_s"]
        return same and set(peers) <= row["peers"].keys() and not (cut and longer)

    def run_of(self, row: Row) -> dict[str, Any]:
        return self.runs[row["run"]]


def _rounded(value: Any) -> Any:
    """Five digits are more than any clock here knows."""
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, dict):
        return {name: _rounded(item) for name, item in value.items()}
    return [_rounded(item) for item in value] if isinstance(value, (list, tuple)) else value


def beside(settings: dict[str, Any]) -> str:
    """Which other programs ran beside a row or a run."""
    if not (count := settings.get("busy", 0)):
        return ""
    share = settings.get("busy_share", 1)
    return f" beside {count} busy" + (f" by {100 * share:g} %" if share < 1 else "")


def case_of(row: Row) -> Case:
    return Case(**{name: row["case"][name] for name in FIELDS if name in row["case"]})


# --- statistics ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Spread:
    """Median and quartiles."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: list[float]) -> Spread:
        if len(values) < 2:
            return cls(values[0], values[0], values[0])
        low, median, high = statistics.quantiles(values, n=4, method="inclusive")
        return cls(median, low, high)

    @property
    def relative(self) -> float:
        """Half the interquartile range, as a part of the median."""
        return (self.high - self.low) / 2 / self.median


def timed(row: Row) -> list[str]:
    """The contenders that have figures."""
    return [name for name, peer in row["peers"].items() if peer.get("rounds")]


def seconds(row: Row, name: str) -> Spread | None:
    rounds = row["peers"].get(name, {}).get("rounds")
    return Spread.of(rounds) if rounds else None


def ratio(row: Row, name: str) -> Spread | None:
    """How many times longer than ours a contender takes: above 1, ours is faster."""
    ours, theirs = (row["peers"].get(n, {}).get("rounds") for n in (OURS, name))
    if not ours or not theirs:
        return None
    return Spread.of([b / a for a, b in zip(ours, theirs, strict=True)])


# Our own slow path, for machines without a compiler, is no rival, nor is another case of ours, nor
# one with weights of 8 bits.
NO_RIVALS = (
    OURS,
    "ours_frozen",
    "ours_int8",
    "torch_int8",
    "ours_exported",
    "ours_invariant",
    "ours_recompute",
    "ours_baseline",
    "ours_plain",
    "ours_header",
    "reference",
)


def best_peer(row: Row) -> tuple[str, Spread] | None:
    """The fastest contender but ours, and its ratio."""
    found = [(n, r) for n in timed(row) if n not in NO_RIVALS and (r := ratio(row, n))]
    return min(found, key=lambda pair: pair[1].median) if found else None


def of_limit(row: Row) -> float | None:
    """The floor as a part of our time."""
    ours = seconds(row, OURS)
    return row["floor"]["s"] / ours.median if ours and row.get("floor") else None


def geometric_mean(values: Iterable[float]) -> float:
    logs = [math.log(value) for value in values]
    return math.exp(statistics.fmean(logs)) if logs else math.nan


def barrier(row: Row) -> Spread | None:
    """Microseconds, over all turns of the row."""
    values = [
        pulse[1] for peer in row["peers"].values() for pulse in peer.get("pulse", []) if pulse
    ]
    return Spread.of(values) if values else None
