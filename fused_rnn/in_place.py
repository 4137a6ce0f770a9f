"""What programs may write into, as with torch.nn: the inputs of a call, and its results."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import ops
from .torch_internals import dispatch_modes


def kept_for_backward(x: Tensor, states: Sequence[Tensor], weights: Sequence[Tensor]) -> bool:
    """Whether autograd will keep x and the states, and notice if somebody changes them.

    torch.nn then keeps copies of what it has to cast, and of what is not contiguous, as are inputs
    that are batch-first. So programs write into their inputs as soon as a call has returned
    (``x += rnn(x)[0]``), and we copy the same. A compiler knows by itself who writes where.
    """
    return ops.wants_grad((*weights, x, *states)) and not torch.compiler.is_compiling()


def reshapes_in_place(result: Tensor) -> bool:
    """Whether an engine's result should change its shape in place rather than become a view, which
    torch.nn's results are not, and which ``detach_()`` refuses.

    Tracers are better off with views. A mode may have kept the tensor, as selective checkpoints do,
    and a subclass of Tensor is a view already, which autograd lets nobody change.
    """
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return False
    return type(result) is Tensor and dispatch_modes() == 0
