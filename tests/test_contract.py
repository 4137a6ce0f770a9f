"""What the contract of a cell allows beyond the cells of the package, on both engines.

tests/cells has a cell without a recurrent matrix and one whose output is not the state that goes
through W_hh, and tests/contract_cells.py has cells from Python. The package's own build compiles
them, in the place of its cells, and no engine knows.
"""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from typing import Any

import contract_cells
import emulated
import pytest
import torch
from cases import Case
from helpers import assert_all_close, operate
from torch import Tensor

from fused_rnn import build, ops, reference

pytestmark = pytest.mark.compiling


def _light(gx: Tensor, gh: None, h: Tensor, c: Tensor, p: Tensor) -> tuple[Tensor, Tensor]:
    x, f, r = gx.chunk(3, -1)
    f = (f + p * c).sigmoid()
    c = x + f * (c - x)
    return r.sigmoid() * c.tanh(), c


def _swapped(gx: Tensor, gh: Tensor, h: Tensor, rest: Tensor) -> tuple[Tensor, Tensor]:
    c, count = rest.chunk(2, -1)
    h, c = reference.cells._lstm(gx, gh, h, c)
    return h, torch.cat([c, count + 1], -1)


CELLS = {
    "light": reference.Cell(_light, gates=3, states=("h", "c"), params=("p",), gates_h=0),
    "swapped": reference.Cell(_swapped, gates=4, states=("h", "c", "count"), output=1),
}

FROM_PYTHON = [cell.name for cell in contract_cells.headers(emulated.ENGINE)]

inside = pytest.mark.skipif(not emulated.ENGINE.endswith("-contract"), reason="in a process below")


@pytest.fixture(autouse=True)
def known(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, cell in CELLS.items():
        monkeypatch.setitem(reference.CELLS, name, cell)


@pytest.mark.skipif(bool(emulated.ENGINE) or build.backend() != "native", reason="needs a compiler")
@pytest.mark.drawn(1)  # each is compiled as a whole
@pytest.mark.parametrize("engine", ["cpu", "emulated"])
def test_on(engine: str, seed: int) -> None:
    own = {"FUSED_RNN_TEST_ENGINE": f"{engine}-contract", "FUSED_RNN_TEST_SEED": str(seed)}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", __file__]
    done = subprocess.run(command, env=os.environ | own, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]


SIZES = [
    Case(time=5, batch=3, input_size=4, hidden_size=6),
    Case(time=1, batch=1, input_size=3, hidden_size=17, num_layers=2, bidirectional=True),
    Case(
        layout="packed",
        **dict(time=4, batch=4, input_size=33, hidden_size=65, num_layers=2, bidirectional=True),
    ),
    Case(time=6, batch=33, input_size=48, hidden_size=96, bidirectional=True),
]


@inside
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("cell", [*CELLS, *FROM_PYTHON])
def test_cells(cell: str, sizes: Case, dtype: torch.dtype, threads: int) -> None:
    if dtype == torch.bfloat16 and cell.startswith("everything"):
        pytest.skip("a rounding of its state grows from step to step")
    case = replace(sizes, cell=cell, dtype=dtype)
    arguments = case.arguments()
    torch.set_num_threads(threads)
    results = []
    for fn in (ops.recurrent, reference.recurrent):
        results.append(operate(fn, case, arguments))
        x, _, _, *weights = arguments[0]
        with torch.no_grad():
            from_zeros = case.call(fn, [x, None, None, *weights], arguments[1])
        results[-1] |= {f"from zeros, {i}": t for i, t in enumerate(from_zeros) if t is not None}
    tol = {torch.float64: 1e-12, torch.float32: 1e-4, torch.bfloat16: 0.06}[dtype]
    assert_all_close(*results, tol=tol)


@inside
def test_names() -> None:
    assert ops.tensor_names("cpu", "light") == CELLS["light"].tensors
    assert ops.facts_of("cpu", "swapped").extra_states == 2


@inside
def test_what_they_refuse() -> None:
    def infer(cell: str, change: Any) -> None:
        case = replace(SIZES[0], cell=cell)
        (x, h0, c0, *weights), batch_sizes = case.arguments()
        operator = torch.ops.fused_rnn.recurrent_infer.default
        weights, present = change(weights, case.present)
        arguments = [cell, x, h0, c0, weights, *case.rest_of_schema(batch_sizes)]
        arguments[[a.name for a in operator._schema.arguments].index("present")] = present
        operator(*arguments)

    w_hr = torch.randn(3, 6, dtype=torch.float64)
    with pytest.raises(RuntimeError, match="w_hr: this cell .* no projection"):
        infer(
            "swapped", lambda weights, present: ([*weights, w_hr], present | reference.PROJECTION)
        )
    with pytest.raises(RuntimeError, match="there is no w_hh"):
        infer("light", lambda weights, present: ([weights[0], *weights], present | 2))
