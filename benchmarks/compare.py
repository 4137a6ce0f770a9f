"""Two files of results, an older and a newer: what became slower, and what is gone.

Compared is our speed relative to contenders that stand in both files, since a machine is not as
fast today as it was yesterday; times alone count only where nobody else ran. A row is a regression
when it lost more than the tolerance and the two interquartile ranges do not overlap.
"""

from __future__ import annotations

from dataclasses import dataclass

from .report import ms, title
from .results import NO_RIVALS, OURS, Results, Row, Spread, geometric_mean, ratio, seconds, timed


@dataclass(frozen=True)
class Change:
    """``speed``: the new speed over the old, so below 1 is slower. ``sure``: beyond the spread."""

    key: str
    speed: float
    sure: bool
    text: str


def changes(old: Results, new: Results) -> list[Change]:
    """Of all rows that both files have figures for, the worst first."""
    found = [
        _change(key, before, new.rows[key])
        for key, before in old.rows.items()
        if key in new.rows and seconds(before, OURS) and seconds(new.rows[key], OURS)
    ]
    return sorted(found, key=lambda change: change.speed)


def _change(key: str, before: Row, after: Row) -> Change:
    common = [n for n in timed(before) if n in timed(after) and n not in NO_RIVALS]
    pairs = {n: (ratio(before, n), ratio(after, n)) for n in common}
    speeds = {n: b.median / a.median for n, (a, b) in pairs.items() if a and b}
    then, now = seconds(before, OURS), seconds(after, OURS)
    assert then and now
    times = f"ours {ms(then.median)} -> {ms(now.median)} ms"
    if not speeds:
        return Change(key, then.median / now.median, _apart(then, now), times + ", no common peer")
    speed = geometric_mean(speeds.values())
    apart = all(_apart(a, b) for a, b in pairs.values() if a and b)
    moved = ", ".join(
        f"{title(n)} {a.median:.2f} -> {b.median:.2f}" for n, (a, b) in pairs.items() if a and b
    )
    return Change(key, speed, apart, f"{times}; ratios {moved}")


def _apart(a: Spread, b: Spread) -> bool:
    return a.high < b.low or b.high < a.low


def lost(old: Results, new: Results) -> list[str]:
    """Rows that had a figure of ours and have none now."""
    gone = []
    for key, before in old.rows.items():
        if not seconds(before, OURS):
            continue
        after = new.rows.get(key)
        if after is None:
            gone.append(f"{key}: not in the new file")
        elif not seconds(after, OURS):
            record = after["peers"].get(OURS, {})
            gone.append(f"{key}: {next(iter(record.values()), 'not run')}")
    return gone


def main(old: Results, new: Results, tolerance: float) -> int:
    """Print the verdict. Returns 1 if there are regressions or lost rows."""
    compared = changes(old, new)
    slower = [c for c in compared if c.speed < 1 - tolerance and c.sure]
    doubtful = [c for c in compared if c.speed < 1 - tolerance and not c.sure]
    faster = [c for c in reversed(compared) if c.speed > 1 + tolerance and c.sure]
    if old.machine != new.machine:
        print("Two different machines: ratios to peers are compared, as always, but mean less.\n")
    gone = lost(old, new)
    for heading, found in (
        ("Regressions", slower),
        ("Slower, but within the spread", doubtful),
        ("Faster", faster),
    ):
        if found:
            print(f"{heading}:")
            print("\n".join(f"  {c.speed:.2f}x  {c.key}\n         {c.text}" for c in found))
    if gone:
        print("Lost:")
        print("\n".join(f"  {text}" for text in gone))
    if compared:
        mean = geometric_mean(c.speed for c in compared)
        print(f"\n{len(compared)} rows compared, geometric mean of the speed {mean:.3f}x")
    else:
        print("No row is in both files.")
    return 1 if slower or gone or not compared else 0
