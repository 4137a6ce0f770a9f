"""The harness itself: it refuses who is wrong, goes on where it stopped, and hides nothing."""

from __future__ import annotations

import copy
import itertools
import json
import multiprocessing
import os
import re
import shutil
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import cases, compare, floors, machine, pages, peers, report, results, runner
from benchmarks.__main__ import main
from benchmarks.cases import Case, Item, load_suite
from benchmarks.gpu import page as gpu_page
from benchmarks.peers import Prepared, loop, torch_nn
from benchmarks.problem import Problem, diagonal, mismatch, sample
from fused_rnn import zoo

pytestmark = pytest.mark.unit

# --- peers for the tests, loaded in their processes as "tests.test_benchmarks:name" --------------


class Wrong(torch_nn.TorchNN):
    """Right but for one step, and that only a little."""

    def prepare(self, problem: Problem) -> Prepared:
        right = super().prepare(problem)

        def results() -> dict[str, torch.Tensor]:
            found = right.results()
            y = found["y"].detach().clone()
            y[2] *= 1.01
            return found | {"y": y}

        return Prepared(right.call, results)


class Broken(torch_nn.TorchNN):
    def prepare(self, problem: Problem) -> Prepared:
        raise RuntimeError("out of order")


class Sleeper(torch_nn.TorchNN):
    def refuses(self, case: Case) -> str | None:
        time.sleep(60)
        return None


HERE = "tests.test_benchmarks"
TINY = Case("gru", 2, 5, 8)
SETTINGS = runner.Settings(threads=1, rounds=2, limit_s=60, warm_s=0, sample_s=0.001, memory=False)
LIMITS = {
    "threads": 1,
    "gemm": {"float32": {"mm": 100.0}},
    "bandwidth": [
        {"name": "L2", "capacity": 1e6, "bytes": 5e5, "gb_per_s": 100.0},
        {"name": "DRAM", "capacity": None, "bytes": 5e8, "gb_per_s": 10.0},
    ],
    "pulse": [1.0, 0.2],
}


@pytest.fixture
def no_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measuring the machine takes seconds, and has nothing to do with the rest."""
    monkeypatch.setattr(runner, "measure_limits", lambda *_: copy.deepcopy(LIMITS))


def made(path: Path) -> results.Results:
    return results.Results.open(path, machine.machine(1, "cpu"))


# --- running -------------------------------------------------------------------------------------


def test_who_is_wrong_or_broken_is_named_and_not_timed(tmp_path: Path, no_limits: None) -> None:
    names = ["ours", "torch_nn", f"{HERE}:Wrong", f"{HERE}:Broken"]
    found = made(tmp_path / "r.json")
    runner.run([Item(TINY)], names, found, SETTINGS)
    (row,) = found.rows.values()
    assert len(row["peers"]["torch_nn"]["rounds"]) == SETTINGS.rounds
    assert "ours" in row["peers"]
    wrong, broken = (row["peers"][f"{HERE}:{name}"] for name in ("Wrong", "Broken"))
    assert "y is off by" in wrong["refused"] and "rounds" not in wrong
    assert "out of order" in broken["failed"] and "rounds" not in broken
    text = report.render(found)
    assert "wrong results" in text and "out of order" in text


def test_a_run_goes_on_where_it_was_stopped(tmp_path: Path, no_limits: None) -> None:
    path = tmp_path / "r.json"
    items = [Item(replace(TINY, T=T)) for T in (3, 4, 5)]

    def stop_after_one(text: str, done: int) -> None:
        if done and made(path).rows:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        runner.run(items, ["torch_nn"], made(path), SETTINGS, stop_after_one)
    first = made(path)
    assert len(first.rows) == 1

    runner.run(items, ["torch_nn"], made(path), SETTINGS)
    second = made(path)
    assert len(second.rows) == 3
    (key,) = first.rows
    assert second.rows[key]["peers"] == first.rows[key]["peers"]  # not measured again

    # Other sources than those measured, or a contender more: the rows are measured again.
    facts = machine.run_facts()
    assert second.has(key, ["torch_nn"], facts, 60)
    assert not second.has(key, ["torch_nn", "reference"], facts, 60)
    assert not second.has(key, ["torch_nn"], facts | {"source": "other"}, 60)


def test_busy_neighbours(tmp_path: Path, no_limits: None) -> None:
    """They run while contenders do, end with the run, and are part of what a row is."""
    with runner.neighbours(1):
        (spinning,) = multiprocessing.active_children()
        time.sleep(0.5)
        used = Path(f"/proc/{spinning.pid}/stat").read_text().rpartition(")")[2].split()[11]
        assert int(used) > 0, "ticks of user time"
    assert not multiprocessing.active_children()

    found = made(tmp_path / "r.json")
    settings = replace(SETTINGS, busy=1)
    runner.run([Item(TINY)], ["torch_nn"], found, settings)
    (key,) = found.rows
    assert "beside 1 busy" in key and "beside 1 busy" in report.render(found)
    key = runner._key(TINY, replace(settings, busy_share=0.1))
    assert key.endswith("beside 1 busy by 10 %"), key


def test_neighbours_that_rest() -> None:
    with runner.neighbours(1, share=0.2):
        (process,) = multiprocessing.active_children()
        time.sleep(1)
        fields = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
        seconds = int(fields[11]) / os.sysconf("SC_CLK_TCK")
    assert 0 < seconds < 0.7


def test_results_of_two_machines_are_not_mixed(tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    results.Results(path, {"cpu": "another"}).save()
    with pytest.raises(ValueError, match="another machine"):
        made(path)


def test_who_is_late_is_left_behind() -> None:
    contender = runner.Contender(f"{HERE}:Sleeper", threads=1)
    try:
        contender.ask("about", "cpu", timeout=60)
        with pytest.raises(runner.Late, match="no answer within"):
            contender.ask("load", TINY, Path("nowhere"), timeout=0.2)
    finally:
        contender.close(grace_s=0)


def test_a_row_past_the_limit_says_so(tmp_path: Path, no_limits: None) -> None:
    huge = Case("lstm", 128, 1500, 4096)
    found = made(tmp_path / "r.json")
    runner.run([Item(huge)], ["torch_nn"], found, SETTINGS)
    (row,) = found.rows.values()
    assert "at the least" in row["peers"]["torch_nn"]["skipped"]
    assert "skipped" in report.render(found)


def test_the_command_line(tmp_path: Path, no_limits: None, capsys: Any) -> None:
    suite = tmp_path / "mine.json"
    suite.write_text(
        json.dumps({"about": "mine", "groups": [{"cell": ["gru", "lstm"], "BTH": [[2, 5, 8]]}]})
    )
    out = tmp_path / "out.json"
    run = ["run", "--suite", str(suite), "--cells", "gru", "--peers", "torch_nn", "--no-memory"]
    assert main([*run, "--threads", "1", "--rounds", "1", "--json", str(out)]) == 0
    assert "| gru  | B2 T5 H8 | inference |" in capsys.readouterr().out
    assert main(["table", str(out), "--details"]) == 0
    assert "first call" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["run", "--suite", "no such suite"])


@pytest.mark.parametrize("command", ["peers", "suites"])
def test_lists_are_tables(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Names stand apart from what follows."""
    assert main([command]) == 0
    lines = capsys.readouterr().out.splitlines()
    names = cases.suite_names() if command == "suites" else peers.NAMES
    for name, line in zip(names, lines, strict=True):
        assert re.match(rf"{re.escape(name)} +(cpu: |\d+  )", line), line


# --- peers ---------------------------------------------------------------------------------------

SHAPES = (
    {},
    {"layers": 2, "bidirectional": True},
    {"shortest": 0.25},
    {"bias": False, "layers": 3},
    {"phase": "decode", "B": 1, "T": 1, "layers": 2},
    {"phase": "stream", "B": 1, "T": 20},
    {"phase": "training", "shortest": 0.25, "bidirectional": True},
)


@pytest.mark.parametrize("name", ["ours_recompute", "reference", "onnxruntime", "openvino"])
@pytest.mark.parametrize("cell", cases.CELLS)
def test_peers_do_equal_work(name: str, cell: str) -> None:
    peer = peers.load(name)
    if missing := peer.missing("cpu"):
        pytest.skip(missing)
    for shape in SHAPES:
        case = Case(**{"cell": cell, "B": 3, "T": 7, "H": 17, "I": 9, **shape})
        if peer.refuses(case):
            continue
        expected = sample(torch_nn.peer().prepare(Problem(case)).results())
        found = sample(peer.prepare(Problem(case)).results())
        assert mismatch(found, expected, case.dtype) is None, case.label


@pytest.mark.parametrize("name", ["ours_int8", "torch_int8"])
@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_peers_of_8_bits_do_equal_work(name: str, cell: str) -> None:
    """But for what their weights are rounded to."""
    peer = peers.load(name)
    if missing := peer.missing("cpu"):
        pytest.skip(missing)
    for case in (
        Case(cell, B=1, T=1, H=64, phase="decode"),
        Case(cell, B=3, T=20, H=65, I=9, layers=2, bidirectional=True),
    ):
        assert peer.refuses_at_all(case) is None
        expected = sample(torch_nn.peer().prepare(Problem(case)).results())
        found = sample(peer.prepare(Problem(case)).results())
        assert mismatch(found, expected, peer.rounds_to or case.dtype) is None, case.label
        assert mismatch(found, expected, case.dtype), "weights are not rounded"
    assert peer.refuses(replace(case, phase="training"))


@pytest.mark.parametrize("name", ["ours_exported", "rtneural", "rtneural_xsimd"])
@pytest.mark.parametrize("cell", ["gru", "lstm"])
def test_peers_that_are_compiled_do_equal_work(
    name: str, cell: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    peer = peers.load(name)
    if missing := peer.missing("cpu"):
        pytest.skip(missing)
    for inputs in (1, 16):
        case = Case(cell, B=1, T=20, H=8, I=inputs, phase="stream")
        expected = sample(torch_nn.peer().prepare(Problem(case)).results())
        prepared = peer.prepare(Problem(case))
        for _ in range(2):  # they begin anew
            assert mismatch(sample(prepared.results()), expected, case.dtype) is None, case.label
    assert peer.refuses(replace(case, phase="inference"))
    assert peer.refuses(replace(case, B=2)) and peer.refuses(replace(case, dtype="float64"))


def test_rtneural_says_why_it_is_absent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RTNEURAL", raising=False)
    assert "RTNEURAL names no folder" in (peers.load("rtneural").missing("cpu") or "")
    monkeypatch.setenv("RTNEURAL", str(tmp_path))
    assert "has no RTNeural/RTNeural.h" in (peers.load("rtneural_xsimd").missing("cpu") or "")


def test_streams_are_shown_by_the_step() -> None:
    from benchmarks.report import _legend, _time

    case = Case("gru", B=1, T=64, H=8, I=1, phase="stream")
    row: Any = {"case": case.to_json()}
    assert _time(row, 64 * 0.25e-6) == "0.250" and "microseconds" in _legend([row])
    row = {"case": replace(case, phase="inference").to_json()}
    assert _time(row, 0.25e-3) == "0.250" and "microseconds" not in _legend([row])


@pytest.mark.drawn(8)
@pytest.mark.parametrize("name", zoo.__all__)
def test_the_zoos_peers_do_equal_work(name: str) -> None:
    """In float64; ours for one cell of each kind, since each is compiled."""
    case = Case(f"zoo.{name}", B=3, T=7, H=17, I=9, phase="training", dtype="float64")
    case = replace(case, bias=name != "RAN")  # whose content has none in the other package
    if name == "SLSTM":  # whose blocks are its heads
        case = replace(case, H=16, blocks=4)
    expected = sample(peers.load("zoo_loop").prepare(Problem(case)).results())
    assert {f"d {name}" for name in Problem(case).weights} | {"y", "h_n", "d x"} <= set(expected)
    for other in ("ours", "torchrecurrent", "ours_header"):
        peer = peers.load(other)
        drawn = name in ("GRUD", "AntisymmetricRNN", "SLSTM") or other != "ours"
        if drawn and not (peer.missing("cpu") or peer.refuses_at_all(case)):
            found = sample(peer.prepare(Problem(case)).results())
            assert mismatch(found, expected, case.dtype) is None, other
            assert {"y", "h_n", "d x"} <= set(found)
    for other in set(peers.NAMES) - {"ours", "zoo_loop", "torchrecurrent", "torch_compile"}:
        inherits = other.startswith("ours")
        assert inherits or peers.load(other).refuses_at_all(case) == "has not this cell", other


BETWEEN = ({"resets": 0.3}, {"blocks": 4}, {"norm": "layer"}, {"norm": "rms", "resets": 0.3})


@pytest.mark.parametrize("between", BETWEEN, ids=str)
@pytest.mark.parametrize("cell", cases.CELLS)
def test_between_steps_peers_do_equal_work(cell: str, between: dict[str, Any]) -> None:
    """As the loop, in all gradients; the plain one as torch.nn does without."""
    case = Case(cell, B=3, T=9, H=16, I=5, phase="training", dtype="float64", **between)
    expected = sample(loop.peer().prepare(Problem(case)).results())
    gradients = {f"d {name}" for name in Problem(case).weights}
    outputs = {"y", "h_n", "d x"} | ({"c_n"} if cell == "lstm" else set())
    assert set(expected) == gradients | outputs
    able = {"torch_nn_around"} if "norm" not in between else set()
    for name in {"ours", "ours_plain", "reference", *able}:
        peer = peers.load(name)
        if missing := peer.missing("cpu"):
            pytest.skip(missing)
        assert peer.refuses_at_all(case) is None
        own = peer.case(case)
        found = sample(peer.prepare(Problem(own)).results())
        if name == "ours_plain":
            assert mismatch(found, expected, case.dtype), "without options it computes others"
            right = sample(torch_nn.peer().prepare(Problem(own)).results())
        else:
            right = expected
        assert mismatch(found, right, case.dtype) is None, name
        lacking = {"c_n"} if name == "torch_nn_around" and case.resets else set()
        assert set(found) == set(right) - lacking
    for name in set(peers.NAMES) - {"ours", "ours_plain", "reference", "loop", *able}:
        peer = peers.load(name)
        assert set(between) <= peer.has_between or "has no" in (peer.refuses_at_all(case) or "")


@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_torchrl_does_equal_work(cell: str) -> None:
    peer = peers.load("torchrl")
    if missing := peer.missing("cpu"):
        pytest.skip(missing)
    case = Case(cell, B=3, T=9, H=16, I=5, phase="training", dtype="float64", resets=0.3)
    assert peer.refuses_at_all(case) is None
    expected, found = (sample(p.prepare(Problem(case)).results()) for p in (loop.peer(), peer))
    assert mismatch(found, expected, case.dtype) is None
    assert set(found) == set(expected) - {"c_n"}
    assert peer.refuses_at_all(Case(cell, B=3, T=9, H=16, I=5)) == "is for resets"


@pytest.mark.parametrize("cell", cases.CELLS)
def test_the_loop_is_torch_nn_where_nothing_is_between(cell: str) -> None:
    """It says what is right for other cases, so it must not err on this one."""
    case = Case(cell, B=3, T=9, H=16, I=5, phase="training", dtype="float64")
    found, right = (
        sample(peers.load(name).prepare(Problem(case)).results()) for name in ("loop", "torch_nn")
    )
    assert set(found) == set(right) and mismatch(found, right, case.dtype) is None


def test_blocks_are_those_on_the_diagonal() -> None:
    whole = torch.arange(3 * 6 * 6.0).view(18, 6)
    found = diagonal(whole, 2)
    for q, u in itertools.product(range(3), range(6)):
        own = slice(0, 3) if u < 3 else slice(3, 6)
        assert torch.equal(found[6 * q + u], whole[6 * q + u, own])


def test_rows_between_steps(tmp_path: Path, no_limits: None) -> None:
    """Each contender is judged by what it computes, and the plain layer is nobody's rival."""
    names = ["ours", "ours_plain", "torch_nn", "loop", f"{HERE}:Wrong"]
    found = made(tmp_path / "r.json")
    case = replace(TINY, T=20, resets=0.2)
    runner.run([Item(case)], names, found, SETTINGS)
    (row,) = found.rows.values()
    assert "resets 20%" in row["key"] and results.case_of(row) == case
    assert "has no resets" in row["peers"]["torch_nn"]["refused"]
    assert "has no resets" in row["peers"][f"{HERE}:Wrong"]["refused"]
    timed = results.timed(row)
    assert "loop" in timed
    if "ours" in timed:
        best = results.best_peer(row)
        assert best and best[0] == "loop" and "ours_plain" in timed
    assert "resets 20%" in report.render(found)


@pytest.mark.parametrize("phase", cases.LOOPS)
@pytest.mark.parametrize("cell", cases.CELLS)
def test_loops_over_cells(cell: str, phase: str) -> None:
    """Each step is a call of a cell, and all of its gradients are compared."""
    case = Case(cell, B=3, T=4, H=17, I=9, phase=phase)
    found = {}
    for name in ("ours", "torch_nn"):
        peer, problem = peers.load(name), Problem(case)
        if peer.missing("cpu"):
            pytest.skip(peer.missing("cpu"))
        assert peer.refuses_at_all(case) is None
        module = peer.module(problem)
        calls: list[int] = []
        module.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(type(peer), "module", lambda self, problem, module=module: module)
            found[name] = sample(peer.prepare(problem).results())
        assert len(calls) == case.T
    ours, theirs = found["ours"], found["torch_nn"]
    gradients = {f"d {kind}_{side}" for kind in ("weight", "bias") for side in ("ih", "hh")}
    states = {"y", "h_n"} | ({"c_n"} if cell == "lstm" else set())
    assert set(theirs) == gradients | states | ({"d x"} if phase == "loop" else set())
    assert ours.keys() == theirs.keys() and mismatch(ours, theirs, case.dtype) is None
    for name in set(peers.NAMES) - set(found) - {"ours_baseline"}:
        assert peers.load(name).refuses_at_all(case)
    with pytest.raises(ValueError, match="one layer"):
        replace(case, layers=2)


def test_mismatch_sees_nan_and_sizes() -> None:
    right = {"y": torch.ones(4, 3, dtype=torch.float64)}
    assert mismatch(right, right, "float32") is None
    assert "off by" in (mismatch({"y": right["y"] * torch.nan}, right, "float32") or "")
    assert "sizes" in (mismatch({"y": right["y"][:2]}, right, "float32") or "")
    assert "no y" in (mismatch({}, right, "float32") or "")


# --- suites and floors ---------------------------------------------------------------------------


def test_every_suite_can_be_read() -> None:
    asked = "quick deepbench-train deepbench-infer fastrnns flashrnn char-rnn decode ragged deep"
    asked += " cells-train resets blocks normalised zoo realtime"
    assert {*asked.split(), "odd", "scaling", "headline"} <= set(cases.suite_names())
    for name in cases.suite_names():
        items = load_suite(name)
        assert items and cases.read_suite(name)["about"]
        assert len({item.case.label for item in items}) == len(items), (
            "labels must tell cases apart"
        )
        assert all(item.case.B == item.case.T == 1 for item in items if item.case.phase == "decode")
    assert len(load_suite("deepbench-train")) == 53
    assert len(load_suite("headline")) == 21
    assert {item.case.zoo for item in load_suite("zoo")} == set(zoo.__all__)


def test_suites_are_narrowed_and_checked(tmp_path: Path) -> None:
    only = load_suite("headline", cells=["gru"], dtypes=["bfloat16"], match="H64 ")
    assert [item.case for item in only] == [Case("gru", 1, 100, 64, dtype="bfloat16")]
    path = tmp_path / "s.json"
    path.write_text(json.dumps({"about": "", "groups": [{"cell": "gru", "hidden": 3}]}))
    with pytest.raises(ValueError, match="hidden"):
        load_suite(str(path))
    for wrong, text in (
        ({"blocks": 3}, "out of range"),
        ({"norm": "batch"}, "no such norm"),
        ({"resets": 0.1, "layers": 2}, "one padded layer"),
    ):
        with pytest.raises(ValueError, match=text):
            replace(TINY, **wrong)


def test_floors() -> None:
    large = Case("lstm", 64, 50, 512)
    flops = 2 * 4 * 512 * (512 + 512) * 64 * 50
    assert floors.flops(large) == flops
    bound = floors.floor(large, LIMITS)
    assert bound and bound.bound == "compute" and bound.seconds == pytest.approx(flops / 100e9)
    for phase, products in (("training", 3), ("loop", 3), ("loop_weights", 2.5)):
        trained = replace(large, phase=phase)
        assert floors.flops(trained) == products * flops
        least = floors.floor(trained, LIMITS)
        assert least and least.seconds == pytest.approx(products * bound.seconds)

    # One stream: 1024 x 256 floats a step, too many for this machine's L2, after W x.
    single = floors.floor(Case("lstm", 1, 100, 256), LIMITS)
    read = 4 * 4 * 256 * 256 / 10e9
    assert single and single.bound == "DRAM"
    assert single.seconds == pytest.approx(100 * read + max(read, 2 * 4 * 256 * 256 * 100 / 100e9))

    ragged = floors.floor(replace(large, shortest=0.25), LIMITS)
    assert ragged and ragged.seconds < bound.seconds
    assert floors.floor(large, {"gemm": {}}) is None
    assert floors.flops(replace(large, blocks=8)) == flops * (1 + 1 / 8) / 2


# --- statistics, tables, comparisons -------------------------------------------------------------


def invented(path: Path, ours: dict[int, list[float]], theirs: list[float]) -> results.Results:
    """Rows of several T, each with rounds of ours, and of torch.nn and ONNX Runtime."""
    found = results.Results(path, {"cpu": "invented", "threads": 1, "cores": 1})
    found.runs.append(machine.run_facts() | {"limits": LIMITS, "settings": {"limit_s": 1}})
    for T, rounds in ours.items():
        case = replace(TINY, T=T)
        record = {"prepare_s": 0.0, "first_s": 0.0, "call_s": 0.0, "pulse": [[1.0, 0.2]]}
        found.rows[case.label] = {
            "key": case.label,
            "case": case.to_json(),
            "run": 0,
            "floor": {"s": 1e-3, "bound": "compute"},
            "peers": {
                "ours": record | {"rounds": rounds},
                "torch_nn": record | {"rounds": [2 * t for t in theirs]},
                "onnxruntime": record | {"rounds": theirs},
            },
        }
    return found


def test_ratios_are_formed_inside_a_round(tmp_path: Path) -> None:
    found = invented(tmp_path / "r.json", {5: [1.0, 3.0, 1.0]}, [2.0, 6.0, 2.0])
    (row,) = found.rows.values()
    ratio = results.ratio(row, "onnxruntime")
    assert ratio and (ratio.low, ratio.median, ratio.high) == (2, 2, 2)  # states cancel out
    assert results.best_peer(row) == ("onnxruntime", ratio)
    assert results.of_limit(row) == pytest.approx(1e-3)


def test_the_table_shows_every_row_once_and_the_worst_first(tmp_path: Path) -> None:
    ours = {T: [1.0 + T / 100] * 3 for T in range(1, 21)}
    text = report.render(invented(tmp_path / "r.json", ours, [1.1] * 3))
    places = [text.index(f" B2 T{T} H8 ") for T in range(20, 0, -1)]
    assert places == sorted(places)
    assert text.count(" B2 T7 H8 ") == text.count("commit ") == text.count("**Geometric means") == 1
    assert "Slower than the best peer in 10 of 20 rows." in text


def test_compare_finds_a_planted_regression(tmp_path: Path, capsys: Any) -> None:
    steady = [1.0, 1.02, 1.01]
    old = invented(tmp_path / "old.json", {3: steady, 4: steady, 5: steady}, [2.0, 2.04, 2.02])
    new = copy.deepcopy(old)
    for row in new.rows.values():  # the whole machine is slower today: that is no regression
        for peer in row["peers"].values():
            peer["rounds"] = [1.5 * t for t in peer["rounds"]]
    assert compare.main(old, new, 0.05) == 0
    assert "Regressions" not in capsys.readouterr().out

    planted = new.rows[replace(TINY, T=4).label]["peers"]["ours"]
    planted["rounds"] = [1.3 * t for t in planted["rounds"]]
    assert compare.main(old, new, 0.05) == 1
    said = capsys.readouterr().out
    assert "Regressions" in said and "T4" in said and "T3" not in said

    del new.rows[replace(TINY, T=3).label]
    assert compare.main(old, new, 0.05) == 1
    assert "not in the new file" in capsys.readouterr().out


def test_results_survive_the_file(tmp_path: Path) -> None:
    found = invented(tmp_path / "r.json", {5: [1.0, 1.1], 6: [1.0, 1.2]}, [2.0, 2.0])
    found.save()
    again = results.Results.read(tmp_path / "r.json")
    assert again.rows == found.rows and again.machine == found.machine


# --- what is written from results -----------------------------------------------------------------


def test_committed_pages_are_what_the_results_give() -> None:
    """If this fails: python -m benchmarks pages"""
    wanted = pages.texts()
    for path, text in wanted.items():
        assert path.is_file() and path.read_text() == text, path
    assert set((pages.RESULTS / "pages").glob("*.md")) <= wanted.keys()
    assert pages.SPEED_PICTURE.is_file()


def test_pages_follow_the_results(tmp_path: Path) -> None:
    folder = tmp_path / "benchmarks" / "results"
    shutil.copytree(pages.RESULTS, folder)
    shutil.copy(pages.ROOT / "README.md", tmp_path)
    invented(folder / "one-cpu.json", {3: [1.0] * 3, 4: [1.2] * 3}, [1.1] * 3).save()
    one = folder / "pages" / "one-cpu.md"
    assert pages.write(tmp_path) == [one, folder / "README.md"]
    assert "Slower than the best peer in 1 of 2 rows." in one.read_text()
    assert pages.write(tmp_path) == []
    (folder / "one-cpu.json").unlink()
    assert pages.write(tmp_path) == [one, folder / "README.md"] and not one.exists()


def test_a_table_needs_its_place() -> None:
    with pytest.raises(ValueError, match="no place for speed"):
        pages.fill("nothing here", "speed", "| |")


def test_ratios_of_a_card() -> None:
    """What the first page says of the H200, from its files."""
    shown = gpu_page.read(pages.RESULTS / "h200").shown
    lstm = [row for row in shown if row.case.cell == "lstm"]
    for phase, by_clock, of_kernels in (("inference", 6.38, 1.91), ("training", 5.83, 1.65)):
        for whom, mean in ((gpu_page.TORCH, by_clock), (gpu_page.KERNELS, of_kernels)):
            found = gpu_page.ratios_of(lstm, "bfloat16", phase, whom)
            assert len(found) == 8
            assert results.geometric_mean(found) == pytest.approx(mean, abs=0.01)


def test_plots_are_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from benchmarks import plots

    found = invented(tmp_path / "r.json", {T: [T / 10] * 3 for T in (2, 4, 8)}, [1.0] * 3)
    written = plots.draw(found, tmp_path)
    assert [path.stem for path in written] == ["r-ratios", "r-scaling", "r-roofline"]
    written.append(plots.draw_speed(pages.RESULTS, tmp_path / "speed.png"))
    assert all(path.stat().st_size > 10_000 for path in written)
