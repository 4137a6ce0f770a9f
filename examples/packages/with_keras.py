"""Keras 3 on the torch backend: its layers with and without ``fused_rnn.keras.enable()``."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
from measure import compare
from torch import Tensor

import fused_rnn

os.environ["KERAS_BACKEND"] = "torch"  # which Keras reads when it is imported

import keras  # noqa: E402

BATCH, STEPS, INPUTS, UNITS = 32, 100, 64, 128


def layers() -> dict[str, Any]:
    options: dict[str, Any] = {"return_sequences": True}
    lstm = keras.layers.LSTM(UNITS, **options)
    return {
        "LSTM": lstm,
        "GRU": keras.layers.GRU(UNITS, **options),
        "SimpleRNN": keras.layers.SimpleRNN(UNITS, **options),
        "Bidirectional(LSTM)": keras.layers.Bidirectional(lstm),
    }


def main() -> None:
    x = torch.randn(BATCH, STEPS, INPUTS)
    lengths = torch.randint(STEPS // 4, STEPS + 1, (BATCH, 1))
    left_padded = torch.arange(STEPS) >= STEPS - lengths

    def on_ours(call: Callable[[], Tensor]) -> Tensor:
        with fused_rnn.keras.enable():
            return call()

    for name, layer in layers().items():

        @torch.no_grad()
        def infer(layer: Any = layer) -> Tensor:
            return layer(x)

        def train(mask: Tensor | None = None, layer: Any = layer) -> Tensor:
            y = layer(x, mask=mask)
            y.square().mean().backward()
            return y.detach()

        for title, call in {
            "inference": infer,
            "training": train,
            "training, left-padded": lambda train=train: train(left_padded),
        }.items():
            print(f"{name}, {title}")
            compare({"Keras": call, "fused_rnn": lambda call=call: on_ours(call)})


if __name__ == "__main__":
    main()
