"""examples/seq2seq.py: what it computes, and that it learns to translate."""

from __future__ import annotations

import calendar
import random
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import assert_close
from torch.nn.utils.rnn import pack_sequence

for package in ("matplotlib", "tqdm", "sklearn", "sacrebleu", "dateutil"):
    pytest.importorskip(package)

import dates  # noqa: E402
import seq2seq  # noqa: E402
from common import find_cell  # noqa: E402
from programs import CELLS, Run, learns  # noqa: E402

pytestmark = [pytest.mark.examples, pytest.mark.usefixtures("one_thread")]
pytest_plugins = "program_fixtures"


def test_dates_mean_what_they_say() -> None:
    r = random.Random(torch.initial_seed())
    kinds = set()
    for _ in range(2000):
        date = dates.random_date(r)
        kinds.add(date.kind)
        day = dates.datetime.date.fromisoformat(date.iso)
        assert dates.FIRST <= day <= dates.LAST
        if date.kind == "numbers" and not date.typo:
            assert dates.by_dateutil(date.text) == date.iso, date
        if "last day" in date.text.lower():
            assert day.day == calendar.monthrange(day.year, day.month)[1], date
    assert kinds == set(dates.KINDS)
    assert [dates.ordinal(n) for n in (1, 2, 3, 5, 12, 20, 31)] == (
        "first second third fifth twelfth twentieth thirty-first".split()
    )
    assert [dates.suffixed(n) for n in (1, 11, 22, 30)] == ["1st", "11th", "22nd", "30th"]


def small_translator(cell: str, attends: bool) -> seq2seq.Translator:
    return seq2seq.Translator(find_cell(cell), 9, 8, 12, 2, attends).double()


@pytest.mark.parametrize("attends", [True, False])
@pytest.mark.parametrize("cell", CELLS)
def test_translator_steps_as_it_was_taught_whatever_shares_the_batch(
    cell: str, attends: bool
) -> None:
    model = small_translator(cell, attends)
    sources = [torch.randint(4, 9, (n,)) for n in (3, 7, 1, 5)]
    target = torch.randint(4, 8, (6, 4))
    taught = model(pack_sequence(sources, enforce_sorted=False), target)
    for b, source in enumerate(sources):
        state = model.read(pack_sequence([source]))
        token = torch.tensor([seq2seq.BEGIN])
        for t in range(6):
            logits, state, _ = model.step(token, state)
            assert_close(logits[0], taught[t, b])
            token = target[t, [b]]


def test_scheduled_sampling_feeds_the_models_own_tokens() -> None:
    model = small_translator("gru", attends=True)
    source = pack_sequence([torch.randint(4, 9, (5,)) for _ in range(64)])
    some, others = torch.randint(4, 8, (2, 6, 64))

    def logits(target: torch.Tensor, own: float) -> torch.Tensor:
        torch.manual_seed(5)
        return model(source, target, own=own)

    # Always its own tokens: the target is never seen. Never, or now and then: it is.
    assert_close(logits(some, 1.0), logits(others, 1.0))
    assert not torch.equal(logits(some, 0.5), logits(others, 0.5))
    assert not torch.equal(logits(some, 0.5), logits(some, 0.0))


@learns
@pytest.mark.drawn(2, of="long training")
def test_seq2seq_beats_a_parser_written_by_hand_and_copying(run: Run, capsys: Any) -> None:
    figures = run(
        seq2seq, "--steps", 240, "--held-out", 200, "--examples", 8000, "--attention", "yes",
    )  # fmt: skip
    reached = figures["with_attention_exact_beam"]
    assert reached > figures["dateutil"] + 5
    assert figures["nearest"] < figures["dateutil"]
    assert reached >= figures["with_attention_exact_greedy"] - 2
    assert set(figures["kinds"]["dateutil"]) == set(dates.KINDS)
    assert f"{figures['samples'][0]['written']}" in capsys.readouterr().out


def german(n: int) -> str:
    """1..999 in German words, separate."""
    ones = "- ein zwei drei vier fünf sechs sieben acht neun".split()
    tens = "- zehn zwanzig dreißig vierzig fünfzig sechzig siebzig achtzig neunzig".split()
    h, t, o = n // 100, n // 10 % 10, n % 10
    words = [ones[h], "hundert"] if h else []
    words += [ones[o]] if o else []
    words += ["und"] if o and t else []
    return " ".join(words + ([tens[t]] if t else []))


def english(n: int) -> str:
    return f"{dates.ONES[n // 100]} hundred and {dates.cardinal(n % 100)}, please"


@learns
def test_seq2seq_translates_pairs(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    file = tmp_path / "pairs.tsv"
    lines = [f"{english(n)}\t{german(n)}\tignored\n" for n in range(1, 1000)]
    file.write_text("".join(lines), encoding="utf-8")
    figures = run(
        seq2seq, "--pairs", file, "--steps", 250, "--hidden", 64, "--attention", "yes",
        "--sampling", 0.2,
    )  # fmt: skip
    assert figures["pairs_held_out"] == 999 // 20
    assert figures["with_attention_bleu_beam"] > figures["nearest"] + 15

    # What was trained is there for --say, which trains nothing.
    capsys.readouterr()
    arguments = figures["arguments"]
    command = ["--pairs", file, "--hidden", 64, "--out", arguments["out"], "--say", english(321)]
    monkeypatch.setattr(sys, "argv", ["seq2seq", *map(str, command)])
    seq2seq.main()
    said = capsys.readouterr().out
    assert "greedy: " in said and "beam of 5: " in said and "hundert" in said


def test_pairs_stay_apart_and_bad_files_are_named(tmp_path: Path) -> None:
    file = tmp_path / "pairs.tsv"
    file.write_text("".join(f"a {n}\tb {n} {k}\n" for n in range(60) for k in range(2)))
    train, held_out = seq2seq.read_pairs(file, "word", 10, 100, seed=1)
    assert len(train) + len(held_out) == 120 and len(held_out) == 6
    assert not {tuple(p.source) for p in train} & {tuple(p.source) for p in held_out}
    file.write_text("a\tb\nno tab here\n")
    with pytest.raises(SystemExit, match="line 2: no tab"):
        seq2seq.read_pairs(file, "word", 10, 100, seed=1)
    file.write_text("a\tb\n")
    with pytest.raises(SystemExit, match="too few"):
        seq2seq.read_pairs(file, "word", 10, 100, seed=1)
