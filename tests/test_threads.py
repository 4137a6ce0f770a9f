"""Teams of threads in all circumstances: the results are those of one thread, to the last bit.

Elsewhere: 1, 2, 3 threads by all engine stages (test_ops.py, test_tiles.py), limits of OpenMP
(test_ops.py), races (`make sanitize`), and what it costs (the suite `crowded` of benchmarks/).
"""

from __future__ import annotations

import contextlib
import ctypes
import multiprocessing
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import emulated
import pytest
import torch
from cases import LAYER_CLASSES
from helpers import native, run
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

import fused_rnn
from fused_rnn import build

pytestmark = [
    pytest.mark.engine,
    pytest.mark.skipif(not native(), reason="about the native kernels"),
    pytest.mark.skipif(emulated.WANTED, reason="about the CPU's engine"),
]

# Of vectors, of tiles where there are some, and with barriers of the projection.
KINDS: dict[str, tuple[str, tuple[int, int, int], dict[str, Any]]] = {
    "rnn": ("RNN", (30, 7, 300), {"bidirectional": True}),
    "gru": ("GRU", (20, 33, 130), {}),
    "lstm": ("LSTM", (20, 5, 260), {"num_layers": 2}),
    "lstm_proj": ("LSTM", (10, 40, 140), {"proj_size": 70}),
}


def make(kind: str) -> tuple[nn.Module, Tensor]:
    name, (time, batch, hidden), kwargs = KINDS[kind]
    return getattr(fused_rnn, name)(33, hidden, **kwargs), torch.randn(time, batch, 33)


@contextlib.contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def alone(module: nn.Module, x: Tensor) -> dict[str, Tensor]:
    with threads(1):
        return run(module, x)


def assert_same(found: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    assert found.keys() == want.keys()
    for name, tensor in want.items():
        assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize("count", [4, 8])
@pytest.mark.parametrize("kind", KINDS)
def test_more_threads_than_cores(kind: str, count: int) -> None:
    module, x = make(kind)
    want = alone(module, x)
    with threads(count):
        assert_same(run(module, x), want)


@pytest.mark.parametrize("name", LAYER_CLASSES)
def test_any_number_of_rows(name: str) -> None:
    """Columns are cut by the number of threads, and rows by the width of a tile of columns."""
    module = getattr(fused_rnn, name)(50, 168)
    for batch in range(1, 14):
        x = torch.randn(200 // batch + 1, batch, 50)
        want = alone(module, x)
        with threads(3):
            assert_same(run(module, x), want)


def test_busy_neighbours() -> None:
    """Other processes take the cores at any point of a step."""
    module, x = make("gru")
    want = alone(module, x)
    spin = [sys.executable, "-c", "while True: pass"]
    neighbours = [subprocess.Popen(spin) for _ in range(2)]
    try:
        for count in (2, 4):
            with threads(count):
                assert_same(run(module, x), want)
    finally:
        for neighbour in neighbours:
            neighbour.kill()
            neighbour.wait()


@pytest.mark.parametrize("kind", KINDS)
def test_another_number_in_the_backward(kind: str) -> None:
    """What the forward leaves to the backward is laid out the same for any number."""
    module, x = make(kind)
    want = alone(module, x)
    for forward, backward in ((1, 3), (3, 1), (2, 8)):
        with threads(forward):
            module.zero_grad()
            leaf = x.clone().requires_grad_()
            y = module(leaf)[0]
        with threads(backward):
            y.square().sum().backward()
        found = {"x": leaf.grad} | {n: p.grad for n, p in module.named_parameters()}
        if forward == 1:
            first = found
        assert_same(found, first)
    assert torch.equal(y.detach(), want["output 0"])


def test_teams_of_several_python_threads() -> None:
    """Each has a team of its own: 4 x 3 threads at once."""
    work = [make(kind) for kind in KINDS]
    wants = [alone(*each) for each in work]
    errors: list[BaseException] = []

    def repeat(i: int) -> None:
        torch.set_num_threads(3)  # OpenMP keeps this for each thread
        try:
            for _ in range(3):
                assert_same(run(*work[i]), wants[i])
        except BaseException as error:  # noqa: BLE001
            errors.append(error)

    with threads(3):
        teams = [threading.Thread(target=repeat, args=(i,)) for i in range(len(work))]
        for team in teams:
            team.start()
        for team in teams:
            team.join()
    assert not errors, errors


def test_inside_a_parallel_region(tmp_path: Path) -> None:
    """Where somebody else's OpenMP threads call, each call is done by its thread alone."""
    source = tmp_path / "region.c"
    source.write_text(
        "#include <omp.h>\n"
        "void region(int n, void (*body)(int)) {\n"
        "#pragma omp parallel num_threads(n)\n"
        "  body(omp_get_thread_num());\n"
        "}\n"
    )
    library = source.with_suffix(".so")
    compiler = build.find_compiler().command
    command = [*compiler, "-x", "c", "-fopenmp", "-fPIC", "-shared", str(source), "-o", library]
    subprocess.run(command, check=True)
    module, x = make("gru")
    want = module(x)[0].detach()
    found: dict[int, Tensor] = {}

    @ctypes.CFUNCTYPE(None, ctypes.c_int)
    def body(number: int) -> None:
        with torch.no_grad():
            found[number] = module(x)[0]

    with threads(2):
        ctypes.CDLL(str(library)).region(3, body)
    assert sorted(found) == [0, 1, 2]
    assert all(torch.equal(y, want) for y in found.values())


class Outputs(Dataset[Tensor]):
    """A layer that runs in the workers of a DataLoader."""

    def __init__(self, module: nn.Module, x: Tensor) -> None:
        self.module, self.x = module, x

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> Tensor:
        with torch.no_grad():
            y: Tensor = self.module(self.x + index)[0]
        return y


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_workers_of_a_data_loader(method: str) -> None:
    """Forked after the parent's teams have run, or started afresh."""
    module, x = make("gru")
    dataset = Outputs(module, x)
    want = [dataset[i] for i in range(len(dataset))]  # with the parent's team
    run(module, x)
    loader = DataLoader(
        dataset, batch_size=None, num_workers=2, multiprocessing_context=method, timeout=120
    )
    assert all(torch.equal(a, b) for a, b in zip(loader, want, strict=True))


def train_in_child(queue: Any, module: nn.Module, x: Tensor) -> None:
    torch.set_num_threads(1)
    found = run(module, x)
    queue.put({name: tensor.numpy() for name, tensor in found.items()})


def test_training_in_a_forked_child() -> None:
    """One thread, as OpenMP's teams do not survive a fork (torch.nn's hang there, too)."""
    module, x = make("lstm")
    want = run(module, x)
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=train_in_child, args=(queue, module, x))
    child.start()
    found = {name: torch.from_numpy(array) for name, array in queue.get(timeout=60).items()}
    child.join()
    assert_same(found, want)


def test_threads_that_end() -> None:
    """Calls from short-lived threads, whose teams end with them."""
    module, x = make("rnn")
    want = module(x)[0].detach()
    found: list[Tensor] = []
    for _ in range(10):
        thread = threading.Thread(target=lambda: found.append(module(x)[0].detach()))
        thread.start()
        thread.join()
    assert len(found) == 10 and all(torch.equal(y, want) for y in found)
