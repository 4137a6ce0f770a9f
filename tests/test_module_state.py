"""What modules hold: copies, files, devices, dtypes, and weights, which calls read by name."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from cases import CELL_CLASSES, CLASSES, LAYER_CLASSES, Case, pair, small, some_input
from helpers import assert_all_close, flatten, run
from torch import nn

import fused_rnn

pytestmark = pytest.mark.module


def same(copied: nn.Module, original: nn.Module, name: str) -> None:
    assert type(copied) is type(original)
    if isinstance(copied, nn.RNNBase):
        for weight, attribute in zip(copied._flat_weights, copied._flat_weights_names, strict=True):
            assert weight is getattr(copied, attribute)
    value = some_input(name)
    assert_all_close(copied(value), original(value), tol=0)
    for a, b in zip(copied.parameters(), original.parameters(), strict=True):
        assert a is not b and torch.equal(a, b)


@pytest.mark.parametrize("name", CLASSES)
def test_copies(name: str) -> None:
    module = getattr(fused_rnn, name)(3, 4)
    same(copy.deepcopy(module), module, name)
    same(pickle.loads(pickle.dumps(module)), module, name)
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    same(torch.load(file, weights_only=False), module, name)
    file = io.BytesIO()
    torch.save(module.state_dict(), file)
    file.seek(0)
    fresh = getattr(nn, name)(3, 4)
    fresh.load_state_dict(torch.load(file))
    assert all(
        torch.equal(a, b) for a, b in zip(fresh.parameters(), module.parameters(), strict=True)
    )


def test_pickle_of_an_old_module() -> None:
    """What torch wrote before projections existed lacks ``proj_size``."""
    module = fused_rnn.LSTM(3, 4)
    state = module.__getstate__()
    del state["proj_size"]
    old = fused_rnn.LSTM.__new__(fused_rnn.LSTM)
    old.__setstate__(state)
    assert old.proj_size == 0
    assert_all_close(old(torch.ones(5, 2, 3)), module(torch.ones(5, 2, 3)), tol=0)


@pytest.mark.parametrize("name", CLASSES)
def test_meta_device(name: str) -> None:
    def build(module: Any) -> nn.Module:
        with torch.device("meta"):
            return getattr(module, name)(3, 4)

    theirs, ours = build(nn), build(fused_rnn)
    value = some_input(name).to("meta")
    for a, b in zip(flatten(ours(value)), flatten(theirs(value)), strict=True):
        assert a.device.type == "meta" and a.shape == b.shape and a.dtype == b.dtype
    real = ours.to_empty(device="cpu")
    real.reset_parameters()
    assert all(p.device.type == "cpu" and p.abs().max() <= 0.5 for p in real.parameters())
    real(torch.zeros(value.shape))


@pytest.mark.parametrize("name", CLASSES)
def test_skip_init(name: str) -> None:
    """torch.nn's RNN, LSTM and GRU cannot do this: their signatures hide ``device``."""
    state = torch.get_rng_state()
    module = nn.utils.skip_init(getattr(fused_rnn, name), 3, 4)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(p.device.type == "cpu" for p in module.parameters())


@pytest.mark.parametrize("name", CLASSES)
def test_dtypes(name: str) -> None:
    value = some_input(name)
    theirs, ours = pair(name, 3, 4)
    for dtype in (torch.float64, torch.bfloat16, torch.float16, torch.float32):
        ours, theirs = ours.to(dtype), theirs.to(dtype)
        for a, b in zip(
            flatten(ours(value.to(dtype))), flatten(theirs(value.to(dtype))), strict=True
        ):
            assert a.dtype == b.dtype == dtype
    assert ours.double().half().float() is ours


@pytest.mark.parametrize("name", CLASSES)
def test_default_dtype(name: str) -> None:
    torch.set_default_dtype(torch.float64)
    try:
        module = getattr(fused_rnn, name)(3, 4)
        output = flatten(module(some_input(name)))[0]
    finally:
        torch.set_default_dtype(torch.float32)
    assert output.dtype == next(module.parameters()).dtype == torch.float64


@pytest.mark.parametrize("name", CLASSES)
def test_reset_parameters(name: str) -> None:
    theirs, ours = pair(name, 3, 4)
    for module in (theirs, ours):
        torch.manual_seed(11)
        module.reset_parameters()
    assert all(
        torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True)
    )


# --- Weights: read by name, at every call --------------------------------------------------------


@pytest.mark.parametrize(
    "case", small(num_layers=2, bidirectional=True, dropout=0.5), ids=lambda c: c.cell
)
def test_attributes_are_read_at_every_call(case: Case) -> None:
    theirs, ours = case.modules()
    value = torch.randn(3, 3, case.input_size, dtype=torch.float64)  # T = B: batch_first may change
    for change in (
        {},
        {"dropout": 0.0},
        {"batch_first": True},
        {"dropout": 1.0, "training": True},
        {"training": False},
    ):
        for module in (theirs, ours):
            torch.manual_seed(5)
            for key, setting in change.items():
                setattr(module, key, setting)
            module.result = module(value)
        assert_all_close(ours.result, theirs.result)


def test_weights_that_change() -> None:
    theirs, ours = pair("GRU", 3, 4)
    value = torch.randn(5, 2, 3)
    fresh = {k: torch.randn_like(v) for k, v in ours.state_dict().items()}

    def check() -> None:
        assert_all_close(ours(value), theirs(value), tol=1e-5)

    check()
    for module in (theirs, ours):
        module.weight_hh_l0.data = fresh["weight_hh_l0"].clone()
    check()
    for module in (theirs, ours):
        with torch.no_grad():
            module.weight_ih_l0.mul_(1.5)
    check()
    for module in (theirs, ours):
        module.load_state_dict(fresh, assign=True)
    check()
    for module in (theirs, ours):
        module.bias_hh_l0 = nn.Parameter(fresh["bias_hh_l0"] * 2)
    check()
    assert ours._flat_weights[3] is ours.bias_hh_l0
    for module in (theirs, ours):
        with torch.no_grad():
            module.weight_hh_l0.set_(
                torch.randn(99)[-12 * 4 :].view(12, 4).copy_(fresh["weight_hh_l0"])
            )
    check()


@pytest.mark.parametrize("name", LAYER_CLASSES)
def test_tied_weights(name: str) -> None:
    theirs, ours = pair(name, 3, 4, bidirectional=True)
    for module in (theirs, ours):
        module.bias_ih_l0_reverse = module.bias_ih_l0
        module.weight_hh_l0_reverse = module.weight_hh_l0
        module.double()
    assert len(list(ours.parameters())) == 6 and len(ours._flat_weights) == 8
    value = torch.randn(5, 2, 3, dtype=torch.float64)
    assert_all_close(run(ours, value), run(theirs, value))


def test_plain_tensor_as_weight() -> None:
    """The weight-drop pattern of AWD-LSTM: a raw parameter, and a tensor made from it each time."""
    theirs, ours = pair("LSTM", 3, 4, dtype=torch.float64)
    value = torch.randn(5, 2, 3, dtype=torch.float64)
    grads = []
    for module in (theirs, ours):
        raw = module.weight_hh_l0
        del module._parameters["weight_hh_l0"]
        module.register_parameter("weight_hh_l0_raw", nn.Parameter(raw.data))
        for scale in (0.5, 2.0):
            module.weight_hh_l0 = module.weight_hh_l0_raw * scale
            module(value)[0].sum().backward()
        grads.append([p.grad for p in module.parameters()])
    assert_all_close(grads[1], grads[0])


def test_deleted_weight() -> None:
    """The weight last seen is used, as in torch.nn; moving the module does not fail."""
    theirs, ours = pair("GRU", 3, 4)
    value = torch.randn(5, 2, 3)
    before = ours(value)
    for module in (theirs, ours):
        del module.weight_ih_l0
    assert_all_close(ours(value), theirs(value), tol=1e-6)
    assert_all_close(ours(value), before, tol=0)
    ours.cpu()


@pytest.mark.parametrize("name", CELL_CLASSES)
@pytest.mark.parametrize("gone", ["bias_ih", "bias_hh"])
def test_cells_with_one_bias(gone: str, name: str) -> None:
    """The second bias of most cells is redundant, so people drop it. The other one counts."""
    theirs, ours = pair(name, 3, 4, dtype=torch.float64)
    for module in (theirs, ours):
        module.register_parameter(gone, None)
    value = torch.randn(2, 3, dtype=torch.float64)
    assert_all_close(run(ours, value), run(theirs, value))
    with torch.no_grad():
        assert_all_close(ours(value), theirs(value))
    for module in (theirs, ours):
        module.float()
    with torch.autocast("cpu", torch.bfloat16):
        assert_all_close(ours(value.float()), theirs(value.float()), tol=0.05)


def test_all_weights() -> None:
    module = fused_rnn.LSTM(3, 4, num_layers=2, bidirectional=True, proj_size=2)
    assert [len(group) for group in module.all_weights] == [5] * 4
    flat = [weight for group in module.all_weights for weight in group]
    for a, b, c in zip(flat, module.parameters(), module._flat_weights, strict=True):
        assert a is b is c


def test_flatten_parameters_changes_nothing() -> None:
    module = fused_rnn.GRU(3, 4)
    pointers = [p.data_ptr() for p in module.parameters()]
    assert module.flatten_parameters() is None
    assert pointers == [p.data_ptr() for p in module.parameters()]
