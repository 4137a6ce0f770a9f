"""Modules in several threads, replicas and processes."""

from __future__ import annotations

import copy
import socket
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import pytest
import torch
from cases import CLASSES
from double_modules import double_pair, first, is_cell, value
from helpers import assert_all_close, cpu_engine_only

import fused_rnn

pytestmark = pytest.mark.parity


@cpu_engine_only  # the emulation runs one launch at a time
@pytest.mark.parametrize("name", CLASSES)
def test_threads(name: str) -> None:
    """Several Python threads at once, with and without grad."""
    _, ours = double_pair(name)
    xs = [value(name) for _ in range(4)]
    expected = [first(ours(x)).detach() for x in xs]
    errors: list[BaseException] = []

    def work(i: int) -> None:
        try:
            for step in range(30):
                with torch.set_grad_enabled(step % 2 == 0):
                    output = first(ours(xs[i]))
                assert torch.equal(output.detach(), expected[i])
                if output.requires_grad:
                    torch.autograd.grad(
                        output.sum(), ours.weight_hh if is_cell(name) else ours.weight_hh_l0
                    )
        except BaseException as error:  # noqa: BLE001
            errors.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors


def test_data_parallel_replica() -> None:
    """What nn.DataParallel makes: a shallow copy whose weights are plain tensors."""
    _, ours = double_pair("LSTM")
    replica = ours._replicate_for_data_parallel()
    for name, parameter in ours.named_parameters():
        setattr(replica, name, parameter * 2)
    x = value("LSTM")
    doubled = copy.deepcopy(ours)
    with torch.no_grad():
        for parameter in doubled.parameters():
            parameter.mul_(2)
    before = ours(x)
    assert_all_close(replica(x), doubled(x))
    assert_all_close(ours(x), before, tol=0)


DDP = """
import os, sys, torch, fused_rnn
import torch.distributed as dist
rank = int(sys.argv[1])
os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=sys.argv[2])
torch.set_num_threads(1)
dist.init_process_group("gloo", rank=rank, world_size=2)
torch.manual_seed(0)
module = fused_rnn.LSTM(3, 4, num_layers=2, dtype=torch.float64)
x = torch.randn(5, 4, 3, dtype=torch.float64)
module(x)[0].sum().backward()
whole = [p.grad.clone() / 2 for p in module.parameters()]
module.zero_grad()
parallel = torch.nn.parallel.DistributedDataParallel(module)
for _ in range(2):
    module.zero_grad()
    parallel(x[:, 2 * rank : 2 * rank + 2])[0].sum().backward()
for a, b in zip((p.grad for p in module.parameters()), whole):
    assert (a - b).abs().max() <= 1e-10, (a - b).abs().max()
del parallel
dist.barrier()
dist.destroy_process_group()
"""


@cpu_engine_only  # the processes load the package's own library
def test_distributed_data_parallel() -> None:
    """Two processes, each with half the batch, average to the gradients of the whole."""
    if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
        pytest.skip("no gloo")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    root = str(Path(fused_rnn.__file__).parents[1])
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(DDP), str(rank), port],
            cwd=root,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    for worker in workers:
        output, _ = worker.communicate(timeout=120)
        assert worker.returncode == 0, output
