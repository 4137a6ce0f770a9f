"""Part stress: what shows only under load. Each test of tests/test_cuda_stress.py is a row."""

from __future__ import annotations

from dataclasses import replace

from . import tests
from .rows import Clock, Rows, Settings

FILES = ("tests/test_cuda_stress.py",)


def measure(settings: Settings, rows: Rows, clock: Clock) -> None:
    tests.measure(replace(settings, tests=FILES), rows, clock)


table = tests.table
