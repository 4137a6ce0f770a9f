"""examples/hidden_units.py: what it finds in units, and the page that shows it."""

from __future__ import annotations

import json
import math
import re
import shutil
import subprocess
import tokenize
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from helpers import assert_close

for package in ("matplotlib", "tqdm", "sklearn", "scipy"):
    pytest.importorskip(package)
np = pytest.importorskip("numpy")
image = pytest.importorskip("matplotlib.image")

import hidden_units  # noqa: E402
import text as corpus  # noqa: E402
from common import find_cell  # noqa: E402
from programs import Run, learns  # noqa: E402

pytestmark = [pytest.mark.examples, pytest.mark.usefixtures("one_thread")]
pytest_plugins = "program_fixtures"


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
@pytest.mark.drawn(2, of="long training")
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
