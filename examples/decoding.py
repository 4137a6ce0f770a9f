"""What writes token by token: vocabulary, attention, greedy and beam search, BLEU.

States here are nested tuples of tensors whose dimension 1 is the batch, such as h [L, B, H] and the
LSTM's (h, c), or notes of an encoder [S, B, H]: one function picks rows of them all.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

PAD, BEGIN, END, UNKNOWN = range(4)  # begin the vocabulary; a target ends with END


class Vocabulary:
    """Numbers for tokens, of those that occur at least ``least`` times in ``sentences``."""

    def __init__(self, sentences: Iterable[Sequence[str]], least: int = 1) -> None:
        counts = Counter(token for sentence in sentences for token in sentence)
        self.tokens = ["<pad>", "<begin>", "<end>", "<unknown>"]
        self.tokens += sorted(token for token, n in counts.items() if n >= least)
        self.index = {token: i for i, token in enumerate(self.tokens)}

    def __len__(self) -> int:
        return len(self.tokens)

    def encode(self, sentence: Sequence[str]) -> Tensor:
        """The numbers of the tokens and END, int64 [len(sentence) + 1]."""
        return torch.tensor([self.index.get(t, UNKNOWN) for t in sentence] + [END])

    def decode(self, numbers: Iterable[int]) -> list[str]:
        """The tokens before the first END."""
        tokens = []
        for number in numbers:
            if number == END:
                break
            tokens.append(self.tokens[number])
        return tokens


# --- states --------------------------------------------------------------------------------------


def pick(state: Any, rows: Tensor) -> Any:
    """The state of these rows of the batch; a row may come more than once."""
    if isinstance(state, tuple):
        return tuple(pick(part, rows) for part in state)
    return state if state is None else state.index_select(1, rows)


def top_hidden(state: Any) -> Tensor:
    """h of the last layer [B, H], of an RNN's or GRU's h or an LSTM's (h, c)."""
    return (state[0] if isinstance(state, tuple) else state)[-1]


# --- attention -----------------------------------------------------------------------------------


class Memory(NamedTuple):
    """What a decoder attends to: S places per row."""

    notes: Tensor  # [S, B, N]
    keys: Tensor  # [S, B, A]: U h_j of the equation below, computed once
    is_real: Tensor  # [S, B]: false where a shorter row is padded


class Attention(nn.Module):
    """Additive attention: Bahdanau, Cho and Bengio 2015, arXiv:1409.0473, section 3.1.

    e_j = v . tanh(W s + U h_j), a = softmax(e), context = sum_j a_j h_j, for the decoder's
    state s (H numbers) and notes h_j (N numbers) of the places j.
    """

    def __init__(self, notes: int, hidden: int, size: int) -> None:
        super().__init__()
        self.of_notes = nn.Linear(notes, size)
        self.of_state = nn.Linear(hidden, size, bias=False)
        self.energy = nn.Linear(size, 1, bias=False)

    def memory(self, notes: Tensor, is_real: Tensor | None = None) -> Memory:
        """For ``notes`` [S, B, N]; without ``is_real`` no place is padding."""
        if is_real is None:
            is_real = torch.ones(notes.shape[:2], dtype=torch.bool, device=notes.device)
        return Memory(notes, self.of_notes(notes), is_real)

    def forward(self, hidden: Tensor, memory: Memory | tuple) -> tuple[Tensor, Tensor]:
        """The context [B, N] and the weights a [S, B] for the state ``hidden`` [B, H]."""
        notes, keys, is_real = memory
        energy = self.energy(torch.tanh(keys + self.of_state(hidden))).squeeze(-1)  # [S, B]
        weights = energy.masked_fill(~is_real, -torch.inf).softmax(0)
        return torch.einsum("sb,sbn->bn", weights, notes), weights


# --- search --------------------------------------------------------------------------------------

# From tokens [B] and state to logits [B, V], the next state, and attention's weights [S, B] if any.
Step = Callable[[Tensor, Any], tuple[Tensor, Any, Tensor | None]]


class Written(NamedTuple):
    """What a search found for each of B rows."""

    tokens: Tensor  # [B, T], END and what follows it included
    score: Tensor  # [B]: log probability of the tokens up to END, in nats
    weights: Tensor | None  # attention [T, B, S], of greedy search alone


@torch.no_grad()
def greedy(step: Step, state: Any, rows: int, limit: int, device: Any = None) -> Written:
    """The likeliest token at each step, until every row has ended or has ``limit`` tokens."""
    token = torch.full((rows,), BEGIN, device=device)
    score = torch.zeros(rows, device=device)
    ended = torch.zeros(rows, dtype=torch.bool, device=device)
    tokens, maps = [], []
    while len(tokens) < limit and not ended.all():
        logits, state, weights = step(token, state)
        gain, token = logits.log_softmax(-1).max(-1)
        score += gain.masked_fill(ended, 0)
        token = token.masked_fill(ended, END)
        ended |= token == END
        tokens.append(token)
        maps.append(weights)
    weights = None if maps[0] is None else torch.stack(maps).transpose(1, 2)
    return Written(torch.stack(tokens, 1), score, weights)


@torch.no_grad()
def beam_search(
    step: Step,
    state: Any,
    rows: int,
    limit: int,
    width: int = 4,
    penalty: float = 0.0,
    device: Any = None,
) -> Written:
    """Keeps the ``width`` likeliest beginnings of every row and extends them all.

    At the end the one with the largest log p / length^penalty wins; without penalty (0) short
    sentences have the better chance (Wu et al. 2016, arXiv:1609.08144, section 7). ``width`` 1 is
    greedy search.
    """
    state = pick(state, torch.arange(rows, device=device).repeat_interleave(width))
    token = torch.full((rows * width,), BEGIN, device=device)
    tokens = torch.empty(rows, width, 0, dtype=torch.int64, device=device)
    # All beams of a row begin alike: but for one they wait until there is something to tell apart.
    score = torch.full((rows, width), -torch.inf, device=device)
    score[:, 0] = 0
    ended = torch.zeros(rows, width, dtype=torch.bool, device=device)
    first = torch.arange(rows, device=device)[:, None] * width  # of each row's beams
    while tokens.shape[-1] < limit and not ended.all():
        logits, state, _ = step(token, state)
        gain = logits.log_softmax(-1).view(rows, width, -1)
        symbols = gain.shape[-1]
        # A beam that has ended goes on with END alone, at no cost.
        gain = gain.masked_fill(ended[..., None], -torch.inf)
        gain[..., END] = gain[..., END].masked_fill(ended, 0)
        score, best = (score[..., None] + gain).flatten(1).topk(width)
        beam, token = best // symbols, best % symbols
        tokens = torch.cat(
            [tokens.gather(1, beam[..., None].expand_as(tokens)), token[..., None]], -1
        )
        ended = ended.gather(1, beam) | (token == END)
        state = pick(state, (first + beam).flatten())
        token = token.flatten()
    length = (tokens != END).sum(-1) + 1  # END counts
    winner = (score / length**penalty).argmax(1, keepdim=True)
    chosen = tokens.gather(1, winner[..., None].expand(-1, -1, tokens.shape[-1]))[:, 0]
    return Written(chosen, score.gather(1, winner)[:, 0], None)


# --- scores --------------------------------------------------------------------------------------


def bleu(written: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """BLEU of the corpus, 0..100, by sacrebleu; each sentence may have several ``references``.

    Papineni et al. 2002; Post 2018, arXiv:1804.08771.
    """
    import sacrebleu

    most = max(map(len, references))
    streams = [[r[i] if i < len(r) else None for r in references] for i in range(most)]
    return sacrebleu.corpus_bleu(list(written), streams).score


def exact(written: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """The share, 0..1, of sentences that equal one of their references."""
    return sum(w in r for w, r in zip(written, references, strict=True)) / len(written)
