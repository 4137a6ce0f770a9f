"""``patch_torch``: what is exchanged, undone, left as it was."""

from __future__ import annotations

import copy
import os
import pickle
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from cases import CLASSES, some_input
from forked import python
from helpers import assert_all_close, flatten
from torch import nn

import fused_rnn

pytestmark = pytest.mark.module

ROOT = Path(__file__).resolve().parent.parent
THEIRS = {name: getattr(nn, name) for name in CLASSES}
PLACES = (nn, nn.modules, nn.modules.rnn)


def in_place() -> bool:
    return all(getattr(place, n) is cls for place in PLACES for n, cls in THEIRS.items())


@pytest.mark.parametrize("name", CLASSES)
def test_names_mean_ours_for_a_while(name: str) -> None:
    with fused_rnn.patch_torch():
        kind = getattr(nn, name)
        assert all(getattr(place, name) is getattr(fused_rnn, name) for place in PLACES)
        module = kind(3, 4)
        assert isinstance(module, kind) and type(module) is getattr(fused_rnn, name)

        class Mine(kind):  # type: ignore[misc, valid-type]
            def __init__(self, *args: Any) -> None:
                super().__init__(*args)
                self.calls = 0

            def forward(self, *args: Any) -> Any:
                self.calls += 1
                return super().forward(*args)

        mine = Mine(3, 4)
        assert isinstance(mine, kind) and isinstance(mine, getattr(fused_rnn, name))
    assert in_place()
    mine.load_state_dict(module.state_dict())
    theirs = THEIRS[name](3, 4)
    theirs.load_state_dict(module.state_dict())
    x = some_input(name)
    assert_all_close(flatten(mine(x)), flatten(theirs(x)), tol=1e-5)
    assert mine.calls == 1


def test_forward_set_on_the_instance_calls_ours() -> None:
    """Which no swap could reach once the instance is made."""

    def make() -> Any:
        class Dropping(nn.LSTM):
            def __init__(self, *args: Any) -> None:
                super().__init__(*args)
                usual, raw = self.forward, self.weight_hh_l0
                del self._parameters["weight_hh_l0"]
                self.register_parameter("raw", raw)

                def forward(*args: Any) -> Any:
                    self.weight_hh_l0 = nn.functional.dropout(self.raw, 0.5, self.training)
                    return usual(*args)

                self.forward = forward  # type: ignore[method-assign]

        return Dropping(3, 4)

    theirs = make()
    with fused_rnn.patch_torch():
        ours = make()
    assert isinstance(ours, fused_rnn.LSTM)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(5, 2, 3)
    results = []
    for module in (ours, theirs):
        torch.manual_seed(1)
        y, _ = module(x)
        y.square().sum().backward()
        results.append([y.detach(), module.raw.grad])
    assert_all_close(*results, tol=1e-5)
    assert "set on the instance" in fused_rnn.survey(theirs)[0].reason


def test_instances_of_both() -> None:
    with fused_rnn.patch_torch(keep_isinstance=True):
        module = nn.LSTM(3, 4, num_layers=2, batch_first=True)
        assert isinstance(module, nn.LSTM) and module.num_layers == 2 and module.batch_first
        again = pickle.loads(pickle.dumps(module))
        assert type(again) is type(module)
    assert isinstance(module, nn.LSTM) and isinstance(module, fused_rnn.LSTM)


def test_undone_on_an_error() -> None:
    with pytest.raises(ZeroDivisionError), fused_rnn.patch_torch():
        _ = 1 / 0
    assert in_place()


def test_patches_may_be_nested_and_undone_in_any_order() -> None:
    first = fused_rnn.patch_torch()
    second = fused_rnn.patch_torch(keep_isinstance=True)
    both = nn.GRU
    assert issubclass(both, THEIRS["GRU"]) and issubclass(both, fused_rnn.GRU)
    first.undo()
    first.undo()
    assert nn.GRU is both
    with first:
        assert nn.GRU is fused_rnn.GRU
        with first, second:  # the second was in force, and ends here
            assert nn.GRU is both
        assert nn.GRU is fused_rnn.GRU
        with second, second:
            assert nn.GRU is both
        assert nn.GRU is fused_rnn.GRU
    assert in_place()


def test_what_others_put_there_stays() -> None:
    class Others(nn.LSTM):
        pass

    try:
        with fused_rnn.patch_torch():
            nn.LSTM = Others  # type: ignore[misc]
            with fused_rnn.patch_torch():
                assert nn.LSTM is Others and nn.GRU is fused_rnn.GRU
        assert nn.LSTM is Others and nn.modules.LSTM is THEIRS["LSTM"]
    finally:
        nn.LSTM = THEIRS["LSTM"]  # type: ignore[misc]
    assert in_place()


def test_it_says_what_it_did_and_missed(monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("imported_before")
    module.Layer = nn.LSTM  # type: ignore[attr-defined]

    class Derived(nn.GRU):
        pass

    monkeypatch.setitem(sys.modules, "imported_before", module)
    with fused_rnn.patch_torch() as patch:
        lines = str(patch).splitlines()
    assert "torch.nn.GRUCell -> fused_rnn.step_cells.GRUCell" in lines
    assert "missed: imported_before.Layer is torch.nn.modules.rnn.LSTM" in lines
    assert any(line.endswith("Derived derives from torch.nn.modules.rnn.GRU") for line in lines)
    assert not any("missed: torch." in line for line in lines)


def test_modules_of_before_go_on() -> None:
    model = nn.Sequential(nn.LSTM(3, 4))
    x = torch.randn(5, 2, 3)
    expected = model(x)
    with fused_rnn.patch_torch():
        assert_all_close(model(x), expected, tol=0)
        assert_all_close(copy.deepcopy(model)(x), expected, tol=0)
        assert type(fused_rnn.replace(model)[0]) is fused_rnn.LSTM
        assert type(fused_rnn.restore(model)[0]) is THEIRS["LSTM"]


def test_tools_of_torch_under_the_patch() -> None:
    """Scripting makes torch.nn's of it, and Dynamo a full graph."""
    allowed = torch._dynamo.config.allow_rnn
    with fused_rnn.patch_torch():
        model = nn.Sequential(nn.Linear(3, 3), nn.GRU(3, 4)).eval()
        x = torch.randn(5, 2, 3)
        expected = model(x)
        compiled = torch.compile(copy.deepcopy(model), backend="eager", fullgraph=True)
        assert_all_close(compiled(x), expected, tol=1e-6)
        scripted = torch.jit.script(copy.deepcopy(model))
        assert_all_close(scripted(x), expected, tol=1e-5)
    assert torch._dynamo.config.allow_rnn == allowed


PACKAGE = """
from torch.nn import LSTM, Module
class Mine(LSTM):
    pass
class Model(Module):
    def __init__(self):
        super().__init__()
        self.mine, self.plain = Mine(3, 4), LSTM(3, 4)
    def forward(self, x):
        return self.mine(x)[0] + self.plain(x)[0]
"""


@pytest.mark.parametrize("keep", [False, True])
def test_pickles_of_the_patch_load_without_it(tmp_path: Path, keep: bool) -> None:
    """In another process, where the package that made them has torch.nn's classes."""
    (tmp_path / "package.py").write_text(PACKAGE)
    write = f"""
import torch, fused_rnn
with fused_rnn.patch_torch(keep_isinstance={keep}):
    import package
    model = package.Model()
    assert isinstance(model.mine, fused_rnn.LSTM) and isinstance(model.plain, fused_rnn.LSTM)
    x = torch.randn(5, 2, 3)
    torch.save([model, x, model(x)], "model.pt")
"""
    read = """
import torch
model, x, expected = torch.load("model.pt", weights_only=False)
assert type(model.mine).__mro__[1] is torch.nn.LSTM and isinstance(model, torch.nn.Module)
torch.testing.assert_close(model(x), expected)
"""
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    for program in (write, read):
        done = python("-c", program, cwd=tmp_path, env={**os.environ, "PYTHONPATH": path})
        assert done.returncode == 0, done.stderr
