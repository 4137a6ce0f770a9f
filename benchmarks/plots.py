"""Pictures of a file of results: ratios per shape, cost against T, B and H, and a roofline."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib

from .cases import BYTES, CELLS, PHASES, Case
from .floors import flops, gemm_rate, work
from .gpu import page as gpu_page
from .pages import LAYERS, MACHINES
from .report import title
from .results import OURS, Results, Row, Spread, case_of, geometric_mean, ratio, seconds, timed

matplotlib.use("Agg")  # draws to files; needs no display
import matplotlib.pyplot as plt  # noqa: E402
from matplotlib.ticker import FixedLocator, FuncFormatter, NullFormatter  # noqa: E402

# Colours that colour-blind readers tell apart (Okabe, Ito 2008); ours is the dark one.
COLOURS = {
    OURS: "#1b1b1b",
    "torch_nn": "#d55e00",
    "torch_nn_graph": "#8c510a",
    "onnxruntime": "#0072b2",
    "openvino": "#009e73",
    "zoo_loop": "#a6761d",
    "torchrecurrent": "#8da0cb",
    "torch_compile": "#cc79a7",
    "ours_frozen": "#555555",
    "ours_int8": "#777777",
    "torch_int8": "#bc5090",
    "ours_invariant": "#bbbbbb",
    "ours_recompute": "#f0e442",
    "reference": "#999999",
    "haste": "#56b4e9",
    "flashrnn": "#e69f00",
}
MARKERS = {"lstm": "o", "gru": "s", "rnn": "^", "rnn_relu": "v"}
ROWS_PER_COLUMN = 36
ROOFS = ("#444444", "#666666", "#888888", "#aaaaaa")  # of the levels of memory, near to far

STYLE: Any = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "grid.color": "#dddddd",
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "legend.frameon": False,
    "savefig.dpi": 130,
    "savefig.bbox": "tight",
}


def draw(results: Results, folder: Path) -> list[Path]:
    """Write what the rows allow; returns the files."""
    folder.mkdir(parents=True, exist_ok=True)
    stem = results.path.stem
    written = []
    with plt.rc_context(STYLE):
        pictures = [("ratios", _ratios), ("scaling", _scaling), ("roofline", _roofline)]
        for name, make in pictures:
            figure = make(results)
            if figure is not None:
                path = folder / f"{stem}-{name}.png"
                figure.savefig(path)
                plt.close(figure)
                written.append(path)
    return written


def _colour(name: str) -> str:
    return COLOURS.get(name, "#555555")


def _subtitle(results: Results) -> str:
    machine, run = results.machine, results.runs[-1]
    who = machine.get("gpu") or machine["cpu"]
    return f"{who}, {machine['threads']} threads, torch {run['versions'].get('torch')}, " + (
        f"{run['date'][:10]}, commit {run['commit'] or '?'}"
    )


def _heading(figure: Any, text: str, results: Results, inch: float = 0.0) -> None:
    """Title and provenance above the panels, at the same distance whatever the height."""
    height = figure.get_size_inches()[1]
    figure.suptitle(text, x=0.01, y=1 + (0.42 + inch) / height, ha="left", size=13, weight="bold")
    figure.text(0.01, 1 + (0.14 + inch) / height, _subtitle(results), ha="left", va="top", size=8)


def _legend(figure: Any, names: list[str], **more: Any) -> None:
    handles = [
        plt.Line2D([], [], color=_colour(n), marker="o", ls="", label=title(n)) for n in names
    ]
    figure.legend(handles=handles, ncol=len(names), **more)


# --- ratios --------------------------------------------------------------------------------------


def _ratios(results: Results) -> Any:
    """One line per row, one point per peer; left of 1 a peer is faster than we are."""
    rows = [row for row in results.rows.values() if seconds(row, OURS) and len(timed(row)) > 1]
    if not rows:
        return None
    rows.sort(key=lambda row: PHASES.index(case_of(row).phase))  # stable within a pass
    phases = {case_of(row).phase for row in rows}
    columns = -(-len(rows) // ROWS_PER_COLUMN)
    per = -(-len(rows) // columns)
    names = [n for n in COLOURS if n != OURS and any(ratio(row, n) for row in rows)]
    spans = [s for row in rows for n in names if (s := ratio(row, n))]
    low = min(0.8, *(s.low for s in spans)) * 0.93
    high = min(max(1.5, *(s.high for s in spans)), 40) * 1.15
    figure, axes = plt.subplots(
        1, columns, figsize=(6.6 * columns, 1.1 + 0.27 * per), squeeze=False, layout="constrained"
    )
    for axis, start in zip(axes[0], range(0, len(rows), per), strict=True):
        _ratio_panel(axis, rows[start : start + per], names, (low, high), len(phases) > 1)
    kind = f", {phases.pop()}" if len(phases) == 1 else ""
    _heading(figure, f"How many times longer than ours{kind}", results, inch=0.3)
    top = 1 + 0.22 / figure.get_size_inches()[1]
    _legend(figure, names, loc="center left", bbox_to_anchor=(0.0, top))
    return figure


def _ratio_panel(
    axis: Any, rows: list[Row], names: list[str], span: tuple[float, float], name_phase: bool
) -> None:
    labels = []
    for y, row in enumerate(rows):
        case = case_of(row)
        labels.append(f"{case.cell}  {case.shape}" + (f"  {case.phase}" if name_phase else ""))
        found = {n: r for n in names if (r := ratio(row, n))}
        best = min((r.median for r in found.values()), default=1.0)
        end = max(span[0], min(best, span[1]))
        axis.barh(y, end - 1, left=1, height=0.42, color=_bar(best), alpha=0.3)
        for name, spread in found.items():
            beyond = spread.median > span[1]
            x = span[1] * 0.97 if beyond else spread.median
            if not beyond:
                axis.plot([spread.low, spread.high], [y, y], color=_colour(name), lw=1)
            axis.plot(x, y, ls="", marker=">" if beyond else "o", ms=5, color=_colour(name))
        if y and case.phase != case_of(rows[y - 1]).phase:
            axis.axhline(y - 0.5, color="#999999", lw=0.8)
    axis.axvline(1, color="black", lw=1)
    axis.set_xscale("log")
    axis.set_xlim(*span)
    ticks = [t for t in (0.1, 0.2, 0.5, 1, 2, 3, 5, 10, 20, 40) if span[0] <= t <= span[1]]
    axis.xaxis.set_major_locator(FixedLocator(ticks))
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}x"))
    axis.xaxis.set_minor_formatter(NullFormatter())
    axis.grid(axis="x")
    axis.set_yticks(range(len(rows)), labels)
    axis.tick_params(axis="y", length=0)
    axis.set_ylim(len(rows) - 0.4, -0.6)
    axis.set_xlabel("slower than we are  →", loc="right")


def _bar(best: float) -> str:
    """From 1 to the fastest peer: the lead, or what is missing."""
    return "#2a9d5c" if best >= 1 else "#c1121f"


# --- cost against T, B and H ---------------------------------------------------------------------


def _scaling(results: Results) -> Any:
    """Times of cases that differ in one size alone: rows of panels by cell and pass."""
    families = list(_families(results))
    if not families:
        return None
    found = {(phase, cell) for phase, cell, _, _ in families}
    lines = [(phase, cell) for phase in PHASES for cell in CELLS if (phase, cell) in found]
    names = [n for n in COLOURS if any(seconds(r, n) for *_, rows in families for r in rows)]
    figure, axes = plt.subplots(
        len(lines), 3, figsize=(10.5, 0.5 + 2.5 * len(lines)), squeeze=False, layout="constrained"
    )
    for axis in axes.flat:
        axis.set_visible(False)
    for phase, cell, size, rows in families:
        axis = axes[lines.index((phase, cell))]["TBH".index(size)]
        axis.set_visible(True)
        _scaling_panel(axis, size, rows, names)
        first = case_of(rows[0])
        fixed = ", ".join(f"{s} {getattr(first, s)}" for s in "BTH" if s != size)
        axis.set_title(f"{cell} {phase}", fontsize=9)
        axis.set_xlabel(f"{size}   ({fixed})")
        axis.set_ylabel("ms" if size == "T" else "")
    _heading(
        figure,
        "Time as T, B and H grow, each alone (shaded: below the machine's floor)",
        results,
        inch=0.3,
    )
    _legend(
        figure,
        names,
        loc="center left",
        bbox_to_anchor=(0.0, 1 + 0.22 / figure.get_size_inches()[1]),
    )
    return figure


def _families(results: Results) -> Iterator[tuple[str, str, str, list[Row]]]:
    """(phase, cell, the size that varies, rows in its order), of each the one with most points."""
    for size in "TBH":
        groups: dict[Case, list[Row]] = defaultdict(list)
        for row in results.rows.values():
            case = case_of(row)
            if seconds(row, OURS) and not case.carries:
                same: Any = {size: 1, "I": 1} if size == "H" and case.I == case.H else {size: 1}
                groups[replace(case, **same)].append(row)
        best: dict[tuple[str, str], list[Row]] = {}
        for case, rows in groups.items():
            key = (case.phase, case.cell)
            if len(rows) >= 3 and len(rows) > len(best.get(key, [])):
                best[key] = rows
        for (phase, cell), rows in best.items():
            rows.sort(key=lambda row: getattr(case_of(row), size))  # noqa: B023
            yield phase, cell, size, rows


def _scaling_panel(axis: Any, size: str, rows: list[Row], names: list[str]) -> None:
    xs = [getattr(case_of(row), size) for row in rows]
    for name in names:
        points = [(x, s) for x, row in zip(xs, rows, strict=True) if (s := seconds(row, name))]
        if not points:
            continue
        ours = name == OURS
        axis.plot(
            [x for x, _ in points],
            [s.median * 1e3 for _, s in points],
            marker="o",
            ms=3.5,
            lw=2 if ours else 1.2,
            zorder=3 if ours else 2,
            color=_colour(name),
        )
    limits = [
        (x, row["floor"]["s"] * 1e3) for x, row in zip(xs, rows, strict=True) if "floor" in row
    ]
    if limits:
        axis.fill_between(*zip(*limits, strict=True), color="#eeeeee", zorder=0, lw=0)
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    if limits:  # the shade reaches down to the edge, wherever that is
        bottom = min(y for _, y in limits) * 0.6
        axis.set_ylim(bottom=bottom)
    axis.xaxis.set_major_locator(FixedLocator(xs))
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0f}"))
    axis.xaxis.set_minor_locator(FixedLocator([]))
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.grid(axis="y")


# --- roofline ------------------------------------------------------------------------------------


def _roofline(results: Results) -> Any:
    """GFLOP/s against FLOPs per byte of weights read: how near each contender is to the limits."""
    dtypes = [row["case"]["dtype"] for row in results.rows.values() if seconds(row, OURS)]
    limits = next((run["limits"] for run in reversed(results.runs) if run.get("limits")), None)
    if not dtypes or not limits:
        return None
    dtype = max(set(dtypes), key=dtypes.count)
    peak = gemm_rate(limits, dtype) / 1e9
    points = [(row, case_of(row)) for row in results.rows.values() if row["case"]["dtype"] == dtype]
    points = [(row, case) for row, case in points if seconds(row, OURS) and not case.zoo]
    if not peak or not points:
        return None
    figure, axis = plt.subplots(figsize=(8.5, 5.2), layout="constrained")
    xs = [_intensity(case) for _, case in points]
    left, right = min(xs) / 1.8, max(max(xs) * 1.8, 4 * peak / 50)
    roofs = []
    for level, shade in zip(limits["bandwidth"], ROOFS, strict=False):
        speed = level["gb_per_s"]
        ridge = min(peak / speed, right)
        if ridge > left:
            axis.plot([left, ridge], [left * speed, ridge * speed], color=shade, lw=1)
            roofs.append((f"{level['name']} {speed:.0f} GB/s", speed, ridge, shade))
    axis.plot([left, right], [peak, peak], color=ROOFS[0], lw=1)
    axis.annotate(f"{peak:.0f} GFLOP/s", (right, peak * 1.03), ha="right", va="bottom", size=8)
    names = [n for n in COLOURS if any(seconds(row, n) for row, _ in points)]
    for name in reversed(names):  # ours on top
        aside = 1.025 ** (names.index(name) - (len(names) - 1) / 2)  # or they hide each other
        for row, case in points:
            spent: Spread | None = seconds(row, name)
            if spent:
                axis.plot(
                    _intensity(case) * aside,
                    flops(case) / spent.median / 1e9,
                    ls="",
                    marker=MARKERS[case.cell],
                    ms=6 if name == OURS else 4.5,
                    color=_colour(name),
                    alpha=0.9,
                    mew=0,
                )
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.set_xlim(left, right)
    axis.set_ylim(top=peak * 1.6)
    axis.set_xlabel("FLOPs per byte of weights, W_hh read once per step")
    axis.set_ylabel(f"GFLOP/s, {dtype}")
    ticks = [digit * 10.0**power for power in range(-3, 7) for digit in (1, 2, 5)]
    for one in (axis.xaxis, axis.yaxis):
        low, high = one.get_view_interval()
        one.set_major_locator(FixedLocator([tick for tick in ticks if low <= tick <= high]))
        one.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        one.set_minor_locator(FixedLocator([]))
    axis.grid()
    handles = [
        plt.Line2D([], [], color=_colour(n), marker="o", ls="", label=title(n)) for n in names
    ]
    cells = [c for c in MARKERS if any(case.cell == c for _, case in points)]
    handles += [
        plt.Line2D([], [], color="#666666", marker=MARKERS[c], ls="", label=c) for c in cells
    ]
    axis.legend(handles=handles, loc="lower right", ncol=2)
    figure.draw_without_rendering()  # fixes the layout, and with it the slope of the roofs
    (x0, y0), (x1, y1) = axis.transData.transform([(left, left), (left * 10, left * 10)])
    slope = math.degrees(math.atan2(y1 - y0, x1 - x0))
    for text, speed, ridge, shade in roofs:
        start = max(left, axis.get_ylim()[0] / speed) * 1.08
        if ridge > 2 * start:
            place: Any = dict(rotation=slope, rotation_mode="anchor", va="bottom", size=8)
            axis.text(start, start * speed * 1.04, text, color=shade, **place)
    _heading(figure, "Against the machine's limits", results)
    return figure


def _intensity(case: Case) -> float:
    """W_ih is read once, W_hh and W_hr once per step; a training step reads them back again."""
    todo = work(case)
    size = BYTES[case.dtype] * case.directions / 2
    steps = case.T * (2 if case.trains else 1)
    read = size * (sum(todo.projection) + steps * case.layers * todo.recurrent)
    return flops(case) / read


# --- README's picture ----------------------------------------------------------------------------

PASSES = {"inference": "#0072b2", "training": "#d55e00"}


def draw_speed(results: Path, path: Path) -> Path:
    """How many times faster than torch.nn, by layer and pass, on CPUs and a GPU."""
    with plt.rc_context(STYLE):
        panels = len(MACHINES) + 1
        size = (11, 3.9)
        figure, axes = plt.subplots(1, panels, figsize=size, sharey=True, layout="constrained")
        for axis, (name, ending) in zip(axes, MACHINES.items(), strict=False):
            _speed_panel(axis, f"CPU ({name})\nfloat32, 2 cores")
            for phase, suite in zip(PASSES, ("headline", "headline-train"), strict=True):
                rows = Results.read(results / f"{suite}-{ending}.json").rows.values()
                for place, cell in enumerate(LAYERS):
                    own = [row for row in rows if case_of(row).cell == cell]
                    found = [r.median for row in own if (r := ratio(row, "torch_nn"))]
                    _speed_bar(axis, place, phase, found)
        _speed_panel(axes[-1], "GPU (H200)\nbfloat16, an older version of the kernels")
        shown = gpu_page.read(results / "h200").shown
        for place, cell in enumerate(LAYERS):
            own = [row for row in shown if row.case.cell == cell]
            for phase in PASSES:
                _speed_bar(
                    axes[-1],
                    place,
                    phase,
                    gpu_page.ratios_of(own, "bfloat16", phase, gpu_page.KERNELS),
                    gpu_page.ratios_of(own, "bfloat16", phase, gpu_page.TORCH),
                )
        axes[0].set_ylabel("times as fast as torch.nn")
        axes[0].set_ylim(0.5, 16)
        heading = "Speed relative to torch.nn (geometric means over sizes)"
        figure.suptitle(heading, x=0.01, ha="left", size=13, weight="bold")
        patches = [plt.Rectangle((0, 0), 1, 1, color=colour) for colour in PASSES.values()]
        dot = plt.Line2D([], [], ls="", marker="o", ms=3, color="#333333")
        pale = plt.Rectangle((0, 0), 1, 1, color="#777777", alpha=0.3)
        names = [*PASSES, "one size", "GPU: with the time that torch.nn takes to launch kernels"]
        figure.legend([*patches, dot, pale], names, loc="outside lower left", ncol=4)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, metadata={"Software": None})
        plt.close(figure)
    return path


def _speed_panel(axis: Any, name: str) -> None:
    axis.set_title(name, fontsize=9)
    axis.set_yscale("log", base=2)
    axis.yaxis.set_major_locator(FixedLocator([0.5, 1, 2, 4, 8, 16]))
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}x"))
    axis.yaxis.set_minor_locator(FixedLocator([]))
    axis.grid(axis="y")
    axis.axhline(1, color="black", lw=1)
    axis.set_xticks(range(len(LAYERS)), [cell.upper() for cell in LAYERS])
    axis.set_xlim(-0.5, len(LAYERS) - 0.5)
    axis.tick_params(axis="x", length=0)


def _speed_bar(
    axis: Any, at: int, phase: str, found: list[float], in_all: list[float] | None = None
) -> None:
    """A bar to the geometric mean, a point for each size; ``in_all``: a pale bar on top of it."""
    x = at + (-0.2 if phase == "inference" else 0.2)
    if not found:
        axis.text(x, 1.1, "not measured", rotation=90, ha="center", va="bottom", size=8)
        return
    mean = geometric_mean(found)
    top = geometric_mean(in_all) if in_all else mean
    colour = PASSES[phase]
    axis.bar(x, mean - 1, width=0.36, bottom=1, color=colour, alpha=0.85)
    if in_all:
        axis.bar(x, top - mean, width=0.36, bottom=mean, color=colour, alpha=0.3)
    steps = [0.2 * (i / max(1, len(found) - 1) - 0.5) for i in range(len(found))]
    axis.plot([x + s for s in steps], found, ls="", marker="o", ms=2.5, color="#222222", alpha=0.7)
    place: Any = dict(ha="center", va="center", size=9, color=colour)
    axis.text(x, 0.6, f"{mean:.1f}x", weight="bold", **place)
    if in_all:
        axis.text(x, top * 1.12, f"{top:.1f}x", **place)
