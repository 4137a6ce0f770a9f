"""What autocast asks for, and the types that torch.nn's layers have under it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import ops
from .reference import CELLS


def dtype_for(x: Tensor, states: Sequence[Tensor], weights: Sequence[Tensor]) -> torch.dtype | None:
    """The dtype autocast asks for, or None: switched off, or double, which it never casts."""
    device = x.device.type
    if device not in ("cpu", "cuda") or not torch.is_autocast_enabled(device):
        return None
    if any(t.dtype == torch.float64 for t in (x, *states, *weights)):
        return None
    return torch.get_autocast_dtype(device)


def dtypes_of_results(
    cell: str,
    low: torch.dtype,
    x: Tensor,
    states: Sequence[Tensor],
    *,
    projected: bool,
    fused: bool,
) -> tuple[torch.dtype, torch.dtype]:
    """The dtypes of h and c that torch.nn returns under autocast to ``low``; y has that of h.

    On the CPU products come out in ``low``, and a state that is mixed in elementwise promotes the
    result to its own dtype. So, with a dtype that a state brings along (zeros have that of x):

    ======================================  ===============  ===============
    cell                                    h                c
    ======================================  ===============  ===============
    RNN                                     low
    GRU                                     wider of low, h
    LSTM                                    wider of low, c  wider of low, c
    LSTM, projected: h is one more product  low              wider of low, c
    LSTM of layers that oneDNN runs         low              low
    ======================================  ===============  ===============

    ``fused`` says whether the last row holds, see ``fused_by_torch``. On CUDA everything is cast
    first. tests/test_autocast.py tries the table against the torch that is there.
    """
    if x.is_cuda:
        return low, low
    mixed = torch.promote_types(low, states[-1].dtype if states else x.dtype)
    if len(CELLS[cell].states) == 1:
        h_dtype = mixed if CELLS[cell].reads_h else low
        return h_dtype, h_dtype
    if fused and not projected:
        return low, low
    c_dtype = mixed
    return low if projected else c_dtype, c_dtype


def fused_by_torch(x: Tensor, batch_sizes: Tensor | None) -> bool:
    """Whether torch.nn hands an LSTM without projection to oneDNN for this input.

    Padded batches that are not empty, of the dtypes that oneDNN takes here; from torch 2.13 on also
    packed ones whose sequences are equally long. How long they are cannot be asked of what a
    compiler traces; they then count as unequal.
    """
    if x.numel() == 0 or not ops.onednn_takes(x.dtype):
        return False
    if batch_sizes is None:
        return True
    if torch.compiler.is_compiling() or torch.__version__ < "2.13":
        return False
    return type(batch_sizes) is Tensor and bool(batch_sizes[0] == batch_sizes[-1])
