"""rsl-rl: a recurrent policy of many environments, a step at a time and in an update.

It asks whether its layer is torch.nn's before it exports one: hence ``keep_isinstance``.
"""

from __future__ import annotations

import copy

import torch
from measure import compare
from rsl_rl.models import RNNModel
from tensordict import TensorDict
from torch import Tensor

import fused_rnn

ENVIRONMENTS, STEPS, OBSERVED, UNITS, ACTIONS = 64, 24, 48, 128, 12


def observations(*sizes: int) -> TensorDict:
    return TensorDict({"policy": torch.randn(*sizes, OBSERVED)}, batch_size=sizes)


def main() -> None:
    step, sequence = observations(ENVIRONMENTS), observations(STEPS, ENVIRONMENTS)
    theirs = RNNModel(
        step,
        {"actor": ["policy"]},
        "actor",
        ACTIONS,
        rnn_type="lstm",
        rnn_hidden_dim=UNITS,
        rnn_num_layers=1,
        hidden_dims=[64],
    )
    ours = fused_rnn.replace(copy.deepcopy(theirs), keep_isinstance=True)

    @torch.no_grad()
    def act(model: RNNModel) -> Tensor:
        model.reset()
        for _ in range(STEPS):
            actions = model(step)
        return actions

    masks = torch.ones(STEPS, ENVIRONMENTS, dtype=torch.bool)
    states = (torch.zeros(1, ENVIRONMENTS, UNITS),) * 2

    def update(model: RNNModel) -> Tensor:
        actions = model(sequence, masks=masks, hidden_state=states)
        actions.square().mean().backward()
        return actions.detach()

    print("rollout")
    compare({"torch.nn": lambda: act(theirs), "fused_rnn": lambda: act(ours)})
    print("update")
    compare({"torch.nn": lambda: update(theirs), "fused_rnn": lambda: update(ours)})
    ours.as_jit()
    ours.as_onnx()


if __name__ == "__main__":
    main()
