"""torchrecurrent (the package of that name): recurrent cells of the literature as loops in PyTorch.

Where its equations are those of fused_rnn.zoo, both get the same weights, and outputs and the
gradient of x are compared. ``_CELLS`` says for each how its weights are made of ours.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..cases import Case
from ..problem import Problem
from . import version
from .modules import ModulePeer

Weights = dict[str, Tensor]
MATRICES = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")


def _same(w: Weights) -> Weights:
    return w


def _rows(order: list[int], *names: str) -> Callable[[Weights], Weights]:
    """The gates of these weights in another order."""

    def reordered(w: Weights) -> Weights:
        for name in names:
            if name in w:
                parts = w[name].chunk(len(order))
                w[name] = torch.cat([parts[i] for i in order])
        return w

    return reordered


def _second(new: str) -> Callable[[Weights], Weights]:
    """The recurrent rows behind the first gate's under names of their own."""

    def split(w: Weights) -> Weights:
        units = w["weight_hh"].shape[1]
        for kind in ("weight", "bias"):
            whole = w.pop(f"{kind}_hh")
            w[f"{kind}_hh"], w[f"{kind}_{new}"] = whole[:units], whole[units:]
        return w

    return split


def _antisymmetric(w: Weights) -> Weights:
    w["weight_hh"] = w.pop("parametrizations.weight_hh_l0.original")
    return w


def _fastgrnn(w: Weights) -> Weights:
    b_z, b_h = w.pop("b_z"), w.pop("b_h")
    w["bias_ih"] = torch.cat([w["bias_ih"] + b_z, w["bias_ih"] + b_h])
    w["bias_hh"] = w["bias_hh"].repeat(2)
    # One for all units, as ours are at the start.
    return w | {name: w[name][:1] for name in ("zeta", "nu")}


def _indrnn(w: Weights) -> Weights:
    w["vector_u"] = w.pop("u")
    return w


def _peephole(w: Weights) -> Weights:
    w["weight_ph"] = torch.cat([w.pop(name) for name in ("p_i", "p_f", "p_o")])
    return w


def _unicornn(w: Weights) -> Weights:
    w["weight_hh"], w["weight_ch"] = w.pop("w"), w.pop("c")
    return w


# By the name in fused_rnn.zoo: the name there, its arguments, and its weights.
_CELLS: dict[str, tuple[str, dict[str, Any], Callable[[Weights], Weights]]] = {
    "ATR": ("ATR", {}, _same),
    "AntisymmetricRNN": ("AntisymmetricRNN", {"epsilon": 0.1, "gamma": 0.1}, _antisymmetric),
    "CoRNN": ("coRNN", {"dt": 0.05}, _second("ch")),
    "FastGRNN": ("FastGRNN", {"nonlinearity": "sigmoid"}, _fastgrnn),
    "IndRNN": ("IndRNN", {"nonlinearity": "relu"}, _indrnn),
    "JANET": ("JANET", {}, _same),
    "LiGRU": ("LiGRU", {}, _same),
    "MGU": ("MGU", {}, _same),
    "MUT1": ("MUT1", {}, _same),
    "MUT2": ("MUT2", {}, _same),
    # Ours are in the order of the products.
    "MUT3": ("MUT3", {}, _rows([1, 0, 2], "weight_hh", "bias_hh")),
    "MultiplicativeLSTM": ("MultiplicativeLSTM", {}, _second("mh")),
    "PeepholeLSTM": ("PeepholeLSTM", {}, _peephole),
    "RAN": ("RAN", {}, _rows([2, 0, 1], "weight_ih")),
    "UGRNN": ("UGRNN", {}, _rows([1, 0], *MATRICES)),
    "UnICORNN": ("UnICORNN", {"alpha": 0.9}, _unicornn),
}


class Layer(nn.Module):
    """Returns the states that a layer of the zoo has: not what is h once more."""

    def __init__(self, layer: nn.Module, states: int) -> None:
        super().__init__()
        self.layer, self.states = layer, states

    def forward(self, x: Tensor) -> tuple[Tensor, Any]:
        y, state = self.layer(x)
        return y, state if isinstance(state, Tensor) else state[: self.states]


class TorchRecurrent(ModulePeer):
    name = title = "torchrecurrent"
    devices = ("cpu", "cuda")
    has_zoo = True

    def absent(self) -> str | None:
        return None if version(self.name) else "torchrecurrent is not installed"

    def versions(self) -> dict[str, str]:
        return {self.name: version(self.name) or ""}

    def refuses(self, case: Case) -> str | None:
        if not case.zoo:
            return "is for cells of the zoo"
        if case.zoo == "RAN" and case.bias:
            return "its RAN has no bias of the content"
        return None if case.zoo in _CELLS else "has not this cell, or with other equations"

    def gradients(self, module: Any) -> dict[str, Any]:
        return {}  # in another layout

    def module(self, problem: Problem) -> Any:
        import torchrecurrent

        case = problem.case
        name, arguments, theirs = _CELLS[case.zoo]
        made = getattr(torchrecurrent, name)(
            case.I, case.H, bias=case.bias, recurrent_bias=case.bias, **arguments
        )
        layer = made.to(case.device, problem.dtype)
        ours = {name.removesuffix("_l0"): w.clone() for name, w in problem.weights.items()}
        (cell,) = layer.cells
        missing, unexpected = cell.load_state_dict(theirs(ours), strict=False)
        lacking = dict(cell.named_parameters()).keys() & missing
        if unexpected or lacking - {"bias_ih", "bias_hh", "beta"}:
            raise RuntimeError(f"{name}: lacks {sorted(lacking)} and has no {unexpected}")
        for bias in lacking - {"beta"}:  # ours has it once; JANET's beta is a number
            getattr(cell, bias).data.zero_()
        states = 1 if isinstance(problem.module(problem.padded)[1], Tensor) else 2
        return Layer(layer, states).train(problem.module.training)


def peer() -> TorchRecurrent:
    return TorchRecurrent()
