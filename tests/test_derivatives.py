"""Derivatives of all kinds, and batching: autograd's and torch.func's."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import CELLS, CLASSES, Case, pair, small
from double_modules import LAYERS, double_pair, first, is_cell, value
from helpers import assert_all_close, assert_close, flatten
from torch import Tensor, nn
from torch.func import functional_call, grad, hessian, jacrev, jvp, stack_module_state, vmap
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import fused_rnn

pytestmark = pytest.mark.parity

TINY = dict(input_size=2, hidden_size=3, batch=2, time=3)


def as_function(module: nn.Module) -> tuple[Callable[..., Any], dict[str, Tensor]]:
    """The module as a function of (parameters, *inputs), and its parameters."""
    parameters = {k: p.detach() for k, p in module.named_parameters()}
    return lambda weights, *inputs: functional_call(module, weights, inputs), parameters


def for_gradcheck(case: Case) -> tuple[Callable[..., tuple[Tensor, ...]], tuple[Tensor, ...]]:
    """A function of all of x, hx and the parameters, and a point with float64 tensors."""
    _, module = case.modules()
    x, hx = case.inputs()
    lengths = case.lengths()
    names = [name for name, _ in module.named_parameters()]
    states = flatten(hx)
    packed = case.layout != "padded"
    if packed:
        x = torch.randn(case.time, case.batch, case.input_size, dtype=torch.float64)

    def call(x: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
        hx: Any = rest[: len(states)]
        weights = dict(zip(names, rest[len(states) :], strict=True))
        inputs = pack_padded_sequence(x, lengths, enforce_sorted=False) if packed else x
        return tuple(
            flatten(functional_call(module, weights, (inputs, hx if len(hx) > 1 else hx[0])))
        )

    point = (x, *states, *(p.detach() for p in module.parameters()))
    return call, tuple(t.requires_grad_() for t in point)


GRADCHECKS = [
    case
    for layout in ("padded", "unsorted")
    for case in small(**TINY, layout=layout, num_layers=2, bidirectional=True)
]


@pytest.mark.parametrize("case", GRADCHECKS, ids=lambda c: f"{c.cell}-{c.layout}")
def test_gradcheck(case: Case) -> None:
    call, point = for_gradcheck(case)
    assert torch.autograd.gradcheck(call, point, fast_mode=True)
    assert torch.autograd.gradgradcheck(call, point, fast_mode=True)


@pytest.mark.parametrize("case", small(**TINY), ids=lambda c: c.cell)
def test_gradcheck_slow_mode(case: Case) -> None:
    call, point = for_gradcheck(case)
    assert torch.autograd.gradcheck(call, point, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(call, point)


@pytest.mark.parametrize("case", small(**TINY, bidirectional=True), ids=lambda c: c.cell)
def test_gradcheck_forward_mode(case: Case) -> None:
    call, point = for_gradcheck(case)
    assert torch.autograd.gradcheck(
        call, point, fast_mode=True, check_forward_ad=True, check_backward_ad=False
    )


@pytest.mark.parametrize("cell", CELLS)
def test_gradcheck_of_cells(cell: str) -> None:
    name, kwargs = CELLS[cell]
    module = getattr(fused_rnn, name)(2, 3, dtype=torch.float64, **kwargs)
    names = [n for n, _ in module.named_parameters()]
    states = torch.randn(2 if cell == "lstm" else 1, 2, 3, dtype=torch.float64)

    def call(x: Tensor, states: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
        hx = tuple(states) if cell == "lstm" else states[0]
        return tuple(
            flatten(functional_call(module, dict(zip(names, weights, strict=True)), (x, hx)))
        )

    x = torch.randn(2, 2, dtype=torch.float64)
    point = tuple(t.detach().requires_grad_() for t in (x, states, *module.parameters()))
    assert torch.autograd.gradcheck(call, point)
    assert torch.autograd.gradgradcheck(call, point)
    assert torch.autograd.gradcheck(call, point, check_forward_ad=True, check_backward_ad=False)


@pytest.mark.parametrize("name", CLASSES)
def test_gradient_penalty(name: str) -> None:
    """WGAN-GP: a loss on the gradient of the input, which reaches every parameter."""
    x = value(name)
    found = []
    for module in double_pair(name):
        x_ = x.clone().requires_grad_()
        (g,) = torch.autograd.grad(first(module(x_)).sum(), x_, create_graph=True)
        (g.norm() - 1).square().backward()
        found.append([p.grad for p in module.parameters() if p.grad is not None])
    assert_all_close(found[1], found[0], tol=1e-9)


@pytest.mark.parametrize("name", CLASSES)
def test_func_grad_and_functional_call(name: str) -> None:
    theirs, ours = double_pair(name)
    x = value(name)
    found = []
    for module in (theirs, ours):
        call, weights = as_function(module)
        found.append(grad(lambda w, call=call: first(call(w, x)).square().sum())(weights))
        zeros = {k: torch.zeros_like(w) for k, w in weights.items()}
        assert first(call(zeros, x)).abs().max() == 0, "the weights are really exchanged"
    assert_all_close(found[1], found[0])
    assert_all_close(ours(x), theirs(x))


@pytest.mark.parametrize("name", CLASSES)
def test_jacobians(name: str) -> None:
    theirs, ours = double_pair(name)
    x = value(name)
    expected = jacrev(lambda x: first(theirs(x)))(x)
    assert_close(jacrev(lambda x: first(ours(x)))(x), expected)
    jacobian = torch.autograd.functional.jacobian
    assert_close(jacobian(lambda x: first(ours(x)), x), expected)
    assert_close(jacobian(lambda x: first(ours(x)), x, vectorize=True), expected)
    forward = jacobian(lambda x: first(ours(x)), x, vectorize=True, strategy="forward-mode")
    assert_close(forward, expected)


@pytest.mark.parametrize("name", CLASSES)
def test_hessians(name: str) -> None:
    theirs, ours = pair(name, 2, 2, dtype=torch.float64)
    x = torch.randn(2, 2).double() if is_cell(name) else torch.randn(2, 1, 2).double()
    expected = torch.autograd.functional.hessian(lambda x: first(theirs(x)).square().sum(), x)
    assert_close(hessian(lambda x: first(ours(x)).square().sum())(x), expected, tol=1e-9)
    found = torch.autograd.functional.hessian(lambda x: first(ours(x)).square().sum(), x)
    assert_close(found, expected, tol=1e-9)


@pytest.mark.parametrize("name", CLASSES)
def test_jvp(name: str) -> None:
    """Forward mode along inputs and weights; torch.nn has it in float64."""
    theirs, ours = double_pair(name)
    x, dx = value(name), value(name)
    expected = jvp(lambda x: first(theirs(x)), (x,), (dx,))
    assert_all_close(jvp(lambda x: first(ours(x)), (x,), (dx,)), expected)

    call, weights = as_function(ours)
    tangents = {k: torch.randn_like(w) for k, w in weights.items()}
    _, along = jvp(lambda w: first(call(w, x)), (weights,), (tangents,))
    jacobian = jacrev(lambda w: first(call(w, x)))(weights)
    dot = sum((jacobian[k] * tangents[k]).sum(tuple(range(-tangents[k].dim(), 0))) for k in weights)
    assert_close(along, dot)

    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, dx)
        output = first(ours(dual))
        assert_close(torch.autograd.forward_ad.unpack_dual(output).tangent, expected[1])
        assert torch.autograd.forward_ad.unpack_dual(first(ours(x))).tangent is None


@pytest.mark.parametrize("name", CLASSES)
def test_vmap(name: str) -> None:
    """Over inputs, over states, and over an ensemble of weights."""
    _, ours = double_pair(name)
    xs = torch.stack([value(name) for _ in range(3)])
    expected = torch.stack([first(ours(x)) for x in xs])
    assert_close(vmap(lambda x: first(ours(x)))(xs), expected)
    assert_close(vmap(lambda x: first(ours(x)), in_dims=1)(xs.transpose(0, 1)), expected)

    ensemble = [double_pair(name)[1] for _ in range(3)]
    weights, buffers = stack_module_state(ensemble)
    skeleton = copy.deepcopy(ensemble[0]).to("meta")
    outputs = vmap(lambda w, b, x: first(functional_call(skeleton, (w, b), (x,))))(
        weights, buffers, xs
    )
    assert_close(outputs, torch.stack([first(m(x)) for m, x in zip(ensemble, xs, strict=True)]))


@pytest.mark.parametrize("name", CLASSES)
def test_per_sample_gradients(name: str) -> None:
    """vmap(grad), as differential privacy needs it; torch.nn fails at most of these."""
    _, ours = double_pair(name)
    call, weights = as_function(ours)
    xs = torch.stack([value(name) for _ in range(3)])
    found = vmap(grad(lambda w, x: first(call(w, x)).square().sum()), in_dims=(None, 0))(
        weights, xs
    )
    for i, x in enumerate(xs):
        ours.zero_grad()
        first(ours(x)).square().sum().backward()
        assert_all_close(
            {k: g[i] for k, g in found.items()}, {k: p.grad for k, p in ours.named_parameters()}
        )


@pytest.mark.parametrize("name", LAYERS)
def test_jacobian_of_packed_rows(name: str) -> None:
    theirs, ours = double_pair(name)
    packed = pack_padded_sequence(value(name), [5, 2])

    def call(module: nn.Module, rows: Tensor) -> Tensor:
        return module(PackedSequence(rows, packed.batch_sizes))[0].data

    expected = torch.autograd.functional.jacobian(lambda x: call(theirs, x), packed.data)
    assert_close(jacrev(lambda x: call(ours, x))(packed.data), expected)
