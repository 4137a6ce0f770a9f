"""sb3-contrib: RecurrentPPO, whose policy is swapped after it was made.

It goes over episodes step by step, in the rollout and in every update that an episode ends in: what
counts is the time of a single step.
"""

from __future__ import annotations

from measure import compare
from sb3_contrib import RecurrentPPO

import fused_rnn


def agent() -> RecurrentPPO:
    sizes = {"n_steps": 64, "batch_size": 64, "n_epochs": 1}
    return RecurrentPPO("MlpLstmPolicy", "CartPole-v1", seed=0, device="cpu", **sizes)


def main() -> None:
    theirs, ours = agent(), agent()
    fused_rnn.replace(ours.policy)
    compare(
        {
            "torch.nn": lambda: theirs.learn(64) and None,
            "fused_rnn": lambda: ours.learn(64) and None,
        }
    )


if __name__ == "__main__":
    main()
