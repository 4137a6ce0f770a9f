"""How the tests run modules and judge numbers. Checks are written so that NaN fails them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

import fused_rnn

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


def leaves(value: Any) -> Any:
    """Copies that collect gradients."""
    return map_tensors(value, lambda t: t.detach().clone().requires_grad_())


def run(
    module: nn.Module, x: Any, hx: Any = None, cotangent_dtype: torch.dtype | None = None
) -> Named:
    """Call and backpropagate: outputs, and gradients of input, states and parameters, by name.

    Random cotangents make every output count, and differently. They depend on the session's seed
    and the outputs' shapes alone, so two modules meet the same; ``cotangent_dtype`` rounds them.
    """
    x, hx = leaves(x), leaves(hx)
    module.zero_grad(set_to_none=True)
    outputs = flatten(module(x, hx))
    generator = torch.Generator().manual_seed(torch.initial_seed())
    cotangents = [torch.randn(o.shape, dtype=torch.float64, generator=generator) for o in outputs]
    torch.autograd.backward(
        outputs,
        [
            g.to(cotangent_dtype or o.dtype).to(o.dtype)
            for g, o in zip(cotangents, outputs, strict=True)
        ],
    )
    result = {f"output {i}": o.detach() for i, o in enumerate(outputs)}
    for kind, tensors in (("input", flatten(x)), ("hx", flatten(hx))):
        result |= {f"d {kind} {i}": t.grad for i, t in enumerate(tensors)}
    return result | {f"d {name}": p.grad for name, p in module.named_parameters()}


@contextlib.contextmanager
def restored_rng() -> Iterator[None]:
    """Leave the generator as it was: what runs next draws the same numbers."""
    state = torch.get_rng_state()
    try:
        yield
    finally:
        torch.set_rng_state(state)


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


# Half an ulp is what rounding a perfect result to the dtype costs. A result is rounded more than once
# on the way (h at every step, the terms that a gradient sums), and the errors of two runs of the same
# quality differ by luck. So four roundings of the largest value are granted beside twice torch.nn's
# error.
ROUNDINGS = 4


def assert_no_worse(ours: Named, theirs: Named, exact: Named) -> None:
    """Against float64, our error is at most twice torch.nn's own in the same dtype."""
    assert ours.keys() == theirs.keys()
    for name, reference in exact.items():
        assert ours[name].dtype == theirs[name].dtype, name
        assert torch.isfinite(ours[name]).all(), name
        floor = (
            ROUNDINGS * 0.5 * torch.finfo(ours[name].dtype).eps * max(magnitude(reference), TINY)
        )
        bound = 2 * error(theirs[name], reference) + floor
        found = error(ours[name], reference)
        assert found <= bound, (
            f"{name}: off by {found:.3g} of {magnitude(reference):.3g}, allowed {bound:.3g}"
        )


TINY = 1e-3  # below this, 16-bit floats lose precision themselves


def native() -> bool:
    return fused_rnn.backend_info()["backend"] == "native"
