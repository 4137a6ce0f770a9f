"""The whole CUDA engine, emulated, on a runtime that fails: FUSED_RNN_TEST_ENGINE=emulated.

After a failure at any call nothing is left behind, nothing was freed that was still in use (a fault
to the fake, see tests/cpp/fake_runtime.h), and the next call is right.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import emulated
import pytest
import torch
from helpers import flatten, run
from torch import Tensor

import fused_rnn
from fused_rnn import build

pytestmark = [
    pytest.mark.parity,
    pytest.mark.skipif(not emulated.WANTED, reason="about the CUDA engine, emulated"),
]

KINDS = ("word", "stream", "event", "blas", "drawing")
# A variant, and a size for which it is possible.
VARIANTS = {"steps": 7, "graph": 7, "resident": 48, "cluster": 48, "local": 24}


@pytest.fixture
def fake() -> Iterator[ctypes.CDLL]:
    library = build.library("cpu")
    yield library
    library.frnn_fake_fail_at(0)
    library.frnn_fake_blocks(-1, -1)
    library.frnn_fake_clusters(16, 16)
    assert library.frnn_fake_faults() == 0


def living(fake: ctypes.CDLL) -> list[int]:
    return [fake.frnn_fake_live(kind.encode()) for kind in KINDS]


def count(fake: ctypes.CDLL, name: str) -> int:
    return fake.frnn_fake_count(name.encode())


def layer(variant: str, monkeypatch: pytest.MonkeyPatch) -> tuple[fused_rnn.LSTM, Tensor]:
    monkeypatch.setenv("FUSED_RNN_VARIANT", variant)
    dtype = torch.float64 if VARIANTS[variant] == 7 else torch.bfloat16
    module = fused_rnn.LSTM(5, VARIANTS[variant], bidirectional=True, dtype=dtype)
    return module, torch.randn(4, 3, 5, dtype=dtype)


def results(module: fused_rnn.LSTM, x: Tensor) -> list[Tensor]:
    """Of a training step, and of three inferences, which come to lie in the same memory."""
    found = list(run(module, x).values())
    with torch.no_grad():
        for _ in range(3):
            y, (h, c) = module(x)
            found += [y.clone(), h.clone(), c.clone()]
            del y, h, c
    return found


def equal(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(map(torch.equal, a, b)) and len(a) == len(b)


@pytest.mark.drawn(2)
@pytest.mark.parametrize("variant", VARIANTS)
def test_failure_at_every_call(
    variant: str, fake: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, x = layer(variant, monkeypatch)
    expected = results(module, x)
    before = living(fake)
    failed, n, start = 0, 0, fake.frnn_fake_calls()
    assert equal(results(module, x), expected)
    calls = fake.frnn_fake_calls() - start
    while n <= calls:
        n += 1
        fake.frnn_fake_fail_at(n)
        try:
            assert equal(results(module, x), expected), n
        except RuntimeError as error:
            assert "as it was told to fail" in str(error)
            failed += 1
        fake.frnn_fake_fail_at(0)
        assert equal(results(module, x), expected), n
        assert living(fake) == before, n
        assert fake.frnn_fake_faults() == 0, n
    assert failed > calls // 4


def test_graphs_are_replayed(fake: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also of ragged batches; by their streams both directions run in any order."""
    module, x = layer("graph", monkeypatch)
    packed = torch.nn.utils.rnn.pack_padded_sequence(x, [4, 2, 1])
    with torch.no_grad():
        for inputs in (x, packed):
            expected = flatten(module(inputs))
            wanted = count(fake, "Launch") + 3
            for _ in range(5000):  # until they lie in the same memory often enough
                assert equal(flatten(module(inputs)), expected)
                if count(fake, "Launch") >= wanted:
                    break
            assert count(fake, "Launch") >= wanted


@pytest.mark.parametrize("variant", ["resident", "cluster"])
def test_no_room(variant: str, fake: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the card says that blocks do not fit, and where it finds out when they are launched, a
    graph does the work. So it does where the card refuses clusters of that size, or has none."""
    module, x = layer(variant, monkeypatch)
    monkeypatch.setenv("FUSED_RNN_VARIANT", "graph")
    expected = results(module, x)
    monkeypatch.setenv("FUSED_RNN_VARIANT", variant)
    # A number that no other test has: what is known of a card stays.
    for multiprocessors, told, room in ((131, 0, 132), (130, 132, 0)):
        monkeypatch.setenv("FUSED_RNN_EMULATE_MULTIPROCESSORS", str(multiprocessors))
        fake.frnn_fake_blocks(told, room)
        for _ in range(2):
            assert equal(results(module, x), expected)
            asked = count(fake, "BlocksAtOnce")
        assert equal(results(module, x), expected)
        assert count(fake, "BlocksAtOnce") == asked


def test_one_step_is_one_launch(fake: ctypes.CDLL) -> None:
    module = fused_rnn.LSTM(5, 7, bidirectional=True, dtype=torch.float64)
    with torch.no_grad():
        before = [count(fake, name) for name in ("Start", "Multiply", "Launch")]
        module(torch.randn(1, 3, 5, dtype=torch.float64))
    after = [count(fake, name) for name in ("Start", "Multiply", "Launch")]
    assert [b - a for a, b in zip(before, after, strict=True)] == [1, 0, 0]


def test_resident_in_place_of_a_cluster(fake: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the card refuses as a cluster may well be there as blocks that poll."""
    module = fused_rnn.LSTM(5, 144, dtype=torch.bfloat16)  # too large for a local kernel
    x = torch.randn(9, 3, 5, dtype=torch.bfloat16)
    for multiprocessors, told, taken, wanted in (
        (129, 8, 8, "clusters"),
        (128, 1, 8, "together"),
        (127, 8, 2, "together"),
    ):
        monkeypatch.setenv("FUSED_RNN_EMULATE_MULTIPROCESSORS", str(multiprocessors))
        fake.frnn_fake_clusters(told, taken)
        kinds = ("clusters", "together")
        before = {kind: count(fake, kind) for kind in kinds}
        run(module, x)
        launches = {kind: count(fake, kind) - before[kind] for kind in kinds}
        assert launches == {kind: 2 * (kind == wanted) for kind in kinds}, (told, taken)


def test_kernel_that_gave_up() -> None:
    """In a process of its own, whose card never again has kernels that wait."""
    script = """
import torch, fused_rnn, emulated
from fused_rnn import build
emulated.use()
module = fused_rnn.LSTM(5, 48, dtype=torch.bfloat16)
x = torch.randn(9, 3, 5, dtype=torch.bfloat16)
with torch.no_grad():
    expected = module(x)[0]
    build.library("cpu").frnn_fake_alarm()
    try:
        module(x)
    except RuntimeError as error:
        assert "gave up waiting" in str(error) and "FUSED_RNN_VARIANT=graph" in str(error), error
    else:
        raise AssertionError("no error")
    torch.testing.assert_close(module(x)[0], expected)
"""
    folders = [str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(folders)}
    done = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
