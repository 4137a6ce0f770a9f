"""``python -m fused_rnn.build.trial TARGET LIBRARY``: loads a library, tries the layers it has.

For a process of its own: a library that is broken may end it.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

import fused_rnn
from fused_rnn import build


def main(target: str, library: str) -> None:
    build.use(target, Path(library))
    cells = build.record.read(Path(library)).get("cells", ())
    for layer in (fused_rnn.RNN, fused_rnn.LSTM, fused_rnn.GRU):
        ours = layer(5, 7, bidirectional=True).to(target)
        if ours.mode.lower() not in cells:
            continue
        x = torch.randn(4, 3, 5, device=target)
        results = []
        for module in (ours, fused_rnn.restore(ours, inplace=False)):
            y = module(x)[0]
            y.square().sum().backward()
            results.append([y, *(p.grad for p in module.parameters())])
        torch.testing.assert_close(*results, rtol=1e-2, atol=1e-2)


if __name__ == "__main__":
    main(*sys.argv[1:])
