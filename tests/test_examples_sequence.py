"""Overview, language model, gradient flow, comparison of cells: short runs beat their baselines."""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

for package in ("matplotlib", "tqdm", "sklearn"):
    pytest.importorskip(package)

import common  # noqa: E402
import compare_cells  # noqa: E402
import gradient_flow  # noqa: E402
import language_model  # noqa: E402
import overview  # noqa: E402
from helpers import assert_close, native  # noqa: E402
from matplotlib import image  # noqa: E402
from text import Text, chunks  # noqa: E402

pytestmark = pytest.mark.examples

ROOT = Path(__file__).resolve().parents[1]
CELLS = ["rnn", "gru", "lstm"]
learns = pytest.mark.skipif(not native(), reason="training is slow on the reference path")


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    """One, for work so small that a second thread costs more than it does. Programs set the number
    of the process; the next test has its own again."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def run_of(tmp_path: Path, *argv: str) -> common.Run:
    parser = common.arguments("A test.", "test", steps=10)
    return common.start(parser.parse_args(["--out", str(tmp_path / "out"), *argv]))


def results(out: Path) -> dict[str, Any]:
    """The figures of a run, whose picture is looked at here."""
    (picture,) = out.glob("*.png")
    pixels = image.imread(picture)  # [height, width, RGBA]
    assert pixels.shape[0] >= 600 and pixels.shape[1] >= 900
    assert pixels.std() > 0.05, "a blank picture"
    return json.loads((out / f"{picture.stem}.json").read_text(encoding="utf-8"))


# --- common --------------------------------------------------------------------------------------


def test_cells_are_found_by_name() -> None:
    assert {"rnn", "gru", "lstm"} <= common.CELLS.keys()
    assert common.find_cell("Lstm")(2, 3).mode == "LSTM"
    with pytest.raises(
        ValueError, match="no cell 'foo'; there are blockgru, gru, lstm, peepholelstm, rnn"
    ):
        common.find_cell("foo")


def test_random_numbers_depend_on_seed_and_step(tmp_path: Path) -> None:
    run, other = run_of(tmp_path), run_of(tmp_path, "--seed", "1")
    draw = [torch.rand(3, generator=r.generator(s)) for r in (run, other) for s in (0, 1)]
    assert len({tuple(d.tolist()) for d in draw}) == 4
    assert torch.equal(draw[0], torch.rand(3, generator=run.generator(0)))


def test_a_checkpoint_of_other_arguments_is_refused(tmp_path: Path) -> None:
    layer = nn.Linear(2, 2)
    run_of(tmp_path).checkpoint(layer=layer).save(7, {"seen": [1.0]})
    before = layer.weight.clone()
    nn.init.zeros_(layer.weight)
    same = run_of(tmp_path, "--resume", "--steps", "99").checkpoint(layer=layer)
    assert same.load() == 7 and same.extra == {"seen": [1.0]}
    assert torch.equal(layer.weight, before)
    assert run_of(tmp_path).checkpoint(layer=layer).load() == 0  # not asked to resume
    with pytest.raises(SystemExit, match="--hidden 128 .now 5."):
        run_of(tmp_path, "--resume", "--hidden", "5").checkpoint(layer=layer).load()


def test_what_is_finished_is_not_done_again(tmp_path: Path) -> None:
    calls = []
    run_of(tmp_path).once("a", lambda: calls.append(1) or {"loss": math.nan})
    kept = run_of(tmp_path, "--resume").once("a", lambda: calls.append(1))
    assert math.isnan(kept["loss"]) and calls == [1]


def test_nan_is_null_in_json(tmp_path: Path) -> None:
    run_of(tmp_path).write({"a": math.nan, "b": [math.inf, 1.5]}, "figures")
    figures = json.loads((tmp_path / "out" / "figures.json").read_text())
    assert figures["a"] is None and figures["b"] == [None, 1.5]


# --- language model ------------------------------------------------------------------------------


@pytest.mark.parametrize("cell", CELLS)
def test_hell_becomes_ello(cell: str) -> None:
    written, p = language_model.hello(cell)
    assert written == "ello"  # without memory at most three of the four can be right
    assert p.max(-1).values.min() > 0.5


def model_and_text(cell: str, inputs: str = "embedding") -> tuple[nn.Module, Text]:
    text = Text("the cat sat on the mat; " * 40)
    return language_model.CharModel(cell, len(text.symbols), 16, 2, inputs).double(), text


@pytest.mark.parametrize("inputs", ["embedding", "one-hot"])
@pytest.mark.parametrize("cell", CELLS)
def test_one_chunk_over_all_is_full_back_propagation(cell: str, inputs: str) -> None:
    model, text = model_and_text(cell, inputs)
    x, target = next(chunks(text.train, 3, 24))
    model.zero_grad()
    logits, _ = model(x)
    F.cross_entropy(logits.flatten(0, 1), target.flatten()).backward()
    full = {name: p.grad.clone() for name, p in model.named_parameters()}
    found = language_model.gradient(model, x, target, 24)
    truncated = language_model.gradient(model, x, target, 6)
    assert found.keys() == full.keys()
    for name in full:
        assert_close(found[name], full[name], 1e-12, name)
    assert common.detach(None) is None
    assert (truncated["rnn.weight_hh_l0"] - full["rnn.weight_hh_l0"]).abs().max() > 1e-6
    assert_close(truncated["head.weight"], full["head.weight"], 1e-12)  # the state was carried

    cosines = language_model.truncation(model, x, target)
    assert list(cosines) == [1, 2, 4, 8, 16, 24]
    assert cosines[24] == pytest.approx(1, abs=1e-12) and cosines[1] < cosines[16] < 1


def test_a_truncated_run_carries_values_and_no_history() -> None:
    model, text = model_and_text("lstm")
    x, _ = next(chunks(text.train, 3, 24))
    whole, _ = model(x)
    parts, state = [], None
    for part in x.split(8):
        state = common.detach(state)
        assert state is None or all(s.grad_fn is None for s in state)
        logits, state = model(part, state)
        assert all(s.grad_fn is not None for s in state)
        parts.append(logits)
    assert_close(torch.cat(parts), whole, 1e-12)


def test_bits_of_a_model_are_those_of_one_long_reading() -> None:
    model, text = model_and_text("gru")
    ids = torch.cat([text.train[-1:], text.held_out])
    logits, _ = model(ids[:-1, None])
    expected = F.cross_entropy(logits[:, 0], ids[1:]).item() / math.log(2)
    assert language_model.model_bits(model, text, streams=1, chunk=7) == pytest.approx(expected)


def test_ngrams_are_witten_bell() -> None:
    """Against the definition, with dictionaries, one prediction at a time."""
    text = Text(
        "abracadabra, a barracuda; abba dab a cad. " * 3 + "a new drab arcade, a bad car", 6
    )
    longest, both = 4, text.train.tolist() + text.held_out.tolist()
    counts: dict[tuple[int, ...], Counter[int]] = defaultdict(Counter)
    for n in range(longest):
        for i in range(n, len(text.train)):
            counts[tuple(both[i - n : i])][both[i]] += 1

    def p(context: tuple[int, ...], symbol: int) -> float:
        lower = p(context[1:], symbol) if context else 1 / len(text.symbols)
        seen = counts.get(context)
        if not seen:
            return lower
        return (seen[symbol] + len(seen) * lower) / (seen.total() + len(seen))

    found = language_model.ngram_bits(text, longest)
    for n in range(1, longest + 1):
        where = range(len(text.train), len(both))
        bits = [-math.log2(p(tuple(both[i - n + 1 : i]), both[i])) for i in where]
        assert found[n] == pytest.approx(sum(bits) / len(bits), rel=1e-12)
    assert sum(p(tuple(both[:3]), s) for s in range(len(text.symbols))) == pytest.approx(1)


def test_sampling() -> None:
    model, text = model_and_text("gru")
    one, two = (torch.Generator().manual_seed(0) for _ in range(2))
    drawn = language_model.sample(model, text, 30, "the ", 1.0, None, one)
    assert len(drawn) == 30 and set(drawn) <= set(text.symbols[1:])
    assert drawn == language_model.sample(model, text, 30, "the ", 1.0, None, two)
    greedy = language_model.sample(model, text, 30, "the ", 0.0)
    assert greedy == language_model.sample(model, text, 30, "the ", 1.0, top_k=1)
    logits, _ = model(text.encode("the ")[:, None])
    logits[-1, 0, 0] = -torch.inf
    assert greedy[0] == text.symbols[logits[-1, 0].argmax()]  # it continues the prime
    with pytest.raises(ValueError, match="temperature -1 is negative"):
        language_model.sample(model, text, 1, "t", -1)
    with pytest.raises(ValueError, match="at least one character"):
        language_model.sample(model, text, 1, "")


def far_copies(lines: int) -> str:
    """Lines "a..........a": a letter that is drawn, and again 11 characters later."""
    generator = torch.Generator().manual_seed(0)
    letters = ["abcdefgh"[i] for i in torch.randint(8, (lines,), generator=generator)]
    return "".join(f"{c}..........{c}\n" for c in letters)


@learns
def test_the_language_model_beats_ngrams_and_compressors(tmp_path: Path) -> None:
    """What it must remember is farther away than any n-gram here reaches."""
    file, out = tmp_path / "text.txt", tmp_path / "out"
    file.write_text(far_copies(4000), encoding="utf-8")
    arguments = ["--data", str(file), "--out", str(out), "--hidden", "48", "--chunk", "52"]
    arguments += ["--steps", "300", "--lr", "1e-2", "--compare", "20", "--threads", "1"]
    language_model.main(arguments)
    figures = results(out)
    ours = figures["bits_per_character"]
    assert ours < figures["ngram_bits_per_character"] - 0.1
    assert ours < figures["gzip_bits_per_character"] - 0.1
    assert ours < figures["xz_bits_per_character"] - 0.1
    assert ours > 3 / 13 - 0.02  # the letters are random: 3 bits of every 13 characters
    assert len(figures["train_bits"]) == 300 and figures["sample"].startswith("def ")
    assert len(figures["texts"]) == 4
    assert figures["truncation"]["1"] < figures["truncation"]["64"]


def test_an_interrupted_training_goes_on_as_if_it_had_not_been(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = Text(far_copies(100))

    def train(out: str, *argv: str) -> list[float]:
        arguments = ["--out", str(tmp_path / out), "--steps", "12", "--batch", "4", *argv]
        run = common.start(language_model.parse(arguments))
        model = language_model.CharModel("lstm", len(text.symbols), 8)
        return language_model.train(run, text, model, 12, [12])["bits"]

    def stop(self: common.Checkpoint, step: int, extra: Any) -> None:
        if step == 7:
            self.save(step, extra)
            raise KeyboardInterrupt

    whole = train("whole")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(common.Checkpoint, "save_now_and_then", stop)
        train("parts")
    parts = train("parts", "--resume")
    assert len(whole) == 12 and parts == whole


@learns
def test_two_processes_train_one_model(tmp_path: Path) -> None:
    file = tmp_path / "text.txt"
    file.write_text(far_copies(600), encoding="utf-8")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    program = [str(ROOT / "examples" / "language_model.py"), "--data", str(file), "--steps", "8"]
    program += ["--out", "out", "--hidden", "16", "--batch", "4", "--compare", "2"]
    done = subprocess.run(
        [*command, *program, "--length", "5", "--threads", "1"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "utf-8"},
        capture_output=True,
        encoding="utf-8",
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("bits per character") > 0
    assert results(tmp_path / "out")["processes"] == 2


# --- gradient flow -------------------------------------------------------------------------------


def test_measured_norms_are_the_product_of_jacobians() -> None:
    layer = gradient_flow.recurrent("rnn", 5, 3)
    x = torch.randn(7, 1, 3, dtype=torch.float64)
    norms = gradient_flow.gradient_norms(layer, x)["h"]

    w, h = layer.weight_hh_l0.detach(), torch.zeros(5, dtype=torch.float64)
    jacobians = []
    for x_t in x[:, 0]:
        h = torch.tanh(layer.weight_ih_l0.detach() @ x_t + w @ h)
        jacobians.append((1 - h**2)[:, None] * w)
    largest, smallest = [1.0], [1.0]
    product = torch.eye(5, dtype=torch.float64)
    for jacobian in reversed(jacobians[1:]):
        product = product @ jacobian
        values = torch.linalg.svdvals(product)
        largest.append(values[0].item())
        smallest.append(values[-1].item())
    assert len(norms) == 7
    for low, norm, high in zip(smallest, norms, largest, strict=True):
        assert low * (1 - 1e-9) <= norm <= high * (1 + 1e-9)


def test_orthogonal_tanh_follows_theory() -> None:
    for curves in gradient_flow.singular_value_study(40, 16, [0.9, 1.0, 1.1]).values():
        for rest, driven, theory in zip(*curves.values(), strict=True):
            assert rest == pytest.approx(theory, rel=1e-6)
            assert driven <= theory * (1 + 1e-9)
    curves = gradient_flow.gaussian_study(40, 64, 0.7)
    bound, _, measured = curves.values()
    assert bound[-1] > 1e3 and measured[-1] < 0.2  # the bound explodes, the gradient vanishes


def test_relu_keeps_half_of_the_squared_norm() -> None:
    curves = gradient_flow.relu_study(20, 256, [1.0, 2**0.5])
    for lines in curves.values():
        assert lines["measured"][6] == pytest.approx(lines["theory"][6], rel=0.5)


@pytest.mark.parametrize("bias", [-3.0, 0.0, 3.0])
def test_the_c_path_is_the_product_of_forget_gates(bias: float) -> None:
    layer = gradient_flow.recurrent("lstm", 8)
    nn.init.zeros_(layer.weight_hh_l0)  # h has no way back
    with torch.no_grad():
        layer.weight_ih_l0[8:16] = 0  # nor has x a say in forgetting
    gradient_flow.forget_bias_(layer, bias)
    x = torch.randn(10, 4, 16, dtype=torch.float64)
    c = gradient_flow.gradient_norms(layer, x)["c"]
    gate = 1 / (1 + math.exp(-bias))
    # The last c is asked for through h_T; every step back is one more gate.
    for k in range(1, 9):
        assert c[k + 1] / c[k] == pytest.approx(gate, rel=1e-9)


def test_skips_and_gates_keep_what_plain_layers_lose() -> None:
    skip = gradient_flow.skip_study(50, 32)
    assert skip["without skip"][-1] < 1e-6 and skip["with skip"][-1] > 0.5
    cells = gradient_flow.cell_study(50, 32)
    assert cells["RNN"][-1] < 1e-6
    assert cells["LSTM c, forget bias 3"][-1] > 0.05
    assert cells["RNN, relu, identity"][-1] > 0.05
    forget = gradient_flow.forget_study(20, 32, [-3.0, 3.0])
    assert forget["-3"]["measured"][10] < 1e-5 < 0.05 < forget["+3"]["measured"][10]


def test_tasks_and_their_baselines() -> None:
    generator = torch.Generator().manual_seed(0)
    x, y = gradient_flow.adding_problem(20, 4000, generator)
    assert x.shape == (20, 4000, 2) and (x[:10, :, 1].sum(0) == 1).all()
    assert (x[10:, :, 1].sum(0) == 1).all()
    assert_close((x[..., 0] * x[..., 1]).sum(0), y, 1e-6)
    assert (y - 1).square().mean().item() == pytest.approx(gradient_flow.ADDING_BASELINE, rel=0.1)

    x, target = gradient_flow.copy_memory(7, 50, generator)
    symbols = x.argmax(-1)
    assert x.shape == (27, 50, 10) and target.shape == (27, 50)
    assert torch.equal(symbols[:10], target[-10:]) and (symbols[:10] < 8).all()
    assert (symbols[16] == 9).all() and (symbols == 9).sum() == 50 and (target[:-10] == 8).all()
    ideal = torch.full((27, 50, 10), -1e9)
    ideal[:17, :, 8] = 0
    ideal[17:, :, :8] = 0
    loss = F.cross_entropy(ideal.flatten(0, 1), target.flatten()).item()
    assert gradient_flow.copy_baseline(7) == pytest.approx(loss, rel=1e-6)


@learns
@pytest.mark.drawn(1)
@pytest.mark.parametrize("name", ["GRU", "LSTM"])
def test_gated_cells_solve_what_needs_memory(tmp_path: Path, name: str) -> None:
    run = run_of(tmp_path, "--lr", "1e-2", "--batch", "32")
    adding = gradient_flow.adding_run(run, name, length=12, steps=900, hidden=32)
    assert adding["held_out_loss"] < gradient_flow.ADDING_BASELINE / 5
    copy = gradient_flow.copy_run(run, name, delay=3, steps=1000, hidden=48)
    assert copy["held_out_loss"] < 0.9 * gradient_flow.copy_baseline(3)


def test_clipping_keeps_a_training_alive(tmp_path: Path) -> None:
    run = run_of(tmp_path, "--batch", "16")
    free = gradient_flow.clipping_run(run, math.inf, length=80, steps=30, hidden=32)
    clipped = gradient_flow.clipping_run(run, 1.0, length=80, steps=30, hidden=32)
    assert not free["held_out_loss"] < 1e6
    assert clipped["held_out_loss"] < 1
    assert max(clipped["norms"]) > 10  # there was something to clip


def test_gradient_flow_draws_its_page(tmp_path: Path) -> None:
    out = tmp_path / "out"
    short = ["--steps", "5", "--distance", "20", "--adding-length", "10", "--copy-delay", "2"]
    gradient_flow.main(["--out", str(out), "--hidden", "16", "--batch", "4", *short])
    figures = results(out)
    assert figures["error_against_theory"] < 1e-6
    assert len(figures["studies"]["cells"]["LSTM c"]) == 20
    assert figures["copy_baseline"] == pytest.approx(10 * math.log(8) / 22)


# --- comparison of cells -------------------------------------------------------------------------


@pytest.mark.parametrize("cell", CELLS)
def test_equal_parameters_are_equal(cell: str) -> None:
    def build(width: int) -> nn.Module:
        return compare_cells.PixelModel(cell, width)

    width = compare_cells.width_for(build, 20_000)
    size = common.count_parameters(build(width))
    assert 0.95 * 20_000 < size <= 20_000 < common.count_parameters(build(width + 1))
    with pytest.raises(ValueError, match="5 parameters are too few"):
        compare_cells.width_for(build, 5)


@pytest.mark.parametrize("better, chosen", [("lower", 0.1), ("higher", 0.3)])
def test_the_rate_is_chosen_by_the_end_of_training(
    tmp_path: Path, better: str, chosen: float
) -> None:
    class Task:
        title = "a task whose curve ends at its rate"

        def build(self, cell: str, width: int) -> nn.Module:
            return compare_cells.PixelModel(cell, width)

        def train(self, model: nn.Module, steps: int, seed: int, rate: float) -> list[float]:
            return [0.2] * (steps - 1) + [rate]

        def measure(self, model: nn.Module) -> float:
            return 0.5

    run = common.start(
        compare_cells.parse(["--out", str(tmp_path / "out"), "--rates", "0.3", "0.1", "0.2"])
    )
    task = Task()
    task.better = better
    found = compare_cells.compare(run, task, ["gru"], 1000, steps=10, seeds=2)["gru"]
    assert found["rate"] == chosen and found["results"] == [0.5, 0.5]


@learns
@pytest.mark.drawn(4, of="long training")
def test_every_cell_beats_the_baselines_at_equal_size(tmp_path: Path) -> None:
    file, out = tmp_path / "text.txt", tmp_path / "out"
    file.write_text(Path(argparse.__file__).read_text(encoding="utf-8"), encoding="utf-8")
    arguments = ["--data", str(file), "--out", str(out), "--steps", "120", "--seeds", "2"]
    compare_cells.main([*arguments, "--parameters", "20000", "--batch", "32", "--rates", "5e-3"])
    figures = results(out)
    for cell in CELLS:
        assert figures[f"characters_{cell}"] < figures["characters_baseline"] - 0.5
        assert len(figures["characters"][cell]["results"]) == 2
    for cell in ("gru", "lstm"):
        assert figures[f"pixels_{cell}"] > figures["pixels_baseline"] + 0.1


# --- overview ------------------------------------------------------------------------------------


@learns
@pytest.mark.drawn(4, of="long training")
def test_all_five_shapes_learn(tmp_path: Path) -> None:
    out = tmp_path / "out"
    overview.main(["--out", str(out), "--steps", "600"])
    figures = results(out)
    for name in overview.shapes():
        assert figures[name] > figures[f"{name} baseline"] + 0.5, name


def test_overview_data_asks_what_it_says() -> None:
    generator = torch.Generator().manual_seed(0)
    x, target = overview.parity(50, generator, True)
    assert torch.equal(x[:, :, 0].cumsum(0).long() % 2, target)
    x, target = overview.reversal(50, generator, False)
    assert x.shape == (10, 50, 11) and torch.equal(x[:5].argmax(-1).flip(0), target[5:])
    words = {
        held_out: {
            tuple(w) for w in overview.reversal(500, generator, held_out)[1][5:].t().tolist()
        }
        for held_out in (False, True)
    }
    assert words[True] and not words[True] & words[False]
    x, target = overview.Digits().spelled(20, generator, False)
    assert not x[1:].any()
    names = ["".join(overview.ALPHABET[i] for i in column if i >= 0) for column in target.t()]
    assert {name.rstrip(".") for name in names} <= set(overview.NAMES)
    assert all(name.endswith(".") for name in names)


@pytest.mark.parametrize(
    "program", ["overview", "language_model", "gradient_flow", "compare_cells"]
)
def test_help_names_the_cells_and_defaults(program: str, capsys: pytest.CaptureFixture) -> None:
    module = {m.__name__: m for m in (overview, language_model, gradient_flow, compare_cells)}
    with pytest.raises(SystemExit) as end:
        module[program].parse(["--help"])
    assert end.value.code == 0
    shown = capsys.readouterr().out
    assert "of all random numbers (default: 0)" in " ".join(shown.split())
    assert "--resume" in shown
