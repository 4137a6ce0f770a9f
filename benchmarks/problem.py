"""The work of one case, the same for everybody: weights, input, cotangent, and who is right.

The module of torch.nn, or of fused_rnn.zoo, holds the weights, drawn from one seed; a peer takes
them from there, or from ``Problem.weights``, where the case has what torch.nn does not.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

from .cases import GATES, Case

SEED = 2026
SAMPLED_ROWS = 256

# A result is refused when it is off by more than this part of the largest entry. Kernels sum in
# other orders and round in other places; a wrong gate, weight or step is off by far more.
TOLERANCE = {"float64": 1e-9, "float32": 3e-4, "float16": 3e-2, "bfloat16": 1e-1, "int8": 1e-1}

MODULES: dict[str, Callable[..., nn.RNNBase]] = {
    "lstm": nn.LSTM,
    "gru": nn.GRU,
    "rnn": nn.RNN,
    "rnn_relu": nn.RNN,
}
CELL_MODULES: dict[str, Callable[..., nn.RNNCellBase]] = {
    "lstm": nn.LSTMCell,
    "gru": nn.GRUCell,
    "rnn": nn.RNNCell,
    "rnn_relu": nn.RNNCell,
}


def module_arguments(case: Case) -> dict[str, Any]:
    """What torch.nn's constructor, and that of every drop-in, is given."""
    arguments: dict[str, Any] = {
        "input_size": case.I,
        "hidden_size": case.H,
        "bias": case.bias,
    }
    if not case.loops:
        arguments |= {"num_layers": case.layers, "bidirectional": case.bidirectional}
    if case.proj:
        arguments["proj_size"] = case.proj
    if case.cell.startswith("rnn"):
        arguments["nonlinearity"] = "relu" if case.cell == "rnn_relu" else "tanh"
    return arguments


def module_class(case: Case) -> Callable[..., nn.Module]:
    """Of torch.nn, or of fused_rnn.zoo for what torch.nn does not have."""
    if case.zoo:
        from fused_rnn import zoo

        return getattr(zoo, case.zoo)
    return (CELL_MODULES if case.loops else MODULES)[case.cell]


def given_names(case: Case, module: Any) -> tuple[str, ...]:
    """What a cell of the zoo wants to be given for each step, [T, B, H]."""
    if not case.zoo:
        return ()
    from fused_rnn.reference import CELLS

    return CELLS[module.cell].given


def gain_sizes(case: Case) -> dict[str, int]:
    """The parameters of ``norm``: over all gates of a row, and over the c that an LSTM shows. A
    gain is drawn about 1; so is a shift, since any number does."""
    if not case.norm:
        return {}
    gates, units = GATES[case.cell] * case.H, case.H
    sizes = {"gain_ih_l0": gates, "gain_hh_l0": gates}
    return sizes | ({"gain_c_l0": units, "shift_c_l0": units} if case.cell == "lstm" else {})


def diagonal(whole: Tensor, blocks: int) -> Tensor:
    """Of W_hh [G*H, H] the blocks on its diagonal, [G*H, H / blocks]: row q*H + u has what
    multiplies the h of u's block."""
    each = whole.unflatten(1, (blocks, -1)).unflatten(0, (-1, blocks, whole.shape[1] // blocks))
    return torch.stack([each[:, i, :, i] for i in range(blocks)], 1).flatten(0, 2)


class Problem:
    """A case in tensors, in its dtype and on its device."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self.dtype = getattr(torch, case.dtype)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(SEED)
            self.module: nn.Module = module_class(case)(**module_arguments(case))
            padded = torch.randn(case.T, case.B, case.I)
            cotangent = torch.randn(case.T, case.B, case.directions * case.width)
            states = case.layers * case.directions
            size = 0.0 if case.phase == "stream" else 0.1
            h = torch.randn(states, case.B, case.width) * size
            c = torch.randn(states, case.B, case.H) * size
            reset = torch.rand(case.T, case.B) < case.resets
            gains = {name: 1 + 0.1 * torch.randn(size) for name, size in gain_sizes(case).items()}
            given = torch.rand(case.T, case.B, case.H)
        self.module.to(case.device, self.dtype).train(case.keeps)
        # By the names of torch.nn and fused_rnn.
        self.weights = dict(self.module.state_dict())
        if case.blocks > 1:
            self.weights["weight_hh_l0"] = diagonal(self.module.weight_hh_l0.detach(), case.blocks)
        self.weights |= {name: self._to(gain) for name, gain in gains.items()}
        self.reset = reset.to(case.device) if case.resets else None  # [T, B] bool
        self.given = {name: self._to(given) for name in given_names(case, self.module)}
        self.lengths = torch.tensor(case.lengths())
        self.padded = self._to(padded)  # [T, B, I]
        self.cotangent = self._to(cotangent)  # [T, B, D*P], of y
        # Of the first step, where calls carry states, and for loops.
        self.h, self.c = self._to(h), self._to(c) if case.cell == "lstm" else None

    def _to(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.case.device, self.dtype)

    @property
    def keywords(self) -> dict[str, Tensor]:
        """What a call is given beside input and states."""
        return self.given if self.reset is None else {"reset": self.reset}

    @property
    def state(self) -> Any:
        """As torch.nn takes it."""
        return self.h if self.c is None else (self.h, self.c)

    def pack(self, padded: Tensor) -> PackedSequence:
        return pack_padded_sequence(padded, self.lengths, enforce_sorted=False)


def outputs(y: Any, state: Any) -> dict[str, Tensor]:
    """Results by name, from what a module of torch.nn returns."""
    states = state if isinstance(state, tuple) else (state,)
    y = y.data if isinstance(y, PackedSequence) else y
    return {"y": y, **dict(zip(("h_n", "c_n"), states, strict=False))}


def sample(results: dict[str, Tensor]) -> dict[str, Tensor]:
    """At most SAMPLED_ROWS rows of each, evenly spread: enough to see a mistake, small to keep."""
    kept = {}
    for name, tensor in results.items():
        rows = tensor.detach().reshape(-1, tensor.shape[-1])
        picked = torch.linspace(0, len(rows) - 1, min(len(rows), SAMPLED_ROWS)).long()
        kept[name] = rows[picked.to(rows.device)].to("cpu", torch.float64)
    return kept


def mismatch(found: dict[str, Tensor], expected: dict[str, Tensor], dtype: str) -> str | None:
    """What is wrong with sampled results, in words, or None."""
    if "y" not in found:
        return "returned no y"
    for name, tensor in found.items():
        wanted = expected[name]
        if tensor.shape != wanted.shape:
            return f"{name} has sizes {tuple(tensor.shape)} instead of {tuple(wanted.shape)}"
        error = (tensor - wanted).abs().max() / wanted.abs().max().clamp_min(1e-30)
        if not error <= TOLERANCE[dtype]:  # NaN is refused too
            return f"{name} is off by {error:.2g} of its largest entry"
    return None
