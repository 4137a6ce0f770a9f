"""examples/gradient_flow.py: what it measures, and what its tasks need."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

for package in ("matplotlib", "tqdm"):
    pytest.importorskip(package)

import gradient_flow  # noqa: E402
from helpers import assert_close  # noqa: E402
from programs import Run, learns, run_of  # noqa: E402

pytestmark = [pytest.mark.examples, pytest.mark.usefixtures("one_thread")]
pytest_plugins = "program_fixtures"


def test_measured_norms_are_the_product_of_jacobians() -> None:
    layer = gradient_flow.recurrent("rnn", 5, 3)
    x = torch.randn(7, 1, 3, dtype=torch.float64)
    norms = gradient_flow.gradient_norms(layer, x)["h"]

    w, h = layer.weight_hh_l0.detach(), torch.zeros(5, dtype=torch.float64)
    jacobians = []
    for x_t in x[:, 0]:
        h = torch.tanh(layer.weight_ih_l0.detach() @ x_t + w @ h)
        jacobians.append((1 - h**2)[:, None] * w)
    largest, smallest = [1.0], [1.0]
    product = torch.eye(5, dtype=torch.float64)
    for jacobian in reversed(jacobians[1:]):
        product = product @ jacobian
        values = torch.linalg.svdvals(product)
        largest.append(values[0].item())
        smallest.append(values[-1].item())
    assert len(norms) == 7
    for low, norm, high in zip(smallest, norms, largest, strict=True):
        assert low * (1 - 1e-9) <= norm <= high * (1 + 1e-9)


def test_orthogonal_tanh_follows_theory() -> None:
    for curves in gradient_flow.singular_value_study(40, 16, [0.9, 1.0, 1.1]).values():
        for rest, driven, theory in zip(*curves.values(), strict=True):
            assert rest == pytest.approx(theory, rel=1e-6)
            assert driven <= theory * (1 + 1e-9)
    curves = gradient_flow.gaussian_study(40, 64, 0.7)
    bound, _, measured = curves.values()
    assert bound[-1] > 1e3 and measured[-1] < 0.2  # the bound explodes, the gradient vanishes


def test_relu_keeps_half_of_the_squared_norm() -> None:
    curves = gradient_flow.relu_study(20, 256, [1.0, 2**0.5])
    for lines in curves.values():
        assert lines["measured"][6] == pytest.approx(lines["theory"][6], rel=0.5)


@pytest.mark.parametrize("bias", [-3.0, 0.0, 3.0])
def test_the_c_path_is_the_product_of_forget_gates(bias: float) -> None:
    layer = gradient_flow.recurrent("lstm", 8)
    nn.init.zeros_(layer.weight_hh_l0)  # h has no way back
    with torch.no_grad():
        layer.weight_ih_l0[8:16] = 0  # nor has x a say in forgetting
    gradient_flow.forget_bias_(layer, bias)
    x = torch.randn(10, 4, 16, dtype=torch.float64)
    c = gradient_flow.gradient_norms(layer, x)["c"]
    gate = 1 / (1 + math.exp(-bias))
    # The last c is asked for through h_T; every step back is one more gate.
    for k in range(1, 9):
        assert c[k + 1] / c[k] == pytest.approx(gate, rel=1e-9)


def test_skips_and_gates_keep_what_plain_layers_lose() -> None:
    skip = gradient_flow.skip_study(50, 32)
    assert skip["without skip"][-1] < 1e-6 and skip["with skip"][-1] > 0.5
    cells = gradient_flow.cell_study(50, 32)
    assert cells["RNN"][-1] < 1e-6
    assert cells["LSTM c, forget bias 3"][-1] > 0.05
    assert cells["RNN, relu, identity"][-1] > 0.05
    forget = gradient_flow.forget_study(20, 32, [-3.0, 3.0])
    assert forget["-3"]["measured"][10] < 1e-5 < 0.05 < forget["+3"]["measured"][10]


def test_tasks_and_their_baselines() -> None:
    generator = torch.Generator().manual_seed(0)
    x, y = gradient_flow.adding_problem(20, 4000, generator)
    assert x.shape == (20, 4000, 2) and (x[:10, :, 1].sum(0) == 1).all()
    assert (x[10:, :, 1].sum(0) == 1).all()
    assert_close((x[..., 0] * x[..., 1]).sum(0), y, 1e-6)
    assert (y - 1).square().mean().item() == pytest.approx(gradient_flow.ADDING_BASELINE, rel=0.1)

    x, target = gradient_flow.copy_memory(7, 50, generator)
    symbols = x.argmax(-1)
    assert x.shape == (27, 50, 10) and target.shape == (27, 50)
    assert torch.equal(symbols[:10], target[-10:]) and (symbols[:10] < 8).all()
    assert (symbols[16] == 9).all() and (symbols == 9).sum() == 50 and (target[:-10] == 8).all()
    ideal = torch.full((27, 50, 10), -1e9)
    ideal[:17, :, 8] = 0
    ideal[17:, :, :8] = 0
    loss = F.cross_entropy(ideal.flatten(0, 1), target.flatten()).item()
    assert gradient_flow.copy_baseline(7) == pytest.approx(loss, rel=1e-6)


@learns
@pytest.mark.drawn(1)
@pytest.mark.parametrize("name", ["GRU", "LSTM"])
def test_gated_cells_solve_what_needs_memory(tmp_path: Path, name: str) -> None:
    run = run_of(tmp_path, "--lr", "1e-2", "--batch", "32")
    adding = gradient_flow.adding_run(run, name, length=12, steps=900, hidden=32)
    assert adding["held_out_loss"] < gradient_flow.ADDING_BASELINE / 5
    copy = gradient_flow.copy_run(run, name, delay=3, steps=1000, hidden=48)
    assert copy["held_out_loss"] < 0.9 * gradient_flow.copy_baseline(3)


def test_clipping_keeps_a_training_alive(tmp_path: Path) -> None:
    run = run_of(tmp_path, "--batch", "16")
    free = gradient_flow.clipping_run(run, math.inf, length=80, steps=30, hidden=32)
    clipped = gradient_flow.clipping_run(run, 1.0, length=80, steps=30, hidden=32)
    assert not free["held_out_loss"] < 1e6
    assert clipped["held_out_loss"] < 1
    assert max(clipped["norms"]) > 10  # there was something to clip


def test_gradient_flow_draws_its_page(run: Run) -> None:
    short = ("--steps", 5, "--distance", 20, "--adding-length", 10, "--copy-delay", 2)
    figures = run(gradient_flow, "--hidden", 16, "--batch", 4, *short)
    assert figures["error_against_theory"] < 1e-6
    assert len(figures["studies"]["cells"]["LSTM c"]) == 20
    assert figures["copy_baseline"] == pytest.approx(10 * math.log(8) / 22)
