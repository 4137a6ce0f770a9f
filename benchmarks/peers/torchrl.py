"""torchrl's modules over trajectories of several episodes, in their recurrent mode.

``is_init`` says where episodes begin. The batch is split there, and the pieces are padded to the
longest, run, and put together again. torchrl says not to trust the last states where episodes end
inside: c_n is not returned, h_n is the last output.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

from torch import Tensor, nn

from ..cases import Case
from ..problem import Problem
from . import version
from .modules import ModulePeer, copy_weights

_STATES = {"lstm": ("h", "c"), "gru": ("h",)}


class Episodes(nn.Module):
    """torchrl's LSTM or GRU, x [T, B, I] and ``reset`` [T, B]."""

    def __init__(self, problem: Problem) -> None:
        super().__init__()
        import torchrl.modules

        case = problem.case
        states = _STATES[case.cell]
        made: Any = getattr(torchrl.modules, f"{case.cell.upper()}Module")(
            input_size=case.I,
            hidden_size=case.H,
            bias=case.bias,
            in_keys=["x", *states],
            out_keys=["y", *(("next", state) for state in states)],
            recurrent_backend="pad",
            default_recurrent_mode=True,
        )
        self.module = made.to(problem.dtype)
        copy_weights(self.layer, problem)
        self.train(problem.module.training)

    @property
    def layer(self) -> Any:
        """torch.nn's, inside."""
        return getattr(self.module, "lstm" if hasattr(self.module, "lstm") else "gru")

    def forward(self, x: Tensor, *, reset: Tensor) -> tuple[Tensor, Tensor]:
        from tensordict import TensorDict

        rows, begins = x.transpose(0, 1), reset.t().unsqueeze(-1)
        found = self.module(TensorDict({"x": rows, "is_init": begins}, rows.shape[:2]))
        y = found["y"].transpose(0, 1)
        return y, y[-1:]


class TorchRL(ModulePeer):
    name, title = "torchrl", "torchrl"
    devices = ("cpu", "cuda")
    has_between = frozenset({"resets"})

    def absent(self) -> str | None:
        return None if find_spec("torchrl") else "not installed: torchrl"

    def versions(self) -> dict[str, str]:
        return {package: version(package) or "?" for package in ("torchrl", "tensordict")}

    def refuses(self, case: Case) -> str | None:
        if case.cell not in _STATES:
            return f"has no {case.cell}"
        if not case.resets:
            return "is for resets"
        one = case.layers == case.directions == 1 and not (case.proj or case.ragged)
        return None if one else "is one padded layer and direction without projection"

    def regime(self, case: Case) -> str | None:
        return "split and padded"

    def module(self, problem: Problem) -> Any:
        return Episodes(problem)

    def gradients(self, module: Any) -> dict[str, Any]:
        return super().gradients(module.layer)


def peer() -> TorchRL:
    return TorchRL()
