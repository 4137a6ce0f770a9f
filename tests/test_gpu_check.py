"""The check for a machine with a card, gone through on the CPU: it goes on, and hides nothing."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from benchmarks import gpu_check
from benchmarks.cases import Case
from benchmarks.gpu import device, versus
from benchmarks.gpu.rows import ROOT, Clock, Rows, Settings, output

pytestmark = pytest.mark.compiling

CUDA = Settings("cuda", False, ("graph", "steps"), "tests/test_cuda.py", 60)

# Until the file `mended` is there, one test fails, one ends its process and one hangs.
TESTS = """
import os, time
from pathlib import Path
import pytest

MENDED = Path(__file__).with_name("mended").exists()

def test_passes(): pass
def test_fails(): assert MENDED, "of no use yet"
def test_crashes(): MENDED or os._exit(3)
def test_hangs(): MENDED or time.sleep(100)
@pytest.mark.skip(reason="not here")
def test_is_skipped(): pass
def test_comes_last(): pass
"""


def check(folder: Path, tests: Path, *arguments: str) -> tuple[int, str]:
    """Exit code and output of the command."""
    command = [sys.executable, "-m", "benchmarks.gpu_check", "--device", "cpu", "--tiny"]
    command += ["--out", str(folder), "--tests", str(tests), "--stall", "3", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert "Traceback" not in done.stderr, done.stderr
    return done.returncode, done.stdout


def rows_in(folder: Path) -> dict[str, dict[str, Any]]:
    files = folder.glob("gpu_check-*.json")
    return {path.stem.partition("-")[2]: json.loads(path.read_text())["rows"] for path in files}


@pytest.mark.skipif(
    os.environ.get("FUSED_RNN_BACKEND") == "reference", reason="it runs the native kernels anyway"
)
def test_dry_run_goes_on_where_it_stopped(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, tests = tmp_path / "out", tmp_path / "test_these.py"
    tests.write_text(TESTS)

    without_time = ["--device", "cpu", "--tiny", "--out", str(out), "--budget", "0"]
    assert gpu_check.main(without_time) == 0 and not rows_in(out)

    code, text = check(out, tests)
    first = rows_in(out)
    assert code == 1 and set(first) == {"build", "tests", "device", "sanitizer", "peers"}
    errors = {k: r["error"] for rows in first.values() for k, r in rows.items() if "error" in r}
    named = {key.partition("::")[2]: error for key, error in errors.items()}
    assert set(named) == {"test_fails", "test_crashes", "test_hangs"}, named
    assert "of no use yet" in named["test_fails"]
    assert "exit code 3" in named["test_crashes"]
    assert "no sign of life" in named["test_hangs"]
    assert all(f"FAILED {key}" in text for key in errors)
    assert first["build"]["library"]["backend"] == "native"
    assert len(first["tests"]) == 6
    peers = first["peers"]
    assert len(peers) == len(versus.cases(Settings("cpu", True, (), (), 0)))
    for row in peers.values():
        assert {"torch_nn", "ours/plan", "ours/graph"} <= {
            n for n in row["peers"] if "us" in row["peers"][n]
        }
    assert "ours against torch_nn" in text

    # What failed is tried again, and nothing else.
    tests.with_name("mended").touch()
    file = out / "gpu_check-peers.json"
    data = json.loads(file.read_text())
    again = next(iter(peers))
    data["rows"][again] = {"error": "a card fell out", "source": "other"}
    file.write_text(json.dumps(data))
    code, text = check(out, tests)
    assert code == 0, text
    second = rows_in(out)
    mended = {key for key in errors} | {again}
    for part, rows in first.items():
        assert set(second[part]) == set(rows)
        changed = {key for key in rows if second[part][key] != rows[key]}
        assert changed == mended & set(rows)
        assert not any("error" in row for row in second[part].values())

    # Without time there is the table and nothing else.
    capsys.readouterr()
    assert gpu_check.main(without_time) == 0 and rows_in(out) == second
    text = capsys.readouterr().out
    assert "5 passed, 1 skipped, 0 failed" in text and "ours against torch_nn" in text
    assert text.strip() == (out / "gpu_check.txt").read_text().strip()


def test_rows_of_two_cards_are_not_mixed(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    Rows(path, "one card", "source").put("row", {"us": 1.23456789})
    assert Rows(path, "one card", "source").rows["row"]["us"] == 1.2346
    with pytest.raises(ValueError, match="of one card, this is another"):
        Rows(path, "another", "source")


def test_a_command_that_hangs_is_killed_with_its_children() -> None:
    with pytest.raises(RuntimeError, match="killed after"):
        output(["sh", "-c", "sleep 100; true"], 0.2)
    with pytest.raises(RuntimeError, match="exit code 3: the reason"):
        output(["sh", "-c", "echo the reason; exit 3"], 10)


@pytest.mark.parametrize(
    ("dtype", "theirs", "ours", "bad"),
    [
        ("bfloat16", 1e-2, 2e-2, False),
        ("bfloat16", 1e-2, 4e-2, True),
        ("float16", 0.0, 0.9e-3, False),  # a unit in the last place, where torch.nn is exact
        ("float16", 0.0, 3e-3, True),
        ("float32", 1e-4, 1e-3, False),  # TF32
        ("float32", 1e-4, float("nan"), True),
    ],
)
def test_results_may_be_twice_as_far_off_as_those_of_torch(
    dtype: str, theirs: float, ours: float, bad: bool
) -> None:
    case = Case("lstm", 2, 4, 8, dtype=dtype, device="cuda")
    wrong = versus._wrong(case, {"y": ours, "h_n": 0.0}, {"y": theirs, "h_n": 0.0})
    assert (wrong is not None) == bad
    assert not bad or "y is off by" in wrong


def test_what_is_slow_is_named(tmp_path: Path) -> None:
    rows = Rows(tmp_path / "rows.json", "card", "source")

    def put(H: int, graph: list[float], steps: list[float], theirs: list[float]) -> str:
        case = Case("lstm", 16, 256, H, dtype="bfloat16", device="cuda")
        times = {"ours/graph": graph, "ours/steps": steps, "torch_nn": theirs}
        peers = {name: {"rounds": us, "us": us[1]} for name, us in times.items()}
        rows.put(case.label, {"case": case.to_json(), "peers": peers, "cudnn": {}})
        return case.label

    fast = put(512, [1, 2, 1], [4, 4, 4], [4, 8, 4])
    slow = put(1024, [9, 9, 9], [4, 4, 4], [2, 2, 2])
    assert versus.ratios(rows.rows[fast], "torch_nn") == {"graph": 4, "steps": 1}
    lines = versus.table(rows)
    assert "graph in 1, steps in 1" in lines[0]
    means = next(line for line in lines if "by H" in line)
    assert "H512 4.00 (1)" in means and "H1024 0.50 (1)" in means
    assert any("by pass: inference 1.41 (2)" in line for line in lines)  # sqrt(4 * 0.5)
    at = next(i for i, line in enumerate(lines) if "below 0.95: 1 rows" in line)
    assert slow in lines[at + 1] and " 0.50 " in lines[at + 1] and "(steps)" in lines[at + 1]


def test_the_whole_grid_is_measured_once_and_in_bearable_sizes() -> None:
    cases = versus.cases(CUDA)
    assert len({case.label for case in cases}) == len(cases)
    wanted = {
        (cell, dtype, H, B, phase)
        for cell in ("lstm", "gru", "rnn")
        for dtype in ("bfloat16", "float16", "float32")
        for H in (64, 128, 256, 512, 768, 1024, 2048)
        for B in (1, 16, 64, 128, 256)
        for phase in ("inference", "forward", "training")
    }
    plain = [c for c in cases if c.layers == c.directions == 1 and not c.ragged]
    assert wanted <= {(c.cell, c.dtype, c.H, c.B, c.phase) for c in plain}
    assert {c.T for c in plain if c.H <= 512 and c.phase != "decode"} == {256}
    assert all(c.T * c.B * c.H <= versus.ELEMENTS for c in cases)
    for kind in ("ragged", "bidirectional"):
        assert any(getattr(c, kind) for c in cases[:150])
    assert any(c.layers == 2 for c in cases[:150]) and any(c.phase == "decode" for c in cases[:150])


@pytest.fixture(scope="module")
def latency(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Future[None]]]:
    """By architecture, the program and its compilation. All begin at once: each takes one core."""
    folder, archs = tmp_path_factory.mktemp("latency"), ("sm_80", "sm_90a")
    programs = {arch: folder / arch for arch in archs}
    with ThreadPoolExecutor(len(archs)) as pool:
        return {
            arch: (program, pool.submit(device.compile_latency, program, arch, 120))
            for arch, program in programs.items()
        }


@pytest.mark.skipif(not shutil.which("nvcc"), reason="there is no nvcc")
@pytest.mark.parametrize("arch", ["sm_80", "sm_90a"])
def test_latency_compiles(arch: str, latency: dict[str, tuple[Path, Future[None]]]) -> None:
    program, compiled = latency[arch]
    compiled.result()
    assert program.exists()


def test_a_clock_gives_no_row_more_than_is_left() -> None:
    assert Clock(0).over and not Clock(100).over
    assert Clock(1000).limit(30) == 30
    assert Clock(0).limit(1000) == pytest.approx(20, abs=1)
    assert Clock(100).part(0.5).left == pytest.approx(50, abs=1)
