"""``python -m benchmarks.gpu.smallest cuda|cpu CELL...``: every kind of layer of each cell, forward
and backward, in sizes that a sanitizer can bear. Fails if a result is not finite.
"""

from __future__ import annotations

import sys
from dataclasses import replace

from ..cases import Case
from ..peers import load
from .contender import Problem

CELLS = ("lstm", "gru", "rnn")


def cases(cell: str, device: str) -> list[Case]:
    """H = 5: the tails of vectors and tiles. H = 32: none, and kernels that keep their weights."""
    plain = Case(cell, B=3, T=3, H=5, I=4, phase="training", device=device)
    kinds = [
        plain,
        replace(plain, bidirectional=True, layers=2),
        replace(plain, shortest=0.3),
        replace(plain, bias=False),
        *([replace(plain, proj=2)] if cell == "lstm" else []),
    ]
    dtypes = ("float64", "float16", "bfloat16") if device == "cuda" else ("float64", "bfloat16")
    whole = [replace(plain, H=32, I=32, B=9, dtype=dtype) for dtype in dtypes]
    return kinds + whole + [replace(whole[-1], bidirectional=True, shortest=0.3)]


def main(device: str, *cells: str) -> None:
    ours = load("ours")
    for case in (case for cell in cells for case in cases(cell, device)):
        print(case.label, flush=True)
        for name, tensor in ours.prepare(Problem(case)).results().items():
            if not tensor.isfinite().all():
                raise ArithmeticError(f"{case.label}: {name} is not finite")


if __name__ == "__main__":
    main(*sys.argv[1:])
