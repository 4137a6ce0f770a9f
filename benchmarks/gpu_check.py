"""Everything that only a card can tell, in one command: ``python -m benchmarks.gpu_check``

It needs torch, nvcc, ninja, numpy and pytest, and is run in the repository's root. Where a card is
at hand for a quarter of an hour, in two calls:

    python -m benchmarks.gpu_check --out DIR --call 1   # 330 s: right, and faster than before?
    python -m benchmarks.gpu_check --out DIR --call 2   # 380 s: against others

Or part by part, each with a budget of its own:

    python -m benchmarks.gpu_check --out DIR                # all parts, 520 s
    python -m benchmarks.gpu_check --out DIR --part peers   # again, until no row is left

A call ends within its --budget, and 40 s for rows under way and the table, which are part of the
330 and the 380 s. Every part has its share of that time and what those before it left over; none
costs the others their turn. DIR/gpu_check-PART.json has each row as soon as it is known. A row that
is there is kept if it is of these sources; one that failed holds its error and is tried again,
after those that were never tried. So a second call goes on where the first stopped, on another
machine too if DIR goes with it, but not on another kind of card: take another DIR. The table is
printed last, and stands whole in DIR/gpu_check.txt; --budget 0 only prints it.

    build      the CUDA library, seconds to build it, versions, properties of the card
    gate       registers of each kernel, by the compiler that is here
    tests      every test of the CUDA engine; one that hangs or crashes is named, and the others go
               on without it
    stress     streams, threads, plans as large as the card, workspaces that are taken away; errors
               over 256 steps of 512 and 1024 units
    device     barriers, latencies, broadcast, launches, mma.sync; where a step of ours spends time
    baseline   ours against another checkout of ours, whose folder BENCHMARKS_BASELINE names
    sanitizer  memcheck and racecheck over the smallest layers, by variant
    peers      ours against torch.nn (cuDNN), the same in a CUDA graph, FlashRNN and haste, results
               checked against float64

Without a card, ``--device cpu --tiny`` goes through the same steps on the CPU engine.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from dataclasses import replace
from pathlib import Path

from . import machine
from .gpu import baseline, build, device, gate, sanitizer, stress, tests, versus
from .gpu.rows import Clock, Rows, Settings, last_lines, output, say

PARTS = {
    "build": build,
    "gate": gate,
    "tests": tests,
    "stress": stress,
    "device": device,
    "baseline": baseline,
    "sanitizer": sanitizer,
    "peers": versus,
}

# What is done together: the parts, and the seconds meant for each. Their sum is the budget.
CALLS: dict[str, dict[str, float]] = {
    "all": {
        "build": 100,
        "gate": 40,
        "tests": 80,
        "stress": 60,
        "device": 70,
        "baseline": 30,
        "sanitizer": 50,
        "peers": 90,
    },
    "1": {"build": 100, "tests": 55, "stress": 55, "baseline": 35, "sanitizer": 45},
    "2": {"build": 100, "peers": 240},
}
OVERRUN = 40  # seconds after the budget in which a call has ended, see rows.GRACE
PART_S = 520  # the budget of a part that is run alone

SHOWN = 11_000  # characters of the table that are printed


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu_check",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("--out", type=Path, required=True, metavar="DIR", help="where results are kept")
    what = p.add_mutually_exclusive_group()
    what.add_argument("--call", choices=("1", "2"), help="of the two of a quarter of an hour")
    what.add_argument("--part", choices=(*PARTS, "all"), default="all")
    p.add_argument("--budget", type=float, metavar="SECONDS", help="default: see above")
    p.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    p.add_argument("--tiny", action="store_true", help="a few small rows")
    p.add_argument(
        "--variants",
        nargs="+",
        default=["plan"],
        help="of ours, as FUSED_RNN_VARIANT has them; `plan`: what our own plan chooses",
    )
    p.add_argument(
        "--tests",
        nargs="+",
        default=["tests/test_cuda.py", "tests/test_resident.py", "tests/test_native_stages.py"],
        help="what pytest is given",
    )
    p.add_argument("--stall", type=float, default=30, help="seconds after which a test hangs")
    return p


def plan(call: str | None, part: str) -> dict[str, float]:
    """The parts to run, and the seconds meant for each."""
    name = call or part
    return CALLS[name] if name in CALLS else {name: PART_S}


def turn(seconds: dict[str, float], part: str, clock: Clock) -> Clock:
    """That of a part which begins now: of the time that is left, as much for each second that is
    meant for it as for those of the parts behind it.
    """
    names = list(seconds)
    return clock.part(seconds[part] / sum(seconds[name] for name in names[names.index(part) :]))


def card(device: str) -> str:
    """The name of what is measured. Raises RuntimeError if there is no card."""
    if device == "cpu":
        return "cpu"
    if not shutil.which("nvidia-smi"):
        raise RuntimeError("there is no card here (no nvidia-smi): --device cpu --tiny")
    query = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    return output(query, 60).splitlines()[0].strip()


def table(parts: dict[str, Rows]) -> str:
    """Every part in short, then what failed: many failures must not push figures out of sight."""
    lines, failures = [], []
    for name, rows in parts.items():
        errors = rows.errors()
        lines.append(f"== {name} on {rows.card}: {len(rows.good())} rows, {len(errors)} failed")
        if others := rows.others():
            counts = ", ".join(f"{number} of {source}" for source, number in sorted(others.items()))
            lines.append(f"left out, of other sources than {rows.source}: {counts}")
        lines += PARTS[name].table(rows)
        failures += [f"FAILED {key}: {last_lines(text, 3)}" for key, text in errors.items()]
    return "\n".join(lines + failures) + "\n"


def main(arguments: list[str] | None = None) -> int:
    a = parser().parse_args(arguments)
    settings = Settings(a.device, a.tiny, tuple(a.variants), tuple(a.tests), a.stall)
    seconds = plan(a.call, a.part)
    clock = Clock(sum(seconds.values()) if a.budget is None else a.budget)
    try:
        name, source = card(a.device), machine.source()
        parts = {part: Rows(a.out / f"gpu_check-{part}.json", name, source) for part in seconds}
    except (RuntimeError, ValueError) as error:
        print(error, file=sys.stderr)
        return 2
    for part, rows in parts.items():
        own = turn(seconds, part, clock)
        if own.over:
            continue
        say(f"{part}, for at most {own.left:.0f} s")
        rows.rows.pop(f"part {part}", None)
        try:
            PARTS[part].measure(settings, rows, own)
            if part == "build":
                settings = replace(settings, built=rows.done("library"))
        except Exception as error:  # no part may cost the others their turn, or the table
            rows.put(f"part {part}", {"error": f"{type(error).__name__}: {error}"[-600:]})
    text = table(parts)
    a.out.mkdir(parents=True, exist_ok=True)
    (a.out / "gpu_check.txt").write_text(text)
    cut = f"... the rest is in {a.out / 'gpu_check.txt'}\n" if len(text) > SHOWN else ""
    print(f"\n{text[:SHOWN]}{cut}", end="", flush=True)
    return 1 if any(rows.errors() for rows in parts.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
