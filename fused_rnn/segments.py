"""A batch cut where states begin anew, into segments that are sequences of their own.

From one reset to the next nothing passes but gradients of the initial states, so that a batch with
resets is a packed batch of more sequences, which any engine runs as fast as another. The rows of a
batch, padded or packed, stand time first; ``Segments`` says where each of them goes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .reference import Stages
from .torch_internals import transformed


def places_of_rows(batch_sizes: Tensor, rows: Any) -> tuple[Tensor, Tensor]:
    """For each row of a packed batch its step and its sequence, longest first."""
    steps = torch.arange(batch_sizes.shape[0])
    step = steps.repeat_interleave(batch_sizes, output_size=rows)
    begin = batch_sizes.cumsum(0) - batch_sizes
    return step, torch.arange(rows) - begin[step]


def last_rows(batch_sizes: Tensor, batch: Any) -> Tensor:
    """[B], the row of each sequence's last step."""
    counts = (batch_sizes.unsqueeze(1) > torch.arange(batch)).sum(0)
    begin = batch_sizes.cumsum(0) - batch_sizes
    return begin[counts - 1] + torch.arange(batch)


class Segments(NamedTuple):
    """Where the rows of a batch go, R of them, and what its S segments are; on the device of x but
    for ``batch_sizes``."""

    origin: Tensor  # [R], the row of the batch that each row of the segments is
    place: Tensor  # [R], the other way round
    batch_sizes: Tensor  # of the segments, as of a PackedSequence
    sequence: Tensor  # [S], the sequence that a segment is of
    begin: Tensor  # [S], its first step in there
    end: Tensor  # [S], the step of the next segment's beginning, or that of its own
    anew: Tensor  # [S] bool, whether it begins with a reset
    final: Tensor  # [S] bool, whether it is the last of its sequence
    first: Tensor  # [B], the first segment of each sequence
    last: Tensor  # [B], the last one


def _find(reset: Tensor, batch_sizes: Tensor | None, batch: int) -> Segments:
    """The segments of the rows of ``reset``, [T, B] or, with batch_sizes, [R]."""
    device = reset.device
    reset = reset.to("cpu")
    rows = reset.numel()
    at = torch.arange(rows)
    if batch_sizes is None:
        by_sequence = at.view(-1, batch).t().flatten()  # rows, one sequence after the other
        step, sequence = at // batch, at % batch
    else:
        reset = reset[: int(batch_sizes.sum())]
        step, sequence = places_of_rows(batch_sizes, rows)
        by_sequence = sequence.argsort(stable=True)
    anew, step, sequence = (t.flatten()[by_sequence] for t in (reset, step, sequence))
    begins = anew | (step == 0)
    start = begins.nonzero().squeeze(1)  # of each segment, in that order
    length = torch.diff(start, append=torch.tensor([rows]))
    segments = start.numel()
    longest_first = length.argsort(descending=True, stable=True)
    rank = torch.empty_like(start)
    rank[longest_first] = torch.arange(segments)
    ended = torch.bincount(length).cumsum(0)
    sizes = segments - ended[:-1]
    own = begins.cumsum(0) - 1  # the segment of each row
    offset = sizes.cumsum(0) - sizes
    place, origin = torch.empty_like(at), torch.empty_like(at)
    place[by_sequence] = offset[at - start[own]] + rank[own]
    origin[place] = at
    begin, of = step[start], sequence[start]
    final = torch.cat([begin[1:] == 0, torch.tensor([True])])
    end = torch.where(final, begin, begin.roll(-1))
    found = [t[longest_first] for t in (of, begin, end, anew[start], final)]
    first, last = rank[begin == 0], rank[final]
    on_device = (t.to(device) for t in (*found, first, last))
    return Segments(origin.to(device), place.to(device), sizes, *on_device)


# A compiler sees one operator, whose results have sizes that are in the data. Another copy of this
# module in the process works with that of the first.
if not hasattr(torch.ops.fused_rnn, "segments"):

    @torch.library.custom_op(
        "fused_rnn::segments",
        mutates_args=(),
        schema="(Tensor reset, Tensor? batch_sizes, SymInt batch) -> (Tensor origin, Tensor place, "
        "Tensor batch_sizes, Tensor sequence, Tensor begin, Tensor end, Tensor anew, Tensor final, "
        "Tensor first, Tensor last)",
    )
    def _segments(reset: Tensor, batch_sizes: Tensor | None, batch: int) -> tuple[Tensor, ...]:
        return tuple(_find(reset, batch_sizes, batch))

    @_segments.register_fake
    def _(reset: Tensor, batch_sizes: Tensor | None, batch: Any) -> tuple[Tensor, ...]:
        sizes = torch.library.get_ctx()
        segments, steps = sizes.new_dynamic_size(), sizes.new_dynamic_size()

        def made(*size: Any, dtype: torch.dtype = torch.int64) -> Tensor:
            return reset.new_empty(size, dtype=dtype)

        rows = reset.numel()
        return (
            made(rows),
            made(rows),
            torch.empty(steps, dtype=torch.int64, device="cpu"),
            *(made(segments) for _ in range(3)),
            *(made(segments, dtype=torch.bool) for _ in range(2)),
            made(batch),
            made(batch),
        )


def find(reset: Tensor, batch_sizes: Tensor | None, batch: Any) -> Segments:
    """The segments of B sequences that ``reset`` cuts: [T, B], or packed [R] with batch_sizes."""
    if torch.compiler.is_compiling():
        return Segments(*torch.ops.fused_rnn.segments.default(reset, batch_sizes, batch))
    return _find(reset, batch_sizes, batch)


class _Rows(torch.autograd.Function):
    """Rows in another order. The backward of torch's own ``index_select`` adds, which takes longer
    than the rows take to copy."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, index: Tensor, inverse: Tensor) -> Tensor:
        ctx.dim = dim
        ctx.save_for_backward(index, inverse)
        return x.index_select(dim, index)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        index, inverse = ctx.saved_tensors
        return reordered(grad, ctx.dim, inverse, index), None, None, None


def reordered(x: Tensor, dim: int, index: Tensor, inverse: Tensor) -> Tensor:
    """``x.index_select(dim, index)`` for a permutation and its inverse."""
    if transformed():
        return x.index_select(dim, index)
    found: Tensor = _Rows.apply(x, dim, index, inverse)
    return found


def by_direction(
    states: Tensor, directions: int, forwards: Tensor, backwards: Tensor | None
) -> Tensor:
    """Of states [L*D, n, P] those at ``forwards`` [B] in the first direction and at ``backwards``
    (None: 0 to B - 1) in the second: [L*D, B, P]."""
    if directions == 1:
        return states.index_select(1, forwards)
    one, other = states[0::2].index_select(1, forwards), states[1::2]
    if backwards is None:
        other = other[:, : forwards.shape[0]]
    else:
        other = other.index_select(1, backwards)
    return torch.stack([one, other], 1).flatten(0, 1)


def begun(cut: Segments, initial: Tensor, anew: Tensor | None, directions: int) -> Tensor:
    """The initial states of all segments, [L*D, S, P], from those of the sequences [L*D, B, P].

    ``anew`` takes their place after a reset: [L*D, B, P], or for each step [T, L*D, B, P]; None is
    zeros. The second direction begins a segment at its end.
    """
    found = []
    of = cut.sequence
    for d, (begins, step) in enumerate(((cut.anew, cut.begin), (~cut.final, cut.end))[:directions]):
        own = initial[d::directions].index_select(1, of)
        mask = begins.view(1, -1, 1)
        if anew is None:
            found.append(own.masked_fill(mask, 0))
            continue
        if anew.dim() == 3:
            other = anew[d::directions].index_select(1, of)
        else:
            runs = anew[:, d::directions].transpose(1, 2).flatten(0, 1)  # [T*B, L, P]
            other = runs.index_select(0, step * anew.shape[2] + of).transpose(0, 1)
        found.append(torch.where(mask, other, own))
    return found[0] if directions == 1 else torch.stack(found, 1).flatten(0, 1)


def run(
    call: Callable[..., Any],
    reset: Tensor,
    x: Tensor,
    initial: tuple[Tensor, Tensor | None],
    anew: tuple[Tensor | None, Tensor | None],
    masks: Tensor | None,
    batch_sizes: Tensor | None,
    stages: Stages,
    given: Sequence[Tensor],
    *,
    directions: int,
    every_state: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """``call(x, h0, c0, masks, batch_sizes, stages, given)`` for a batch that ``reset`` cuts: its
    states begin with ``initial``, and after a reset with ``anew``, see ``begun``."""
    cut = find(reset, batch_sizes, initial[0].shape[1])

    def placed(rows: Tensor | None, at: Tensor = cut.origin) -> Tensor | None:
        return None if rows is None else rows.index_select(1, at)

    def together(rows: Tensor, dim: int = 1) -> Tensor:
        return reordered(rows, dim, cut.place, cut.origin)

    lead, padded = x.shape[:-1], batch_sizes is None
    if padded:
        x, masks = x.flatten(0, 1), None if masks is None else masks.flatten(1, 2)
        given = [rows.flatten(0, 1) for rows in given]
    zoneout = stages.zoneout
    if zoneout is not None and zoneout.shape[1] > 1:  # of each row
        zoneout = placed(zoneout)
    y, *last = call(
        reordered(x, 0, cut.origin, cut.place),
        *(
            None if first is None else begun(cut, first, other, directions)
            for first, other in zip(initial, anew, strict=True)
        ),
        placed(masks),
        cut.batch_sizes,
        stages._replace(zoneout=zoneout, h_mask=placed(stages.h_mask, cut.sequence)),
        [reordered(rows, 0, cut.origin, cut.place) for rows in given],
    )
    if every_state:
        last = [None if s is None else together(s) for s in last]
    else:
        last = [
            None if s is None else by_direction(s, directions, cut.last, cut.first) for s in last
        ]
    y = together(y, 0)
    return y.unflatten(0, lead) if padded else y, last[0], last[1]
