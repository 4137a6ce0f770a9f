"""What a card's folder of results comes to, for the page of that card and for README's table.

``gpu_check-peers.json`` is written by ``benchmarks.gpu_check``.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..cases import Case
from ..report import table
from ..results import geometric_mean
from .versus import ORACLE, REPLAYED, ratios

REPLAYED_TEXT = ", *in a graph* that of the same call replayed from a CUDA graph"
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
    graph: float | None = None  # torch.nn's, replayed from a CUDA graph
    of_graph: float | None = None  # the ratio of that to ours

    @property
    def of_kernels(self) -> float | None:
        return self.kernels and self.kernels / self.ours


TORCH, GRAPH, KERNELS = "torch.nn", "torch.nn in a CUDA graph", "cuDNN's kernels alone"
AGAINST: dict[str, Callable[[Measured], float | None]] = {
    TORCH: lambda row: row.ratio,
    GRAPH: lambda row: row.of_graph,
    KERNELS: lambda row: row.of_kernels,
}


@dataclass(frozen=True)
class Card:
    name: str
    plan: list[Measured]  # as our plan chooses
    graph: list[Measured]  # a product and a kernel for each step, where there is no plan's figure

    @property
    def shown(self) -> list[Measured]:
        """One layer and direction on full batches."""
        return [row for row in self.plan if _plain(row.case)]


def _plain(case: Case) -> bool:
    return not case.bidirectional and not case.ragged and case.layers == 1 and case.T == 256


def read(folder: Path) -> Card:
    data = json.loads((folder / "gpu_check-peers.json").read_text())
    rows = [row for row in data["rows"].values() if "error" not in row]
    plan, graph = [], []
    for row in rows:
        own = sum(us for _, _, us in row["cudnn"]["kernels"])
        found = ratios(row, ORACLE)
        variant = "plan" if "plan" in found else "graph"
        ours, theirs = row["peers"][f"ours/{variant}"]["us"], row["peers"][ORACLE]["us"]
        measured = Measured(
            Case(**row["case"]),
            variant,
            ours,
            theirs,
            found[variant],
            own,
            row["cudnn"]["algorithm"],
            row["peers"].get(REPLAYED, {}).get("us"),
            ratios(row, REPLAYED).get(variant),
        )
        (plan if variant == "plan" else graph).append(measured)
    return Card(data["card"], plan, graph)


# --- tables --------------------------------------------------------------------------------------


def number(value: float) -> str:
    return f"{value:.2f}" if value < 2 else f"{value:.1f}"


def means(rows: Sequence[Measured]) -> str:
    """Inference and training by cell and dtype, against each of AGAINST that was measured."""
    body = []
    for cell in dict.fromkeys(row.case.cell for row in rows):
        own = [row for row in rows if row.case.cell == cell]
        for whom in AGAINST:
            pairs = [_pair(own, dtype, whom) for dtype in DTYPES]
            if any(pairs):
                body.append([f"{cell.upper()}, against {whom}", *pairs])
    return table(["", *NAMES.values()], body)


def _pair(rows: Sequence[Measured], dtype: str, whom: str) -> str:
    both = (ratios_of(rows, dtype, phase, whom) for phase in PHASES)
    return " / ".join(number(geometric_mean(found)) for found in both if found)


def ratios_of(rows: Iterable[Measured], dtype: str, phase: str, whom: str) -> list[float]:
    """How many times longer than ours it takes ``whom``, one of AGAINST, where that is known."""
    own = [row for row in rows if row.case.dtype == dtype and row.case.phase == phase]
    return [ratio for ratio in map(AGAINST[whom], own) if ratio is not None]


def _all(rows: Iterable[Measured]) -> str:
    ordered = sorted(rows, key=lambda row: row.ratio)
    columns = [("torch.nn", [(row.theirs, row.ratio) for row in ordered])]
    if any(row.graph for row in ordered):
        columns.append(("in a graph", [(row.graph, row.of_graph) for row in ordered]))
    columns.append(("cuDNN's kernels", [(row.kernels, row.of_kernels) for row in ordered]))
    head = ["cell", "shape", "pass", "dtype", "ours", *(title for title, _ in columns), "algorithm"]
    body = []
    for i, row in enumerate(ordered):
        case = row.case
        shape = [case.cell, case.shape, case.phase, case.dtype, f"{row.ours:.3g}"]
        body.append([*shape, *(_timed(*fields[i]) for _, fields in columns), row.algorithm])
    return table(head, body)


def _timed(us: float | None, ratio: float | None) -> str:
    return "" if us is None or ratio is None else f"{us:.3g} ({ratio:.2f})"


def page(folder: Path) -> str:
    card = read(folder)
    low = [row for row in card.plan if row.case.dtype == "bfloat16"]
    times = [row.theirs / row.kernels for row in low if row.kernels]
    layers = ", ".join(sorted({row.case.cell.upper() for row in card.plan}))
    parts = [f"# {card.name}", (folder / "about.md").read_text().strip()]
    if times:
        parts.append(
            f"In bfloat16 a call of torch.nn's {layers} takes {statistics.median(times):.1f} times "
            f"as long as cuDNN's kernels in it (median of {len(times)} rows)."
        )
    parts += [
        "**Geometric means of the ratios, inference / training**",
        means(card.shown),
        "**How to read the rows.** Microseconds per time step; in brackets, how many times "
        "longer than ours (above 1: ours is faster). *torch.nn* is the time of a call"
        f"{REPLAYED_TEXT if any(row.graph for row in card.plan) else ''}. "
        "*cuDNN's kernels* is what the four longest kinds of kernels in it take on the card, "
        "by torch's profiler. *algorithm*: `standard` launches kernels for every step, "
        "`persistent` keeps the weights on the chip. Slow rows come first.",
    ]
    if card.plan:
        parts += [f"## {layers}", _all(card.plan)]
    if card.graph:
        parts += [
            "## One product and one kernel per step, replayed from a CUDA graph",
            "Rows that were measured with `FUSED_RNN_VARIANT=graph` alone. The plan takes this way "
            "for what [the other kernels](../../../docs/cuda.md) do not fit.",
            _all(card.graph),
        ]
    return "\n\n".join(parts)
