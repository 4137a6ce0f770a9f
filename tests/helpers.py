"""How the tests run modules and judge numbers. Checks are written so that NaN fails them."""

from __future__ import annotations

import contextlib
import resource
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import emulated
import pytest
import torch
from cases import Case
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

import fused_rnn
from fused_rnn import ops
from fused_rnn.build.custom import CellTarget
from fused_rnn.reference import CELLS

Named = dict[str, Tensor]


def flatten(value: Any) -> list[Tensor]:
    """All tensors of a module's input or output, in order."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, PackedSequence):
        return [value.data]
    return [] if value is None else [tensor for item in value for tensor in flatten(item)]


def map_tensors(value: Any, fn: Any) -> Any:
    """The same structure with ``fn`` applied to every floating tensor."""
    if isinstance(value, Tensor):
        return fn(value)
    if isinstance(value, PackedSequence):
        return PackedSequence(fn(value.data), *value[1:])
    return value if value is None else tuple(map_tensors(item, fn) for item in value)


def leaves(value: Any, dtype: torch.dtype | None = None) -> Any:
    """Copies, of another type perhaps, that collect gradients."""
    return map_tensors(value, lambda t: t.detach().to(dtype or t.dtype, copy=True).requires_grad_())


def pull_back(outputs: Sequence[Tensor], rounded_to: torch.dtype | None = None) -> None:
    """Backpropagate random cotangents, which make every output count, and differently.

    They depend on torch's seed and the outputs' shapes alone, so two modules meet the same.
    """
    generator = torch.Generator().manual_seed(torch.initial_seed())
    cotangents = [torch.randn(o.shape, dtype=torch.float64, generator=generator) for o in outputs]
    torch.autograd.backward(
        outputs,
        [g.to(rounded_to or o.dtype).to(o) for g, o in zip(cotangents, outputs, strict=True)],
    )


class Giving(nn.Module):
    """A layer of a cell from Python, and what it is given for each step, as parameters."""

    def __init__(self, layer: Any, given: Named) -> None:
        super().__init__()
        self.layer, self.given = layer, nn.ParameterDict(given)

    def forward(self, x: Any, hx: Any = None, **more: Any) -> Any:
        return self.layer(x, hx, **self.given, **more)


def run(
    module: nn.Module, x: Any, hx: Any = None, cotangent_dtype: torch.dtype | None = None
) -> Named:
    """Call and ``pull_back``: outputs, and gradients of input, states and parameters, by name."""
    x, hx = leaves(x), leaves(hx)
    module.zero_grad(set_to_none=True)
    outputs = flatten(module(x, hx))
    pull_back(outputs, cotangent_dtype)
    result = {f"output {i}": o.detach() for i, o in enumerate(outputs)}
    for kind, tensors in (("input", flatten(x)), ("hx", flatten(hx))):
        result |= {f"d {kind} {i}": t.grad for i, t in enumerate(tensors)}
    return result | {f"d {name}": p.grad for name, p in module.named_parameters()}


def operate(
    fn: Any, case: Case, arguments: tuple[Any, Tensor | None], dtype: torch.dtype | None = None
) -> Named:
    """The same of an operator or its reference, computed in ``dtype``, for cotangents that the
    case's type holds."""
    tensors, batch_sizes = leaves(arguments[0], dtype), arguments[1]
    outputs = case.call(fn, tensors, batch_sizes)
    pull_back([o for o in outputs if o is not None], case.dtype)
    result = {
        n: o.detach() for n, o in zip(("y", "h_n", "c_n"), outputs, strict=True) if o is not None
    }
    # Nothing may read a tensor at all: that is zero to an engine.
    return result | {
        f"d {name}": torch.zeros_like(t) if t.grad is None else t.grad
        for name, t in zip(case.names, tensors, strict=True)
        if t is not None
    }


@contextlib.contextmanager
def restored_rng() -> Iterator[None]:
    """Leave the generator as it was: what runs next draws the same numbers."""
    state = torch.get_rng_state()
    try:
        yield
    finally:
        torch.set_rng_state(state)


def leave_kink(modules: Sequence[nn.Module], x: Any, hx: Any) -> tuple[Any, Any]:
    """Move a relu layer away from where its derivative jumps; returns the input to use.

    A pre-activation z near 0 may round to either side of it, whoever rounds, and the gradient then
    differs by any amount. Here every |z| >= 2: the bias is +-3, |x| and |h0| are at most 4, every
    row of W has sum |w| = 1/8, and so |h| stays below 3 + 4/8 + 4/8 = 4. Without a bias, no summand
    is negative, so that all units are on.
    """
    for module in modules:
        for name, parameter in module.named_parameters():
            with torch.no_grad():
                if "weight" in name:
                    parameter /= 8 * parameter.abs().sum(1, keepdim=True)
                    if not module.bias:
                        parameter.abs_()
                elif "bias_ih" in name:  # 0 too: torch 2.10 draws bfloat16 from 256 numbers
                    parameter.copy_(torch.where(parameter < 0, -3, 3))
                else:
                    parameter.zero_()
    biased = all(module.bias for module in modules)
    return map_tensors((x, hx), lambda t: t.clamp(-4, 4) if biased else t.abs())


def error(actual: Tensor, expected: Tensor) -> float:
    """The largest difference, in float64; NaN if there is one."""
    assert actual.shape == expected.shape, (actual.shape, expected.shape)
    if actual.numel() == 0:
        return 0.0
    wide = torch.complex128 if expected.is_complex() else torch.float64
    return (actual.detach().to(wide) - expected.detach().to(wide)).abs().max().item()


def magnitude(tensor: Tensor) -> float:
    return tensor.detach().abs().max().item() if tensor.numel() else 0.0


def assert_close(actual: Tensor, expected: Tensor, tol: float = 1e-10, what: str = "") -> None:
    """Equal shape and dtype, and a difference below ``tol`` of the largest value (or of 1)."""
    assert actual.dtype == expected.dtype, f"{what}: {actual.dtype} instead of {expected.dtype}"
    bound = tol * max(1.0, magnitude(expected))
    assert (found := error(actual, expected)) <= bound, f"{what}: off by {found}, allowed {bound}"


def assert_all_close(actual: Any, expected: Any, tol: float = 1e-10) -> None:
    """``assert_close`` for results of ``run``, or for outputs of modules."""
    if isinstance(expected, dict):
        assert actual.keys() == expected.keys()
        for name, tensor in expected.items():
            assert_close(actual[name], tensor, tol, name)
    else:
        ours, theirs = flatten(actual), flatten(expected)
        assert len(ours) == len(theirs)
        for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
            assert_close(a, b, tol, f"tensor {i}")


def half_ulp(dtype: torch.dtype, size: float) -> float:
    """What rounding a perfect number of this size to ``dtype`` costs at most."""
    return 0.5 * torch.finfo(dtype).eps * size


def assert_no_worse(
    ours: Named, theirs: Named, exact: Named, terms: int, more: float = 1.0
) -> None:
    """Against float64, our error is at most twice torch.nn's own in the same dtype, plus a floor.

    The errors of two runs of the same quality differ by luck, above all in small tensors. So some
    roundings are granted beside: those of storing (h at every step, what gradients pass through),
    and those of computing in float32. There, activations and factors like 1 - tanh^2 are exact to
    some ulps of 1, however small the gradient that they multiply, and a sum of n ``terms`` is off
    by about sqrt(n) roundings (Higham & Mary 2019), or fewer with a better order of summation.

    Where there are a few numbers only, torch.nn's may be right by accident, although they are sums
    of ``terms`` products with an h that was rounded when it was stored. Tensors that small are
    granted what this costs, for h and gradients of 1/2, however much of the sum cancels.

    ``more`` times as much is allowed to those that look again.
    """
    assert ours.keys() == theirs.keys()
    for name, reference in exact.items():
        dtype, size = ours[name].dtype, max(magnitude(reference), 1e-3)  # float16 has subnormals
        assert dtype == theirs[name].dtype, name
        assert torch.isfinite(ours[name]).all(), name
        computing = (8 + terms**0.5) * half_ulp(torch.float32, max(size, 1.0))
        floor = 4 * half_ulp(dtype, size) + computing
        if reference.numel() < 16:
            floor += terms**0.5 * half_ulp(dtype, 0.25)
        bound = more * (2 * error(theirs[name], reference) + floor)
        found = error(ours[name], reference)
        assert found <= bound, f"{name}: off by {found:.3g} of {size:.3g}, allowed {bound:.3g}"


def assert_library_agrees(cell: str) -> None:
    """What the kernels' header declares of a cell, and what ``CELLS`` says of it."""
    known, facts = CELLS[cell], ops.facts_of("cpu", cell)
    assert ops.tensor_names("cpu", cell) == known.tensors
    assert (facts.gates_x, facts.gates_h) == (known.gates, known.recurrent_gates)
    assert facts.extra_states == len(known.states) - 1
    assert (facts.given, facts.operands + 1) == (len(known.given), len(known.products) or 1)
    for name in ("reads_h", "reads_new_h", "adds", "projectable"):
        assert bool(getattr(facts, name)) == getattr(known, name), name


def resident() -> int:
    """Bytes of the process in memory."""
    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * resource.getpagesize()
    except OSError:
        return 0


cpu_engine_only = pytest.mark.skipif(emulated.WANTED, reason="about the CPU's engine")


def native() -> bool:
    """Whether the kernels do the work, rather than the reference."""
    return fused_rnn.backend_info()["backend"] == "native"


def packs() -> bool:
    """Whether the engine that runs the tests packs weights."""
    return native() and not emulated.WANTED


def compile_quickly(
    monkeypatch: pytest.MonkeyPatch, but: Callable[[str], bool] = lambda cell: False
) -> None:
    """Cells from Python without optimisation, which takes a third of the time."""
    flags = CellTarget.own_flags

    def own_flags(target: CellTarget) -> tuple[str, ...]:
        return flags(target) if but(target.cell) else (*flags(target), "-O0")

    monkeypatch.setattr(CellTarget, "own_flags", own_flags)
