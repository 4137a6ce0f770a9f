"""Whether results are the same to the last bit: for changes that should not touch them.

    python tests/bits.py record FILE     # with one checkout on PYTHONPATH
    python tests/bits.py compare FILE    # with another; exits 1 where bits differ

Random configurations of the modules that torch.nn has too: every cell, dtype, layout, odd and even
sizes, forward and backward. Inputs come from NumPy, whose draws do not depend on the processor.
``record`` adds the digests of this engine and instruction set to FILE, so that one file holds
several (FUSED_RNN_CPU_CAPABILITY, FUSED_RNN_TEST_ENGINE, FUSED_RNN_VARIANT); ``compare`` looks at
those of its own. Digests hold for one compiler: FILE says which.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_sequence

import fused_rnn

SEED = 24
DTYPES = ("float32", "float64", "bfloat16", "float16")


def draw(rng: np.random.Generator, small: bool) -> dict[str, Any]:
    """One configuration. Some are large enough for several threads, tiles and packed weights."""

    def pick(*values: Any) -> Any:
        return values[int(rng.integers(len(values)))]

    large = not small and rng.random() < 0.25
    kind = pick("rnn_tanh", "rnn_relu", "lstm", "lstm", "lstm_proj", "gru", "gru")
    return {
        "kind": kind,
        "dtype": pick(*DTYPES[:1], *DTYPES),
        "single": kind != "lstm_proj" and rng.random() < 0.15,
        "layout": pick("padded", "padded", "batch_first", "packed", "unsorted"),
        "I": pick(1, 3, 8, 65, 100) if not large else pick(64, 193, 256),
        "H": pick(2, 3, 16, 33, 65) if not large else pick(96, 193, 256),
        "B": pick(1, 2, 3, 8, 17) if not large else pick(16, 33, 64),
        "T": pick(1, 2, 5, 13) if not large else pick(5, 20),
        "layers": pick(1, 1, 2),
        "both": pick(False, True),
        "bias": pick(True, True, False),
        "hx": pick(True, False),
        "recompute": rng.random() < 0.1,
    }


def module_of(c: dict[str, Any]) -> torch.nn.Module:
    dtype = getattr(torch, c["dtype"])
    name = {"rnn": "RNN", "lstm": "LSTM", "gru": "GRU"}[c["kind"].partition("_")[0]]
    extra: dict[str, Any] = {}
    if name == "RNN":
        extra["nonlinearity"] = c["kind"].partition("_")[2]
    if c["single"]:
        cls = getattr(fused_rnn, f"{name}Cell")
        return cls(c["I"], c["H"], bias=c["bias"], dtype=dtype, **extra)
    if c["kind"] == "lstm_proj":
        extra["proj_size"] = (c["H"] + 1) // 2
    return getattr(fused_rnn, name)(
        c["I"],
        c["H"],
        num_layers=c["layers"],
        bidirectional=c["both"],
        bias=c["bias"],
        batch_first=c["layout"] == "batch_first",
        dtype=dtype,
        recompute=c["recompute"],
        **extra,
    )


def results(rng: np.random.Generator, c: dict[str, Any]) -> list[Tensor]:
    """Outputs without gradients, outputs with, and all gradients."""
    dtype = getattr(torch, c["dtype"])

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return torch.from_numpy(rng.standard_normal(shape) * scale).to(dtype)

    module = module_of(c)
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(normal(*p.shape, scale=c["H"] ** -0.5))
    width = (c["H"] + 1) // 2 if c["kind"] == "lstm_proj" else c["H"]
    lead = () if c["single"] else (c["layers"] * (1 + c["both"]),)
    x: Any
    if c["single"]:
        x = normal(c["B"], c["I"])
    elif c["layout"] in ("packed", "unsorted"):
        lengths = sorted(rng.integers(1, c["T"] + 1, c["B"]).tolist(), reverse=True)
        if c["layout"] == "unsorted":
            lengths.reverse()
        rows = [normal(n, c["I"]) for n in lengths]
        x = pack_sequence(rows, enforce_sorted=c["layout"] == "packed")
    else:
        lengths = (c["B"], c["T"]) if c["layout"] == "batch_first" else (c["T"], c["B"])
        x = normal(*lengths, c["I"])
    hx: Any = normal(*lead, c["B"], width) if c["hx"] else None
    if hx is not None and c["kind"].startswith("lstm"):
        hx = (hx, normal(*lead, c["B"], c["H"]))
    states = [] if hx is None else list(hx) if isinstance(hx, tuple) else [hx]
    with torch.no_grad():
        found = flatten(module(x, hx))
    rows = x.data if isinstance(x, PackedSequence) else x
    leaves = [t.requires_grad_() for t in (rows, *states)]
    outputs = flatten(module(x, hx))
    torch.autograd.backward(outputs, [normal(*o.shape) for o in outputs])
    found += outputs + [t.grad for t in leaves]
    return found + [p.grad for p in module.parameters()]


def flatten(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, PackedSequence):
        return [value.data]
    return [t for item in value for t in flatten(item)]


def digests(count: int, small: bool) -> dict[str, str]:
    found = {}
    for i in range(count):
        rng = np.random.default_rng((SEED, i))
        config = draw(rng, small)
        digest = hashlib.sha256()
        for t in results(rng, config):
            flat = t.detach().contiguous().flatten()
            digest.update(str(tuple(t.shape)).encode() + flat.view(torch.uint8).numpy().tobytes())
        words = [f"{k}={v}" for k, v in config.items()]
        found[f"{i} {' '.join(words)}"] = digest.hexdigest()[:16]
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("record", "compare"))
    parser.add_argument("file", type=Path)
    parser.add_argument("--count", type=int, default=600)
    parser.add_argument("--small", action="store_true", help="no large sizes, for emulations")
    arguments = parser.parse_args()
    engine = os.environ.get("FUSED_RNN_TEST_ENGINE", "")
    if engine:
        sys.path.insert(0, str(Path(fused_rnn.__file__).parents[1] / "tests"))
        import emulated

        emulated.use()
    facts = fused_rnn.backend_info()
    assert facts["backend"] == "native", facts
    variant = os.environ.get("FUSED_RNN_VARIANT", "")
    name = " ".join(filter(None, (engine, variant, facts["instructions"] or "")))
    torch.set_num_threads(2)
    found = {"compiler": facts["compiler"], "digests": digests(arguments.count, arguments.small)}
    known = json.loads(arguments.file.read_text()) if arguments.file.is_file() else {}
    if arguments.what == "record":
        arguments.file.write_text(json.dumps(known | {name: found}, indent=0) + "\n")
        print(f"{name}: recorded {len(found['digests'])}")
        return 0
    before = known[name]["digests"]
    other = [case for case, digest in found["digests"].items() if before[case] != digest]
    print(*other[:20], sep="\n")
    print(f"{name}: {len(found['digests']) - len(other)} equal, {len(other)} differ")
    return int(bool(other))


if __name__ == "__main__":
    sys.exit(main())
