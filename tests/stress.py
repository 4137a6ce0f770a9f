"""Scenes that a card must stand under load, for test_cuda_stress.py. Where there is no card, a
``Rehearsal`` takes its part: the scenes themselves are tried on the CPU, in small sizes.
"""

from __future__ import annotations

import contextlib
import copy
import ctypes
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import pytest
import torch
from cases import LAYERS, OWN_LAYERS, Case
from helpers import (
    assert_all_close,
    assert_no_worse,
    flatten,
    leave_kink,
    leaves,
    map_tensors,
    resident,
    run,
)
from torch import Tensor

from benchmarks.gpu.contender import relative_errors
from benchmarks.gpu.versus import wrong

MIB, GIB = 1 << 20, 1 << 30
POOL = 32  # streams in torch's pool, whence it gives them out in turn


class Card:
    """What the scenes ask of a card."""

    device = "cuda"

    def stream(self) -> Any:
        return torch.cuda.Stream()

    def on(self, stream: Any) -> contextlib.AbstractContextManager[Any]:
        return torch.cuda.stream(stream)

    def wait(self) -> None:
        torch.cuda.synchronize()

    def free(self) -> int:
        """Bytes that nobody has, not even torch's allocator in reserve."""
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info()[0]

    def clear_workspaces(self) -> None:
        """As torch.compile does between its graphs."""
        torch._C._cuda_clearCublasWorkspaces()

    def destroy_a_graph(self) -> None:
        """One of the user's own, with a product in it, whose end frees workspaces of its stream."""
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
        a = torch.ones(64, 64, device=self.device)
        a @ a  # makes the library's handle, which a capture may not
        with torch.cuda.graph(graph, stream=stream):
            a @ a
        graph.replay()
        torch.cuda.synchronize()
        graph.reset()

    @contextlib.contextmanager
    def foreign_stream(self) -> Iterator[Any]:
        """Made and destroyed by somebody else."""
        runtime, handle = torch.cuda.cudart(), ctypes.c_void_p()
        assert int(runtime.cudaStreamCreate(ctypes.addressof(handle))) == 0
        yield torch.cuda.ExternalStream(handle.value)
        torch.cuda.synchronize()
        assert int(runtime.cudaStreamDestroy(handle.value)) == 0


class Rehearsal(Card):
    """The CPU in a card's part: one stream, and memory that is never short."""

    device = "cpu"

    def stream(self) -> Any:
        return None

    def on(self, stream: Any) -> contextlib.AbstractContextManager[Any]:
        return contextlib.nullcontext()

    def wait(self) -> None:
        pass

    def free(self) -> int:
        return 64 * MIB

    def clear_workspaces(self) -> None:
        pass

    destroy_a_graph = clear_workspaces

    @contextlib.contextmanager
    def foreign_stream(self) -> Iterator[Any]:
        yield None


# --- results that must not change ----------------------------------------------------------------


class Layer:
    """A layer and its input; ``right`` is what a training step of it gives alone."""

    def __init__(self, card: Card, case: Case, dtype: torch.dtype) -> None:
        self.module = case.modules(dtype)[1].to(card.device)
        x, hx = map_tensors(case.inputs(dtype), lambda t: t.to(card.device))
        self.x, self.hx = leaves(x), leaves(hx)
        self.sources = [*flatten(self.x), *flatten(self.hx), *self.module.parameters()]
        outputs = flatten(self.module(self.x, self.hx))
        self.cotangents = [torch.randn_like(output) for output in outputs]
        self.right = self.call()
        card.wait()

    def call(self) -> list[Tensor]:
        """Outputs and gradients."""
        outputs = flatten(self.module(self.x, self.hx))
        gradients = torch.autograd.grad(outputs, self.sources, self.cotangents)
        return [*(output.detach() for output in outputs), *gradients]

    def check(self, found: list[Tensor], what: str = "") -> None:
        for a, b in zip(found, self.right, strict=True):
            assert torch.equal(a, b), what

    def replay(self, what: str = "") -> None:
        """As it is, captured, replayed."""
        for _ in range(3):
            self.check(self.call(), what)


def in_threads(works: list[Callable[[], None]]) -> None:
    """Each in a thread of its own, all at once. Raises what one of them raised."""
    begin = threading.Barrier(len(works))

    def work(i: int) -> None:
        begin.wait()
        works[i]()

    with ThreadPoolExecutor(len(works)) as pool:
        list(pool.map(work, range(len(works))))


# --- scenes --------------------------------------------------------------------------------------


def many_streams(
    card: Card, case: Case, dtype: torch.dtype, streams: int, threads: int, calls: int
) -> None:
    """More streams than torch's pool has, so that every one of it is a user's, in some threads.

    What a user's stream does beside a layer must not end up in a graph of ours, nor change it.
    """
    layers = [Layer(card, case, dtype) for _ in range(threads)]
    own = [card.stream() for _ in range(streams)]
    beside = torch.eye(64, device=card.device)
    card.wait()

    def work(i: int) -> None:
        for number in range(calls):
            found = []
            for stream in own[i::threads]:
                with card.on(stream):
                    product = beside @ beside
                    found.append((layers[i].call(), product @ beside))
            card.wait()
            for result, product in found:
                layers[i].check(result, f"thread {i}, call {number}")
                assert torch.equal(product, beside)

    in_threads([lambda i=i: work(i) for i in range(threads)])


def beside_a_hog(card: Card, cases: list[Case], dtype: torch.dtype, calls: int, size: int) -> None:
    """Plans that each take every multiprocessor, at once, while a product takes them all too."""
    layers = [Layer(card, case, dtype) for case in cases]
    a = torch.randn(size, size, device=card.device, dtype=dtype)
    product = torch.empty_like(a)
    streams, hog = [card.stream() for _ in layers], card.stream()
    card.wait()
    found: list[list[list[Tensor]]] = [[] for _ in layers]
    for _ in range(calls):
        with card.on(hog):
            torch.mm(a, a, out=product)
        for layer, stream, results in zip(layers, streams, found, strict=True):
            with card.on(stream):
                results.append(layer.call())
    card.wait()
    for layer, results in zip(layers, found, strict=True):
        for number, result in enumerate(results):
            layer.check(result, f"call {number}")


def blocks(free: int, keep: int, sizes: tuple[int, ...] = (GIB, 32 * MIB, 2 * MIB)) -> list[int]:
    """Sizes that together take all of the free memory but ``keep`` bytes: large ones first."""
    left, found = free - keep, []
    for size in sizes:
        number = max(0, left // size)
        found += [size] * number
        left -= size * number
    return found


def memory_taken_away(
    card: Card, layers: list[Layer], take: Callable[[], None], keep: int = 4 * GIB
) -> None:
    """Graphs are captured; what others may free is freed, and all memory is somebody else's then:
    a replay writes nothing into it and reads nothing of it.
    """
    for layer in layers:
        layer.replay()
    take()
    pattern = 0x7F
    taken = [
        torch.full((size,), pattern, dtype=torch.uint8, device=card.device)
        for size in blocks(card.free(), keep)
    ]
    assert taken
    for layer in layers:
        layer.replay("after memory was taken away")
    card.wait()
    for block in taken:
        assert int(block.amin()) == int(block.amax()) == pattern, (
            "a replay wrote to memory that is not ours"
        )


def many_threads(card: Card, layer: Layer, threads: int, growth: int) -> None:
    """Threads that end leave nothing behind: the last nine tenths of them take less than ``growth``
    bytes, of the card and of the host. Ten live at a time.
    """

    def burst(number: int) -> None:
        for _ in range(number // 10):
            in_threads([layer.replay] * 10)

    burst(threads // 10)
    of_card, of_host = card.free(), resident()
    burst(threads - threads // 10)
    assert of_card - card.free() < growth, "memory of the card"
    assert resident() - of_host < growth, "memory of the host"


def streams_that_end(card: Card, layer: Layer, others: list[Layer], streams: int) -> None:
    """Graphs that were launched on a stream which is gone are dropped without touching it."""
    for _ in range(streams):
        with card.foreign_stream() as stream, card.on(stream):
            layer.replay()
    for other in [*others, layer]:
        other.replay()


def many_keys(layers: list[Layer]) -> None:
    """More different calls than graphs are kept: in turn, so that each is dropped before it comes
    again, then each some times in a row.
    """
    for _ in range(3):
        for layer in layers:
            layer.check(layer.call())
    for layer in layers:
        layer.replay()


# --- errors over many steps ----------------------------------------------------------------------


class Precision(NamedTuple):
    name: str
    dtype: torch.dtype
    tf32: bool = False


PRECISIONS = (
    Precision("bfloat16", torch.bfloat16),
    Precision("float16", torch.float16),
    Precision("tf32", torch.float32, tf32=True),
    Precision("float32", torch.float32),
    Precision("float64", torch.float64),
)


def parity_cases(sizes: tuple[int, ...], steps: int, batch: int) -> list[tuple[Case, Precision]]:
    """Every cell in every precision: those whose kernels keep their weights come first."""
    return [
        (Case(cell, hidden, hidden, batch=batch, time=steps), precision)
        for precision in PRECISIONS
        for hidden in sizes
        for cell in (*LAYERS, *OWN_LAYERS)
    ]


def parity(card: Card, case: Case, precision: Precision, patch: pytest.MonkeyPatch) -> None:
    """Forward and backward against float64, held to what torch.nn is off by in the same precision.

    A cell that torch.nn does not have is held to our own steps, one product each.
    """
    patch.setattr(torch.backends.cudnn.rnn, "fp32_precision", "tf32" if precision.tf32 else "ieee")
    dtype = precision.dtype
    theirs, ours = (module.to(card.device) for module in case.modules(dtype))
    x, hx = map_tensors(case.inputs(dtype), lambda t: t.to(card.device))
    if case.cell == "rnn_relu":
        x, hx = leave_kink((theirs, ours), x, hx)
    found = run(ours, x, hx)
    patch.setenv("FUSED_RNN_VARIANT", "steps")  # for theirs, where it is ours too
    reference = run(theirs, x, hx)
    if dtype == torch.float64:
        return assert_all_close(found, reference)
    wide = map_tensors((x, hx), lambda t: t.double())
    exact = run(copy.deepcopy(theirs).double(), *wide, dtype)
    if not precision.tf32:
        terms = max(4 * case.hidden_size, case.batch * case.time)
        return assert_no_worse(found, reference, exact, terms)
    bad = wrong("tf32", relative_errors(found, exact), relative_errors(reference, exact))
    assert bad is None, bad
