"""The examples hidden_units, seq2seq, captioning, video and recurrent_ppo: what they compute, and
that they learn.

Each learns in a short run, and is held against a baseline that does not.
"""

from __future__ import annotations

import calendar
import itertools
import json
import math
import random
import re
import shutil
import subprocess
import sys
import tokenize
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from helpers import assert_close, native
from torch.nn.utils.rnn import pack_sequence

for package in ("tqdm", "sklearn", "sacrebleu", "PIL"):
    pytest.importorskip(package)
np = pytest.importorskip("numpy")
image = pytest.importorskip("matplotlib.image")

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
sys.path.insert(0, str(EXAMPLES))

import amplifier  # noqa: E402
import captioning  # noqa: E402
import dates  # noqa: E402
import decoding  # noqa: E402
import digits  # noqa: E402
import hidden_units  # noqa: E402
import seq2seq  # noqa: E402
import text as corpus  # noqa: E402
import video  # noqa: E402
from common import find_cell  # noqa: E402

pytestmark = pytest.mark.examples

learns = pytest.mark.skipif(not native(), reason="trains too long on the reference path")
Run = Callable[..., dict[str, Any]]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs a program as from a shell; returns its figures. Its pictures are checked here."""

    def run(program: ModuleType, *arguments: Any) -> dict[str, Any]:
        out = tmp_path / "deeper" / program.__name__  # a folder that is not there yet
        command = [program.__name__, "--out", out, "--threads", 1, *arguments]
        monkeypatch.setattr(sys, "argv", list(map(str, command)))
        program.main()
        pictures = list(out.glob("*.png"))
        assert out / f"{program.__name__}.png" in pictures
        for path in pictures:
            pixels = image.imread(path)  # [height, width, RGBA]
            assert min(pixels.shape[:2]) >= 400
            assert pixels.std() > 0.05, f"{path.name} is blank"
        return json.loads((out / f"{program.__name__}.json").read_text(encoding="utf-8"))

    return run


# --- decoding ------------------------------------------------------------------------------------


def random_writer(cell: str = "lstm", rows: int = 3, symbols: int = 6) -> tuple[Any, Any]:
    """A step function without training, sharp enough that choices matter, and a state."""
    rnn = find_cell(cell)(5, 7).double()
    embedding, head = torch.randn(symbols, 5).double(), 3 * torch.randn(7, symbols).double()
    _, state = rnn(torch.randn(1, rows, 5).double())

    @torch.no_grad()
    def step(token: torch.Tensor, state: Any) -> tuple[torch.Tensor, Any, None]:
        y, state = rnn(embedding[token][None], state)
        return y[0] @ head, state, None

    return step, state


def log_probability(step: Any, state: Any, row: int, tokens: list[int]) -> float:
    """Of ``tokens`` up to the first END, for one row, one step after the other."""
    state, before, total = decoding.pick(state, torch.tensor([row])), decoding.BEGIN, 0.0
    for token in tokens:
        logits, state, _ = step(torch.tensor([before]), state)
        total += logits.log_softmax(-1)[0, token].item()
        if token == decoding.END:
            break
        before = token
    return total


@pytest.mark.parametrize("cell", ["rnn", "lstm", "gru"])
def test_a_beam_of_one_is_greedy_search(cell: str) -> None:
    step, state = random_writer(cell, rows=5)
    plain = decoding.greedy(step, state, 5, 8)
    beam = decoding.beam_search(step, state, 5, 8, width=1)
    assert torch.equal(plain.tokens, beam.tokens)
    assert_close(beam.score.float(), plain.score, 1e-5)


@pytest.mark.parametrize("cell", ["rnn", "lstm", "gru"])
def test_a_wide_beam_finds_the_best_of_all_sentences(cell: str) -> None:
    rows, symbols, limit = 3, 6, 3
    step, state = random_writer(cell, rows, symbols)
    found = decoding.beam_search(step, state, rows, limit, width=symbols**limit // 2)
    for row in range(rows):
        every = itertools.product(range(symbols), repeat=limit)
        best = max(log_probability(step, state, row, list(tokens)) for tokens in every)
        assert found.score[row].item() == pytest.approx(best, abs=1e-4)
        own = log_probability(step, state, row, found.tokens[row].tolist())
        assert found.score[row].item() == pytest.approx(own, abs=1e-4)


def test_attention_is_bahdanaus_equation_and_ignores_padding() -> None:
    attention = decoding.Attention(notes=4, hidden=3, size=5).double()
    notes, hidden = torch.randn(6, 2, 4).double(), torch.randn(2, 3).double()
    lengths = [6, 4]
    is_real = torch.arange(6)[:, None] < torch.tensor(lengths)
    context, weights = attention(hidden, attention.memory(notes, is_real))
    v, u, w = attention.energy.weight[0], attention.of_notes, attention.of_state
    for b, length in enumerate(lengths):
        energies = [v @ torch.tanh(w(hidden[b]) + u(notes[j, b])) for j in range(length)]
        expected = torch.stack(energies).softmax(0)
        assert_close(weights[:length, b], expected)
        assert weights[length:, b].abs().sum() == 0
        assert_close(context[b], expected @ notes[:length, b])


# --- seq2seq -------------------------------------------------------------------------------------


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
@pytest.mark.parametrize("cell", ["rnn", "lstm", "gru"])
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
@pytest.mark.drawn(4, of="long training")
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


# --- captioning ----------------------------------------------------------------------------------


def test_captions_are_true_of_their_scenes() -> None:
    rng = np.random.default_rng(torch.initial_seed())
    seen = set()
    for _ in range(300):
        picture, sentences, things = digits.scene(rng)
        assert picture.shape == (digits.SCENE, digits.SCENE)
        centres = {t.name: t.centre for t in things}
        for sentence in sentences:
            match = re.fullmatch(r"(a \w+ \w+) (left of|right of|above|below) (.+)", sentence)
            if not match:
                (row, column), words = things[0].centre, sentence.split()
                assert words[-2:] == [
                    "top" if row < digits.SCENE / 2 else "bottom",
                    "left" if column < digits.SCENE / 2 else "right",
                ]
                continue
            if len(centres) == 1:  # two things of one name
                continue
            (row, column), (row2, column2) = centres[match[1]], centres[match[3]]
            truth = {
                "left of": column < column2, "right of": column > column2,
                "above": row < row2, "below": row > row2,
            }  # fmt: skip
            assert truth[match[2]], sentence
            seen.add(match[2])
    assert len(seen) == 4


def test_handwriting_is_of_other_people_when_held_out() -> None:
    ours, theirs = digits.handwriting(False)[0], digits.handwriting(True)[0]
    assert len(ours) + len(theirs) == 1797
    assert not {i.tobytes() for i in ours} & {i.tobytes() for i in theirs}


@pytest.mark.parametrize("variant", captioning.VARIANTS)
def test_captioner_steps_as_it_was_taught(variant: str) -> None:
    model = captioning.Captioner(find_cell("lstm"), (5, 4, 4), 9, 6, variant).double().eval()
    maps, target = torch.rand(3, 5, 4, 4).double(), torch.randint(4, 9, (7, 3))
    taught, state = model(maps, target), model.see(maps)
    token = torch.full((3,), decoding.BEGIN)
    for t in range(7):
        logits, state, weights = model.step(token, state)
        assert_close(logits, taught[t])
        token = target[t]
        if variant == "attend":
            assert_close(weights.sum(0), torch.ones(3).double())
            assert weights.shape == (16, 3)


@learns
@pytest.mark.drawn(4, of="long training")
def test_captioning_beats_copying_the_nearest_images_caption(run: Run) -> None:
    figures = run(
        captioning, "--cnn-steps", 180, "--steps", 220, "--examples", 1500, "--held-out", 300,
        "--variant", "attend", "--hidden", 64, "--lr", 6e-3,
    )  # fmt: skip
    assert figures["nearest_bleu"] > 20  # no straw man
    assert figures["attend_bleu"] > figures["nearest_bleu"] + 5
    assert figures["attend_exact"] > figures["nearest_exact"] + 10


@learns
@pytest.mark.drawn(4, of="long training")
def test_pretrained_cnn_is_frozen_and_every_variant_learns(run: Run, tmp_path: Path) -> None:
    args = ["--cnn-steps", 40, "--steps", 50, "--examples", 400, "--held-out", 50, "--hidden", 64]
    figures = run(captioning, *args)
    again = run(captioning, *args, "--resume")  # nothing is left to train
    assert all(figures[k] == again[k] for k in figures if k.endswith(("_bleu", "_exact", "_loss")))
    out = Path(figures["arguments"]["out"])
    weights = torch.load(out / "cnn.pt", weights_only=True)["parts"]["look"]
    look = captioning.Look(1, figures["words"] + 4, 64)
    look.load_state_dict(weights)
    for variant in captioning.VARIANTS:
        content = torch.load(out / f"{variant}.pt", weights_only=True)
        assert not any(name.startswith("map") for name in content["parts"]["model"])
        losses = content["extra"]
        assert len(losses) == 50 and sum(losses[-5:]) < 0.7 * sum(losses[:5])


def test_coco_files_are_read_as_they_are(run: Run, tmp_path: Path) -> None:
    from PIL import Image

    rng = np.random.default_rng(3)
    entries, annotations, pictures = [], [], []
    for i in range(40):
        pixels, sentences, _ = digits.scene(rng)
        pictures.append((255 * pixels.clip(0, 1)).astype(np.uint8))
        wide = np.pad(pictures[-1], ((0, 0), (8, 8)))  # the loader takes the middle
        Image.fromarray(wide).save(tmp_path / f"{i}.png")
        entries.append({"id": 100 + i, "file_name": f"{i}.png"})
        annotations += [{"image_id": 100 + i, "caption": s.capitalize() + "."} for s in sentences]
    file = tmp_path / "captions.json"
    file.write_text(json.dumps({"images": entries, "annotations": annotations[::-1]}))
    read = captioning.read_coco(file, tmp_path, size=32, most=100)
    assert read.images.shape == (40, 3, 32, 32)
    assert_close(read.images[7, 1], torch.from_numpy(pictures[7] / 255).float(), 1e-6)
    expected = [a["caption"].lower()[:-1] for a in annotations if a["image_id"] == 107]
    assert sorted(read.captions[7]) == sorted(expected)

    figures = run(
        captioning, "--coco", file, "--images", tmp_path, "--size", 32, "--cnn-steps", 3,
        "--steps", 3, "--variant", "always",
    )  # fmt: skip
    assert figures["images_held_out"] == 4 and "always_bleu" in figures


# --- video ---------------------------------------------------------------------------------------


def test_digits_move_as_labelled() -> None:
    rng = np.random.default_rng(torch.initial_seed())
    steps = list(digits.COMPASS.values())
    bounces = 0
    for _ in range(50):
        track = list(digits.path(rng, 12))
        moves = [(b[0] - a[0], b[1] - a[1]) for a, b in itertools.pairwise(track)]
        assert all(0 <= top <= 12 and 0 <= left <= 12 for top, left, _ in track)
        for (down, right), (_, _, direction) in zip(moves, track[1:], strict=True):
            speed = max(abs(down), abs(right))
            assert (down, right) == tuple(speed * s for s in steps[direction]) and speed > 0
        assert track[0][2] == track[1][2]
        bounces += len({direction for _, _, direction in track}) > 1
    assert bounces > 10


@pytest.mark.parametrize("cell", ["rnn", "lstm", "gru"])
def test_the_last_state_answers_for_each_clip_as_the_clip_would_alone(cell: str) -> None:
    lengths = [4, 9, 1, 6, 9]
    model = video.Watcher(find_cell(cell), video.DIGIT_QUESTIONS, (1, 24, 24), 16).eval()
    films = [torch.rand(n, 1, 24, 24) for n in lengths]
    together = model.answer(pack_sequence(films, enforce_sorted=False))
    for b, film in enumerate(films):
        frames = pack_sequence([film])
        alone, every = model.answer(frames), model(frames)
        for name in ("digit", "start"):
            assert_close(together[name][b], alone[name][0], 1e-5)
            assert_close(alone[name][0], every[name][-1], 1e-5)


@learns
@pytest.mark.drawn(4, of="long training")
def test_video_beats_single_frames_and_the_commonest_answer(run: Run) -> None:
    figures = run(video, "--steps", 240, "--held-out", 200)
    ours, single, common = (
        figures["accuracies"][kind] for kind in ("recurrent", "single frame", "commonest answer")
    )
    assert ours["moving"] > max(single["moving"], common["moving"]) + 40
    assert ours["start"] > max(single["start"], common["start"]) + 40
    assert single["digit"] > common["digit"] + 10  # a frame shows the digit, but no direction
    seen = figures["by_frames_seen"]["start"]
    assert len(seen) == 16 and seen[-1] > seen[0] + 30
    assert seen[-1] == pytest.approx(ours["start"])


@learns
@pytest.mark.drawn(4, of="long training")
def test_films_in_folders_are_told_apart_by_their_motion(run: Run, tmp_path: Path) -> None:
    from PIL import Image

    rng = np.random.default_rng(4)
    for name in ("leftward", "rightward"):
        (tmp_path / "films" / name).mkdir(parents=True)
        for i in range(40):
            length, row, start = rng.integers(5, 9), rng.integers(0, 24), rng.integers(0, 12)
            columns = start + np.arange(length) * 2
            frames = []
            for column in columns if name == "rightward" else columns[::-1]:
                pixels = np.zeros((32, 32), np.uint8)
                pixels[row : row + 8, column : column + 8] = 255
                frames.append(Image.fromarray(pixels))
            folder = tmp_path / "films" / name
            if i % 2:
                frames[0].save(
                    folder / f"{i}.gif", save_all=True, append_images=frames[1:], duration=100
                )
            else:
                (folder / str(i)).mkdir()
                for t, frame in enumerate(frames):
                    frame.save(folder / str(i) / f"{t}.png")
    figures = run(video, "--films", tmp_path / "films", "--size", 32, "--steps", 80)
    accuracies = {kind: a["class"] for kind, a in figures["accuracies"].items()}
    assert figures["clips_held_out"] == 16
    assert accuracies["recurrent"] > accuracies["commonest answer"] + 30
    assert accuracies["recurrent"] > accuracies["all frames, no order"] + 20


# --- hidden units --------------------------------------------------------------------------------


def test_properties_agree_with_pythons_own_tokenizer() -> None:
    path = Path(json.__file__).with_name("decoder.py")
    source = path.read_text(encoding="utf-8")
    found = hidden_units.properties(source)
    begins = np.cumsum([0, *(len(line) for line in source.splitlines(keepends=True))])
    expected = {
        name: np.zeros(len(source), bool)
        for name in ("inside a string", "inside a docstring", "inside a comment")
    }
    depth = np.zeros(len(source), int)
    with path.open("rb") as file:
        for token in tokenize.tokenize(file.readline):
            if token.type == tokenize.ENCODING:
                continue
            begin = begins[token.start[0] - 1] + token.start[1]
            end = begins[min(token.end[0] - 1, len(begins) - 1)] + token.end[1]
            if token.type == tokenize.STRING:
                quote = re.match(r"[a-zA-Z]*('''|\"\"\"|'|\")", token.string)
                name = "inside a docstring" if len(quote[1]) == 3 else "inside a string"
                expected[name][begin + quote.end() - 1 : end - 1] = True
            elif token.type == tokenize.COMMENT:
                expected["inside a comment"][begin:end] = True
            elif token.string in tuple("([{"):
                depth[begin:] += 1
            elif token.string in tuple(")]}"):
                depth[begin:] -= 1
    for name, label in expected.items():
        assert label.any() and np.array_equal(found[name], label), name
    assert np.array_equal(found["depth of brackets"], depth)
    assert np.array_equal(found["inside brackets"], depth > 0)
    for line, begin in zip(source.splitlines(), begins[:-1], strict=True):
        columns = found["position in the line"][begin : begin + len(line)]
        assert np.array_equal(columns, np.arange(1, len(line) + 1))
        if line.strip():
            spaces = len(line) - len(line.lstrip())
            assert (
                found["indentation of the line"][begin + spaces : begin + len(line)] == spaces
            ).all()
            before = found["before a line's first word"][begin : begin + len(line)]
            assert before[:spaces].all() and not before[spaces:].any()


def test_agreement_is_auc_and_rank_correlation() -> None:
    from scipy.stats import rankdata, spearmanr
    from sklearn.metrics import roc_auc_score

    rng = np.random.default_rng(torch.initial_seed())
    units = rng.standard_normal((400, 3)).round(1)  # with ties
    ranks = rankdata(units, axis=0)
    label = rng.random(400) < 0.3
    number = rng.integers(0, 9, 400)
    expected = [2 * roc_auc_score(label, units[:, i]) - 1 for i in range(3)]
    assert hidden_units.agreement(ranks, label) == pytest.approx(expected)
    expected = [spearmanr(units[:, i], number).statistic for i in range(3)]
    assert hidden_units.agreement(ranks, number) == pytest.approx(expected)
    with pytest.raises(ValueError, match="same everywhere"):
        hidden_units.agreement(ranks, np.ones(400, bool))


def test_recorded_units_are_the_layers_states() -> None:
    ids = torch.randint(0, 12, (30,))
    gru = hidden_units.CharModel(find_cell("gru"), 12, 10, 1).double()
    kept, bits = hidden_units.record(gru, ids)
    y, _ = gru.rnn(gru.embedding(ids)[:, None])
    assert_close(torch.from_numpy(kept), y[:, 0].detach())
    logits = gru.head(y[:-1, 0])
    loss = torch.nn.functional.cross_entropy(logits, ids[1:]).item()
    assert bits == pytest.approx(loss / math.log(2))

    lstm = hidden_units.CharModel(find_cell("lstm"), 12, 10, 2).double()
    kept, _ = hidden_units.record(lstm, ids)
    _, (_, c) = lstm.rnn(lstm.embedding(ids)[:, None])
    assert_close(torch.from_numpy(kept[-1]), c.tanh().flatten().detach())


def part(size: int, units: int, seed: int) -> hidden_units.Part:
    """Random units over real code; unit 3 follows strings (upside down), unit 5 the column."""
    from scipy.stats import rankdata

    rng = np.random.default_rng(seed)
    source = Path(json.__file__).with_name("decoder.py").read_text(encoding="utf-8") * 2
    begin = int(rng.integers(0, len(source) // 2))
    labels = {n: p[begin : begin + size] for n, p in hidden_units.properties(source).items()}
    held = 0.3 * rng.standard_normal((size, units))
    held[:, 3] -= labels["inside a string"]
    held[:, 5] += labels["position in the line"] / 20
    return hidden_units.Part(source[begin : begin + size], held, rankdata(held, axis=0), labels)


def test_planted_units_are_found_and_chance_is_seen_as_chance() -> None:
    trained = part(6000, 20, 1), part(6000, 20, 2)
    untrained = tuple(p._replace(ranks=p.ranks[:, 6:]) for p in trained)
    found = hidden_units.search(trained, untrained, times=10, seed=0)
    strings, column = found["inside a string"], found["position in the line"]
    assert (strings["unit"], strings["sign"]) == (3, -1) and strings["score"] > 0.9
    assert (column["unit"], column["sign"]) == (5, 1) and column["score"] > 0.9
    for f in (strings, column):
        assert f["score"] > f["untrained"] + 0.2 and f["score"] > f["moved_largest"] + 0.1


class Words(HTMLParser):
    """The text within <pre>, and every attribute of a page."""

    def __init__(self) -> None:
        super().__init__()
        self.inside, self.passages, self.attributes, self.tags = False, [], set(), set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes |= set(attrs)
        if tag == "pre":
            self.inside = True
            self.passages.append("")

    def handle_endtag(self, tag: str) -> None:
        self.inside &= tag != "pre"

    def handle_data(self, data: str) -> None:
        if self.inside:
            self.passages[-1] += data


def example_page() -> tuple[str, hidden_units.Part]:
    trained = part(6000, 20, 1), part(6000, 20, 2)
    found = hidden_units.search(trained, trained, times=3, seed=0)
    return hidden_units.page(trained[1], found, "Units & <what> they follow"), trained[1]


def test_the_page_stands_alone_and_shows_the_text_as_it_is() -> None:
    page, shown = example_page()
    words = Words()
    words.feed(page)
    assert not words.tags & {"script", "link", "img", "iframe", "object"}
    assert not re.search(
        r"url\(|@import|https?://|src=", re.sub(r"<pre.*?</pre>", "", page, flags=re.S)
    )
    assert "<title>Units &amp; &lt;what&gt; they follow</title>" in page
    assert len(words.passages) == len(shown.labels)
    assert all(len(p) > 500 and p.strip("\n") in shown.text for p in words.passages)
    anchors = {value for name, value in words.attributes if name == "id"}
    links = {value for name, value in words.attributes if name == "href"}
    assert links == {f"#{a}" for a in anchors}


def test_text_can_be_read_on_every_colour() -> None:
    def luminance(colour: tuple[int, ...]) -> float:  # WCAG 2.1, relative luminance
        linear = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4
                  for c in (v / 255 for v in colour)]  # fmt: skip
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    levels = range(-hidden_units.LEVELS, hidden_units.LEVELS + 1)
    shades = [hidden_units.shade(i) for i in levels]
    assert len(set(shades)) == len(shades)
    text = luminance((0x11, 0x11, 0x11))
    assert all((luminance(s) + 0.05) / (text + 0.05) >= 7 for s in shades)  # grade AAA


def test_a_browser_shows_the_page(tmp_path: Path) -> None:
    names = ("chromium", "chromium-browser", "google-chrome", "chrome")
    browser = next(filter(None, map(shutil.which, names)), None)
    if browser is None:
        pytest.skip("no browser found: " + ", ".join(names))
    page, _ = example_page()
    file, shot = tmp_path / "page.html", tmp_path / "page.png"
    file.write_text(page, encoding="utf-8")
    flags = (
        "--headless --no-sandbox --disable-gpu --no-first-run --disable-background-networking "
        "--disable-component-update --disable-sync --hide-scrollbars --window-size=1000,1600"
    )
    command = [browser, *flags.split(), f"--user-data-dir={tmp_path / 'profile'}"]
    done = subprocess.run(
        [*command, f"--screenshot={shot}", file.as_uri()], capture_output=True, timeout=120
    )
    assert shot.exists(), done.stderr[-2000:]
    pixels = (image.imread(shot)[..., :3] * 255).round().astype(int)
    assert pixels.shape[:2] == (1600, 1000)
    counts = {
        i: int((pixels == hidden_units.shade(i)).all(-1).sum())
        for i in range(-hidden_units.LEVELS, hidden_units.LEVELS + 1)
    }
    # The scale shows every other level, the text all that the planted units reach.
    assert all(counts[i] > 100 for i in range(-hidden_units.LEVELS, hidden_units.LEVELS + 1, 2))
    assert sum(counts[i] for i in counts if i) > 20_000
    assert (pixels.max(-1) < 60).sum() > 5_000  # ink


@learns
@pytest.mark.drawn(4, of="long training")
def test_hidden_units_learn_what_untrained_ones_do_not_know(run: Run, tmp_path: Path) -> None:
    file = tmp_path / "code.py"
    file.write_text(corpus.standard_library_source(700_000), encoding="utf-8")
    figures = run(
        hidden_units, "--data", file, "--steps", 1000, "--hidden", 96, "--batch", 16, "--lr", 1e-2,
        "--chunk", 40, "--look", 60000, "--moves", 5,
    )  # fmt: skip
    assert figures["held_out_bits"] < figures["single_character_bits"] - 1.2
    # Which of the eight a short training finds is a matter of its seed: six of them, or seven.
    rivals = ("untrained", "character", "moved_largest")
    better = {n: f["score"] - max(f[r] for r in rivals) for n, f in figures["found"].items()}
    assert sum(by > 0.03 for by in better.values()) >= 5, better
    page = Path(figures["arguments"]["out"]) / "hidden_units.html"
    assert page.stat().st_size < 1_000_000


# --- recurrent_ppo -------------------------------------------------------------------------------


@pytest.fixture
def ppo() -> ModuleType:
    pytest.importorskip("gymnasium")
    import recurrent_ppo

    return recurrent_ppo


def experience_of(ppo: ModuleType, cell: str, steps: int, rows: int) -> tuple[Any, Any]:
    """A policy, and what it meets in a world that many episodes have ended in."""
    policy = ppo.Policy(find_cell(cell), 8)
    world = ppo.World(rows, 5, torch.device("cpu"))
    random = torch.Generator().manual_seed(3)
    world.play(policy, 20, random)
    experience, _ = world.play(policy, steps, random)
    assert experience.begins[1:].any()
    return policy, experience


@pytest.mark.parametrize("cell", ["rnn", "lstm", "gru"])
def test_policies_by_reset_and_by_loop_are_the_same(ppo: ModuleType, cell: str) -> None:
    """And both are what was thought step by step while playing."""
    policy, met = experience_of(ppo, cell, 50, 4)
    loop = ppo.LoopPolicy(find_cell(cell), 8)
    loop.load_state_dict(policy.state_dict())
    gain = ppo.advantages(met, 0.99, 0.95)
    found = []
    for each in (policy, loop):
        _, value, _ = each(met.seen, met.state, met.begins)
        assert_close(value.detach(), met.value, 1e-5)
        losses = ppo.losses_of(each, met, gain, torch.tensor([2, 0, 3]), 0.2)
        sum(losses.values()).backward()
        found.append([p.grad for p in each.parameters()])
    for ours, theirs in zip(*found, strict=True):
        assert_close(ours, theirs, 1e-5)


def test_advantages_end_with_their_episode(ppo: ModuleType) -> None:
    """As the sum over the rest of an episode, of one environment after the other."""
    _, met = experience_of(ppo, "gru", 40, 3)
    found = ppo.advantages(met, 0.9, 0.8)
    goes_on = ~torch.cat([met.begins[1:], met.next_begins[None]])
    following = torch.cat([met.value[1:], met.next_value[None]])
    for b in range(3):
        for t in range(40):
            expected, weight = 0.0, 1.0
            for k in range(t, 40):
                ahead = 0.9 * following[k, b].item() if goes_on[k, b] else 0.0
                reward = 0.1 * met.reward[k, b].item()
                expected += weight * (reward + ahead - met.value[k, b].item())
                weight *= 0.9 * 0.8
                if not goes_on[k, b]:
                    break
            assert found[t, b].item() == pytest.approx(expected, abs=1e-5)


def test_a_world_begins_where_it_says(ppo: ModuleType) -> None:
    """An episode is seen from its first place on, near the middle; returns are its steps."""
    policy = ppo.Policy(find_cell("gru"), 8)
    world = ppo.World(4, 1, torch.device("cpu"))
    met, finished = world.play(policy, 100, torch.Generator().manual_seed(0))
    assert met.begins[0].all() and len(finished) == int(
        met.begins[1:].sum() + met.next_begins.sum()
    )
    at_first = (met.seen[met.begins] * ppo.SCALE).abs()
    assert at_first.max() <= 0.05, "where CartPole begins"
    lengths = []
    for b in range(4):
        begins = torch.cat([met.begins[:, b], met.next_begins[b : b + 1]]).nonzero().flatten()
        lengths += begins.diff().tolist()
    assert sorted(lengths) == sorted(finished)


def test_recurrent_ppo_learns_alike_with_resets_and_by_a_loop(ppo: ModuleType, run: Run) -> None:
    figures = run(
        ppo, "--steps", 3, "--batch", 8, "--chunk", 32, "--hidden", 16, "--passes", 2, "--parts", 2,
    )  # fmt: skip
    assert figures["frames"] == 3 * 8 * 32
    assert figures["batches_until_curves_part"] >= 2
    ours, theirs = (figures[f"losses of all batches ({name})"] for name in ("reset", "loop"))
    assert ours[:2] == pytest.approx(theirs[:2], abs=1e-4)
    assert ours != figures["losses of all batches (no memory)"]


@learns
@pytest.mark.drawn(4, of="long training")
def test_a_pole_needs_memory(ppo: ModuleType, tmp_path: Path) -> None:
    command = ["--steps", "14", "--threads", "1", "--out", str(tmp_path)]
    run = ppo.start(ppo.parser().parse_args(command))
    with_memory, without = (ppo.train(run, name) for name in ("reset", "no memory"))
    assert with_memory.returns[-1] > 2 * without.returns[-1]
    assert with_memory.returns[-1] > 4 * with_memory.returns[0]


# --- amplifier -----------------------------------------------------------------------------------


def test_the_amplifier_is_learned_and_sounds_the_same_in_cpp(run: Run) -> None:
    sizes = ("--seconds", 8, "--batch", 8, "--steps", 150)
    figures = run(amplifier, *sizes)
    assert figures["error_held_out"] < figures["error_of_a_gain"] / 2
    if shutil.which("g++"):
        assert figures["apart_in_steps_of_16_bits"] <= 0.51  # half a step is rounding
        assert figures["microseconds_per_sample"] > 0
    again = run(amplifier, *sizes, "--resume")
    assert again["error_held_out"] == figures["error_held_out"]
