"""``lengths`` of a padded batch, against torch.nn with sequences packed by hand, one by one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import assert_all_close, flatten
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence

import fused_rnn

pytestmark = pytest.mark.module

KINDS: list[tuple[str, dict[str, Any]]] = [
    ("RNN", {}),
    ("RNN", {"nonlinearity": "relu", "batch_first": True, "bidirectional": True}),
    ("LSTM", {"num_layers": 2, "bidirectional": True}),
    ("LSTM", {"proj_size": 3, "batch_first": True}),
    ("GRU", {"num_layers": 2, "bidirectional": True, "batch_first": True}),
    ("GRU", {"bias": False}),
    ("PeepholeLSTM", {"num_layers": 2, "bidirectional": True}),
    ("BlockGRU", {"num_layers": 2, "bidirectional": True}),
]
LENGTHS = {
    "any order": [2, 5, 1, 4],
    "all": [5, 5, 5, 5],
    "one step": [1, 1, 1, 1],
    "some empty": [0, 3, 5, 0],
    "all empty": [0, 0, 0, 0],
}
T, B, I, H = 5, 4, 3, 6  # noqa: E741


def problem(name: str, kwargs: dict[str, Any], given: bool) -> tuple[Any, Tensor, Any]:
    module = getattr(fused_rnn, name)(I, H, dtype=torch.float64, **kwargs)
    x = torch.randn((B, T, I) if module.batch_first else (T, B, I), dtype=torch.float64)
    runs = module.num_layers * (2 if module.bidirectional else 1)
    h, c = (torch.randn(runs, B, n, dtype=torch.float64) for n in (module.proj_size or H, H))
    if not given:
        return module, x.requires_grad_(), None
    states = tuple(t.requires_grad_() for t in (h, c))
    return module, x.requires_grad_(), states if name.endswith("LSTM") else states[0]


def one_by_one(module: Any, x: Tensor, hx: Any, lengths: list[int]) -> tuple[Tensor, Any]:
    """Each sequence cut to its length, as a batch of its own."""
    rows = x if module.batch_first else x.transpose(0, 1)
    pair = isinstance(hx, tuple)
    states = hx if pair else (hx,)
    outputs, lasts = [], []
    for b, n in enumerate(lengths):
        own = None if hx is None else tuple(s[:, b : b + 1].contiguous() for s in states)
        row = rows[b : b + 1, :n]
        if n == 0:
            width = module.proj_size or module.hidden_size
            d = 2 if module.bidirectional else 1
            y = x.new_zeros(1, 0, d * width)
            runs = module.num_layers * d
            sizes = [width, module.hidden_size][: 2 if isinstance(module, fused_rnn.LSTM) else 1]
            if isinstance(module, fused_rnn.PeepholeLSTM):
                sizes = [width, module.hidden_size]
            last: Any = own or tuple(x.new_zeros(runs, 1, size) for size in sizes)
        else:
            argument = own if own is None or pair else own[0]
            y, last = module(row if module.batch_first else row.transpose(0, 1), argument)
            y = y if module.batch_first else y.transpose(0, 1)
            last = last if isinstance(last, tuple) else (last,)
        outputs.append(nn.functional.pad(y, (0, 0, 0, T - n)))
        lasts.append(last)
    y = torch.cat(outputs)
    ends = tuple(torch.cat(parts, 1) for parts in zip(*lasts, strict=True))
    return y if module.batch_first else y.transpose(0, 1), ends if len(ends) > 1 else ends[0]


def with_gradients(call: Any, module: Any, x: Tensor, hx: Any) -> dict[str, Tensor]:
    outputs = flatten(call())
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(o.shape, generator=generator, dtype=o.dtype) for o in outputs]
    wanted = {"x": x, **dict(module.named_parameters())}
    wanted |= {f"state {i}": s for i, s in enumerate(flatten(hx) if hx is not None else [])}
    loss = sum((o * w).sum() for o, w in zip(outputs, weights, strict=True))
    grads = torch.autograd.grad(loss, list(wanted.values()), allow_unused=True)
    found = {f"output {i}": o.detach() for i, o in enumerate(outputs)}
    for (name, t), grad in zip(wanted.items(), grads, strict=True):
        found[name] = torch.zeros_like(t) if grad is None else grad
    return found


@pytest.mark.parametrize("given", [True, False], ids=["hx", "zeros"])
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
@pytest.mark.parametrize("name, kwargs", KINDS, ids=lambda v: v if isinstance(v, str) else "")
def test_as_each_sequence_alone(
    name: str, kwargs: dict[str, Any], lengths: list[int], given: bool
) -> None:
    module, x, hx = problem(name, kwargs, given)
    if not any(lengths) and not given:
        pytest.skip("nothing has a gradient")
    found = with_gradients(lambda: module(x, hx, lengths=lengths), module, x, hx)
    expected = with_gradients(lambda: one_by_one(module, x, hx, lengths), module, x, hx)
    assert_all_close(found, expected)


def test_forms_of_lengths() -> None:
    module, x, _ = problem("GRU", {}, False)
    expected = module(x, lengths=[2, 5, 1, 4])
    for dtype in (torch.int64, torch.int32, torch.uint8):
        found = module(x, lengths=torch.tensor([2, 5, 1, 4], dtype=dtype))
        assert_all_close(found, expected, tol=0)
    assert_all_close(module(x, lengths=None), module(x), tol=0)


def test_as_packed(seed: int) -> None:
    """The same bits, without the packing."""
    module = fused_rnn.LSTM(I, H, bidirectional=True)
    rows = [torch.randn(n, I) for n in (5, 4, 2, 1)]
    packed, hx = module(pack_sequence(rows))
    y, found = module(nn.utils.rnn.pad_sequence(rows), lengths=[5, 4, 2, 1])
    assert_all_close(found, hx, tol=0)
    assert torch.equal(y, nn.utils.rnn.pad_packed_sequence(packed)[0])


def test_garbage_past_the_end() -> None:
    """What is there is neither read nor given a gradient."""
    module, x, _ = problem("LSTM", {"bidirectional": True}, False)
    lengths = [0, 3, 5, 1]
    clean = x.detach().clone()
    dirty = clean.clone()
    for b, n in enumerate(lengths):
        dirty[n:, b] = float("nan")
    found = [
        with_gradients(lambda t=t: module(t, lengths=lengths), module, t, None)
        for t in (clean.requires_grad_(), dirty.requires_grad_())
    ]
    assert_all_close(found[1], found[0], tol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_types(dtype: torch.dtype) -> None:
    module = fused_rnn.GRU(I, H).to(dtype)
    y, h = module(torch.randn(T, B, I, dtype=dtype), lengths=[0, 5, 2, 3])
    assert y.dtype == h.dtype == dtype
    with torch.autocast("cpu", torch.bfloat16):
        plain, x, hx = fused_rnn.GRU(I, H), torch.randn(T, B, I), torch.ones(1, B, H)
        expected, found = plain(x, hx), plain(x, hx, lengths=[0, 5, 2, 3])
    assert [t.dtype for t in found] == [t.dtype for t in expected]


def test_second_derivatives_and_compile() -> None:
    module, x, _ = problem("GRU", {}, False)
    assert torch.autograd.gradgradcheck(
        lambda x: module(x, lengths=[2, 0, 1, 4])[0], (x,), fast_mode=True
    )
    torch._dynamo.reset()
    compiled = torch.compile(module, backend="eager")
    assert_all_close(compiled(x, lengths=[2, 5, 1, 4]), module(x, lengths=[2, 5, 1, 4]))


@pytest.mark.parametrize(
    "lengths, error, message",
    [
        ([1, 2, 3], ValueError, r"lengths: expected shape \(4,\), got \(3,\)"),
        ([[1, 2, 3, 4]], ValueError, r"lengths: expected shape \(4,\), got \(1, 4\)"),
        ([1, 2, 3, 6], ValueError, "lengths: expected 0 to 5, the steps of input, got"),
        ([1, 2, 3, -1], ValueError, "lengths: expected 0 to 5, the steps of input, got"),
        ([1.0, 2.0, 3.0, 4.0], TypeError, "lengths: expected integers, got torch.float32"),
        ([True] * 4, TypeError, "lengths: expected integers, got torch.bool"),
    ],
)
def test_wrong_lengths(lengths: Any, error: type[Exception], message: str) -> None:
    module, x, _ = problem("GRU", {}, False)
    with pytest.raises(error, match=message):
        module(x, lengths=lengths)


def test_other_wrong_arguments() -> None:
    module, x, _ = problem("GRU", {}, False)
    packed: PackedSequence = pack_sequence([torch.randn(2, I, dtype=torch.float64)])
    with pytest.raises(ValueError, match="lengths: expected None with a PackedSequence"):
        module(packed, lengths=[2])
    with pytest.raises(ValueError, match="lengths: expected input to be 3D, a batch, got 2D"):
        module(x[:, 0], lengths=[2])
    with pytest.raises(RuntimeError, match="Expected hidden size"):
        module(x, x.new_zeros(1, 3, H), lengths=[1, 2, 3, 0])
    with pytest.raises(RuntimeError, match="hx should also be 3-D"):
        module(x, x.new_zeros(B, H), lengths=[1, 2, 3, 4])
    with pytest.raises(RuntimeError, match="length"):
        module(x[:0], lengths=[0] * 4)
    assert module(x[:, :0], lengths=[])[0].shape == (T, 0, H)
