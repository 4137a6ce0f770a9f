"""Tools that look inside: walkers over autograd's graph, FLOP counters, gradients per sample."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import CELL_CLASSES, CELLS, Case, pair, small
from forked import python
from helpers import assert_all_close, flatten, leaves
from torch import nn
from torch.nn.utils._per_sample_grad import call_for_per_sample_grads
from torch.nn.utils.rnn import pack_sequence
from torch.utils.flop_counter import FlopCounterMode

import fused_rnn

pytestmark = pytest.mark.tools

ROOT = Path(__file__).resolve().parent.parent


def nodes(tensors: list[torch.Tensor]) -> Iterator[Any]:
    """All nodes of the graph that made these tensors."""
    waiting, seen = [t.grad_fn for t in tensors], set()
    while waiting:
        node = waiting.pop()
        if node is not None and node not in seen:
            seen.add(node)
            yield node
            waiting += [below for below, _ in node.next_functions]


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize(
    "case", [*small(hx=True), *small(bias=False, layout="packed", bidirectional=True)], ids=str
)
def test_saved_tensors_are_tensors(case: Case, recompute: bool) -> None:
    _, module = case.modules()
    module.recompute = recompute
    x, hx = map(leaves, case.inputs())
    outputs = flatten(module(x, hx))
    first = torch.autograd.grad(
        [o.square().sum() for o in outputs], list(module.parameters()), create_graph=True
    )
    seen = 0
    for node in nodes([*outputs, *first]):
        for tensor in getattr(node, "saved_tensors", ()):
            assert isinstance(tensor, torch.Tensor), node
            seen += 1
    assert seen or fused_rnn.backend_info()["backend"] != "native"


# --- FLOPs ---------------------------------------------------------------------------------------


def flops(module: nn.Module, x: Any, hx: Any, train: bool) -> int:
    with FlopCounterMode(display=False) as counter, torch.set_grad_enabled(train):
        y = flatten(module(x, hx))[0]
        if train:
            y.sum().backward()
    return counter.get_total_flops()


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize(
    "case",
    [
        *small(num_layers=2, bidirectional=True),
        *small(bias=False, layout="packed"),
        *small(layout="unbatched", hx=False),
        *small(hx=False),
    ],
    ids=str,
)
def test_flops_of_layers(case: Case, train: bool) -> None:
    """Those of torch.nn, which multiplies step by step in float64. In training twice: where x and
    the states want gradients, and where they do not."""
    theirs, ours = case.modules()
    inputs = case.inputs()
    for x, hx in (inputs, map(leaves, inputs)):
        assert flops(ours, x, hx, train) == flops(theirs, x, hx, train) > 0


@pytest.mark.parametrize("name", CELLS)
def test_flops_of_cells(name: str) -> None:
    kind, kwargs = CELLS[name]
    theirs, ours = pair(kind, 5, 7, **kwargs)
    x, h = torch.randn(3, 5), torch.randn(3, 7, requires_grad=True)
    hx = (h, h) if kind == "LSTMCell" else h
    for train in (False, True):
        assert flops(ours, x, hx, train) == flops(theirs, x, hx, train) > 0


def test_flops_by_hand() -> None:
    """Two directions of a projected LSTM, I, H, P = 5, 7, 4, over ragged sequences of 6 steps."""
    module = fused_rnn.LSTM(5, 7, proj_size=4, bidirectional=True)
    x = pack_sequence([torch.randn(n, 5) for n in (3, 2, 1)])
    products = 4 * 7 * 5 + 4 * 7 * 4 + 7 * 4
    assert flops(module, x, None, train=False) == 2 * 2 * 6 * products
    # Gradients of every weight, of h before the projection, and of h at all steps but the first.
    backward = 6 * products + 6 * 7 * 4 + (6 - 3) * 4 * 7 * 4
    assert flops(module, x, None, train=True) == 2 * 2 * (6 * products + backward)
    module.recompute = True
    assert flops(module, x, None, train=True) == 2 * 2 * (2 * 6 * products + backward)


def test_flop_counter_is_not_imported_for_it() -> None:
    """Nor what it imports, Triton above all."""
    program = """
import sys, torch
before = "torch.utils.flop_counter" in sys.modules
import fused_rnn
assert ("torch.utils.flop_counter" in sys.modules) == before
from torch.utils.flop_counter import FlopCounterMode
with FlopCounterMode(display=False) as counter:
    fused_rnn.GRU(3, 4)(torch.randn(1, 2, 3))
print(counter.get_total_flops())
"""
    found = python("-c", program)
    assert found.stdout.split() == [str(2 * 2 * (12 * 3 + 12 * 4))], found.stderr


# --- Gradients per sample -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "case",
    [
        case
        for layout in ("padded", "packed")
        for case in small(layout=layout, hx=False, num_layers=2, batch_first=True)
        if case.cell in ("rnn_tanh", "rnn_relu", "gru")
        or layout == "packed"
        and case.cell == "lstm"
    ],
    ids=str,
)
def test_expanded_weights(case: Case) -> None:
    """Where torch.nn's take them: not where it hands an LSTM to oneDNN, nor projections."""
    x, _ = case.inputs(torch.float32)
    modules = case.modules(torch.float32)
    for module in modules:
        call = call_for_per_sample_grads(module, batch_size=case.batch)
        flatten(call(x))[0].square().sum().backward()
    theirs, ours = ([p.grad_sample for p in module.parameters()] for module in modules)
    assert_all_close(ours, theirs, tol=1e-6)


@pytest.mark.parametrize("name", CELL_CLASSES)
def test_expanded_weights_of_cells(name: str) -> None:
    """Refused as torch.nn's are."""
    messages = []
    for module in pair(name, 3, 4):
        with pytest.raises(RuntimeError) as error:
            call_for_per_sample_grads(module, batch_size=2)(torch.randn(2, 3))
        messages.append(str(error.value))
    assert messages[0] == messages[1] and "Expanded Weights" in messages[0]


# --- Tables by type -------------------------------------------------------------------------------


def test_tables_by_type_know_ours(tmp_path: Path) -> None:
    """Of a package that is imported after us, or was before."""
    (tmp_path / "opacus").mkdir()
    (tmp_path / "opacus/__init__.py").touch()
    (tmp_path / "opacus/validators.py").write_text(
        "import torch\n"
        "class ModuleValidator:\n"
        "    VALIDATORS = {torch.nn.LSTM: 'an error', torch.nn.Linear: 'none'}\n"
        "    FIXERS = {torch.nn.GRU: 'a fix'}\n"
    )
    program = """
import sys
if sys.argv[1] == "before": from opacus.validators import ModuleValidator
import fused_rnn
if sys.argv[1] == "after": from opacus.validators import ModuleValidator
from torch import nn
for table, theirs in ((ModuleValidator.VALIDATORS, nn.LSTM), (ModuleValidator.FIXERS, nn.GRU)):
    for keep in (False, True):
        kind = type(fused_rnn.replace(theirs(3, 4), keep_isinstance=keep))
        assert kind is not theirs and table[kind] == table[theirs]
    assert len(table) < 5
"""
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", ""), str(ROOT)])
    for order in ("before", "after"):
        found = python("-c", program, order, env={**os.environ, "PYTHONPATH": path})
        assert found.returncode == 0, found.stderr


def test_opacus() -> None:
    """It says that it cannot train ours, as of torch.nn's, and puts its own in their place."""
    validators = pytest.importorskip("opacus.validators")
    for keep in (False, True):
        model = nn.Sequential(nn.LSTM(3, 4), nn.GRU(4, 4))
        expected = [type(error) for error in validators.ModuleValidator.validate(model)]
        fused_rnn.replace(model, keep_isinstance=keep)
        assert [type(e) for e in validators.ModuleValidator.validate(model)] == expected != []
        fixed = validators.ModuleValidator.fix(model)
        assert validators.ModuleValidator.is_valid(fixed)
        x = torch.randn(5, 2, 3)
        assert_all_close(fixed[0](x), model[0](x), tol=1e-5)
