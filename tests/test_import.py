"""The package imported more than once in a process, as reloaders of notebooks and servers do."""

from __future__ import annotations

from pathlib import Path

import pytest
from forked import python
from helpers import cpu_engine_only

import fused_rnn

pytestmark = pytest.mark.module

# Both the package's way for single calls and what is registered with torch: fakes, autograd.
PRELUDE = """
import gc, importlib, pickle, sys, warnings, weakref
import torch

warnings.simplefilter("ignore")

def use(library):
    cell, steps = library.LSTMCell(3, 4), torch.randn(5, 2, 3)
    their_cell = library.restore(cell, inplace=False)
    for each in (their_cell, cell):
        hx = None
        for step in steps:
            hx = each(step, hx)
        hx[0].sum().backward()
    assert (cell.weight_hh.grad - their_cell.weight_hh.grad).abs().max() < 1e-5
    both = library.replace(torch.nn.LSTM(3, 4), keep_isinstance=True)
    assert isinstance(both, library.LSTM) and isinstance(both, torch.nn.LSTM)

    x, module = torch.randn(2, 2, 3), library.GRU(3, 4, num_layers=2, bidirectional=True)
    theirs = library.restore(module, inplace=False)
    expected = theirs(x)[0]
    expected.sum().backward()
    with torch.no_grad():
        assert (module(x)[0] - expected).abs().max() < 1e-5
    exported = torch.export.export(module, (x,)).module()
    calls = [exported, module]
    # Dynamo of torch 2.15 goes by the names of modules, and meets the first copy there.
    if torch.__version__ < "2.15":
        calls.append(torch.compile(module, backend="aot_eager", fullgraph=True))
    for call in calls:
        output = call(x)[0]
        assert (output - expected).abs().max() < 1e-5
        module.zero_grad()
        output.sum().backward()
    assert (module.weight_hh_l0.grad - theirs.weight_hh_l0.grad).abs().max() < 1e-5
    torch._dynamo.reset()
    from torch.utils.flop_counter import FlopCounterMode
    with FlopCounterMode(display=False) as counter:
        module(x)
    assert counter.get_total_flops() == 2 * 4 * sum(
        weight.numel() for weight in module.parameters() if weight.dim() == 2
    )

def ours():
    return [name for name in sys.modules if name.partition(".")[0] == "fused_rnn"]

def purge():
    for name in ours():
        del sys.modules[name]
    gc.collect()

import fused_rnn
"""
WAYS = {
    "two copies": """
use(fused_rnn)
first, module, x = fused_rnn, fused_rnn.LSTM(3, 4), torch.randn(5, 2, 3)
data, expected = pickle.dumps(module), module(x)[0]
purge()
import fused_rnn
assert first.GRU is not fused_rnn.GRU
use(fused_rnn)
use(first)
found = pickle.loads(data)
assert type(found) is fused_rnn.LSTM and torch.equal(found(x)[0], expected)
""",
    "nobody holds the first": """
for before in (lambda library: None, use, use):  # the first is gone before it did anything
    before(fused_rnn)
    gone = weakref.ref(fused_rnn)
    del fused_rnn
    purge()
    assert gone() is None
    import fused_rnn
use(fused_rnn)
""",
    "patched": """
fused_rnn.patch_torch()
assert torch.nn.GRU is fused_rnn.GRU
del fused_rnn
purge()
import fused_rnn
assert type(fused_rnn.restore(fused_rnn.GRU(3, 4))).__module__ == "torch.nn.modules.rnn"
with fused_rnn.patch_torch():
    assert torch.nn.GRU is fused_rnn.GRU
assert torch.nn.GRU.__module__ == "torch.nn.modules.rnn"
use(fused_rnn)
""",
    "reloaded": """
use(fused_rnn)
for again in range(2):
    for name in ours():
        if name != "fused_rnn._direct":
            importlib.reload(sys.modules[name])
use(fused_rnn)
""",
    "another version": """
schemas, _ = torch.ops.fused_rnn._registered
schemas["recurrent"] = schemas["recurrent"].replace("cell", "kind")
purge()
try:
    import fused_rnn
except ImportError as error:
    assert "start a new process" in str(error)
else:
    raise AssertionError("imported")
""",
}


@cpu_engine_only  # the processes load the package's own library
@pytest.mark.drawn(1)
@pytest.mark.parametrize("way", WAYS)
def test_import_again(way: str) -> None:
    done = python("-c", PRELUDE + WAYS[way], cwd=Path(fused_rnn.__file__).parents[1])
    assert done.returncode == 0, done.stderr
