"""pytorch-forecasting: its LSTM and GRU derive from torch.nn's, which ``keep_isinstance`` takes."""

from __future__ import annotations

import copy
import warnings

import numpy as np
import pandas as pd
import torch
from measure import compare
from pytorch_forecasting import TemporalFusionTransformer, TimeSeriesDataSet
from torch import Tensor

import fused_rnn

warnings.filterwarnings("ignore")


def series() -> TimeSeriesDataSet:
    steps = np.arange(200)
    groups = [
        pd.DataFrame({"step": steps, "group": str(i), "value": np.sin(steps / (5 + i))})
        for i in range(4)
    ]
    frame = pd.concat(groups, ignore_index=True)
    return TimeSeriesDataSet(
        frame,
        time_idx="step",
        target="value",
        group_ids=["group"],
        max_encoder_length=96,
        max_prediction_length=24,
        time_varying_unknown_reals=["value"],
    )


def main() -> None:
    data = series()
    theirs = TemporalFusionTransformer.from_dataset(data, hidden_size=64, dropout=0.0)
    ours = fused_rnn.replace(copy.deepcopy(theirs), keep_isinstance=True)
    x, _ = next(iter(data.to_dataloader(train=False, batch_size=64)))

    def train(model: TemporalFusionTransformer) -> Tensor:
        y = model(x).prediction
        y.square().mean().backward()
        return y.detach()

    compare({"torch.nn": lambda: train(theirs), "fused_rnn": lambda: train(ours)})
    assert any(isinstance(module, torch.nn.LSTM) for module in ours.modules())


if __name__ == "__main__":
    main()
