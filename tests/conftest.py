"""Fresh random numbers in every run, and the seed to have them again; roles; quick runs."""

from __future__ import annotations

import os
import random
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


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--quick",
        type=int,
        default=0,
        metavar="N",
        help="of the cases of each test function N, drawn by the seed",
    )


def pytest_configure(config: pytest.Config) -> None:
    # Teams of threads are the CPU engine's. Beside another run of pytest they cost time.
    teams = not emulated.WANTED and os.environ.get("FUSED_RNN_BACKEND") != "reference"
    torch.set_num_threads(min(2, os.cpu_count() or 1) if teams else 1)
    if emulated.ENGINE:
        emulated.use()


def pytest_itemcollected(item: pytest.Item) -> None:
    declared = [line.split(": ") for line in item.config.getini("markers")]
    roles = {name for name, kind, *_ in declared if kind == "role"}
    found = roles & {mark.name for mark in item.iter_markers()}
    if len(found) != 1:
        raise pytest.UsageError(f"{item.nodeid}: one role of {sorted(roles)}, not {sorted(found)}")


@pytest.hookimpl(trylast=True)  # after those that -m and -k leave out
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if most := config.getoption("--quick"):
        cases: dict[str, list[pytest.Item]] = {}
        for item in items:
            cases.setdefault(item.nodeid.partition("[")[0], []).append(item)
        draw = random.Random(SEED)
        kept = {item for some in cases.values() for item in draw.sample(some, min(most, len(some)))}
        config.hook.pytest_deselected(items=[item for item in items if item not in kept])
        items[:] = [item for item in items if item in kept]


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
