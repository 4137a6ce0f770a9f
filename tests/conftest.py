"""Fresh random numbers in every run, and the seed to have them again; roles; quick runs; Dynamo
without a past."""

from __future__ import annotations

import os
import random
import re
from collections.abc import Generator
from pathlib import Path

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


def roles(config: pytest.Config) -> set[str]:
    """What pyproject.toml declares: markers whose text begins with "role"."""
    declared = [line.split(": ") for line in config.getini("markers")]
    return {name for name, kind, *_ in declared if kind == "role"}


def marks(path: Path) -> set[str]:
    """All that are named in a file of tests."""
    return set(re.findall(r"\bpytest\.mark\.(\w+)", path.read_text()))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--roles",
        type=lambda text: set(text.split(",")),
        default=set(),
        metavar="ROLE,ROLE",
        help="only files of tests of these roles",
    )
    parser.addoption(
        "--quick",
        type=int,
        default=0,
        metavar="N",
        help="of the cases of each test function N, drawn by the seed",
    )
    parser.addoption("--all", action="store_true", help="all cases, whatever is drawn otherwise")


def pytest_configure(config: pytest.Config) -> None:
    # Teams of threads are the CPU engine's. Beside another run of pytest they cost time.
    teams = not emulated.WANTED and os.environ.get("FUSED_RNN_BACKEND") != "reference"
    torch.set_num_threads(min(2, os.cpu_count() or 1) if teams else 1)
    if emulated.ENGINE:
        emulated.use()


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Files of other roles are not even imported, which takes longer than many tests."""
    wanted = config.getoption("--roles")
    if not wanted or not collection_path.match("test_*.py"):
        return None
    known = roles(config)
    if unknown := wanted - known:
        raise pytest.UsageError(f"--roles: one of {sorted(known)}, not {sorted(unknown)}")
    return not marks(collection_path) & wanted or None


@pytest.hookimpl(trylast=True)  # after those that -m and -k leave out
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    cases: dict[str, list[pytest.Item]] = {}
    for item in items:
        drawn = item.get_closest_marker("drawn")
        group = drawn.kwargs.get("of") if drawn else None
        cases.setdefault(group or item.nodeid.partition("[")[0], []).append(item)
    draw = random.Random(SEED)
    kept: set[pytest.Item] = set()
    for some in cases.values():
        most, drawn = config.getoption("--quick"), some[0].get_closest_marker("drawn")
        if drawn:
            most = min(most or drawn.args[0], drawn.args[0])
        if config.getoption("--all"):
            most = 0
        kept.update(draw.sample(some, min(most, len(some))) if most else some)
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


@pytest.fixture
def fresh_dynamo() -> Generator[None]:
    """Nothing that an earlier test compiled, nor left for a later one."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()
