"""On a card: the CUDA engine against torch.nn, and what only a card can show."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import LAYERS, Case, ids, pairwise, small
from helpers import (
    assert_all_close,
    assert_no_worse,
    flatten,
    leave_kink,
    leaves,
    map_tensors,
    run,
)
from torch import Tensor, nn

import fused_rnn
from fused_rnn import build, ops, zoo

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]

CASES = [case for case in pairwise() if case.dropout == 0]
LOW = [torch.float32, torch.bfloat16, torch.float16]


def on_card(
    case: Case, dtype: torch.dtype = torch.float64
) -> tuple[nn.Module, nn.Module, Any, Any]:
    """torch.nn's module, ours, the input and the state, on the card.

    torch.nn's is in training mode whatever the case says: cuDNN has no backward in the other.
    """
    theirs, ours = (module.cuda() for module in case.modules(dtype))
    x, hx = case.inputs(dtype)
    return theirs.train(), ours, x.cuda(), map_tensors(hx, lambda t: t.cuda())


@pytest.fixture(autouse=True)
def exact_products():
    """float32 means float32, for cuDNN and for us."""
    before = torch.backends.cudnn.rnn.fp32_precision
    torch.backends.cudnn.rnn.fp32_precision = "ieee"
    yield
    torch.backends.cudnn.rnn.fp32_precision = before


def test_native_kernels_are_used() -> None:
    assert build.backend("cuda") == "native"


@pytest.mark.parametrize("variant", ["steps", "graph"])
@pytest.mark.parametrize("case", CASES, ids=ids(CASES))
def test_float64(case: Case, variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FUSED_RNN_VARIANT", variant)
    theirs, ours, x, hx = on_card(case)
    expected = run(theirs, x, hx)
    for _ in range(3):  # as it is, captured, replayed
        assert_all_close(run(ours, x, hx), expected)


@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize("case", CASES, ids=ids(CASES))
def test_low_precision(case: Case, dtype: torch.dtype) -> None:
    """Our error against the exact result for these very numbers is at most twice torch.nn's."""
    theirs, ours, x, hx = on_card(case, dtype)
    if case.cell == "rnn_relu":
        x, hx = leave_kink((theirs, ours), x, hx)
    exact = copy.deepcopy(theirs).double()
    in_double = run(exact, *map_tensors((x, hx), lambda t: t.double()), dtype)
    terms = max(4 * case.hidden_size, case.input_size, case.batch * case.time)
    assert_no_worse(run(ours, x, hx), run(theirs, x, hx), in_double, terms)


@pytest.mark.parametrize("case", small(bidirectional=True, num_layers=2), ids=lambda c: c.cell)
def test_equal_to_the_cpu(case: Case) -> None:
    _, ours = case.modules()
    x, hx = case.inputs()
    expected = run(ours, x, hx)
    card = run(copy.deepcopy(ours).cuda(), *map_tensors((x, hx), lambda t: t.cuda()))
    assert_all_close({name: t.cpu() for name, t in card.items()}, expected)


@pytest.mark.parametrize("variant", ["steps", "graph"])
@pytest.mark.parametrize(
    "kind", [zoo.SLSTM, zoo.FastGRNN, zoo.OriginalGRU], ids=lambda kind: kind.__name__
)
def test_cells_from_python(kind: Any, variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """From libraries of their own, and where a cell has none in plain PyTorch: as on the CPU."""
    monkeypatch.setenv("FUSED_RNN_VARIANT", variant)
    layer = kind(5, 9, 2, bidirectional=True, dtype=torch.float64)
    x = torch.randn(6, 4, 5, dtype=torch.float64)
    expected, card = run(layer, x), copy.deepcopy(layer).cuda()
    for _ in range(3):  # as it is, captured, replayed
        found = run(card, x.cuda())
        assert_all_close({name: t.cpu() for name, t in found.items()}, expected, tol=1e-11)
    assert ops.has_cell("cuda", layer.cell, x.dtype) == (kind is not zoo.OriginalGRU)


# Hidden sizes and types that take another variant each: a graph of steps, a local kernel, one for
# clusters, where there are any, and a resident one. test_resident.py has more of them.
KINDS = [(7, torch.float32), (32, torch.bfloat16), (144, torch.bfloat16), (528, torch.bfloat16)]


@pytest.mark.parametrize(("hidden", "dtype"), KINDS)
@pytest.mark.parametrize("case", small(bidirectional=True, time=9), ids=lambda c: c.cell)
def test_repeatable(case: Case, hidden: int, dtype: torch.dtype) -> None:
    """The same bits every time: as it is, captured, replayed."""
    _, ours, x, hx = on_card(replace(case, hidden_size=hidden), dtype)
    runs = [run(ours, x, hx) for _ in range(4)]
    for later in runs[1:]:
        for name, tensor in later.items():
            assert torch.equal(tensor, runs[0][name]), name


@pytest.mark.parametrize("case", small(), ids=lambda c: c.cell)
def test_second_derivatives(case: Case) -> None:
    if case.cell == "rnn_relu":
        pytest.skip("its derivative jumps")
    _, ours, x, hx = on_card(case)
    inputs = flatten((leaves(x), *flatten(leaves(hx))))

    def call(x: Tensor, *states: Tensor) -> tuple[Tensor, ...]:
        return tuple(flatten(ours(x, states if len(states) > 1 else states[0])))

    assert torch.autograd.gradcheck(call, inputs)
    assert torch.autograd.gradgradcheck(call, inputs)


@pytest.mark.parametrize("case", small(), ids=lambda c: c.cell)
def test_compiles_into_one_graph(case: Case) -> None:
    _, ours, x, hx = on_card(case, torch.float32)
    expected = run(ours, x, hx)
    compiled = run(torch.compile(ours, fullgraph=True), x, hx)
    found = {name.replace("_orig_mod.", ""): tensor for name, tensor in compiled.items()}
    assert_all_close(found, expected, tol=1e-6)


@pytest.mark.parametrize(("hidden", "dtype"), KINDS)
@pytest.mark.parametrize("case", small(bidirectional=True, time=9), ids=lambda c: c.cell)
def test_in_a_graph_of_the_user(case: Case, hidden: int, dtype: torch.dtype) -> None:
    _, ours, x, hx = on_card(replace(case, hidden_size=hidden), dtype)
    with torch.no_grad():
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                ours(x, hx)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            output = flatten(ours(x, hx))
        flatten(x)[0].normal_()
        graph.replay()
        expected = flatten(ours(x, hx))
        for ours_, theirs in zip(output, expected, strict=True):
            assert torch.equal(ours_, theirs)


def test_new_data_in_old_places() -> None:
    """A replayed graph reads what lies in memory now, not what lay there when it was captured."""
    ours = fused_rnn.GRU(8, 16).cuda().double()
    theirs = nn.GRU(8, 16).cuda().double()
    x = torch.empty(20, 4, 8, device="cuda", dtype=torch.float64)
    with torch.no_grad():
        for _ in range(6):
            for p in ours.parameters():
                p.uniform_(-1, 1)
            theirs.load_state_dict(ours.state_dict())
            x.normal_()
            assert_all_close(ours(x), theirs(x))


@pytest.mark.parametrize(("hidden", "dtype"), KINDS)
def test_other_streams_and_threads(hidden: int, dtype: torch.dtype) -> None:
    ours = fused_rnn.LSTM(32, hidden, bidirectional=True).to("cuda", dtype)
    inputs = [torch.randn(30, 5, 32, device="cuda", dtype=dtype) for _ in range(4)]
    with torch.no_grad():
        expected = [flatten(ours(x)) for x in inputs]
    torch.cuda.synchronize()
    wrong = []

    def work(i: int) -> None:
        stream = torch.cuda.Stream()
        with torch.no_grad(), torch.cuda.stream(stream):
            for _ in range(20):
                got = flatten(ours(inputs[i]))
                stream.synchronize()
                if not all(map(torch.equal, got, expected[i])):
                    wrong.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_tf32_is_a_setting() -> None:
    if torch.cuda.get_device_capability() < (8, 0):
        pytest.skip("this card has no TF32")
    torch.manual_seed(0)
    ours = fused_rnn.LSTM(256, 256).cuda()
    x = torch.randn(10, 64, 256, device="cuda")
    exact = copy.deepcopy(ours).double()(x.double())[0]

    def error() -> float:
        return (ours(x)[0] - exact).abs().max().item()

    with torch.no_grad():
        strict = error()
        torch.backends.cudnn.rnn.fp32_precision = "tf32"
        rounded = error()
    assert strict < 1e-5 < rounded < 1e-2


@pytest.mark.parametrize("cell", LAYERS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_autocast(cell: str, dtype: torch.dtype) -> None:
    """In the dtype that is asked for; torch.nn's layers take float16 whatever that is."""
    theirs, ours, x, hx = on_card(Case(cell), torch.float32)
    with torch.autocast("cuda", dtype):
        expected, actual = flatten(theirs(x, hx)), flatten(ours(x, hx))
    for a, b in zip(actual, expected, strict=True):
        assert a.dtype == dtype
        torch.testing.assert_close(a, b.to(dtype), rtol=0.02, atol=0.02)


def test_dropout_statistics() -> None:
    """Between layers a share p is zeroed and the rest grown by 1 / (1 - p), anew at every call."""
    ours = fused_rnn.RNN(4, 512, num_layers=2, dropout=0.25).cuda()
    with torch.no_grad():
        for name, p in ours.named_parameters():
            p.fill_(0)
            if name == "bias_ih_l0":
                p.fill_(20)  # tanh(20) = 1
            if name == "weight_ih_l1":
                p.copy_(torch.eye(512) * 0.1)
        x = torch.zeros(20, 8, 4, device="cuda")
        first, second = (torch.atanh(ours(x)[0]) * 10 for _ in range(2))
    zeros = (first < 0.5).double().mean().item()
    assert abs(zeros - 0.25) < 0.01
    assert torch.allclose(first[first > 0.5], torch.tensor(4 / 3, device="cuda"), atol=1e-3)
    assert not torch.equal(first, second)


def test_devices_must_agree() -> None:
    ours = fused_rnn.GRU(3, 4).cuda()
    with pytest.raises(RuntimeError, match="same device"):
        ours(torch.randn(2, 1, 3))


def test_more_than_2_31_gates() -> None:
    free, _ = torch.cuda.mem_get_info()
    if free < 60 << 30:
        pytest.skip("needs 60 GB of the card's memory")
    rows, hidden = 530_000, 1024  # 2.17e9 gates
    ours = fused_rnn.LSTM(8, hidden, device="cuda", dtype=torch.bfloat16)
    x = torch.randn(2, rows // 2, 8, device="cuda", dtype=torch.bfloat16)
    with torch.no_grad():
        y, _ = ours(x)
        last, _ = ours(x[:, -16:])
    torch.testing.assert_close(y[:, -16:], last, rtol=0.02, atol=0.01)


def test_unusable_toolkit(tmp_path: Path) -> None:
    """Without a toolkit that fits: one warning with the remedy, and right results all the same."""
    script = """
import torch, fused_rnn, warnings
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    ours, theirs = fused_rnn.LSTM(3, 4).cuda(), torch.nn.LSTM(3, 4).cuda()
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(5, 2, 3, device="cuda")
    torch.testing.assert_close(ours(x)[0], theirs(x)[0], rtol=1e-2, atol=1e-2)
text = [str(w.message) for w in caught if "fused_rnn" in str(w.message)]
assert len(text) == 1 and "nvcc was not found" in text[0] and "remedy" in text[0], text
"""
    env = {**os.environ, "CUDA_HOME": str(tmp_path), "FUSED_RNN_CACHE_DIR": str(tmp_path / "cache")}
    done = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
