"""What peers share that are modules of the shape of torch.nn's: how a pass calls them."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..cases import Case
from ..problem import Problem, outputs
from . import Peer, Prepared


class ModulePeer(Peer):
    """Takes the passes from ``passes``; a subclass gives the module."""

    @abstractmethod
    def module(self, problem: Problem) -> Callable[..., Any]:
        """A callable ``(x, state=None) -> (y, state)`` with the problem's weights. For a case with
        resets it also takes them, ``reset=``, [T, B]."""

    def gradients(self, module: Any) -> dict[str, Any]:
        """Of the parameters, after a backward, under torch.nn's names."""
        return {f"d {name}": p.grad for name, p in module.named_parameters()}

    def prepare(self, problem: Problem) -> Prepared:
        module = self.module(problem)
        return _PASSES[problem.case.phase](problem, module, lambda: self.gradients(module))


def copy_weights(target: nn.Module, problem: Problem) -> nn.Module:
    """For drop-ins: the same state_dict, in the same memory, and the same mode."""
    target.load_state_dict(problem.weights, assign=True)
    return target.train(problem.module.training)


def _input(problem: Problem, *, leaf: bool = False) -> tuple[Tensor, Any]:
    """The tensor to derive by, and the input made of it: packed outside the clock."""
    x = problem.padded.requires_grad_(leaf)
    if not problem.case.ragged:
        return x, x
    packed = problem.pack(x.detach())
    data = packed.data.requires_grad_(leaf)
    return data, packed._replace(data=data)


def _inference(problem: Problem, module: Any, _gradients: Any) -> Prepared:
    _, x = _input(problem)

    @torch.no_grad()
    def call() -> Any:
        return module(x, **problem.keywords)

    return Prepared(call, lambda: outputs(*call()))


def _forward(problem: Problem, module: Any, _gradients: Any) -> Prepared:
    _, x = _input(problem, leaf=True)

    def call() -> Any:
        return module(x, **problem.keywords)

    return Prepared(call, lambda: outputs(*call()))


def _training(problem: Problem, module: Any, gradients: Callable[[], dict[str, Tensor]]) -> Any:
    leaf, x = _input(problem, leaf=True)
    cotangent = problem.cotangent
    if problem.case.ragged:
        cotangent = problem.pack(cotangent).data
    parameters = list(module.parameters())

    def call() -> Any:
        leaf.grad = None
        for parameter in parameters:
            parameter.grad = None
        y, state = module(x, **problem.keywords)
        flat = y.data if problem.case.ragged else y
        flat.backward(cotangent)
        return y, state

    def results() -> dict[str, Any]:
        found: dict[str, Any] = outputs(*call())
        return found | {"d x": leaf.grad} | gradients()

    return Prepared(call, results)


def _carrying(problem: Problem, module: Any, _gradients: Any) -> Prepared:
    x, state = problem.padded, problem.state

    @torch.no_grad()
    def call() -> Any:
        nonlocal state
        y, state = module(x, state)
        return y, state

    def results() -> dict[str, Tensor]:
        nonlocal state
        state = problem.state
        call()
        return outputs(*call())  # of the second call: the state was carried

    return Prepared(call, results)


def _loop(problem: Problem, module: Any, gradients: Callable[[], dict[str, Tensor]]) -> Prepared:
    x = problem.padded.requires_grad_(problem.case.wants_dx)
    h, c = (None if s is None else s.squeeze(0) for s in (problem.h, problem.c))
    first, cotangent = h if c is None else (h, c), problem.cotangent[-1]
    parameters = list(module.parameters())

    def call() -> Any:
        x.grad = None
        for parameter in parameters:
            parameter.grad = None
        state = first
        for step in x.unbind(0):
            state = module(step, state)
        y = state if c is None else state[0]
        y.backward(cotangent)
        return y, state

    def results() -> dict[str, Any]:
        found = outputs(*call())
        return found | ({"d x": x.grad} if problem.case.wants_dx else {}) | gradients()

    return Prepared(call, results)


_PASSES = {
    "inference": _inference,
    "forward": _forward,
    "training": _training,
    "decode": _carrying,
    "stream": _carrying,
    "loop": _loop,
    "loop_weights": _loop,
}


def no_ragged(case: Case) -> str | None:
    return "takes no packed sequences" if case.ragged else None
