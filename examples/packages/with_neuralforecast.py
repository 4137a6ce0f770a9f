"""neuralforecast: a model is swapped before it is given to NeuralForecast, which copies it."""

from __future__ import annotations

import logging
import warnings

import numpy as np
import pandas as pd
from measure import compare
from neuralforecast import NeuralForecast
from neuralforecast.models import LSTM

import fused_rnn

warnings.filterwarnings("ignore")
logging.getLogger("lightning").setLevel(logging.ERROR)
logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
logging.getLogger("lightning_fabric").setLevel(logging.ERROR)


def forecaster(swap: bool) -> NeuralForecast:
    model = LSTM(
        h=12,
        input_size=96,
        encoder_hidden_size=64,
        max_steps=10,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
    )
    if swap:
        fused_rnn.replace(model)
    return NeuralForecast(models=[model], freq=1)


def main() -> None:
    steps = np.arange(300)
    frame = pd.concat(
        pd.DataFrame({"unique_id": str(i), "ds": steps, "y": np.sin(steps / (5 + i))})
        for i in range(8)
    )
    theirs, ours = forecaster(False), forecaster(True)
    compare({"torch.nn": lambda: theirs.fit(frame), "fused_rnn": lambda: ours.fit(frame)})
    swapped = [m for m in ours.models[0].modules() if isinstance(m, fused_rnn.LSTM)]
    assert len(swapped) == 1 and len(ours.predict()) == 8 * 12


if __name__ == "__main__":
    main()
