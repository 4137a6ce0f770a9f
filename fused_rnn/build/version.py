"""Which version this is, and which versions of torch it works with."""

from __future__ import annotations

import re

VERSION = "0.2.0"

# The bindings use this version of torch's stable ABI: one library serves every torch from it on.
TORCH_MIN = (2, 10)


def check_torch_version() -> None:
    """Raise ImportError if the installed torch is older than this package can use."""
    import torch

    found = re.match(r"(\d+)\.(\d+)", torch.__version__)
    if found and (int(found[1]), int(found[2])) < TORCH_MIN:
        wanted = ".".join(map(str, TORCH_MIN))
        raise ImportError(
            f"fused_rnn {VERSION} needs torch >= {wanted}, found {torch.__version__}: "
            f"pip install 'torch>={wanted}'"
        )
