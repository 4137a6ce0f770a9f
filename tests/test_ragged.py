"""Packed sequences: every sequence comes out as if it had run alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import LAYER_CLASSES, Case, pair, small
from helpers import assert_all_close, assert_close, flatten, leaves
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils.rnn import (
    PackedSequence,
    pack_padded_sequence,
    pack_sequence,
    pad_packed_sequence,
    unpack_sequence,
)

pytestmark = pytest.mark.parity


def select(hx: Any, i: int) -> Any:
    """The states of sequence i, still batched."""
    return tuple(h[:, i : i + 1] for h in hx) if isinstance(hx, tuple) else hx[:, i : i + 1]


def check_alone(case: Case, lengths: list[int]) -> None:
    """Outputs, states and gradients of a packed run against one run for each sequence."""
    _, module = case.modules()
    _, hx = case.inputs()
    sequences = [torch.randn(n, case.input_size, dtype=torch.float64) for n in lengths]

    packed_in, packed_hx = [s.clone().requires_grad_() for s in sequences], leaves(hx)
    output, h_n = module(pack_sequence(packed_in, enforce_sorted=False), packed_hx)
    packed_out = [*unpack_sequence(output), *flatten(h_n)]
    weights = [torch.randn_like(o) for o in packed_out]
    sum((o * w).sum() for o, w in zip(packed_out, weights, strict=True)).backward()
    packed_grads = [p.grad.clone() for p in module.parameters()]

    module.zero_grad()
    alone_in, alone_hx = [s.clone().requires_grad_() for s in sequences], leaves(hx)
    runs = [module(s[:, None], select(alone_hx, i)) for i, s in enumerate(alone_in)]
    states = zip(*(flatten(state) for _, state in runs), strict=True)
    alone_out = [*(y[:, 0] for y, _ in runs), *(torch.cat(parts, 1) for parts in states)]
    sum((o * w).sum() for o, w in zip(alone_out, weights, strict=True)).backward()

    assert_all_close(packed_out, alone_out)
    assert_all_close(packed_grads, [p.grad for p in module.parameters()])
    assert_all_close([s.grad for s in packed_in], [s.grad for s in alone_in])
    assert_all_close([h.grad for h in flatten(packed_hx)], [h.grad for h in flatten(alone_hx)])


LENGTHS = {
    "one step": [1],
    "one sequence": [6],
    "all equal": [4, 4, 4],
    "all different": [3, 1, 6, 2, 5],
    "one long": [1, 1, 1, 1, 9, 1],
    "ties": [2, 5, 2, 5, 5, 1, 2],
    "wide": [3] * 20 + [1] * 13 + [2],
}


@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("bidirectional", [False, True], ids=["uni", "bi"])
@pytest.mark.parametrize("case", small(num_layers=2), ids=lambda c: c.cell)
def test_alone(case: Case, bidirectional: bool, lengths: str) -> None:
    found = LENGTHS[lengths]
    check_alone(Case(**{**vars(case), "bidirectional": bidirectional, "batch": len(found)}), found)


@given(
    lengths=st.lists(st.integers(1, 12), min_size=1, max_size=24),
    cell=st.sampled_from([case.cell for case in small()]),
    hidden_size=st.integers(2, 35),
    bidirectional=st.booleans(),
)
def test_any_lengths(lengths: list[int], **kwargs: Any) -> None:
    check_alone(Case(batch=len(lengths), **kwargs), lengths)


@pytest.mark.parametrize("case", small(bidirectional=True, num_layers=2), ids=lambda c: c.cell)
def test_full_lengths_equal_padded(case: Case) -> None:
    _, module = case.modules()
    x, hx = case.inputs()
    packed, packed_states = module(pack_padded_sequence(x, [case.time] * case.batch), hx)
    output, states = module(x, hx)
    assert_close(pad_packed_sequence(packed)[0], output)
    assert_all_close(packed_states, states)


@pytest.mark.parametrize("case", small(), ids=lambda c: c.cell)
def test_padding_is_never_read(case: Case) -> None:
    """NaN where there is no sequence; pad_packed_sequence puts zeros back."""
    _, module = case.modules()
    lengths = [4, 1, 2]
    x = torch.full((4, 3, case.input_size), float("nan"), dtype=torch.float64)
    for i, n in enumerate(lengths):
        x[:n, i] = torch.randn(n, case.input_size, dtype=torch.float64)
    output, states = module(pack_padded_sequence(x, lengths, enforce_sorted=False))
    padded, found = pad_packed_sequence(output)
    assert found.tolist() == lengths
    assert all(torch.isfinite(t).all() for t in (padded, *flatten(states)))


@pytest.mark.parametrize("reorder", [[2, 0, 1], [1, 2, 0]])
@pytest.mark.parametrize("case", small(bidirectional=True), ids=lambda c: c.cell)
def test_order_of_the_batch_does_not_matter(case: Case, reorder: list[int]) -> None:
    _, module = case.modules()
    sequences = [torch.randn(n, case.input_size, dtype=torch.float64) for n in (2, 5, 3)]
    _, hx = case.inputs()
    first, states = module(pack_sequence(sequences, enforce_sorted=False), hx)
    moved = [sequences[i] for i in reorder]
    moved_hx = tuple(h[:, reorder] for h in hx) if isinstance(hx, tuple) else hx[:, reorder]
    second, moved_states = module(pack_sequence(moved, enforce_sorted=False), moved_hx)
    outputs = unpack_sequence(first)
    assert_all_close(unpack_sequence(second), [outputs[i] for i in reorder])
    assert_all_close(flatten(moved_states), [h[:, reorder] for h in flatten(states)])


def test_sorted_without_indices() -> None:
    """A PackedSequence built by hand, as torchaudio and others do."""
    theirs, module = Case(cell="lstm").modules()
    data = torch.randn(6, 5, dtype=torch.float64)
    packed = PackedSequence(data, torch.tensor([3, 2, 1]))
    output, states = module(packed)
    expected, expected_states = theirs(packed)
    assert_close(output.data, expected.data)
    assert_all_close(states, expected_states)


@pytest.mark.parametrize("name", LAYER_CLASSES)
def test_packed_by_hand_and_wrong(name: str) -> None:
    theirs, ours = pair(name, 3, 4)
    rows = torch.randn(5, 3)

    def call(module: nn.Module, *sizes: int) -> Tensor:
        return module(PackedSequence(rows, torch.tensor(sizes)))[0].data

    assert_close(call(ours, 3, 1), call(theirs, 3, 1), tol=1e-6)  # the last row is left out
    for sizes in ((1, 2, 2), (2, 0), (2, 2, 2), (-1, 3)):
        with pytest.raises(RuntimeError):
            call(ours, *sizes)


class Encoder(nn.Module):
    """The usual text encoder: pack, run, unpack, take the last state."""

    def __init__(self, rnn: nn.Module) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, 5)
        self.rnn = rnn

    def forward(self, tokens: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        packed = pack_padded_sequence(
            self.embedding(tokens), lengths, batch_first=True, enforce_sorted=False
        )
        output, (h_n, _) = self.rnn(packed)
        return pad_packed_sequence(output, batch_first=True)[0], torch.cat([h_n[-2], h_n[-1]], -1)


def test_text_encoder() -> None:
    case = Case(cell="lstm", num_layers=2, bidirectional=True, batch_first=True)
    theirs, ours = (Encoder(rnn).double() for rnn in case.modules())
    ours.embedding.load_state_dict(theirs.embedding.state_dict())
    tokens, lengths = torch.randint(20, (4, 7)), torch.tensor([3, 7, 1, 5])
    assert_all_close(ours(tokens, lengths), theirs(tokens, lengths))
