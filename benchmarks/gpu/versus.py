"""Part peers: ours against torch.nn (cuDNN, launched by the host and replayed from a CUDA graph),
FlashRNN and haste, in microseconds per step.

A row is a case. Results are checked against float64 before anything is timed: ours may be off by
twice what torch.nn is off by, and one unit in the last place of the largest entry. Then contenders
take turns in rounds, and ratios are formed in each round.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..cases import Case
from ..results import geometric_mean
from ..runner import Failed, Late
from .contender import PROFILED, Contenders
from .rows import Clock, Row, Rows, Settings, say

ORACLE, REPLAYED = "torch_nn", "torch_nn_graph"
RIVALS = (ORACLE, REPLAYED, "flashrnn", "haste")

# Relative to the largest entry: a unit in the last place, of TF32 for float32 on CUDA; a few units
# where sums in another order are all that differs.
FLOORS = {"float64": 1e-14, "float32": 1e-6, "tf32": 1e-3, "float16": 1e-3, "bfloat16": 8e-3}

LOAD_S = 20.0
COMPILE_S = 90.0  # FlashRNN compiles for every size
ROUNDS, ROUNDS_S = 5, 0.6  # so many, if they fit into the time; two at the least
WARM_S, SAMPLE_S = 0.01, 0.03
ELEMENTS = 1 << 25  # T * B * H at most: T is shorter where B and H are large
SLOW = 0.95  # a lower ratio is named

BOTH = ("inference", "training")


# --- what is measured ----------------------------------------------------------------------------


def cases(settings: Settings) -> list[Case]:
    """Each once: first what no card has measured with the plan, then the most telling."""
    if settings.tiny:
        found = _grid(("lstm", "gru", "rnn"), ("float32",), (8,), (2,), ("training",), T=4)
        found += _special(("lstm",), ("bfloat16",), ((8, 2),), T=4, phases=("inference",))
    else:
        found = list(_order())
    own = [replace(case, device=settings.device) for case in found]
    return list(dict.fromkeys(own))


CELLS, DTYPES = ("gru", "lstm", "rnn"), ("bfloat16", "float32", "float16")
SIZES, BATCHES = (512, 128, 1024, 256), (16, 64)
OTHER_SIZES, OTHER_BATCHES, OTHER_STEPS = (768, 64, 2048), (1, 128, 256), (1024, 16)
KINDS: tuple[dict[str, Any], ...] = ({"shortest": 0.25}, {"bidirectional": True}, {"layers": 2})


def _order() -> Iterator[Case]:
    usual = SIZES[:1], BATCHES[:1]
    yield from _in_turn(
        *(_grid(("gru", "rnn"), DTYPES, SIZES, (B,), BOTH) for B in BATCHES),
        *(_grid(CELLS, DTYPES, *usual, BOTH, **kind) for kind in KINDS),
        *(_grid(CELLS, DTYPES, usual[0], (B,), BOTH) for B in OTHER_BATCHES),
        *(_grid(CELLS, DTYPES, (H,), usual[1], BOTH) for H in OTHER_SIZES),
        *(_grid(CELLS, DTYPES, *usual, BOTH, T=T) for T in OTHER_STEPS),
    )
    yield from _grid(("lstm",), DTYPES, SIZES, BATCHES, BOTH)
    yield from _special(("lstm", "gru"), DTYPES[:2], ((512, 16), (512, 64), (256, 16)))
    all_sizes, all_batches = (*SIZES, *OTHER_SIZES), (*BATCHES, *OTHER_BATCHES)
    yield from _grid(CELLS, DTYPES, all_sizes, all_batches, BOTH)
    yield from _special(CELLS, DTYPES, ((1024, 64), (128, 16), (512, 16)))
    yield from _grid(CELLS, DTYPES, all_sizes, all_batches, ("forward",))


def _in_turn(*groups: list[Case]) -> Iterator[Case]:
    """Two of each group, which are the two passes of a layer, then the next two."""
    for at in range(0, max(map(len, groups)), len(BOTH)):
        for group in groups:
            yield from group[at : at + len(BOTH)]


def _grid(
    cells: Iterable[str],
    dtypes: Iterable[str],
    sizes: Iterable[int],
    batches: Iterable[int],
    phases: Iterable[str],
    T: int = 256,
    **kind: Any,
) -> list[Case]:
    return [
        Case(cell, B, min(T, max(16, ELEMENTS // (B * H))), H, phase=phase, dtype=dtype, **kind)
        for H in sizes
        for B in batches
        for dtype in dtypes
        for cell in cells
        for phase in phases
    ]


def _special(
    cells: tuple[str, ...],
    dtypes: tuple[str, ...],
    sizes: Iterable[tuple[int, int]],
    T: int = 256,
    phases: tuple[str, ...] = BOTH,
) -> list[Case]:
    found = []
    for H, B in sizes:
        for kind in KINDS:
            found += _grid(cells, dtypes, (H,), (B,), phases, T, **kind)
        found += _grid(cells, dtypes, (H,), (1,), ("decode",), T=1)
    return found


# --- measuring -----------------------------------------------------------------------------------


def measure(settings: Settings, rows: Rows, clock: Clock) -> None:
    by_label = {case.label: case for case in cases(settings)}
    todo = rows.left(by_label)
    if not todo or clock.over:
        return
    needed = [ORACLE, *(f"ours/{variant}" for variant in settings.variants)]
    with Contenders(clock, threads=1) as contenders:
        missing = absent(dict.fromkeys([*RIVALS, *needed]), needed, settings.device, contenders)
        for label in todo:
            rows.do(label, clock, lambda c=by_label[label]: _row(c, missing, needed, contenders))
    say(f"{sum(map(rows.done, by_label))} of {len(by_label)} rows")


def absent(
    names: Iterable[str], needed: Iterable[str], device: str, contenders: Contenders
) -> dict[str, str | None]:
    """Why each cannot run here, None if it can. Raises RuntimeError if a needed one cannot."""
    found = {name: contenders.missing(name, device) for name in names}
    for name, reason in found.items():
        if reason:
            say(f"{name}: {reason}")
    if lacking := [f"{name}: {found[name]}" for name in needed if found[name]]:
        raise RuntimeError("; ".join(lacking))
    return found


def _row(
    case: Case, missing: dict[str, str | None], needed: list[str], contenders: Contenders
) -> Row:
    row = compare(case, missing, needed, contenders)
    timed = "us" in row["peers"][ORACLE]
    return row | {"cudnn": _algorithm(case, contenders)} if timed else row


def compare(
    case: Case, missing: dict[str, str | None], needed: Iterable[str], contenders: Contenders
) -> Row:
    """Check and time those that are not missing. It is an error if one of ``needed`` is not timed.

    torch.nn must be one of them: it says what is right, and how far off results may be.
    """
    names = list(missing)
    peers: dict[str, Row] = {name: {"missing": missing[name]} for name in names if missing[name]}
    with tempfile.TemporaryDirectory(prefix="gpu_check-") as folder:
        expected = Path(folder) / "expected.pt"
        contenders.ask(ORACLE, "expected", case, expected, limit_s=LOAD_S)
        for name in [name for name in names if name not in peers]:
            limit_s = COMPILE_S if name == "flashrnn" else LOAD_S
            load = _attempt(contenders, name, "load", case, expected, limit_s=limit_s)
            peers[name] = load
    own = peers[ORACLE].get("errors")
    if own is None:
        return {"case": case.to_json(), "peers": peers, "error": f"torch.nn: {peers[ORACLE]}"}
    tf32 = case.dtype == "float32" and case.device == "cuda"
    for name, peer in peers.items():
        errors = peer.get("errors", {})
        if name != ORACLE and (bad := wrong("tf32" if tf32 else case.dtype, errors, own)):
            peer["failed"] = f"wrong: {bad}"
    _play(case, peers, contenders)
    row: Row = {"case": case.to_json(), "peers": peers}
    if failed := {name: peers[name] for name in needed if "us" not in peers[name]}:
        row["error"] = "; ".join(f"{name}: {why_not(peer)}" for name, peer in failed.items())
    return row


def why_not(peer: Row) -> str | None:
    """Why it was not timed."""
    return next((peer[why] for why in ("failed", "refused", "missing") if peer.get(why)), None)


def _attempt(contenders: Contenders, name: str, command: str, *arguments: Any, **limit: Any) -> Row:
    try:
        return contenders.ask(name, command, *arguments, **limit)
    except (Late, Failed) as error:
        return {"failed": str(error)}


def wrong(precision: str, errors: dict[str, float], own: dict[str, float]) -> str | None:
    """The worst of the results that are off by more than they may be, in words.

    ``own`` is what torch.nn is off by in the same precision, one of FLOORS.
    """
    floor = FLOORS[precision]
    bad = {n: e for n, e in errors.items() if not e <= 2 * own[n] + floor}  # NaN is bad too
    if not bad:
        return None
    name = max(bad, key=lambda n: bad[n] / (2 * own[n] + floor))
    return f"{name} is off by {bad[name]:.2g} of its largest entry, torch.nn by {own[name]:.2g}"


def _play(case: Case, peers: dict[str, Row], contenders: Contenders) -> None:
    """Turns in rounds; ``us`` is the median over them, per step."""
    ready = [name for name, peer in peers.items() if "call_s" in peer and "failed" not in peer]
    start = time.monotonic()
    for number in range(ROUNDS):
        if number >= 2 and time.monotonic() - start > ROUNDS_S:
            break
        for name in ready[number % len(ready) :] + ready[: number % len(ready)]:
            peer = peers[name]
            if "failed" not in peer:
                limit_s = 5 + 20 * peer["call_s"]
                peer |= _turn(case, name, peer.get("rounds", []), contenders, limit_s)
    for name in ready:
        if "failed" not in peers[name]:
            peers[name]["us"] = statistics.median(peers[name]["rounds"])


def _turn(
    case: Case, name: str, rounds: list[float], contenders: Contenders, limit_s: float
) -> Row:
    answer = _attempt(contenders, name, "turn", WARM_S, SAMPLE_S, limit_s=limit_s)
    if "failed" in answer:
        return answer
    return {"rounds": [*rounds, answer["median_s"] / case.T * 1e6]}


def _algorithm(case: Case, contenders: Contenders) -> Row:
    """What torch.nn ran, by the names of its kernels."""
    found = _attempt(contenders, ORACLE + PROFILED, "kernels", case, limit_s=LOAD_S)
    if isinstance(found, dict):
        return found
    launches = sum(count for _, count, _ in found)
    persistent = any("persist" in name.lower() for name, _, _ in found)
    name = "persistent" if persistent else "standard" if launches > case.T else "few launches"
    top = [[name[:90], count, us / case.T] for name, count, us in found[:4]]
    return {"algorithm": name, "launches": launches, "kernels": top}


# --- the table -----------------------------------------------------------------------------------


def ratios(row: Row, rival: str) -> dict[str, float]:
    """By variant of ours, how many times longer a rival takes: above 1, ours is faster."""
    theirs = row["peers"].get(rival, {}).get("rounds")
    if not theirs:
        return {}
    return {
        name.partition("/")[2]: statistics.median(
            b / a for a, b in zip(peer["rounds"], theirs, strict=True)
        )
        for name, peer in row["peers"].items()
        if name.startswith("ours/") and "us" in peer
    }


def table(rows: Rows) -> list[str]:
    lines = []
    good = {key: row for key, row in rows.good().items() if "peers" in row}
    for rival in RIVALS:
        best: dict[str, tuple[float, str]] = {}
        for key, row in good.items():
            if found := ratios(row, rival):
                variant = max(found, key=found.__getitem__)
                best[key] = found[variant], variant
        if best:
            lines += _against(rival, best, good)
        failed = [row["peers"].get(rival, {}) for row in good.values()]
        if failed := [peer["failed"] for peer in failed if "failed" in peer]:
            lines.append(f"  {rival} failed in {len(failed)} rows, first: {failed[0][:200]}")
    return lines


def _against(rival: str, best: dict[str, tuple[float, str]], good: dict[str, Row]) -> list[str]:
    wins = defaultdict(int)
    for _, variant in best.values():
        wins[variant] += 1
    fastest = ", ".join(f"{variant} in {number}" for variant, number in wins.items())
    lines = [f"ours against {rival}: {len(best)} rows; our fastest variant: {fastest}"]

    def means(title: str, group: Callable[[dict[str, Any]], str]) -> None:
        groups: dict[str, list[float]] = defaultdict(list)
        for key, (ratio, _) in best.items():
            groups[group(good[key]["case"])].append(ratio)
        shown = (f"{name} {geometric_mean(r):.2f} ({len(r)})" for name, r in groups.items())
        lines.append(f"  geometric means by {title}: " + ", ".join(shown))

    means("pass", lambda case: case["phase"])
    means("cell and dtype", lambda case: f"{case['cell']} {case['dtype']}")
    means("H", lambda case: f"H{case['H']}")
    means("B", lambda case: f"B{case['B']}")
    order = sorted(best, key=lambda key: best[key][0])
    slow = [key for key in order if best[key][0] < SLOW]
    lines.append(f"  below {SLOW}: {len(slow)} rows; the worst first, then the best three")
    shown = slow if len(slow) > 12 else order[:12]
    for key in dict.fromkeys([*shown, *order[-3:]]):
        lines.append("    " + _line(key, rival, *best[key], good[key]))
    return lines


def _line(key: str, rival: str, ratio: float, variant: str, row: Row) -> str:
    ours, theirs = row["peers"][f"ours/{variant}"]["us"], row["peers"][rival]["us"]
    text = f"{ratio:5.2f}  {key}: {ours:.3g} us a step ({variant}), {theirs:.3g}"
    return f"{text} ({row['cudnn'].get('algorithm', '?')})" if rival == ORACLE else text
