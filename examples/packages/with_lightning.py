"""Lightning: a callback that trains any module on our kernels, and leaves it as it was.

Checkpoints have the names of torch.nn, so that they load with and without it.
"""

from __future__ import annotations

import logging
from typing import Any

import lightning
import torch
from measure import compare
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import fused_rnn

STEPS, INPUTS, UNITS = 64, 16, 128


class OnOurKernels(lightning.Callback):
    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        fused_rnn.replace(pl_module)

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        fused_rnn.restore(pl_module)


class Regression(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.GRU(INPUTS, UNITS, batch_first=True)
        self.head = nn.Linear(UNITS, 1)

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        x, target = batch
        y, _ = self.rnn(x)
        return nn.functional.mse_loss(self.head(y[:, -1]), target)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters())


def main() -> None:
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    data = TensorDataset(torch.randn(256, STEPS, INPUTS), torch.randn(256, 1))
    model = Regression()
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}

    def fit(*callbacks: lightning.Callback) -> None:
        trainer = lightning.Trainer(
            max_epochs=1,
            accelerator="cpu",
            enable_model_summary=False,
            callbacks=list(callbacks),
            **quiet,
        )
        trainer.fit(model, DataLoader(data, batch_size=32))
        assert type(model.rnn) is nn.GRU

    compare({"torch.nn": fit, "fused_rnn": lambda: fit(OnOurKernels())})


if __name__ == "__main__":
    main()
