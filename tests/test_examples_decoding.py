"""examples/decoding.py: beams, greedy search and attention."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from helpers import assert_close

for package in ("matplotlib", "tqdm"):
    pytest.importorskip(package)

import decoding  # noqa: E402
from common import find_cell  # noqa: E402
from programs import CELLS  # noqa: E402

pytestmark = [pytest.mark.examples, pytest.mark.usefixtures("one_thread")]
pytest_plugins = "program_fixtures"


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


@pytest.mark.parametrize("cell", CELLS)
def test_a_beam_of_one_is_greedy_search(cell: str) -> None:
    step, state = random_writer(cell, rows=5)
    plain = decoding.greedy(step, state, 5, 8)
    beam = decoding.beam_search(step, state, 5, 8, width=1)
    assert torch.equal(plain.tokens, beam.tokens)
    assert_close(beam.score.float(), plain.score, 1e-5)


@pytest.mark.parametrize("cell", CELLS)
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
