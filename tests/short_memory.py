"""Calls of which each allocation fails in turn: a program that test_memory.py runs.

It preloads tests/cpp/short_memory.cpp, and prints what is wrong; nothing if all is well.
"""

from __future__ import annotations

import ctypes
import gc
import os
import re
import subprocess
import sys
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from bound import library
from helpers import flatten
from torch import Tensor
from torch.nn.utils.rnn import pack_sequence

MESSAGE = re.compile(r"RuntimeError: can't allocate memory: you tried to allocate \d+ bytes$")
# Of torch's headers, compiled into the library: the handles of tensors that they were about to take
# over are lost.
FEW_BYTES = "RuntimeError: can't allocate memory: not even a few bytes"


class Call(NamedTuple):
    name: str
    kwargs: dict[str, Any]
    shape: tuple[int, int, int]  # steps, batch, units
    dtype: torch.dtype
    packed: bool = False


SMALL, LARGE = (3, 2, 5), (40, 80, 96)  # of a large one results are blocks of the pool
CALLS = [
    Call("GRUCell", {}, SMALL, torch.float32),
    Call("LSTMCell", {}, SMALL, torch.bfloat16),
    Call("RNN", {"num_layers": 3, "dropout": 0.5}, SMALL, torch.float32),
    Call("LSTM", {"proj_size": 2, "bidirectional": True}, SMALL, torch.bfloat16, packed=True),
    Call("GRU", {"num_layers": 2}, SMALL, torch.float64, packed=True),
    Call("LSTM", {"num_layers": 2, "batch_first": True}, LARGE, torch.float32),
    Call("GRU", {"recompute": True, "num_layers": 2}, LARGE, torch.bfloat16),
    Call("RNN", {"bidirectional": True}, LARGE, torch.float32, packed=True),
]


def problem(call: Call) -> tuple[torch.nn.Module, Any]:
    import fused_rnn

    time, batch, hidden = call.shape
    module = getattr(fused_rnn, call.name)(4, hidden, dtype=call.dtype, **call.kwargs)
    x = torch.randn(time, batch, 4, dtype=call.dtype)
    if call.packed:
        return module, pack_sequence([x[: time - i % 2, i] for i in range(batch)], False)
    return module, x[0] if call.name.endswith("Cell") else x


def run(module: torch.nn.Module, x: Any, train: bool) -> list[Tensor]:
    """Outputs, and with ``train`` gradients."""
    torch.manual_seed(0)
    with torch.set_grad_enabled(train):
        outputs = flatten(module(x))
        if not train:
            return outputs
        parameters = list(module.parameters())
        ones = [torch.ones_like(t) for t in outputs]
        gradients = torch.autograd.grad(outputs, parameters, ones)
        return [*(t.detach() for t in outputs), *gradients]


def empty_pool() -> None:
    """By a call that wants more than any machine has."""
    import fused_rnn

    with torch.no_grad():
        try:
            fused_rnn.RNN(1, 64)(torch.zeros(1, 1, 1).expand(1 << 45, 1, 1))
        except RuntimeError as error:
            assert MESSAGE.match(f"RuntimeError: {error}"), error
        else:
            raise AssertionError("no error")


def check(call: Call, train: bool, direct: bool, library: ctypes.CDLL) -> list[str]:
    """What is wrong."""
    from fused_rnn import ops

    module, x = problem(call)
    expected = run(module, x, train)
    gc.collect()
    gc.freeze()  # what there is already need not be looked at again
    ops.direct.functions = ops.direct.functions if direct else False
    faults: list[str] = []

    def attempt(first: int, one: bool) -> tuple[bool, str | None]:
        """A call of which allocations fail from ``first`` on, or that one: whether any did, and
        with which error."""
        library.short_memory_fail(first, one)
        found, error = None, None
        try:
            found = run(module, x, train)
        except (RuntimeError, MemoryError) as raised:
            error = f"{type(raised).__name__}: {raised}"
        failed = library.short_memory_asked() > first
        library.short_memory_fail(-1, False)
        if failed and error is None and not one:
            faults.append("no error")
        if error is not None and error != FEW_BYTES and not MESSAGE.match(error):
            faults.append(error)
        for result in (found, run(module, x, train)):
            if result and not all(map(torch.equal, result, expected)):
                faults.append("another result")
        return failed, error

    def alive() -> int:
        """Of allocations, once the pool has given back what it keeps."""
        gc.collect()
        empty_pool()
        return library.short_memory_alive()

    before = alive()
    for one in (False, True):
        first = 0
        while True:
            count = len(faults)
            more, error = attempt(first, one)
            if (now := alive()) != before:
                if error != FEW_BYTES:
                    faults.append(f"{now - before} allocations more than before")
                before = now
            where = f"{call} train={train} direct={direct}, allocation {first} one={one}"
            faults[count:] = [f"{where}: {fault}" for fault in faults[count:]]
            first += 1
            if not more:
                break
    return faults


def main() -> None:
    import fused_rnn
    from fused_rnn import build, ops

    torch.set_num_threads(2)
    fused_rnn.GRUCell(1, 1)(torch.zeros(1, 1))
    library = ctypes.CDLL(None)
    for name in ("asked", "alive"):
        getattr(library, f"short_memory_{name}").restype = ctypes.c_long
    library.short_memory_fail.argtypes = (ctypes.c_long, ctypes.c_bool)
    library.short_memory_watch.restype = ctypes.c_bool
    path = str(build.library("cpu")._name)
    assert library.short_memory_watch(path.encode())
    calls = ops.direct.functions
    for call in [CALLS[int(i)] for i in sys.argv[1:]] or CALLS:
        for train in (False, True):
            for direct in (True, False):
                ops.direct.functions = calls
                for fault in check(call, train, direct, library):
                    print(fault, flush=True)


def walked(cases: Iterable[int] = ()) -> subprocess.CompletedProcess[str]:
    """This program's run on the cases of these numbers; on all if there are none."""
    preload = library("tests/cpp/short_memory.cpp", link_flags=["-ldl"])
    return subprocess.run(
        [sys.executable, __file__, *map(str, cases)],
        env={**os.environ, "LD_PRELOAD": str(preload)},
        capture_output=True,
        text=True,
    )


if __name__ == "__main__":
    main()
