"""The check for a machine with a card, gone through on the CPU: it goes on, and hides nothing."""

from __future__ import annotations

import itertools
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import stress
import torch
from cases import LAYERS, OWN_LAYERS
from cases import Case as LayerCase

from benchmarks import gpu_check, machine, peers, problem
from benchmarks.cases import Case
from benchmarks.gpu import baseline, build, device, page, sanitizer, versus
from benchmarks.gpu.rows import ROOT, Clock, Rows, Settings, output
from benchmarks.peers import torch_nn_graph

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


def check(folder: Path, tests: Path, baseline: Path, *arguments: str) -> tuple[int, str]:
    """Exit code and output of the command."""
    command = [sys.executable, "-m", "benchmarks.gpu_check", "--device", "cpu", "--tiny"]
    command += ["--out", str(folder), "--tests", str(tests), "--stall", "3", *arguments]
    env = {**os.environ, "BENCHMARKS_BASELINE": str(baseline)}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=600)
    assert "Traceback" not in done.stderr, done.stderr
    return done.returncode, done.stdout


def rows_in(folder: Path) -> dict[str, dict[str, Any]]:
    files = folder.glob("gpu_check-*.json")
    return {path.stem.partition("-")[2]: json.loads(path.read_text())["rows"] for path in files}


@pytest.mark.slow  # it runs all that a card would
@pytest.mark.skipif(
    os.environ.get("FUSED_RNN_BACKEND") == "reference", reason="it runs the native kernels anyway"
)
def test_dry_run_goes_on_where_it_stopped(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, tests = tmp_path / "out", tmp_path / "test_these.py"
    tests.write_text(TESTS)
    baseline = tmp_path / "baseline"  # the same sources: nothing is compiled
    for folder in ("csrc", "fused_rnn"):
        shutil.copytree(ROOT / folder, baseline / folder)

    without_time = ["--device", "cpu", "--tiny", "--out", str(out), "--budget", "0"]
    assert gpu_check.main(without_time) == 0 and not rows_in(out)

    code, text = check(out, tests, baseline)
    first = rows_in(out)
    parts = {"build", "tests", "stress", "device", "baseline", "sanitizer", "peers"}
    assert code == 1 and set(first) == parts
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
        assert {"torch_nn", "ours/plan"} == {n for n, peer in row["peers"].items() if "us" in peer}
        assert row["peers"]["torch_nn_graph"]["missing"] == "does not run on cpu"
    assert "ours against torch_nn" in text and "ours against the baseline: 2 rows" in text
    for key, row in first["baseline"].items():
        assert key.endswith(f"against {row['source']}") and row["baseline"] == row["source"]
    assert {row["outcome"] for row in first["stress"].values()} == {"skipped"}

    # What failed is tried again, and nothing else.
    tests.with_name("mended").touch()
    file = out / "gpu_check-peers.json"
    data = json.loads(file.read_text())
    again = next(iter(peers))
    data["rows"][again] |= {"source": "other"}  # a figure, but not of these sources
    file.write_text(json.dumps(data))
    code, text = check(out, tests, baseline)
    assert code == 0, text
    second = rows_in(out)
    mended = {key for key in errors} | {again}
    for part, rows in first.items():
        assert set(second[part]) == set(rows)
        changed = {key for key in rows if second[part][key] != rows[key]}
        assert changed - {"library"} == mended & set(rows)  # which is built on each machine
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
    ("precision", "theirs", "ours", "bad"),
    [
        ("bfloat16", 1e-2, 2e-2, False),
        ("bfloat16", 1e-2, 4e-2, True),
        ("float16", 0.0, 0.9e-3, False),  # a unit in the last place, where torch.nn is exact
        ("float16", 0.0, 3e-3, True),
        ("tf32", 1e-4, 1e-3, False),
        ("float32", 1e-4, 1e-3, True),
        ("tf32", 1e-4, float("nan"), True),
    ],
)
def test_results_may_be_twice_as_far_off_as_those_of_torch(
    precision: str, theirs: float, ours: float, bad: bool
) -> None:
    wrong = versus.wrong(precision, {"y": ours, "h_n": 0.0}, {"y": theirs, "h_n": 0.0})
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
    assert {c.T for c in plain if c.H <= 512 and c.phase != "decode"} == {16, 256, 1024}
    assert all(c.T * c.B * c.H <= versus.ELEMENTS for c in cases)
    assert any(c.phase == "decode" for c in cases)


def test_what_was_never_measured_comes_first() -> None:
    """No plain LSTM of the sizes that a card has seen among it, and some of each other kind."""
    cases = versus.cases(CUDA)
    known = [
        i
        for i, c in enumerate(cases)
        if (c.cell, c.T, c.layers, c.directions, c.ragged) == ("lstm", 256, 1, 1, False)
        and c.H in versus.SIZES
        and c.B in versus.BATCHES
    ]
    assert known[0] > 250
    kinds = 13
    first, early = cases[: 2 * kinds], cases[: 2 * kinds * 9]
    assert {c.B for c in first} == {1, 16, 64, 128, 256}
    assert {c.H for c in first} == {64, 512, 768, 2048} and {c.T for c in first} == {16, 256, 1024}
    for kind in ("ragged", "bidirectional"):
        assert sum(getattr(c, kind) for c in first) == 2
    assert sum(c.layers == 2 for c in first) == 2
    for cell in ("gru", "rnn"):
        for dtype in ("bfloat16", "float16", "float32"):
            own = [c for c in early if (c.cell, c.dtype) == (cell, dtype)]
            assert len({(c.B, c.H, c.T, c.ragged, c.bidirectional, c.layers) for c in own}) > 11
    for inference, training in zip(early[::2], early[1::2], strict=True):
        assert replace(inference, phase="training") == training


def test_rows_of_other_sources_are_measured_again(tmp_path: Path) -> None:
    """After what has no row, and nothing is said of them but that they are there."""
    path = tmp_path / "gpu_check-peers.json"
    old = Rows(path, "card", "old")
    old.put("kept", {"us": 1})
    old.put("wrong", {"error": "of old"})
    rows = Rows(path, "card", "new")
    rows.put("failed", {"error": "of new"})
    rows.put("done", {"us": 2})
    assert not rows.done("kept") and rows.done("done")
    assert list(rows.good()) == ["done"] and list(rows.errors()) == ["failed"]
    assert rows.left(["failed", "kept", "done", "wrong", "fresh"]) == [
        "fresh",
        "failed",
        "kept",
        "wrong",
    ]
    text = gpu_check.table({"peers": rows})
    assert "1 rows, 1 failed" in text and "of other sources than new: 2 of old" in text
    assert "of old\n" in text and "FAILED wrong" not in text
    measured = []
    for key in rows.left(["kept"]):
        rows.do(key, Clock(10), lambda: measured.append(1) or {"us": 3})
    assert measured and Rows(path, "card", "new").good()["kept"]["us"] == 3


def test_a_source_is_every_file_that_matters(tmp_path: Path) -> None:
    for name in ("csrc/cuda/plan.cpp", "fused_rnn/ops/schemas.py", "fused_rnn/build/ninja.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("one")
    seen = {machine.source(tmp_path)}
    for path in sorted(tmp_path.rglob("*.*")):
        path.write_text("two")
        seen.add(machine.source(tmp_path))
    assert len(seen) == 4


@pytest.mark.parametrize("call", gpu_check.CALLS)
def test_each_part_has_its_time(call: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A part that takes all it may leaves the others theirs; one that is quick leaves them more."""
    now = 0.0
    monkeypatch.setattr("benchmarks.gpu.rows.time.monotonic", lambda: now)
    seconds = gpu_check.CALLS[call]
    budget = sum(seconds.values())
    for used in (1.0, 0.1):
        now, clock = 0.0, Clock(budget)
        for part, meant in seconds.items():
            own = gpu_check.turn(seconds, part, clock)
            assert own.left >= meant - 1e-6
            now += used * own.left
        assert clock.left >= -1e-6 and (used == 1.0) == clock.over
    assert {"1": 330, "2": 380, "all": 560}[call] == budget + gpu_check.OVERRUN


def test_a_part_that_fails_costs_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    began = []

    def fails(name: str) -> Callable[..., None]:
        def measure(settings: Settings, rows: Rows, clock: Clock) -> None:
            assert settings.variants == ("plan",)
            began.append(name)
            raise OSError(f"{name} is gone")

        return measure

    for name, part in gpu_check.PARTS.items():
        monkeypatch.setattr(part, "measure", fails(name))
    for call, seconds in gpu_check.CALLS.items():
        began.clear()
        chosen = ["--part", "all"] if call == "all" else ["--call", call]
        out = tmp_path / call
        assert gpu_check.main(["--device", "cpu", "--out", str(out), *chosen]) == 1
        assert began == list(seconds)
        text = capsys.readouterr().out
        assert all(f"FAILED part {name}: OSError: {name} is gone" in text for name in seconds)
        assert text.index("FAILED") > max(text.index(f"== {name} on cpu") for name in seconds)
        assert set(rows_in(out)) == set(seconds)


@pytest.mark.parametrize("part", [versus, baseline])
def test_without_those_that_are_needed_no_row_is_tried(
    part: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A rival may be missing, neither torch.nn nor ours: rows would cost time and say nothing."""

    class Fake:
        def __init__(self, clock: Clock, threads: int) -> None: ...
        def __enter__(self) -> Fake:
            return self

        def __exit__(self, *_: object) -> None: ...
        def missing(self, name: str, device: str) -> str | None:
            return None if name == "torch_nn" else f"no {name} on {device}"

    monkeypatch.setenv("BENCHMARKS_BASELINE", str(tmp_path))
    monkeypatch.setattr(part, "Contenders", Fake)
    rows = Rows(tmp_path / "rows.json", "card", "source")
    with pytest.raises(RuntimeError, match="no ours/plan on cuda"):
        part.measure(replace(CUDA, variants=("plan",)), rows, Clock(100))
    assert not rows.rows


def test_a_backward_has_one_product_less(tmp_path: Path) -> None:
    """T steps, T - 1 products of the backward, and few kernels outside of the steps."""

    class Fake:
        def ask(self, name: str, command: str, case: Case, limit_s: float) -> Any:
            kernels = [
                ("forward product", 8, 80.0),
                ("backward product", 7, 160.0),
                ("void frnn::cuda::GateForward", 8, 40.0),
                ("product of inputs", 1, 8.0),
                ("void frnn::cuda::ColumnSum", 2, 16.0),
            ]
            return {"kernels": kernels, "product": 5e-6, "time": 400e-6}[command]

    case = Case("lstm", 2, 8, 16, phase="training", device="cuda")
    row = device._share(case, Fake())  # type: ignore[arg-type]
    assert row["parts_us"] == {"products": 30, "gates": 5, "outside": 3}
    assert row["gap_us"] == 50 - 38


@pytest.mark.parametrize("phase", ["inference", "training"])
@pytest.mark.parametrize("shape", [{}, {"shortest": 0.3}, {"bidirectional": True, "layers": 2}])
def test_torch_in_a_graph_does_equal_work(
    phase: str, shape: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stand-in for the capture: what is captured is called, and a replay fills its tensors."""
    replays = []

    def captured(work: Callable[[], dict[str, torch.Tensor]]) -> Any:
        made = {name: torch.zeros_like(tensor) for name, tensor in work().items()}

        def replay() -> None:
            replays.append(1)
            for name, tensor in work().items():
                made[name].copy_(tensor.detach())

        return replay, made

    monkeypatch.setattr(torch_nn_graph, "captured", captured)
    case = Case("lstm", 3, 5, 8, phase=phase, **shape)
    expected = problem.sample(peers.load("torch_nn").prepare(problem.Problem(case)).results())
    prepared = peers.load("torch_nn_graph").prepare(problem.Problem(case))
    assert not replays
    found = problem.sample(prepared.results())
    assert replays == [1] and found.keys() == expected.keys()
    assert problem.mismatch(found, expected, case.dtype) is None
    prepared.call()
    assert len(replays) == 2
    assert peers.load("torch_nn_graph").refuses(replace(case, phase="decode"))


def test_torch_in_a_graph_stands_beside_it(tmp_path: Path) -> None:
    """In the table of the check, on the page of the card and in the first page's means."""
    rows = Rows(tmp_path / "gpu_check-peers.json", "card", "source")
    case = Case("gru", 16, 256, 512, dtype="bfloat16", device="cuda")
    times = {"ours/plan": 1.0, "torch_nn": 6.0, "torch_nn_graph": 2.0}
    cudnn = {"algorithm": "standard", "launches": 512, "kernels": [["kernel", 512, 1.5]]}
    for own in (case, replace(case, phase="training"), replace(case, T=16)):
        timed = {name: {"rounds": [us] * 3, "us": us} for name, us in times.items()}
        rows.put(own.label, {"case": own.to_json(), "peers": timed, "cudnn": cudnn})
    failed = {"torch_nn_graph": {"failed": "it cannot be captured"}}
    packed = replace(case, shortest=0.25)
    rows.put(packed.label, {"case": packed.to_json(), "peers": timed | failed, "cudnn": cudnn})
    lines = versus.table(rows)
    assert any(line.startswith("ours against torch_nn: 4 rows") for line in lines)
    assert any(line.startswith("ours against torch_nn_graph: 3 rows") for line in lines)
    assert "  torch_nn_graph failed in 1 rows, first: it cannot be captured" in lines

    (tmp_path / "about.md").write_text("A card.")
    card = page.read(tmp_path)
    assert [row.of_graph for row in card.plan] == [2, 2, 2, None]
    means = page.means(card.shown).splitlines()
    assert [re.split(r" *\| *", line)[1:3] for line in means[2:]] == [
        ["GRU, against torch.nn", "6.0 / 6.0"],
        ["GRU, against torch.nn in a CUDA graph", "2.0 / 2.0"],
        ["GRU, against cuDNN's kernels alone", "1.50 / 1.50"],
    ]
    assert "| 6 (6.00) | 2 (2.00)   | 1.5 (1.50)" in page.page(tmp_path)


def test_the_sanitizer_sees_every_cell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In one run for each variant and tool; where there is no such tool, it is no failure."""
    runs = []

    def output(command: list[str], limit_s: float, env: dict[str, str], errors: bool) -> str:
        runs.append((command, env["FUSED_RNN_VARIANT"]))
        if env["FUSED_RNN_VARIANT"] == "local":
            raise RuntimeError("exit code 9: invalid read")
        return "========= ERROR SUMMARY: 0 errors\n"

    monkeypatch.setattr(sanitizer, "output", output)
    rows = Rows(tmp_path / "rows.json", "card", "source")
    monkeypatch.setattr(shutil, "which", lambda name: None)
    sanitizer.measure(CUDA, rows, Clock(100))
    assert not runs and not rows.rows
    monkeypatch.setattr(shutil, "which", lambda name: name)
    sanitizer.measure(CUDA, rows, Clock(100))
    assert len(runs) == len(sanitizer.VARIANTS) * len(sanitizer.TOOLS)
    assert all(command[-4:] == ["cuda", "lstm", "gru", "rnn"] for command, _ in runs)
    assert set(rows.errors()) == {f"local {tool}" for tool in sanitizer.TOOLS}
    assert "resident memcheck: ERROR SUMMARY: 0 errors" in sanitizer.table(rows)


def test_the_baseline_is_compared_with(tmp_path: Path) -> None:
    rows = Rows(tmp_path / "gpu_check-baseline.json", "card", "source")
    assert baseline.table(rows) == []
    for key, before in (("fast", 3.0), ("slow", 0.75)):
        times = {"ours/plan": 1.0, "ours_baseline/plan": before, "torch_nn": 6.0}
        rows.put(key, {"peers": {name: {"rounds": [us], "us": us} for name, us in times.items()}})
    first, *lines = baseline.table(rows)
    assert "2 rows, geometric mean 1.50, below 0.95: 1" in first
    assert "0.75  slow: 1 us a step, baseline 0.75, torch.nn 6" in lines[0] and "fast" in lines[1]


def test_libraries_that_come_later_are_built_ahead(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("BENCHMARKS_BASELINE", raising=False)
    assert list(build.needed_later(CUDA)) == [(ROOT, "cpu")]
    monkeypatch.setenv("BENCHMARKS_BASELINE", str(tmp_path))
    assert set(build.needed_later(CUDA)) == {
        (ROOT, "cpu"),
        (tmp_path, "cuda"),
        (tmp_path, "cpu"),
    }


@pytest.mark.skipif(not shutil.which("nvcc"), reason="there is no nvcc")
@pytest.mark.drawn(1)
@pytest.mark.parametrize("arch", ["sm_80", "sm_90a"])
def test_latency_compiles(arch: str, tmp_path: Path) -> None:
    program = tmp_path / arch
    device.compile_latency(program, arch, 120)
    assert program.exists()


def test_a_clock_gives_no_row_more_than_is_left() -> None:
    assert Clock(0).over and not Clock(100).over
    assert Clock(1000).limit(30) == 30
    assert Clock(0).limit(1000) == pytest.approx(20, abs=1)
    assert Clock(100).part(0.5).left == pytest.approx(50, abs=1)


# --- test_cuda_stress.py, rehearsed on the CPU ---------------------------------------------------


def tiny(cell: str = "gru", **kind: Any) -> stress.Layer:
    case = LayerCase(cell, 3, 8, batch=2, time=4, **kind)
    return stress.Layer(stress.Rehearsal(), case, torch.float32)


SCENES: dict[str, Callable[[stress.Card], None]] = {
    "many_streams": lambda card: stress.many_streams(
        card, LayerCase("lstm", 3, 8, bidirectional=True), torch.float32, 5, threads=2, calls=2
    ),
    "beside_a_hog": lambda card: stress.beside_a_hog(
        card, [LayerCase("lstm"), LayerCase("gru")], torch.float32, calls=2, size=16
    ),
    "memory_taken_away": lambda card: stress.memory_taken_away(
        card, [tiny(), tiny("lstm")], card.clear_workspaces, keep=32 * stress.MIB
    ),
    "many_threads": lambda card: stress.many_threads(card, tiny(), 30, growth=stress.GIB),
    "streams_that_end": lambda card: stress.streams_that_end(card, tiny(), [tiny("lstm")], 2),
    "many_keys": lambda card: stress.many_keys([tiny(), tiny(layout="packed")]),
}


@pytest.mark.parametrize("scene", SCENES)
def test_scenes_are_rehearsed(scene: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each passes where all is well, and fails when one result changes."""
    card = stress.Rehearsal()
    SCENES[scene](card)
    call, calls = stress.Layer.call, itertools.count()

    def changed(layer: stress.Layer) -> list[torch.Tensor]:
        found = call(layer)
        return [found[0] + 1, *found[1:]] if next(calls) == 5 else found

    monkeypatch.setattr(stress.Layer, "call", changed)
    with pytest.raises(AssertionError):
        SCENES[scene](card)


PARITY_REHEARSED = stress.parity_cases((8,), steps=3, batch=2)


@pytest.mark.parametrize("precision", stress.PRECISIONS, ids=lambda precision: precision.name)
def test_parity_is_rehearsed(precision: stress.Precision) -> None:
    cases = [case for case, own in PARITY_REHEARSED if own == precision]
    assert {case.cell for case in cases} == {*LAYERS, *OWN_LAYERS}
    for case in cases:
        with pytest.MonkeyPatch.context() as patch:
            stress.parity(stress.Rehearsal(), case, precision, patch)


def test_parity_covers_every_cell_and_precision() -> None:
    from test_cuda_stress import PARITY

    found = {(case.cell, case.hidden_size, precision.name) for case, precision in PARITY}
    precisions = ("bfloat16", "float16", "tf32", "float32", "float64")
    cells = (*LAYERS, *OWN_LAYERS)
    assert found == {(c, H, p) for c in cells for H in (512, 1024) for p in precisions}
    assert {case.time for case, _ in PARITY} == {256}


@pytest.mark.parametrize("free", [0, 5 << 30, 140 << 30, (7 << 30) + 12345])
def test_all_memory_but_some_is_taken(free: int) -> None:
    keep = 4 << 30
    sizes = stress.blocks(free, keep)
    assert sum(sizes) <= max(0, free - keep) and free - keep - sum(sizes) < 2 << 20
    assert sizes == sorted(sizes, reverse=True)
