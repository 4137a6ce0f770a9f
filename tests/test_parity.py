"""Numbers: outputs, last states and every gradient equal torch.nn's."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from cases import CELLS, LAYER_CLASSES, SIZES, Case, full_grid, ids, pair, pairwise, small
from helpers import (
    assert_all_close,
    assert_no_worse,
    flatten,
    leave_kink,
    leaves,
    map_tensors,
    restored_rng,
    run,
)
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

pytestmark = pytest.mark.parity

LOW = [torch.float32, torch.bfloat16, torch.float16]


def check_float64(case: Case) -> None:
    theirs, ours = case.modules()
    x, hx = case.inputs()
    with restored_rng():  # dropout draws the same masks below
        expected = run(theirs, x, hx)
    assert_all_close(run(ours, x, hx), expected)


PAIRWISE = pairwise()


@pytest.mark.parametrize("case", PAIRWISE, ids=ids(PAIRWISE))
def test_float64(case: Case) -> None:
    check_float64(case)


@pytest.mark.slow
@pytest.mark.parametrize("case", list(full_grid()), ids=str)
def test_float64_full_grid(case: Case) -> None:
    check_float64(case)


SHARP = [case for case in PAIRWISE if case.dropout == 0]


@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize("case", SHARP, ids=ids(SHARP))
def test_low_precision(case: Case, dtype: torch.dtype) -> None:
    """Our error against the exact result for these very numbers is at most twice torch.nn's."""
    theirs, ours = case.modules(dtype)
    x, hx = case.inputs(dtype)
    if case.cell == "rnn_relu":
        x, hx = leave_kink((theirs, ours), x, hx)
    exact = copy.deepcopy(theirs).double()
    in_double = run(exact, *map_tensors((x, hx), lambda t: t.double()), dtype)
    terms = max(4 * case.hidden_size, case.input_size, case.batch * case.time)  # of the longest sum
    results = [run(module, x, hx) for module in (ours, theirs)]
    assert_no_worse(*results, in_double, terms)


@pytest.mark.parametrize("dtype", [torch.float64, *LOW], ids=str)
@pytest.mark.parametrize("unbatched", [False, True], ids=["batched", "unbatched"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "nobias"])
@pytest.mark.parametrize("with_hx", [True, False], ids=["hx", "zeros"])
@pytest.mark.parametrize("cell", CELLS)
def test_cells(cell: str, with_hx: bool, bias: bool, unbatched: bool, dtype: torch.dtype) -> None:
    name, kwargs = CELLS[cell]
    for batch, inputs, hidden in ((1, 1, 1), (3, 17, 33), (7, 65, 3), (17, 5, 193)):
        theirs, ours = pair(name, inputs, hidden, bias=bias, dtype=dtype, **kwargs)
        lead = () if unbatched else (batch,)
        # Weights are drawn for H summands. Of I = 65 they would saturate H = 3 units, whose
        # 1 - tanh^2 is all rounding; test_large_inputs_saturate is about those.
        x = min(1, (hidden / inputs) ** 0.5) * torch.randn(*lead, inputs, dtype=dtype)
        h, c = torch.randn(2, *lead, hidden, dtype=dtype)
        hx = None if not with_hx else (h, c) if cell == "lstm" else h
        if cell == "rnn_relu" and dtype != torch.float64:
            x, hx = leave_kink((theirs, ours), x, hx)
        expected = run(theirs, x, hx)
        actual = run(ours, x, hx)
        if dtype == torch.float64:
            assert_all_close(actual, expected)
        else:
            exact = copy.deepcopy(theirs).double()
            double = run(exact, *map_tensors((x, hx), lambda t: t.double()), cotangent_dtype=dtype)
            assert_no_worse(actual, expected, double, terms=max(4 * hidden, inputs, batch))


@given(
    cell=st.sampled_from([case.cell for case in small()]),
    sizes=st.tuples(st.integers(1, 40), st.integers(2, 40), st.integers(1, 9), st.integers(1, 9)),
    num_layers=st.integers(1, 3),
    bidirectional=st.booleans(),
    batch_first=st.booleans(),
    layout=st.sampled_from(["padded", "unbatched", "packed", "unsorted"]),
    hx=st.booleans(),
)
def test_any_shape(sizes: tuple[int, int, int, int], **kwargs: Any) -> None:
    inputs, hidden, batch, time = sizes
    check_float64(Case(input_size=inputs, hidden_size=hidden, batch=batch, time=time, **kwargs))


# --- Gradients that arrive, or are wanted, in unusual ways ---------------------------------------


def cotangent_variants(outputs: list[Tensor]) -> dict[str, Any]:
    """Ways of turning outputs into a loss, which make the incoming gradients look different."""
    y, *states = outputs
    return {
        "expanded": lambda: sum(o.sum() for o in outputs),
        "transposed": lambda: (y.permute(2, 0, 1) ** 2).sum(),
        "output only": lambda: (y**2).sum(),
        "first state only": lambda: (states[0] ** 2).sum(),
        "last state only": lambda: (states[-1] ** 2).sum(),
        "one step": lambda: (y[-1] ** 2).sum(),
        "strided": lambda: (y[::2] ** 2).sum(),
    }


VARIANTS = list(cotangent_variants([torch.zeros(1, 1, 1)]))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("bidirectional", [False, True], ids=["uni", "bi"])
@pytest.mark.parametrize("case", small(num_layers=2), ids=lambda c: c.cell)
def test_incoming_gradients(case: Case, bidirectional: bool, variant: str) -> None:
    case = Case(**{**vars(case), "bidirectional": bidirectional})
    x, hx = case.inputs()
    found = []
    for module in case.modules():
        x_leaf, hx_leaf = leaves(x), leaves(hx)
        cotangent_variants(flatten(module(x_leaf, hx_leaf)))[variant]().backward()
        tensors = [x_leaf, *flatten(hx_leaf), *module.parameters()]
        found.append([torch.zeros_like(t) if t.grad is None else t.grad for t in tensors])
    assert_all_close(found[1], found[0])


@pytest.mark.parametrize(
    "wanted", ["input", "hx", "weight_ih", "weight_hh", "bias_ih", "weight_hr"]
)
@pytest.mark.parametrize("case", small(), ids=lambda c: c.cell)
def test_frozen_rest(case: Case, wanted: str) -> None:
    """Only the gradients that are asked for exist, and they are right."""
    grads = []
    x, hx = case.inputs()
    for module in case.modules():
        for name, parameter in module.named_parameters():
            parameter.requires_grad_(name.startswith(wanted))
        x_, hx_ = map_tensors((x, hx), lambda t: t.detach().clone())
        flatten(x_ if wanted == "input" else hx_)[0].requires_grad_(wanted in ("input", "hx"))
        outputs = flatten(module(x_, hx_))
        tensors = [x_, *flatten(hx_), *module.parameters()]
        if not any(t.requires_grad for t in tensors):
            assert wanted == "weight_hr" and not outputs[0].requires_grad
            return
        sum((o**2).sum() for o in outputs).backward()
        for tensor in tensors:
            assert (tensor.grad is not None) == tensor.requires_grad
        grads.append([t.grad for t in tensors if t.requires_grad])
    assert_all_close(grads[1], grads[0])


LAYOUTS = {
    "transposed": lambda t: t.transpose(0, -1).contiguous().transpose(0, -1),
    "expanded": lambda t: t[:, :1].expand_as(t),
    "sliced": lambda t: torch.stack([t, t], -1).flatten(-2)[..., ::2],
    "offset": lambda t: torch.cat([t.flatten()[:1], t.flatten()])[1:].view_as(t),
    "negative view": lambda t: torch.complex(t, -t).conj().imag,
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", small(num_layers=2, bidirectional=True), ids=lambda c: c.cell)
def test_strides_of_input_and_states(case: Case, layout: str) -> None:
    theirs, ours = case.modules()
    x, hx = case.inputs()
    results = []
    for module in (theirs, ours):
        x_, hx_ = leaves(x), leaves(hx)
        odd = map_tensors((x_, hx_), LAYOUTS[layout])
        outputs = flatten(module(*odd))
        sum((o**2).sum() for o in outputs).backward()
        results.append([*outputs, x_.grad, *(t.grad for t in flatten(hx_))])
    assert_all_close(results[1], results[0])


@pytest.mark.parametrize("case", small(), ids=lambda c: c.cell)
def test_strides_of_weights(case: Case) -> None:
    """Weights with strides of their own, as flattening optimizers and FSDP make them."""
    theirs, ours = case.modules()
    for module in (theirs, ours):
        for parameter in module.parameters():
            odd = torch.empty(*parameter.shape[::-1], dtype=parameter.dtype)
            parameter.data = odd.permute(*reversed(range(odd.dim()))).copy_(parameter.data)
    x, hx = case.inputs()
    assert_all_close(run(ours, x, hx), run(theirs, x, hx))


def test_output_strides() -> None:
    for layout in ("padded", "unbatched", "packed"):
        for batch_first in (False, True):
            for case in small(layout=layout, batch_first=batch_first):
                theirs, ours = case.modules()
                x, hx = case.inputs()
                for a, b in zip(flatten(ours(x, hx)), flatten(theirs(x, hx)), strict=True):
                    assert a.stride() == b.stride()


@pytest.mark.parametrize("case", small(num_layers=2, bidirectional=True), ids=lambda c: c.cell)
def test_states_do_not_alias_the_output(case: Case) -> None:
    _, ours = case.modules()
    with torch.no_grad():
        output, *states = flatten(ours(*case.inputs()))
        before = [state.clone() for state in states]
        output.zero_()
    assert_all_close(states, before, tol=0)


# --- Edges ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", small(batch=0, num_layers=2), ids=lambda c: c.cell)
def test_empty_batch(case: Case) -> None:
    theirs, ours = case.modules()
    x, hx = case.inputs()
    assert_all_close(run(ours, x, hx), run(theirs, x, hx))


@pytest.mark.parametrize("batch", [0, 2])
@pytest.mark.parametrize("case", small(), ids=lambda c: c.cell)
def test_no_steps(case: Case, batch: int) -> None:
    for module in case.modules():
        with pytest.raises(
            RuntimeError, match="Expected sequence length to be larger than 0 in RNN"
        ):
            module(torch.empty(0, batch, case.input_size, dtype=torch.float64))


@pytest.mark.parametrize("name", ["RNN", "GRU"])
def test_in_place_edit_of_the_output(name: str) -> None:
    """As in torch.nn: the backward does not need the output."""
    grads = []
    x = torch.randn(4, 3, 5)
    for module in pair(name, 5, 7):
        x_ = x.clone().requires_grad_()
        output, _ = module(x_)
        output.mul_(2).sum().backward()
        grads.append([x_.grad, *(p.grad for p in module.parameters())])
    assert_all_close(grads[1], grads[0], tol=1e-5)


@pytest.mark.parametrize("changed", ["weight", "input"])
@pytest.mark.parametrize("name", LAYER_CLASSES)
def test_in_place_edit_of_what_is_saved(name: str, changed: str) -> None:
    for module in pair(name, 5, 7):
        x = torch.randn(4, 3, 5)
        loss = module(x)[0].sum()
        with torch.no_grad():
            (x if changed == "input" else module.weight_hh_l0).mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


@pytest.mark.parametrize("layout", ["padded", "unsorted"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("cell", ["rnn_tanh", "lstm", "gru"])
def test_dropout_masks(cell: str, dtype: torch.dtype, layout: str) -> None:
    """One seed, the same masks as torch.nn and the same state of the generator afterwards."""
    case = Case(
        cell=cell, num_layers=3, dropout=0.4, layout=layout, batch_first=True, hidden_size=33
    )
    theirs, ours = case.modules(dtype)
    x, hx = case.inputs(dtype)
    tol = 1e-5 if dtype == torch.float32 else 1e-12
    for module in (theirs, ours):
        torch.manual_seed(7)
        module.outputs = [flatten(module(x, hx)) for _ in range(2)]
        module.state = torch.get_rng_state()
    assert_all_close(ours.outputs, theirs.outputs, tol)
    assert torch.equal(ours.state, theirs.state)
    assert (ours.outputs[0][0] != ours.outputs[1][0]).any(), "a fresh mask at every call"
    ours.eval()
    assert torch.equal(ours(x, hx)[1][0], ours(x, hx)[1][0])


def test_dropout_of_everything() -> None:
    theirs, ours = pair("GRU", 5, 7, num_layers=2, dropout=1.0)
    x = torch.randn(4, 3, 5)
    assert_all_close(ours(x), theirs(x), tol=1e-6)


@pytest.mark.parametrize("case", small(bidirectional=True, hidden_size=17), ids=lambda c: c.cell)
def test_large_inputs_saturate(case: Case) -> None:
    """Gates far outside the range of exp: no NaN, and what torch.nn gives."""
    theirs, ours = case.modules(torch.float32)
    x, hx = case.inputs(torch.float32)
    if case.cell == "rnn_relu":
        pytest.skip("relu does not saturate")
    for scale, tol in ((1e2, 1e-3), (1e30, 1e-6)):
        assert_all_close(ours(x * scale, hx), theirs(x * scale, hx), tol)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("case", small(batch=5, hidden_size=9, hx=False), ids=lambda c: c.cell)
def test_bad_values_stay_in_their_sequence(case: Case, bad: float) -> None:
    theirs, ours = case.modules()
    x, _ = case.inputs()
    x[1, 2, 0] = bad
    for a, b in zip(flatten(ours(x)), flatten(theirs(x)), strict=True):
        assert torch.equal(a.isnan(), b.isnan())
        clean = ~b.isnan() & b.isfinite()
        assert_all_close(a[clean], b[clean])


@pytest.mark.parametrize("hidden_size", SIZES)
@pytest.mark.parametrize("name", LAYER_CLASSES)
def test_inference_equals_training(name: str, hidden_size: int) -> None:
    """What runs under no_grad is another path; its numbers are the same."""
    _, ours = pair(name, 9, hidden_size, num_layers=2, bidirectional=True)
    x = torch.randn(5, 4, 9)
    with_grad = ours(x)
    with torch.no_grad():
        assert_all_close(ours(x), with_grad, tol=1e-6)
    with torch.inference_mode():
        assert_all_close(ours(x), with_grad, tol=1e-6)


@pytest.mark.parametrize("name", LAYER_CLASSES)
def test_complex(name: str) -> None:
    theirs, ours = pair(name, 3, 4, dtype=torch.complex64)
    # Small, to stay away from the poles of tanh and sigmoid, where torch.nn's result is NaN.
    x = torch.randn(5, 2, 3, dtype=torch.complex64) / 4
    assert_all_close(ours(x), theirs(x), tol=1e-6)


def test_training_reaches_the_same_weights() -> None:
    """Twenty steps of Adam on a small task."""
    theirs, ours = pair("LSTM", 4, 8, num_layers=2, dtype=torch.float64)
    x, target = torch.randn(6, 5, 4).double(), torch.randn(6, 5, 8).double()
    for module in (theirs, ours):
        optimizer = torch.optim.Adam(module.parameters(), lr=1e-2)
        for _ in range(20):
            optimizer.zero_grad()
            nn.functional.mse_loss(module(x)[0], target).backward()
            optimizer.step()
    assert_all_close(list(ours.parameters()), list(theirs.parameters()), tol=1e-9)
