"""The operators' schemas, and a call's arguments in their order."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.library
from torch import Tensor

from .. import reference

# Bytes of an element of packed weights, for the types that can be asked for.
PACKED_ELEMENTS = {None: 0, torch.bfloat16: 2, torch.int8: 1}

# The names that builds have for the types of tensors, see enum Storage in csrc/core/params.h.
STORAGES = {
    torch.float32: "float",
    torch.float64: "double",
    torch.bfloat16: "bfloat16",
    torch.float16: "half",
}
DTYPES = tuple(STORAGES)


# As for ``reference.recurrent``. between [L-1, rows, D*P] is what a layer gives to the next; hs and
# saved are the tape, whose layout is the engine's own. So is that of packed, from recurrent_pack:
# where these are the weights of the call, as they are, an engine reads them there.
_INPUTS = (
    "str cell, Tensor x, Tensor? h0, Tensor? c0, Tensor[] weights, Tensor? masks, "
    "Tensor? batch_sizes, Tensor? reset, Tensor? zoneout, Tensor? h_mask, int layers, "
    "int directions, int present, int blocks, int norm, float norm_eps, bool every_state, "
    "bool allow_tf32, Tensor? packed=None"
)
SCHEMAS = {
    "recurrent_infer": f"({_INPUTS}) -> (Tensor y, Tensor h_n, Tensor c_n)",
    "recurrent": f"({_INPUTS}) -> "
    "(Tensor y, Tensor h_n, Tensor c_n, Tensor between, Tensor hs, Tensor saved)",
    "recurrent_recomputed": f"({_INPUTS}) -> (Tensor y, Tensor h_n, Tensor c_n, Tensor between)",
    # W_ih and W_hh for calls of other x, in bfloat16 (element=2) or bytes (1) where that is asked
    # for and sums are in float32; empty where there is nothing to pack.
    "recurrent_pack": f"({_INPUTS}, int element=0) -> Tensor",
    # needs: which gradients are wanted, by their numbers: x, h0, c0, then the weights, with what is
    # given behind them. The others come back empty.
    "recurrent_backward": "(Tensor? dy, Tensor? dh_n, Tensor? dc_n, Tensor between, Tensor hs, "
    f"Tensor saved, int[] needs, {_INPUTS}) -> (Tensor dx, Tensor dh0, Tensor dc0, Tensor[] dw)",
}
CELL_AT = {name: 7 if name == "recurrent_backward" else 0 for name in SCHEMAS}


class Call(NamedTuple):
    """What a call is about beside its tensors."""

    cell: str
    layers: int
    directions: int
    present: int
    blocks: int = 1
    norm: int = 0  # 0, or 1 + the number of its kind in reference.NORM_KINDS
    norm_eps: float = 0.0
    every_state: bool = False
    allow_tf32: bool = False


class Inputs(NamedTuple):
    """What the arguments of all operators end with, in the order of the schemas."""

    cell: str
    x: Tensor
    h0: Tensor | None
    c0: Tensor | None
    weights: Sequence[Tensor]
    masks: Tensor | None
    batch_sizes: Tensor | None
    reset: Tensor | None
    zoneout: Tensor | None
    h_mask: Tensor | None
    layers: int
    directions: int
    present: int
    blocks: int
    norm: int
    norm_eps: float
    every_state: bool
    allow_tf32: bool = False
    packed: Tensor | None = None

    @property
    def call(self) -> Call:
        return Call(self.cell, *self[10:-1])

    @property
    def stages(self) -> StageTensors:
        return self.reset, self.zoneout, self.h_mask


# The tensors of ``reference.Stages``: reset, zoneout, h_mask.
StageTensors = tuple[Tensor | None, Tensor | None, Tensor | None]
NO_STAGE_TENSORS: StageTensors = (None, None, None)


def stages_of(call: Call, tensors: Sequence[Tensor | None]) -> reference.Stages:
    reset, zoneout, h_mask = tensors
    norm = None
    if call.norm:
        at = reference.present_norms(call.cell, call.present)
        norm = reference.Norm(reference.NORM_KINDS[call.norm - 1], at, call.norm_eps)
    return reference.Stages(
        reset=reset, zoneout=zoneout, h_mask=h_mask, blocks=call.blocks, norm=norm
    )


def by_reference(
    call: Call,
    stages: Sequence[Tensor | None],
    x: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    weights: Sequence[Tensor],
    masks: Tensor | None,
    batch_sizes: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """What an operator computes, in plain torch."""
    return reference.recurrent(
        call.cell,
        x,
        h0,
        c0,
        weights,
        masks,
        batch_sizes,
        *call[1:4],
        stages=stages_of(call, stages),
        every_state=call.every_state,
    )


def is_plain(call: Call, stages: StageTensors) -> bool:
    """Whether nothing happens between two steps, and nothing is given for them: direct calls know
    nothing of it."""
    if call.blocks > 1 or call.norm or call.every_state or reference.CELLS[call.cell].given:
        return False
    reset, zoneout, h_mask = stages
    return reset is None and zoneout is None and h_mask is None


def inputs_of(
    call: Call,
    stages: StageTensors,
    x: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    masks: Tensor | None,
    batch_sizes: Tensor | None,
    weights: Sequence[Tensor],
    packed: Tensor | None = None,
) -> tuple[Any, ...]:
    """In the order of the schemas."""
    cell, *rest = call
    return (cell, x, h0, c0, list(weights), masks, batch_sizes, *stages, *rest, packed)


# A namespace is torch's to give away once. Another copy of this module in the process, as what
# reloads programs makes, works with the operators of the first, which outlives its module here.
operators: Any = torch.ops.fused_rnn
library: torch.library.Library | None = None  # None in another copy
_registered = vars(operators).get("_registered")  # the first copy's schemas and library
if _registered is None:
    library = torch.library.Library("fused_rnn", "DEF")
    for _name, _schema in SCHEMAS.items():
        library.define(_name + _schema, tags=(torch.Tag.pt2_compliant_tag,))
elif _registered[0] != SCHEMAS:
    raise ImportError(
        "fused_rnn: another version of it was imported in this process, and its operators stay: "
        "start a new process"
    )
