"""Everything that only a card can tell, in one command: ``python -m benchmarks.gpu_check``

It needs torch, nvcc, ninja, numpy and pytest, and is run in the repository's root:

    python -m benchmarks.gpu_check --out DIR                # build, tests, device, sanitizer, peers
    python -m benchmarks.gpu_check --out DIR --part peers   # again, until no row is left

Each call ends within its --budget, 520 s if nothing is said, and 40 s for rows under way and the
table. DIR/gpu_check-PART.json has each row as soon as it is known. A row that is there is kept; one
that failed holds its error and is tried again. So a second call goes on where the first stopped,
on another machine too if DIR goes with it, but not on another kind of card: take another DIR.
The table is printed last, and stands whole in DIR/gpu_check.txt; --budget 0 only prints it.

    build      the CUDA library, seconds to build it, compile gate, versions, properties of the card
    tests      every test of the CUDA engine; one that hangs or crashes is named, and the others go
               on without it
    device     barriers, latencies, broadcast, launches, mma.sync; where a step of ours spends time
    sanitizer  memcheck and racecheck over the smallest layers, by variant
    peers      ours against torch.nn (cuDNN), FlashRNN and haste, results checked against float64

Without a card, ``--device cpu --tiny`` goes through the same steps on the CPU engine.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path

from . import machine
from .gpu import build, device, sanitizer, tests, versus
from .gpu.rows import Clock, Rows, Settings, last_lines, output, say

PARTS = {"build": build, "tests": tests, "device": device, "sanitizer": sanitizer, "peers": versus}

# Of the time that is left, what a part may take before the next one begins, when all are run.
SHARES = {"build": 1.0, "tests": 0.45, "device": 0.35, "sanitizer": 0.3, "peers": 1.0}

SHOWN = 11_000  # characters of the table that are printed


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu_check",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("--out", type=Path, required=True, metavar="DIR", help="where results are kept")
    p.add_argument("--part", choices=(*PARTS, "all"), default="all")
    p.add_argument("--budget", type=float, default=520, metavar="SECONDS", help="default: 520")
    p.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    p.add_argument("--tiny", action="store_true", help="a few small rows")
    p.add_argument(
        "--variants",
        nargs="+",
        default=["plan", "graph"],
        help="of ours, as FUSED_RNN_VARIANT has them; `plan`: what our own plan chooses",
    )
    p.add_argument(
        "--tests",
        nargs="+",
        default=["tests/test_cuda.py", "tests/test_resident.py"],
        help="what pytest is given",
    )
    p.add_argument("--stall", type=float, default=60, help="seconds after which a test hangs")
    return p


def card(device: str) -> str:
    """The name of what is measured. Raises RuntimeError if there is no card."""
    if device == "cpu":
        return "cpu"
    if not shutil.which("nvidia-smi"):
        raise RuntimeError("there is no card here (no nvidia-smi): --device cpu --tiny")
    query = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    return output(query, 60).splitlines()[0].strip()


def table(parts: dict[str, Rows]) -> str:
    lines = []
    for name, rows in parts.items():
        errors = rows.errors()
        lines.append(f"== {name} on {rows.card}: {len(rows.good())} rows, {len(errors)} failed")
        sources = {row["source"] for row in rows.rows.values()}
        if sources - {rows.source}:
            lines.append(f"rows of other sources: {', '.join(sorted(sources - {rows.source}))}")
        lines += PARTS[name].table(rows)
        lines += [f"FAILED {key}: {last_lines(text, 3)}" for key, text in errors.items()]
    return "\n".join(lines) + "\n"


def main(arguments: list[str] | None = None) -> int:
    a = parser().parse_args(arguments)
    settings = Settings(a.device, a.tiny, tuple(a.variants), tuple(a.tests), a.stall)
    clock = Clock(a.budget)
    names = list(PARTS) if a.part == "all" else [a.part]
    try:
        name, source = card(a.device), machine.source()
        parts = {part: Rows(a.out / f"gpu_check-{part}.json", name, source) for part in names}
    except (RuntimeError, ValueError) as error:
        print(error, file=sys.stderr)
        return 2
    for part, rows in parts.items():
        own = clock.part(SHARES[part]) if a.part == "all" else clock
        if own.over:
            continue
        say(f"{part}, for at most {own.left:.0f} s")
        rows.rows.pop(f"part {part}", None)
        try:
            PARTS[part].measure(settings, rows, own)
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
