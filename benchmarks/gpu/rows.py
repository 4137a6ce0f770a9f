"""What the parts share: rows that outlive a kill, a clock, and processes that cannot hang."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]

# Seconds that a row which began within the budget may take beyond its end.
GRACE = 20.0

Row = dict[str, Any]


@dataclass(frozen=True)
class Settings:
    device: str  # "cuda", or "cpu" for a dry run
    tiny: bool  # a few small rows
    variants: tuple[str, ...]  # of ours: values of FUSED_RNN_VARIANT, or "plan" to force none
    tests: tuple[str, ...]  # what pytest is given
    stall_s: float  # a test that takes longer hangs
    built: bool = False  # the library is there: no test has to build it


class Clock:
    """A budget that runs down."""

    def __init__(self, seconds: float) -> None:
        self._end = time.monotonic() + seconds

    @property
    def left(self) -> float:
        return self._end - time.monotonic()

    @property
    def over(self) -> bool:
        return self.left <= 0

    def part(self, share: float) -> Clock:
        """A clock for a share of what is left."""
        return Clock(max(0.0, self.left) * share)

    def limit(self, seconds: float) -> float:
        """Of a row that begins now and may take so long."""
        return max(0.1, min(seconds, self.left + GRACE))


class Rows:
    """Rows by key, in order. One that failed holds its ``error`` and counts as not done.

    A row of other sources than these is kept in the file until it is measured again, and is none
    of what is done, good or failed.
    """

    def __init__(self, path: Path, card: str, source: str) -> None:
        """Go on with a file, or begin one. Raises ValueError for the file of another card."""
        self.path, self.card, self.source = path, card, source
        self.rows: dict[str, Row] = {}
        self._writing = threading.Lock()
        if path.exists():
            data = json.loads(path.read_text())
            if data["card"] != card:
                raise ValueError(f"{path} is of {data['card']}, this is {card}: choose another DIR")
            self.rows = data["rows"]

    def current(self) -> dict[str, Row]:
        return {key: row for key, row in self.rows.items() if row["source"] == self.source}

    def others(self) -> Counter[str]:
        """How many rows there are of each of the other sources."""
        return Counter(row["source"] for row in self.rows.values() if row["source"] != self.source)

    def done(self, key: str) -> bool:
        row = self.rows.get(key)
        return row is not None and row["source"] == self.source and "error" not in row

    def good(self) -> dict[str, Row]:
        return {key: row for key, row in self.current().items() if "error" not in row}

    def errors(self) -> dict[str, str]:
        return {key: row["error"] for key, row in self.current().items() if "error" in row}

    def left(self, keys: Iterable[str]) -> list[str]:
        """What is left to do of these: first what has no row at all, then what failed or is of
        other sources.
        """
        left = [key for key in dict.fromkeys(keys) if not self.done(key)]
        return sorted(left, key=lambda key: key in self.rows)

    def put(self, key: str, row: Row) -> None:
        """Written down at once, in a way that a kill cannot spoil."""
        with self._writing:
            self.rows[key] = _rounded(row) | {"source": self.source}
            self.path.parent.mkdir(parents=True, exist_ok=True)
            rows = ",\n".join(f"  {json.dumps(k)}: {json.dumps(r)}" for k, r in self.rows.items())
            text = f'{{"card": {json.dumps(self.card)},\n "rows": {{\n{rows}\n }}\n}}\n'
            temporary = self.path.with_suffix(".tmp")
            temporary.write_text(text)
            temporary.replace(self.path)

    def do(self, key: str, clock: Clock, work: Callable[[], Row]) -> None:
        """Call ``work`` for a row that is not there yet, unless the time is over."""
        if self.done(key) or clock.over:
            return
        start = time.monotonic()
        try:
            row = work()
        except Exception as error:  # one row may fail, the others go on
            row = {"error": f"{type(error).__name__}: {error}"[-600:]}
        row["took_s"] = time.monotonic() - start
        self.put(key, row)
        say(f"{key}: {row['error'] if 'error' in row else 'ok'} ({row['took_s']:.1f} s)")


def _rounded(value: Any) -> Any:
    """Five digits are more than any clock here knows."""
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, dict):
        return {name: _rounded(item) for name, item in value.items()}
    return [_rounded(item) for item in value] if isinstance(value, (list, tuple)) else value


_start = time.monotonic()


def say(text: str) -> None:
    print(f"[{time.monotonic() - _start:4.0f} s] {text}", flush=True)


def output(
    command: list[str], limit_s: float, env: Mapping[str, str] | None = None, errors: bool = False
) -> str:
    """What a command prints; with ``errors``, on stderr too, which else goes to ours.

    Raises RuntimeError with its last lines if it fails, or is killed after limit_s seconds.
    """
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env={**os.environ, **(env or {})},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT if errors else None,
        text=True,
        errors="replace",
        start_new_session=True,  # so that its children end with it
    )
    try:
        text, _ = process.communicate(timeout=limit_s)
    except subprocess.TimeoutExpired:
        kill(process)
        raise RuntimeError(f"killed after {limit_s:.0f} s") from None
    if process.returncode:
        raise RuntimeError(f"exit code {process.returncode}: {last_lines(text)}")
    return text


def kill(process: subprocess.Popen[str]) -> None:
    """With its children. One that the driver holds in the kernel is not waited for."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate(timeout=10)
    except (ProcessLookupError, subprocess.TimeoutExpired):
        pass


def last_lines(text: str, number: int = 8) -> str:
    return "\n".join([line for line in text.splitlines() if line.strip()][-number:])
