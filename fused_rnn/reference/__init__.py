"""The mathematics of every cell in plain torch: oracle of the tests, and the path always there.

    stages     what may happen to the states between two steps
    cells      what is to know of each cell, and its step, pointwise in the batch and the unit
    tensors    which tensors a layer has
    products   x W_ih^T and h W_hh^T
    direction  one direction of a layer, step by step
    layers     a stack of layers over a whole sequence

Everything is differentiable torch without in-place writes, so autograd of any order, forward mode,
``vmap``, ``torch.func`` and any device work without more code. The native kernels (``ops/``)
answer the same call with the same results.

Sizes: L layers, D directions, T steps, B sequences, I inputs, H units, G gates, P width of h (H, or
less if projected), C width of all states beside h.
"""

from .cells import CELLS, Cell, Step
from .layers import initial_states, recurrent
from .products import Rows
from .stages import NO_STAGES, NORM_KINDS, NORM_TENSORS, Norm, Stages
from .tensors import (
    BIASES,
    PROJECTION,
    Weights,
    by_name,
    present_bits,
    present_names,
    present_norms,
    widths,
    without_blocks,
)

__all__ = [
    "BIASES",
    "CELLS",
    "NORM_KINDS",
    "NORM_TENSORS",
    "NO_STAGES",
    "PROJECTION",
    "Cell",
    "Norm",
    "Rows",
    "Stages",
    "Step",
    "Weights",
    "by_name",
    "initial_states",
    "present_bits",
    "present_names",
    "present_norms",
    "recurrent",
    "widths",
    "without_blocks",
]
