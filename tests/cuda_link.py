"""Builds the CUDA library against this CUDA build of torch and resolves every symbol of it.

Needs nvcc but no card: FUSED_RNN_CUDA_ARCH must name what to compile for. ``make cuda-link``.
"""

import ctypes
import os
import sys

import torch

from fused_rnn import (
    build,
    ops,
    reference,
    zoo,
)  # ops defines the operators that the library implements

if build.backend("cuda") != "native":
    sys.exit(str(build.state("cuda").failure))
state = build.state("cuda")
ctypes.CDLL(str(state.library), mode=os.RTLD_NOW)
for cell in build.cells():
    assert ops.tensor_names("cuda", cell.name), f"{cell.name} is not in the library"
own = zoo.FastGRNN(4, 4).cell  # of a library of its own, which finds all else in the other
assert ops.has_cell("cuda", own, torch.float32)
assert ops.tensor_names("cuda", own) == reference.CELLS[own].tensors
print(f"{state.library}: {state.origin}, all symbols are there")
