"""The host's side of the CUDA engine without a card: graphs, streams, what threads own, failures.

It runs on a fake of CUDA's runtime and of cuBLAS (tests/cpp/fake_runtime.h), which takes streams
and events by their word, counts what lives, and fails when it is told to. The whole engine runs on
it in test_cuda_failures.py.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from bound import bound, needs_compiler

pytestmark = [
    pytest.mark.compiling,
    needs_compiler,
]

DEVICES = itertools.count()  # of which each test takes new ones: what is known of one stays


@pytest.fixture(scope="module")
def module() -> Any:
    engine = [f"csrc/cuda/{name}.cpp" for name in ("context", "cublas", "graph")]
    return bound("tests/cpp/bind_cuda_host.cpp", *engine, "tests/cpp/fake_runtime.cpp")


@pytest.fixture
def host(module: Any) -> Iterator[Any]:
    module.clear()
    yield module
    module.fail_at(0)
    module.wait()
    assert not module.faults()
    module.clear()


def living(host: Any) -> dict[str, int]:
    return {kind: n for kind, n in host.live().items() if n}


class Cached:
    """Work under a key in a cache of graphs; ``made``: the streams that it was asked to run in."""

    def __init__(self, host: Any) -> None:
        self.host, self.cache = host, host.GraphCache()
        self.stream, self.capture = host.own_stream(), host.new_stream()
        self.made: list[int] = []

    def run(self, key: str, nodes: int = 2) -> None:
        def work(stream: int) -> None:
            self.made.append(stream)
            self.host.note(stream, key, nodes)

        self.cache.run(key, self.stream, self.capture, work)

    def done(self) -> list[str]:
        """What was done since the last time."""
        before = len(self.host.ran())
        self.host.wait()
        return self.host.ran()[before:]


@pytest.fixture
def cached(host: Any) -> Iterator[Cached]:
    cached = Cached(host)
    yield cached
    host.wait()
    cached.cache = None
    host.free_stream(cached.capture)
    assert host.live()["graph"] == host.live()["drawing"] == 0


def test_second_time_is_captured(host: Any, cached: Cached) -> None:
    for _ in range(4):
        cached.run("a")
        assert cached.done() == ["a", "a"]
    assert cached.made == [cached.stream, cached.capture]
    assert host.live()["graph"] == cached.cache.graphs == 1 and host.live()["drawing"] == 0


def test_what_never_comes_again(host: Any, cached: Cached) -> None:
    """Batches of random lengths, whose keys are long, leave graphs alone and take no memory."""
    for _ in range(2):
        cached.run("a")
    size = cached.cache.bytes
    for i in range(1000):
        cached.run(f"{i:>32768}", nodes=1)
    assert (cached.cache.graphs, cached.cache.bytes) == (1, size)
    made = len(cached.made)
    cached.run("a")
    assert len(cached.made) == made


def test_count_is_bounded(host: Any, cached: Cached) -> None:
    """The least recently used goes, even while it may still run."""
    most = host.GraphCache.most_graphs
    for i in range(most + 1):
        for _ in range(2):
            cached.run(str(i))
        cached.run("0")
        assert cached.cache.graphs == host.live()["graph"] <= most
    made = len(cached.made)
    cached.run("0"), cached.run(str(most))
    assert len(cached.made) == made
    cached.run("1")
    assert len(cached.made) > made
    assert cached.done().count("1") == 6


def test_bytes_are_bounded(host: Any, cached: Cached) -> None:
    most = host.GraphCache.most_bytes // host.GraphCache.node_bytes
    for key in "abcde":
        for _ in range(2):
            cached.run(key, most // 4)
        assert cached.cache.bytes <= host.GraphCache.most_bytes
    assert host.live()["graph"] == 3
    for _ in range(3):  # more than all that is allowed: launched as it is
        cached.run("large", most + 1)
    assert cached.made.count(cached.stream) == 5 + 3
    assert cached.done().count("large") == 3 * (most + 1)


def test_part_of_the_callers_capture(host: Any, cached: Cached) -> None:
    cached.run("a"), cached.run("a")
    assert host.capture(cached.stream, lambda: cached.run("a")) == 2
    assert cached.made == [cached.stream, cached.capture, cached.stream]


def test_graph_fails_at_every_call(host: Any, cached: Cached) -> None:
    """Whatever of a graph cannot be, the work is done, once, and nothing is left behind."""
    for i in itertools.count(1):
        key = f"key {i}"
        cached.run(key)
        cached.done()
        before = host.calls()
        host.fail_at(i)
        try:
            cached.run(key)
        except RuntimeError as error:
            # Launching fails, or asking whether the caller captures: there is no other way.
            assert "as it was told to fail" in str(error)
            assert host.log()[-1] == "IsCapturing"
        else:
            assert cached.done() == [key, key], host.log()[before - host.calls() :]
        failed = host.calls() - before >= i
        host.fail_at(0)
        assert host.live()["drawing"] == 0
        for _ in range(2):
            cached.run(key)
            assert cached.done() == [key, key]
        if not failed:
            break
    assert i > 6


def test_work_that_fails_is_not_captured(host: Any, cached: Cached) -> None:
    def work(stream: int) -> None:
        raise ValueError("no")

    for _ in range(3):
        with pytest.raises(ValueError, match="no"):
            cached.cache.run("bad", cached.stream, cached.capture, work)
    cached.run("a"), cached.run("a")  # the stream captures no more
    assert cached.done() == ["a"] * 4
    assert host.live()["graph"] == 1


def test_capture_that_cannot_begin(host: Any, cached: Cached) -> None:
    def inside() -> None:  # of another capture in the same stream
        cached.run("a"), cached.run("a"), cached.run("a")

    host.capture(cached.capture, inside)
    assert cached.done() == ["a"] * 6
    assert cached.made == [cached.stream] * 3


# ---- what threads own ----


def in_thread(work: Callable[[], None]) -> None:
    errors = []

    def run() -> None:
        try:
            work()
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    if errors:
        raise errors[0]


def test_threads_that_end_leave_what_they_had_to_others(host: Any) -> None:
    device = next(DEVICES)
    seen, made = set(), []

    def work(call: Any) -> None:
        seen.add(call.context)
        host.note(call.stream(1), "side")
        call.run("key", lambda stream: (made.append(stream), host.note(stream, "work")))

    before = living(host)
    for _ in range(500):
        in_thread(lambda: host.call(device, True, work))
    # Python takes a thread for ended a little before it has.
    assert len(seen) < 10
    left = living(host)
    assert left["graph"] <= len(seen) and "drawing" not in left
    for kind, each in {"stream": 2, "event": 1, "blas": 1}.items():
        assert left[kind] - before.get(kind, 0) == each * len(seen)
    # Streams are part of a real key; here the key says that they do not matter.
    assert len(made) <= 2 * len(seen) and host.ran().count("work") == 500


def test_threads_at_once_share_nothing(host: Any) -> None:
    device, found = next(DEVICES), []
    meet = threading.Barrier(3)

    def work(call: Any) -> None:
        found.append((call.context, call.stream(0), call.stream(1), *call.queue(0)[1:2]))

    def thread() -> None:
        host.call(device, True, work)
        meet.wait()  # all have a context at this time

    threads = [threading.Thread(target=thread) for _ in range(3)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert all(len(set(column)) == 3 for column in list(zip(*found, strict=True))[:3])


def test_devices_share_nothing(host: Any) -> None:
    calls = [next(DEVICES), next(DEVICES)]
    keys = []
    for device in calls * 3:
        host.call(
            device,
            False,
            lambda call: call.run("key", lambda s: (keys.append(call.device), host.note(s, "w"))),
        )
    assert len(keys) == 4 and len(set(keys)) == 2


def test_context_fails_at_every_call(host: Any) -> None:
    """A call that gets only part of what it needs keeps none of it."""
    for i in itertools.count(1):
        device, before = next(DEVICES), living(host)
        host.fail_at(i)
        calls = host.calls()
        try:
            host.call(device, False, lambda call: None)
            break
        except RuntimeError as error:
            assert "as it was told to fail" in str(error)
        left = living(host)
        left["word"] = left.get("word", 0) - (host.calls() - calls > 2)  # a device keeps its own
        assert {kind: n for kind, n in left.items() if n} == before
        host.call(device, False, lambda call: None)
    assert i > 6


# ---- two streams ----


def test_second_stream_runs_between(host: Any) -> None:
    device = next(DEVICES)

    def work(call: Any) -> None:
        host.note(call.stream(1), "side")
        host.note(call.stream(0), "beside")

    for _ in range(50):
        host.note(host.own_stream(), "before")
        host.call(device, True, work)
        host.note(host.own_stream(), "after")
        host.wait()
        first, *both, last = host.ran()[-4:]
        assert (first, sorted(both), last) == ("before", ["beside", "side"], "after")


@pytest.mark.parametrize("also", [0, 1, 2], ids=["joins", "cannot record", "cannot wait"])
def test_exception_after_the_fork(host: Any, also: int) -> None:
    """The second stream is waited for before the caller's memory goes to others."""
    device = next(DEVICES)

    def work(call: Any) -> None:
        host.note(call.stream(1), "side")
        host.fail_at(also)
        raise ValueError("in the middle")

    for _ in range(3):
        count = host.ran().count("side")
        with pytest.raises(ValueError, match="in the middle"):
            host.call(device, True, work)
        assert host.ran().count("side") == count + 1 and not host.faults()
        host.call(device, True, lambda call: None)


# ---- products ----


def test_products_have_memory_of_their_own(host: Any) -> None:
    def work(call: Any) -> None:
        (first, at, size), (second, next_at, _) = call.queue(0), call.queue(1)
        assert (first, second) == (call.stream(0), call.stream(1))
        assert size > 0 and at + size <= next_at and next_at + size <= call.workspace
        call.multiply(0), call.multiply(1), call.multiply(0)

    host.call(next(DEVICES), True, work)
    assert host.ran() == ["product"] * 3  # without its workspace each would be a fault
    log = [name for name in host.log() if name in ("SetStream", "SetWorkspace", "Multiply")]
    assert log == ["SetStream", "SetWorkspace", "Multiply"] * 3


# ---- blocks that wait for each other ----


def test_room_is_asked_for_once(host: Any) -> None:
    def work(call: Any) -> None:
        for _ in range(3):
            assert call.blocks_at_once(1, 0, 1) == 132
            assert call.blocks_at_once(1, 1024, 1) == 132
            assert call.blocks_at_once(1, 1024, 8) == 128  # whole clusters
        call.refuse(2)
        assert call.blocks_at_once(2, 0, 1) == 0

    host.call(next(DEVICES), False, work)
    assert host.log().count("BlocksAtOnce") == 3


def test_room_of_a_stream(host: Any) -> None:
    """A stream that may use part of the card only, as those of green contexts."""
    device = next(DEVICES)

    def work(call: Any) -> None:
        found.append((call.multiprocessors, call.blocks_at_once(1, 0, 1)))

    found: list[tuple[int, int]] = []
    host.call(device, False, work)
    host.limit(20)
    host.call(device, False, work)
    assert found == [(132, 132), (20, 20)]


def test_kernel_that_gave_up(host: Any) -> None:
    """One error says so, in the next call; from then on no kernel waits."""
    device, found = next(DEVICES), []

    def work(call: Any) -> None:
        found.append(call.together)

    host.call(device, False, work)
    host.alarm()
    with pytest.raises(RuntimeError, match="gave up waiting .* FUSED_RNN_VARIANT=graph"):
        host.call(device, False, work)
    host.call(device, False, work)
    assert found == [True, False]
