"""What a card's folder of results comes to, for the page of that card and for README's table.

``gpu_check-peers.json`` is written by ``benchmarks.gpu_check``. ``resident.json`` holds figures
taken by hand of kernels that keep their weights, where the former has none of them (GRU and RNN).
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..cases import Case
from ..report import table
from ..results import geometric_mean
from .versus import ORACLE, ratios

DTYPES = ("bfloat16", "float32", "float16")
NAMES = {"bfloat16": "bfloat16", "float32": "float32 (TF32)", "float16": "float16"}
PHASES = ("inference", "training")


@dataclass(frozen=True)
class Measured:
    """Microseconds per step of one layer, ours and torch.nn's."""

    case: Case
    variant: str  # of ours
    ours: float
    theirs: float  # by the clock, launches included
    ratio: float  # theirs to ours
    kernels: float | None  # what cuDNN's kernels take on the card, for the same case
    algorithm: str  # cuDNN's, "" if unknown

    @property
    def of_kernels(self) -> float | None:
        return self.kernels and self.kernels / self.ours


@dataclass(frozen=True)
class Card:
    name: str
    plan: list[Measured]  # LSTM, as our plan chooses
    resident: list[Measured]  # kernels that keep their weights as first written, every cell
    graph: list[Measured]  # a product and a kernel for each step, where there is no plan's figure

    @property
    def shown(self) -> list[Measured]:
        """One layer and direction on full batches: the plan's rows, of other cells ``resident``."""
        cells = {row.case.cell for row in self.plan}
        others = [row for row in self.resident if row.case.cell not in cells]
        return [row for row in self.plan + others if _plain(row.case)]


def _plain(case: Case) -> bool:
    return not case.bidirectional and not case.ragged and case.layers == 1


def read(folder: Path) -> Card:
    data = json.loads((folder / "gpu_check-peers.json").read_text())
    rows = [row for row in data["rows"].values() if "error" not in row]
    plan, graph = [], []
    kernels: dict[Case, tuple[float, str]] = {}
    for row in rows:
        case = Case(**row["case"])
        own = sum(us for _, _, us in row["cudnn"]["kernels"])
        kernels[case] = own, row["cudnn"]["algorithm"]
        found = ratios(row, ORACLE)
        variant = "plan" if "plan" in found else "graph"
        ours, theirs = row["peers"][f"ours/{variant}"]["us"], row["peers"][ORACLE]["us"]
        measured = Measured(case, variant, ours, theirs, found[variant], *kernels[case])
        (plan if variant == "plan" else graph).append(measured)
    by_hand = json.loads((folder / "resident.json").read_text())
    return Card(data["card"], plan, list(_resident(by_hand, kernels)), graph)


def _resident(data: dict[str, Any], kernels: dict[Case, tuple[float, str]]) -> Iterable[Measured]:
    """Pairs of ours and torch.nn, which stand in one entry, or of ragged batches in two."""
    theirs: dict[Case, float] = {}
    for entry in data["first"] + data["ragged"]:
        ragged = entry.get("ragged", False)
        for phase, short in zip(PHASES, ("infer", "train"), strict=True):
            case = Case(
                entry["cls"].lower(),
                entry["B"],
                256,
                entry["H"],
                bidirectional=entry.get("bi", False),
                shortest=0.25 if ragged else 1.0,
                phase=phase,
                dtype=entry["dtype"],
                device="cuda",
            )
            if ragged and entry["who"] == "nn":
                theirs[case] = entry[short]
            elif not ragged or entry["who"] == "resident":
                ours = entry[short if ragged else f"resident_{short}"]
                nn = theirs[case] if ragged else entry[f"nn_{short}"]
                own = kernels.get(case, (None, ""))
                yield Measured(case, "resident", ours, nn, nn / ours, *own)


# --- tables --------------------------------------------------------------------------------------


def number(value: float) -> str:
    return f"{value:.2f}" if value < 2 else f"{value:.1f}"


def means(rows: Sequence[Measured]) -> str:
    """Inference and training by cell and dtype: by the clock, and against cuDNN's kernels alone."""
    body = []
    for cell in dict.fromkeys(row.case.cell for row in rows):
        own = [row for row in rows if row.case.cell == cell]
        for alone in (False, True):
            what = "against cuDNN's kernels alone" if alone else "against torch.nn"
            body.append(
                [f"{cell.upper()}, {what}", *(_pair(own, dtype, alone) for dtype in DTYPES)]
            )
    return table(["", *NAMES.values()], body)


def _pair(rows: Sequence[Measured], dtype: str, alone: bool) -> str:
    both = []
    for phase in PHASES:
        found = ratios_of(rows, dtype, phase, alone)
        if found:
            both.append(number(geometric_mean(found)))
    return " / ".join(both)


def ratios_of(rows: Iterable[Measured], dtype: str, phase: str, alone: bool) -> list[float]:
    own = [row for row in rows if row.case.dtype == dtype and row.case.phase == phase]
    found = [row.of_kernels if alone else row.ratio for row in own]
    return [ratio for ratio in found if ratio is not None]


def _all(rows: Iterable[Measured]) -> str:
    def line(row: Measured) -> list[str]:
        case, alone = row.case, row.of_kernels
        kernels = "" if alone is None else f"{row.kernels:.3g} ({alone:.2f})"
        shape = [case.cell, case.shape, case.phase, case.dtype]
        return [*shape, f"{row.ours:.3g}", f"{row.theirs:.3g} ({row.ratio:.2f})", kernels]

    head = ["cell", "shape", "pass", "dtype", "ours", "torch.nn", "cuDNN's kernels", "algorithm"]
    ordered = sorted(rows, key=lambda row: row.ratio)
    return table(head, [[*line(row), row.algorithm] for row in ordered])


def page(folder: Path) -> str:
    card = read(folder)
    low = [row for row in card.plan if row.case.dtype == "bfloat16" and row.kernels]
    times = statistics.median(row.theirs / row.kernels for row in low if row.kernels)
    return "\n\n".join(
        [
            f"# {card.name}",
            (folder / "about.md").read_text().strip(),
            f"In bfloat16 a call of torch.nn's LSTM takes {times:.1f} times as long as cuDNN's "
            f"kernels in it (median of {len(low)} rows).",
            "**Geometric means of the ratios, inference / training**",
            means(card.shown),
            "**How to read the rows.** Microseconds per time step; in brackets, how many times "
            "longer than ours (above 1: ours is faster). *torch.nn* is the time of a call. "
            "*cuDNN's kernels* is what the four longest kinds of kernels in it take on the card, "
            "by torch's profiler. *algorithm*: `standard` launches kernels for every step, "
            "`persistent` keeps the weights on the chip. Slow rows come first.",
            "## LSTM",
            _all(card.plan),
            "## Kernels that keep their weights, as first written",
            _all(card.resident),
            "## One product and one kernel per step, replayed from a CUDA graph",
            "Rows that were measured with `FUSED_RNN_VARIANT=graph` alone. The plan takes this way "
            "for what [the other kernels](../../../docs/cuda.md) do not fit.",
            _all(card.graph),
        ]
    )
