"""Fresh random numbers in every run, and the seed to have them again."""

from __future__ import annotations

import os
from collections.abc import Generator

import emulated
import pytest
import torch
from hypothesis import HealthCheck, settings

SEED = int(os.environ.get("FUSED_RNN_TEST_SEED") or int.from_bytes(os.urandom(4), "little"))
REPEAT = f"FUSED_RNN_TEST_SEED={SEED} repeats the random inputs"


# Examples are found anew in every run, like the numbers in them.
settings.register_profile(
    "fused_rnn",
    max_examples=30,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
settings.load_profile("fused_rnn")


def pytest_configure(config: pytest.Config) -> None:
    # Teams of threads are the CPU engine's. Beside another run of pytest they cost time.
    teams = not emulated.WANTED and os.environ.get("FUSED_RNN_BACKEND") != "reference"
    torch.set_num_threads(min(2, os.cpu_count() or 1) if teams else 1)
    if emulated.ENGINE:
        emulated.use()


def pytest_report_header(config: pytest.Config) -> str:
    backend = os.environ.get("FUSED_RNN_BACKEND") or "auto"
    if emulated.WANTED:
        backend = "the CUDA engine, emulated"
    elif emulated.ENGINE:
        backend = f"the CPU's engine, as {emulated.ENGINE}"
    return f"fused_rnn: backend {backend}, torch {torch.__version__}, {REPEAT}"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if report.failed:
        report.sections.append(("seed", REPEAT))
    return report


@pytest.fixture(autouse=True)
def seed() -> int:
    """Every test starts from the session's seed, so it repeats alone as it ran among the others."""
    torch.manual_seed(SEED)
    return SEED
