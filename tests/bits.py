"""Whether results are the same to the last bit: for changes that should not touch them.

    python tests/bits.py record FILE     # with one checkout on PYTHONPATH
    python tests/bits.py compare FILE    # with another; exits 1 where bits differ

Random configurations of all modules (``problems``): every cell, dtype, layout and option without
random numbers, odd and even sizes, forward and backward.
``record`` adds the digests of this engine and instruction set to FILE, so that one file holds
several (FUSED_RNN_CPU_CAPABILITY, FUSED_RNN_TEST_ENGINE, FUSED_RNN_VARIANT); ``compare`` looks at
those of its own. Digests hold for one compiler: FILE says which.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import os
import random
import sys
from pathlib import Path

import torch
from torch import Tensor

import fused_rnn

# The engine for tests of the checkout that is looked at, which need not be this one.
sys.path.insert(0, str(Path(fused_rnn.__file__).parents[1] / "tests"))
import emulated  # noqa: E402

del sys.path[0]
import problems  # noqa: E402

SEED = 24
# Whose results no random number has a part in: torch's draws may depend on the processor.
EXACT = [o for o in problems.OPTIONS if "dropout" not in o and o != "zoneout"]


def drawn(number: int, small: bool) -> problems.Config:
    """Some are large enough for several threads, tiles and packed weights."""
    rng = random.Random(f"{SEED} {number}")
    large = not small and rng.random() < 0.25
    config = problems.draw(
        rng,
        problems.some_options(rng, 0.1, EXACT),
        sizes=problems.LARGE if large else problems.MIDDLE,
        dtypes=("float32", "float32", "float64", "bfloat16", "float16"),
    )
    return dataclasses.replace(config, dropout=0.0)


def results(config: problems.Config) -> list[Tensor]:
    """Outputs without gradients, outputs with, and all gradients."""
    torch.set_num_threads(config.threads)
    problem = problems.make(config)
    with torch.no_grad():
        found = problems.call(problem)
    return found + [*problems.with_gradients(problem, problems.call(problem)).values()]


def digests(count: int, small: bool) -> dict[str, str]:
    found = {}
    for i in range(count):
        config, digest = drawn(i, small), hashlib.sha256()
        for t in results(config):
            flat = t.detach().contiguous().flatten()
            digest.update(str(tuple(t.shape)).encode() + flat.view(torch.uint8).numpy().tobytes())
        found[f"{i} {config}"] = digest.hexdigest()[:16]
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("record", "compare"))
    parser.add_argument("file", type=Path)
    parser.add_argument("--count", type=int, default=600)
    parser.add_argument("--small", action="store_true", help="no large sizes, for emulations")
    arguments = parser.parse_args()
    if emulated.ENGINE:
        emulated.use()
    facts = fused_rnn.backend_info()
    assert facts["backend"] == "native", facts
    variant = os.environ.get("FUSED_RNN_VARIANT", "")
    name = " ".join(filter(None, (emulated.ENGINE, variant, facts["instructions"] or "")))
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
