"""fused_rnn's layers after ``fused_rnn.freeze(dtype=torch.int8)``."""

from __future__ import annotations

import torch

from .ours_frozen import OursFrozen


class OursInt8(OursFrozen):
    name, title = "ours_int8", "ours, int8"
    devices = ("cpu",)
    packs, rounds_to = torch.int8, "int8"


def peer() -> OursInt8:
    return OursInt8()
