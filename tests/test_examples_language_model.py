"""examples/language_model.py: what it computes, and that it beats its baselines."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

for package in ("matplotlib", "tqdm"):
    pytest.importorskip(package)

import common  # noqa: E402
import language_model  # noqa: E402
from helpers import assert_close  # noqa: E402
from programs import CELLS, ROOT, Run, learns, results  # noqa: E402
from text import Text, chunks  # noqa: E402

pytestmark = [pytest.mark.examples, pytest.mark.usefixtures("one_thread")]
pytest_plugins = "program_fixtures"


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
def test_the_language_model_beats_ngrams_and_compressors(run: Run, tmp_path: Path) -> None:
    """What it must remember is farther away than any n-gram here reaches."""
    file = tmp_path / "text.txt"
    file.write_text(far_copies(4000), encoding="utf-8")
    sizes = ("--hidden", 48, "--chunk", 52, "--steps", 300, "--lr", 1e-2, "--compare", 20)
    figures = run(language_model, "--data", file, *sizes)
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
    assert results(tmp_path / "out", "language_model")["processes"] == 2
