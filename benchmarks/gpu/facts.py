"""``python -m benchmarks.gpu.facts library|device cuda|cpu`` prints JSON, in a process of its own:
neither a build nor the start of CUDA is trusted to come back.
"""

from __future__ import annotations

import json
import platform
import sys
import time
from typing import Any

import torch


def library(device: str) -> dict[str, Any]:
    """Build and load the library of the device. FUSED_RNN_BACKEND=native: raises if it cannot."""
    from fused_rnn import build

    start = time.monotonic()
    backend = build.backend(device)
    facts = {key: value for key, value in build.info().items() if value not in (None, "")}
    return {"backend": backend, "seconds": time.monotonic() - start, "doctor": facts}


def device(device: str) -> dict[str, Any]:
    facts: dict[str, Any] = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "cudnn.allow_tf32": torch.backends.cudnn.allow_tf32,
    }
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        names = [name for name in dir(properties) if not name.startswith("_")]
        facts["properties"] = {name: getattr(properties, name) for name in names}
    return facts


if __name__ == "__main__":
    command = {"library": library, "device": device}[sys.argv[1]]
    print(json.dumps(command(sys.argv[2]), default=str))
