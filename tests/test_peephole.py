"""PeepholeLSTM, against a loop written from the paper, and as a module like torch.nn's."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import emulated
import pytest
import torch
from cases import Case
from helpers import assert_all_close, assert_no_worse, flatten, map_tensors, run
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pad_packed_sequence

import fused_rnn

pytestmark = pytest.mark.module


def loop(module: Any, x: Tensor, hx: Any, lengths: list[int] | None = None) -> tuple[Any, Any]:
    """Gers & Schmidhuber 2000, one unit equation a line, on x [T, B, I]. Sequences end at
    ``lengths``; outputs past them are zero."""
    T, B = x.shape[:2]
    lengths = lengths or [T] * B
    directions = 2 if module.bidirectional else 1
    runs = module.num_layers * directions
    width = module.proj_size or module.hidden_size
    h0, c0 = hx or (x.new_zeros(runs, B, width), x.new_zeros(runs, B, module.hidden_size))
    h_n, c_n = [], []
    for layer in range(module.num_layers):
        outputs = []
        for d in range(directions):
            name = f"_l{layer}{'_reverse' * d}"
            w, r = getattr(module, "weight_ih" + name), getattr(module, "weight_hh" + name)
            p_i, p_f, p_o = (getattr(module, p + name) for p in ("p_i", "p_f", "p_o"))
            b = 0
            if module.bias:
                b = getattr(module, "bias_ih" + name) + getattr(module, "bias_hh" + name)
            rows, hs, cs = [], [], []
            for k, length in enumerate(lengths):
                h, c = h0[layer * directions + d, k], c0[layer * directions + d, k]
                steps: list[Any] = [None] * length
                for t in reversed(range(length)) if d else range(length):
                    a_i, a_f, a_g, a_o = (w @ x[t, k] + r @ h + b).chunk(4)
                    i = torch.sigmoid(a_i + p_i * c)
                    f = torch.sigmoid(a_f + p_f * c)
                    c = f * c + i * torch.tanh(a_g)
                    o = torch.sigmoid(a_o + p_o * c)
                    h = o * torch.tanh(c)
                    if module.proj_size:
                        h = getattr(module, "weight_hr" + name) @ h
                    steps[t] = h
                rows.append(torch.stack(steps + [torch.zeros_like(h)] * (T - length)))
                hs.append(h)
                cs.append(c)
            outputs.append(torch.stack(rows, 1))
            h_n.append(torch.stack(hs))
            c_n.append(torch.stack(cs))
        x = torch.cat(outputs, -1)
    return x, (torch.stack(h_n), torch.stack(c_n))


class Loop(nn.Module):
    """``loop`` over the parameters of a module."""

    def __init__(self, module: Any) -> None:
        super().__init__()
        self.inner = (module,)
        for name, parameter in module.named_parameters():
            self.register_parameter(name, parameter)

    def forward(self, x: Any, hx: Any = None) -> Any:
        (module,) = self.inner
        if isinstance(x, PackedSequence):
            padded, lengths = pad_packed_sequence(x)
            y, states = loop(module, padded, hx, lengths.tolist())
            order = torch.arange(len(lengths)) if x.sorted_indices is None else x.sorted_indices
            rows = [
                y[t, order[:n]] for t, n in enumerate(x.batch_sizes.tolist())
            ]  # as the packed input has them
            return x._replace(data=torch.cat(rows)), states
        if module.batch_first:
            y, states = loop(module, x.transpose(0, 1), hx)
            return y.transpose(0, 1), states
        return loop(module, x, hx)


CASES = [
    Case(),
    Case(num_layers=2, bidirectional=True, batch=5, hidden_size=17, hx=False),
    Case(bias=False, batch_first=True, time=1),
    Case(layout="packed", num_layers=2, hidden_size=33),
    Case(layout="unsorted", bidirectional=True, batch=7),
]


def example(case: Case, dtype: torch.dtype = torch.float64, **kwargs: Any) -> tuple[Any, Any, Any]:
    module = fused_rnn.PeepholeLSTM(
        case.input_size,
        case.hidden_size,
        num_layers=case.num_layers,
        bias=case.bias,
        batch_first=case.batch_first,
        bidirectional=case.bidirectional,
        dtype=dtype,
        **kwargs,
    )
    x, h = case.inputs(dtype)
    if h is None:
        return module, x, None
    width = kwargs.get("proj_size") or case.hidden_size
    return module, x, (torch.randn(*h.shape[:-1], width).to(h), torch.randn_like(h))


@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("proj_size", [0, 3])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_agrees_with_the_paper(case: Case, proj_size: int, recompute: bool) -> None:
    module, x, hx = example(case, proj_size=proj_size, recompute=recompute)
    assert_all_close(run(module, x, hx), run(Loop(module), x, hx), tol=1e-12)
    with torch.no_grad():
        assert_all_close(module(x, hx), Loop(module)(x, hx), tol=1e-12)


@pytest.mark.parametrize("size", [(4, 3, 5, 7), (6, 32, 48, 64), (9, 33, 100, 130)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_low_precision(dtype: torch.dtype, size: tuple[int, int, int, int]) -> None:
    """Against float64 no worse than the reference path, on vectors and on tiles."""
    T, B, I, H = size  # noqa: E741
    module, x, _ = example(Case(input_size=I, hidden_size=H, batch=B, time=T, hx=False), dtype)
    exact = run(copy.deepcopy(module).double(), x.double(), None, dtype)
    ours = run(module, x)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fused_rnn.ops, "supports", lambda *_: False)
        plain = run(module, x)
    assert_no_worse(ours, plain, exact, terms=max(4 * H, I, B * T))


def test_parameters() -> None:
    """torch.nn's, in torch.nn's order, then the peepholes of the same run."""
    torch.manual_seed(1)
    module = fused_rnn.PeepholeLSTM(3, 4, 2, bidirectional=True, proj_size=2)
    torch.manual_seed(1)
    theirs = nn.LSTM(3, 4, 2, bidirectional=True, proj_size=2)
    peepholes = [name for name, _ in module.named_parameters() if name.startswith("p_")]
    assert peepholes[:4] == ["p_i_l0", "p_f_l0", "p_o_l0", "p_i_l0_reverse"]
    assert {n: p.shape for n, p in module.named_parameters() if n not in peepholes} == {
        n: p.shape for n, p in theirs.named_parameters()
    }
    assert list(module.state_dict())[:5] == list(theirs.state_dict())[:5]
    assert torch.equal(module.weight_ih_l0, theirs.weight_ih_l0)
    bound = 4**-0.5
    assert all(0 < p.abs().max() <= bound for p in module.parameters())
    assert repr(module) == "PeepholeLSTM(3, 4, proj_size=2, num_layers=2, bidirectional=True)"
    assert [len(run) for run in module.all_weights] == [8] * 4


def test_a_module_like_others() -> None:
    module, x, hx = example(Case(num_layers=2, bidirectional=True))
    expected = module(x, hx)
    saved = io.BytesIO()
    torch.save(module.state_dict(), saved)
    saved.seek(0)
    fresh = fused_rnn.PeepholeLSTM(5, 7, 2, bidirectional=True, dtype=torch.float64)
    fresh.load_state_dict(torch.load(saved))
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module)), fresh):
        assert_all_close(other(x, hx), expected, tol=0)
    assert module.float().weight_ih_l0 is module._flat_weights[0]
    assert not any(f.swapped_for for f in fused_rnn.survey(nn.Sequential(module)))
    assert type(fused_rnn.restore(nn.Sequential(module))[0]) is fused_rnn.PeepholeLSTM


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ((3, 0), ValueError, "hidden_size"),
        ((3.0, 4), TypeError, "input_size"),
        ((3, 4, 0), ValueError, "num_layers"),
        ((3, 4, 1, 2), TypeError, "bias"),
    ],
)
def test_bad_sizes(arguments: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        fused_rnn.PeepholeLSTM(*arguments)


def test_bad_calls() -> None:
    module = fused_rnn.PeepholeLSTM(3, 4)
    h, c = torch.zeros(2, 1, 2, 4).unbind()
    with pytest.raises(RuntimeError, match=r"Expected 3, got 5"):
        module(torch.randn(6, 2, 5))
    with pytest.raises(TypeError, match="'hx' must be tuple of Tensors"):
        module(torch.randn(6, 2, 3), h)
    with pytest.raises(RuntimeError, match=r"Expected hidden\[1\] size \(1, 2, 4\)"):
        module(torch.randn(6, 2, 3), (h, c[..., :3]))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_transforms() -> None:
    module, x, hx = example(Case(hidden_size=3))
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    if not emulated.WANTED:
        assert_all_close(run(compiled, x, hx).values(), run(module, x, hx).values(), tol=1e-12)
    program = torch.export.export(module, (x, hx)).module()
    assert_all_close(program(x, hx), module(x, hx), tol=1e-12)
    with torch.no_grad():  # torch has no operator for it: the loop is traced
        traced = torch.jit.trace(module, (x, hx), check_trace=False)
    assert_all_close(traced(x, hx), module(x, hx), tol=1e-12)
    values = torch.func.vmap(lambda x: module(x[:, None])[0], in_dims=1, out_dims=1)(x)
    assert_all_close(values[:, :, 0], module(x)[0], tol=1e-12)
    with torch.autocast("cpu", torch.bfloat16):
        found = module.float()(*map_tensors((x, hx), lambda t: t.float()))
        like = fused_rnn.LSTM(5, 3)(*map_tensors((x, hx), lambda t: t.float()))
    assert [t.dtype for t in flatten(found)] == [t.dtype for t in flatten(like)]


def test_dropout_between_layers() -> None:
    module, x, _ = example(Case(num_layers=3), dropout=0.5)
    torch.manual_seed(3)
    first = flatten(module(x))
    torch.manual_seed(3)
    assert_all_close(flatten(module(x)), first, tol=0)
    assert not torch.equal(module.eval()(x)[0], first[0])
