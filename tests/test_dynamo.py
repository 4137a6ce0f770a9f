"""torch.compile and torch.export."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import CLASSES, pair
from double_modules import LAYERS, double_pair, is_cell, value
from forked import python
from helpers import assert_all_close, assert_close, cpu_engine_only, native, run
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence

import fused_rnn

pytestmark = pytest.mark.parity


class Graphs:
    """A Dynamo backend that counts what it is given."""

    def __init__(self, inner: str = "aot_eager") -> None:
        self.inner = torch._dynamo.lookup_backend(inner)
        self.count = 0

    def __call__(self, graph: Any, inputs: Any, **kwargs: Any) -> Any:
        self.count += 1
        return self.inner(graph, inputs, **kwargs)


@pytest.mark.drawn(4)
@pytest.mark.parametrize("train", [False, True], ids=["infer", "train"])
@pytest.mark.parametrize("name", CLASSES)
def test_compile(fresh_dynamo: Any, name: str, train: bool) -> None:
    """Full graph, one graph, and the numbers and gradients of the eager module."""
    kwargs = {} if is_cell(name) else {"num_layers": 2, "bidirectional": True}
    theirs, ours = double_pair(name, **kwargs)
    x = value(name)
    graphs = Graphs()
    compiled = torch.compile(ours, backend=graphs, fullgraph=True)
    if train:
        expected = run(theirs, x)
        actual = run(compiled, x)
        actual = {k.replace("_orig_mod.", ""): v for k, v in actual.items()}
        assert_all_close(actual, expected)
    else:
        with torch.no_grad():
            assert_all_close(compiled(x), theirs(x))
            compiled(value(name))
    assert graphs.count == 1


@pytest.mark.parametrize("name", ["LSTM", "GRU"])
def test_compile_dynamic_steps(fresh_dynamo: Any, name: str) -> None:
    """Batch and, with the native kernels, time stay symbolic: no graph for each length."""
    if not native():
        pytest.skip("the reference unrolls time")
    _, ours = double_pair(name)
    graphs = Graphs()
    compiled = torch.compile(ours, backend=graphs, fullgraph=True, dynamic=True)
    for time, batch in ((5, 2), (7, 3), (11, 5), (6, 2)):
        x = torch.randn(time, batch, 3, dtype=torch.float64)
        assert_all_close(compiled(x), ours(x))
    assert graphs.count == 1


def test_compile_inside_a_model(fresh_dynamo: Any) -> None:
    """Around it, a model with code before and after, and autocast."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding, self.head = nn.Embedding(10, 3), nn.Linear(4, 2)
            self.rnn = fused_rnn.LSTM(3, 4, batch_first=True, num_layers=2, dropout=0.0)

        def forward(self, tokens: Tensor, hx: Any) -> tuple[Tensor, Any]:
            output, hx = self.rnn(self.embedding(tokens).relu(), hx)
            return self.head(output[:, -1]).sigmoid(), hx

    model, graphs = Model(), Graphs()
    compiled = torch.compile(model, backend=graphs, fullgraph=True)
    tokens = torch.randint(10, (2, 5))
    hx = (torch.randn(2, 2, 4), torch.randn(2, 2, 4))
    assert_all_close(compiled(tokens, hx), model(tokens, hx), tol=1e-6)
    assert graphs.count == 1
    with torch.autocast("cpu", torch.bfloat16):
        assert_all_close(compiled(tokens, hx), model(tokens, hx), tol=1e-2)


def packed_batches(sort: bool) -> list[PackedSequence]:
    """Other numbers of rows, steps and sequences in each; one sequence in the last."""
    batches = []
    for lengths in ((5, 3, 2), (6, 4, 3, 3, 1), (4, 4), (3,)):
        rows = [torch.randn(n, 3, dtype=torch.float64) for n in lengths]
        batches.append(pack_sequence(rows if sort else rows[::-1], enforce_sorted=sort))
    return batches


def check_compiled_packed(name: str, sort: bool, given: bool, backend: Any, **settings: Any) -> Any:
    theirs, ours = double_pair(name, **settings)
    compiled = torch.compile(ours, backend=backend, fullgraph=True)
    for x in packed_batches(sort):
        hx: Any = None
        if given:
            runs, batch = ours.num_layers * (1 + ours.bidirectional), int(x.batch_sizes[0])
            hx = torch.randn(runs, batch, 4, dtype=torch.float64)
            if name == "LSTM":
                hx = hx[..., : ours.proj_size or 4].contiguous(), hx
        with torch.no_grad():
            assert_all_close(compiled(x, hx), theirs(x, hx))
        actual = run(compiled, x, hx)
        actual = {k.replace("_orig_mod.", ""): v for k, v in actual.items()}
        assert_all_close(actual, run(theirs, x, hx))
    return compiled, hx


@pytest.mark.drawn(2)
@cpu_engine_only  # the graphs are the same, and test_compile runs some on each engine
@pytest.mark.parametrize("given", [True, False], ids=["hx", "zeros"])
@pytest.mark.parametrize("name", LAYERS)
def test_compile_packed(fresh_dynamo: Any, name: str, given: bool, seed: int) -> None:
    """Full graph, and no more graphs than it takes Dynamo to see which sizes change."""
    if not native():
        pytest.skip("the reference loops over the lengths")
    # Every pair of name, given and sort in each run, and every three of them in some.
    sort = (given + (name == "GRU") + seed) % 2 == 0
    graphs = Graphs()
    compiled, hx = check_compiled_packed(name, sort, given, graphs, num_layers=2)
    assert graphs.count <= 6  # with and without gradients
    if given:  # states for another number of sequences
        with pytest.raises(RuntimeError):
            compiled(packed_batches(sort)[0], hx)


@pytest.mark.slow  # Inductor compiles C++
@pytest.mark.parametrize("given", [True, False], ids=["hx", "zeros"])
@pytest.mark.parametrize(
    "name, settings",
    [("RNN", {}), ("GRU", {"bidirectional": True}), ("LSTM", {"proj_size": 2})],
    ids=LAYERS[:1] + LAYERS[:0:-1],
)
def test_compile_packed_inductor(
    fresh_dynamo: Any, name: str, settings: dict[str, Any], given: bool
) -> None:
    if not native():
        pytest.skip("the reference loops over the lengths")
    check_compiled_packed(name, False, given, "inductor", **settings)


def test_compiled_in_transforms(fresh_dynamo: Any) -> None:
    """What was compiled outside a transform is right inside, and outside again."""
    _, ours = double_pair("GRU")
    eager = lambda x: ours(x)[0]  # noqa: E731
    compiled = torch.compile(eager, backend="eager", fullgraph=True)
    x = torch.randn(6, 5, 2, 3, dtype=torch.float64)
    expected = torch.stack([eager(part) for part in x])
    assert_close(compiled(x[0]), expected[0])
    assert_close(torch.vmap(compiled)(x), expected)
    grads = [torch.func.grad(lambda x, f=f: f(x).sum())(x[0]) for f in (compiled, eager)]
    assert_close(*grads)
    assert_close(compiled(x[0]), expected[0])


@pytest.mark.slow  # Inductor compiles C++
def test_compile_inductor(fresh_dynamo: Any) -> None:
    _, ours = pair("GRU", 3, 4)
    x = torch.randn(3, 2, 3)
    compiled = torch.compile(lambda x: ours(x)[0].tanh() + 1, fullgraph=True)
    expected = ours(x)[0].tanh() + 1
    assert_close(compiled(x), expected, tol=1e-5)


@pytest.mark.parametrize("strict", [False, True], ids=["nonstrict", "strict"])
@pytest.mark.parametrize("name", CLASSES)
def test_export(fresh_dynamo: Any, name: str, strict: bool) -> None:
    """No attribute is assigned in forward, so export has nothing to warn of."""
    _, ours = double_pair(name)
    model = nn.Sequential(ours)
    x = value(name)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*attributes.*assigned.*")
        program = torch.export.export(model, (x,), strict=strict)
    other = value(name)
    assert_all_close(program.module()(other), ours(other))


@pytest.mark.parametrize("name", LAYERS)
def test_export_dynamic_batch(fresh_dynamo: Any, name: str) -> None:
    _, ours = double_pair(name)
    batch = torch.export.Dim("batch", min=2, max=64)
    program = torch.export.export(nn.Sequential(ours), (value(name),), dynamic_shapes=({1: batch},))
    x = torch.randn(5, 7, 3, dtype=torch.float64)
    assert_all_close(program.module()(x), ours(x))


ELSEWHERE = """
import sys, torch, fused_rnn
folder, trains = sys.argv[1:]
x, expected, gradient = torch.load(folder + "/values")
with torch.no_grad():
    output = torch.export.load(folder + "/infer.pt2").module()(x)[0]
    assert (output - expected).abs().max() <= 1e-10
module = torch.export.load(folder + "/train.pt2").module()
output = module(x)[0]
assert (output - expected).abs().max() <= 1e-10
if trains:
    output.sum().backward()
    assert (dict(module.named_parameters())["0.weight_hh_l0"].grad - gradient).abs().max() <= 1e-10
"""


@cpu_engine_only  # the processes load the package's own library
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_exported_programs_run_elsewhere(fresh_dynamo: Any, tmp_path: Path, backend: str) -> None:
    """In a process where nothing has loaded the kernels yet, and where there are none."""
    if not native():
        pytest.skip("done in the native run")
    _, ours = double_pair("LSTM", num_layers=2, bidirectional=True)
    model, x = nn.Sequential(ours), value("LSTM")
    for kind in ("train", "infer"):
        with torch.set_grad_enabled(kind == "train"):
            torch.export.save(torch.export.export(model, (x,)), tmp_path / f"{kind}.pt2")
    output = model(x)[0]
    output.sum().backward()
    torch.save((x, output.detach(), ours.weight_hh_l0.grad), tmp_path / "values")
    trains = "yes" if backend == "auto" else ""
    done = python(
        *["-c", ELSEWHERE, str(tmp_path), trains],
        cwd=Path(fused_rnn.__file__).parents[1],
        env={**os.environ, "FUSED_RNN_BACKEND": backend},
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", LAYERS)
def test_onnx_export_sees_operators_of_onnx(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """One for each layer. torch.onnx.export(dynamo=True) sets this flag around torch.export."""
    monkeypatch.setattr(torch.onnx, "is_in_onnx_export", lambda: True)
    _, ours = double_pair(name, num_layers=2)
    program = torch.export.export(nn.Sequential(ours), (value(name),))
    nodes = [node for node in program.graph.nodes if "symbolic_multi_out" in str(node.target)]
    targets = [str(node.target) for node in program.graph.nodes]
    assert [name in map(str, node.args) for node in nodes] == [True, True]
    assert not any("fused_rnn" in target for target in targets)
