"""Results as Markdown: means, then every row, the slow ones first, then what was not measured."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from . import peers
from .results import (
    OURS,
    Results,
    Row,
    barrier,
    beside,
    best_peer,
    case_of,
    geometric_mean,
    of_limit,
    ratio,
    seconds,
    timed,
)


def render(results: Results, *, details: bool = False) -> str:
    rows = slow_first(results.rows.values())
    if not rows:
        return "no rows"
    parts = [_provenance(results)]
    if found := means(rows):
        parts += ["**Geometric means of the ratios**", _summary(rows, found)]
    compared = [best[1].median for row in rows if (best := best_peer(row))]
    if compared:
        behind = sum(median < 1 for median in compared)
        parts.append(f"Slower than the best peer in {behind} of {len(compared)} rows.")
    parts += ["**Rows, the slow ones first**", _legend(rows), table(_head(rows), _body(rows))]
    if len(_ours(rows)) > 1:
        parts += ["**Memory of our own ways to train**", _memory(rows)]
    if details:
        parts += ["**Memory, first calls, regimes**", _details(rows)]
    if notes := _notes(results):
        parts += ["**Not measured**", "\n".join(f"- {note}" for note in notes)]
    return "\n\n".join(parts)


def slow_first(rows: Iterable[Row]) -> list[Row]:
    """By the ratio to the best peer; rows without one come last."""

    def key(row: Row) -> float:
        best = best_peer(row)
        return best[1].median if best else float("inf")

    return sorted(rows, key=key)


def _legend(rows: Iterable[Row]) -> str:
    streams = any(case_of(row).phase == "stream" for row in rows)
    unit = "Milliseconds (*stream*: microseconds per step)" if streams else "Milliseconds"
    return (
        f"{unit}, median over the rounds; ± is half the interquartile range. In brackets, how "
        "many times longer than ours (above 1: ours is faster), formed in each round and then "
        "summed up. *limit*: the floor of the machine as a part of our time, and what sets it. "
        "*barrier*: between two cores, in µs, beside the figures (! if it changed; BUSY if other "
        "programs used the processors)."
    )


def where(results: Results) -> str:
    """The machine, and what ran beside on it."""
    machine = results.machine
    others = beside(results.runs[-1].get("settings", {})) if results.runs else ""
    name = machine.get("gpu") or machine["cpu"]
    return f"{name}, {machine['threads']} threads of {machine['cores']} cores{others}"


def when(run: dict[str, Any]) -> str:
    """Commit and day."""
    changed = " with changes" if run.get("changed") else ""
    return f"commit {(run.get('commit') or '?')[:7]}{changed}, {run.get('date', '')[:10]}"


def _provenance(results: Results) -> str:
    run = results.runs[-1] if results.runs else {}
    versions = ", ".join(f"{k} {v}" for k, v in run.get("versions", {}).items())
    lines = [f"{where(results)}; {versions}; {when(run)}."]
    if len(results.runs) > 1:
        commits = dict.fromkeys((run["commit"] or "?")[:7] for run in results.runs)
        lines.append(f"Rows of {len(results.runs)} runs, commits {', '.join(commits)}.")
    if limits := run.get("limits"):
        rates = [
            f"{dtype} " + ", ".join(f"{way} {rate:.0f}" for way, rate in found.items() if rate)
            for dtype, found in limits["gemm"].items()
        ]
        read = [f"{level['name']} {level['gb_per_s']:.0f}" for level in limits["bandwidth"]]
        lines.append(f"Limits: GFLOP/s {'; '.join(rates)}. GB/s read {', '.join(read) or '?'}.")
        if limits.get("pulse"):
            lines[-1] += " Fork {:.2f} µs, barrier {:.2f} µs at the start.".format(*limits["pulse"])
    return "\n".join(lines)


# --- the table -----------------------------------------------------------------------------------


def _contenders(rows: Iterable[Row]) -> list[str]:
    """All that ran or could have, ours left out, in the order of the peers' list."""
    found = {
        name
        for row in rows
        for name, record in row["peers"].items()
        if not record.keys() & {"missing", "refused"} or record.get("wrong")
    } - {OURS}
    return [n for n in peers.NAMES if n in found] + sorted(found - set(peers.NAMES))


def title(name: str) -> str:
    return peers.load(name).title


def _head(rows: list[Row]) -> list[str]:
    names = [title(name) for name in _contenders(rows)]
    return ["cell", "shape", "pass", "ours", *names, "best peer", "limit", "barrier"]


def _body(rows: list[Row]) -> list[list[str]]:
    names = _contenders(rows)
    one_dtype = len({row["case"]["dtype"] for row in rows}) == 1
    body = []
    for row in rows:
        case = case_of(row)
        ours = seconds(row, OURS)
        best = best_peer(row)
        share = of_limit(row)
        pulse = barrier(row)
        # A machine that changed its state within the row: look at the ratios, not at the times.
        flipped = "!" if pulse and pulse.high > 1.5 * pulse.low else ""
        body.append(
            [
                case.cell,
                case.shape,
                case.phase + ("" if one_dtype else f" {case.dtype}"),
                f"{_time(row, ours.median)} ±{ours.relative:.0%}" if ours else _why_not(row, OURS),
                *(_cell(row, name) for name in names),
                f"{best[1].median:.2f} {title(best[0])}" if best else "",
                f"{share:.0%} {row['floor']['bound']}" if share else "",
                (f"{pulse.median:.2f}{flipped}" if pulse else "") + _busy(row),
            ]
        )
    return body


def _busy(row: Row) -> str:
    """A machine that others use makes figures that mean little."""
    share = row.get("busy") or 0
    return f" BUSY {share:.0%}" if share > 0.15 else ""


def _cell(row: Row, name: str) -> str:
    spent, compared = seconds(row, name), ratio(row, name)
    if spent is None:
        return _why_not(row, name)
    return _time(row, spent.median) + (f" ({compared.median:.2f})" if compared else "")


def _why_not(row: Row, name: str) -> str:
    record = row["peers"].get(name, {})
    if record.get("wrong"):
        return "WRONG"
    return next((word for word in ("failed", "skipped") if word in record), "-")


def _time(row: Row, seconds: float) -> str:
    """Of a call in milliseconds; of a stream what a step takes, in microseconds."""
    case = case_of(row)
    return ms(seconds / case.T * 1e3) if case.phase == "stream" else ms(seconds)


def ms(seconds: float) -> str:
    """Three digits."""
    value = seconds * 1e3
    digits = 0 if value >= 99.95 else 1 if value >= 9.995 else 2 if value >= 0.9995 else 3
    return f"{value:.{digits}f}" if value >= 0.0995 else f"{value:.4f}"


def table(head: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    """Markdown that is also readable as it is."""
    lines = [head, *body]
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]

    def joined(line: Sequence[str]) -> str:
        cells = [text.ljust(width) for text, width in zip(line, widths, strict=True)]
        return f"| {' | '.join(cells)} |"

    rule = "|" + "|".join("-" * (width + 2) for width in widths) + "|"
    return "\n".join([joined(head), rule, *map(joined, body)])


# --- what stands around it -----------------------------------------------------------------------


@dataclass(frozen=True)
class Mean:
    """Geometric means of the ratios of some rows; above 1, ours is faster."""

    kind: str  # pass, dtype, and whether sequences are of different lengths
    cell: str  # or "all"
    rows: int
    of_peer: dict[str, tuple[float, int]]  # the mean, and of how many rows
    best: float  # against the best peer of each row
    worst: float  # the lowest of those ratios


def means(rows: Sequence[Row]) -> list[Mean]:
    """By pass and cell, and of all cells of a pass; of rows that were compared with anyone."""
    groups: dict[tuple[str, str], list[Row]] = defaultdict(list)
    for row in rows:
        if best_peer(row):
            case = case_of(row)
            kind = f"{case.phase} {case.dtype}" + (" ragged" if case.ragged else "")
            groups[kind, "all"].append(row)
            groups[kind, case.cell].append(row)
    found = []
    for (kind, cell), members in sorted(groups.items()):
        of_peer = {}
        for name in _contenders(members):
            if medians := [r.median for row in members if (r := ratio(row, name))]:
                of_peer[name] = geometric_mean(medians), len(medians)
        best = [pair[1].median for row in members if (pair := best_peer(row))]
        found.append(Mean(kind, cell, len(members), of_peer, geometric_mean(best), min(best)))
    return found


def _summary(rows: Sequence[Row], found: Sequence[Mean]) -> str:
    names = _contenders(rows)
    body = []
    for mean in found:
        if mean.cell == "all" and sum(other.kind == mean.kind for other in found) == 2:
            continue  # one cell is no more than itself
        shown = []
        for name in names:
            value, number = mean.of_peer.get(name, (0.0, 0))
            part = "" if number == mean.rows else f" of {number}"
            shown.append(f"{value:.2f}{part}" if number else "-")
        kind = [mean.kind, mean.cell, str(mean.rows)]
        body.append([*kind, *shown, f"{mean.best:.2f}", f"{mean.worst:.2f}"])
    head = ["pass", "cell", "rows", *map(title, names), "best peer", "worst row"]
    return table(head, body)


def _details(rows: list[Row]) -> str:
    body = []
    for row in rows:
        for name in timed(row):
            record = row["peers"][name]
            body.append(
                [
                    case_of(row).cell,
                    case_of(row).shape,
                    case_of(row).phase,
                    title(name),
                    ms(record["prepare_s"]),
                    ms(record["first_s"]),
                    ms(record["call_s"]),
                    _mb(record.get("peak_bytes")),
                    _mb(record.get("saved_bytes")),
                    record.get("regime") or "",
                ]
            )
    head = ["cell", "shape", "pass", "who", "prepare ms", "first call ms", "later ms"]
    return table([*head, "peak MB", "saved MB", "regime"], body)


def _ours(rows: Iterable[Row]) -> list[str]:
    """Those of our contenders that hold more or less for the backward."""
    found = {name for row in rows for name in timed(row)}
    return [
        name for name in (OURS, "ours_recompute", "ours_baseline", "ours_plain") if name in found
    ]


def _memory(rows: list[Row]) -> str:
    """MB held between forward and backward without parameters and input, and the peak of a step."""
    body = []
    for row in rows:
        case = case_of(row)
        records = [row["peers"].get(name, {}) for name in _ours(rows)]
        numbers = [_mb(r.get(kind)) for kind in ("saved_bytes", "peak_bytes") for r in records]
        body.append([case.cell, case.shape, case.phase, *numbers])
    names = [title(name) for name in _ours(rows)]
    head = [f"{what} MB, {name}" for what in ("held", "peak") for name in names]
    return table(["cell", "shape", "pass", *head], body)


def _mb(size: int | None) -> str:
    return "" if size is None else f"{size / 1e6:.2f}"


def _notes(results: Results) -> list[str]:
    """Reasons, each with the rows it kept a contender from."""
    rows = list(results.rows.values())
    reasons: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        case = case_of(row)
        for name, record in row["peers"].items():
            for kind in ("missing", "refused", "skipped", "failed"):
                if kind in record:
                    where = f"{case.cell} {case.shape} {case.phase}"
                    reasons[record[kind]][where].append(title(name))
    notes = []
    for reason, places in reasons.items():
        together: dict[str, list[str]] = defaultdict(list)  # places by who is concerned there
        for where, who in places.items():
            together[", ".join(who)].append(where)
        for who_all, wheres in together.items():
            more = f" and {len(wheres) - 3} more" if len(wheres) > 3 else ""
            shown = "everywhere" if len(wheres) == len(rows) else ", ".join(wheres[:3]) + more
            notes.append(f"{who_all}: {reason} ({shown})")
    fewer = []
    for row in rows:
        rounds = max((len(row["peers"][name]["rounds"]) for name in timed(row)), default=0)
        if 0 < rounds < results.run_of(row)["settings"].get("rounds", 0):
            case = case_of(row)
            fewer.append(f"{case.cell} {case.shape} {case.phase} ({rounds})")
    if fewer:
        notes.append(f"fewer rounds than asked, to stay within the limit: {', '.join(fewer)}")
    return notes
