"""The functions of direct calls, called as tests do, and whether a call was one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from cases import Case
from helpers import flatten

import fused_rnn
from fused_rnn import ops


def find_direct() -> Any:
    """The functions, which the first call of all makes available."""
    with torch.no_grad():
        fused_rnn.GRUCell(1, 1)(torch.zeros(1, 1))
    return ops.direct.functions


DIRECT = find_direct()
needs_direct = pytest.mark.skipif(not DIRECT, reason="there are no direct calls")


class Spy:
    """The functions, and how the calls of them ended: with results, or with None.

    Of a module whose call is not a direct one its forward is asked next, so that goes unsaid.
    """

    def __init__(self) -> None:
        self.done: list[bool] = []
        self.names: list[str] = []

    def __getattr__(self, name: str) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            result = getattr(DIRECT, name)(*args)
            if name == "call_module" and result is None:
                return None
            self.done.append(result is not None)
            self.names.append(name)
            return result

        return call


def forward(case: Case, tensors: Sequence[Any], batch_sizes: Any = None, **changes: Any) -> Any:
    x, h0, c0, *weights = tensors
    arguments = {
        "cell": case.kernel,
        "layers": case.num_layers,
        "directions": case.directions,
        "present": case.present,
    }
    arguments |= {"x": x, "h0": h0, "c0": c0, "batch_sizes": batch_sizes}
    arguments |= {"weights": tuple(weights), "packed": None, "tape": False}
    return DIRECT.forward(*(arguments | changes).values())


def infer_stack(cell: str, x: Any, hx: Any, weights: list[Any], *rest: Any) -> Any:
    """The function, of weights without names."""
    names = [str(i) for i in range(len(weights))]
    named = dict(zip(names, weights, strict=True))
    return DIRECT.infer_stack(cell, x, hx, named, names, *rest, None)


def step(cell: str, x: Any, hx: Any, *weights: Any) -> Any:
    names = [str(i) for i in range(len(weights))]
    return DIRECT.step(cell, x, hx, dict(zip(names, weights, strict=True)), names, None)


def by_operator(fn: Callable[[], Any]) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ops.direct, "functions", False)
        return fn()


def assert_identical(actual: Any, expected: Any) -> None:
    ours, theirs = flatten(actual), flatten(expected)
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
        assert a.is_inference() == b.is_inference()
        assert [s for s, n in zip(a.stride(), a.shape, strict=True) if n > 1] == [
            s for s, n in zip(b.stride(), b.shape, strict=True) if n > 1
        ]
        assert torch.equal(a, b)
