"""The native operators by themselves.

Schema, fake, autograd and tracing (opcheck), agreement with the float64 reference for every engine
stage, derivatives of second order, the instruction sets, and refusal of bad arguments.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import forked
import pytest
import torch
from cases import KERNELS, Case, random_case
from helpers import assert_library_agrees, cpu_engine_only, leaves, operate
from torch import Tensor

import fused_rnn
from fused_rnn import build, ops, reference

NATIVE = build.backend() == "native"
BROKEN = not NATIVE and "do not compile" in fused_rnn.backend_info()["reason"]
pytestmark = [
    pytest.mark.parity,
    pytest.mark.skipif(not NATIVE and not BROKEN, reason="tests of the native library"),
]


@pytest.fixture(autouse=True)
def compiled() -> None:
    """Kernels that do not compile are no reason to skip."""
    assert not BROKEN, fused_rnn.backend_info()["reason"]


def check(case: Case, threads: int) -> None:
    """float64: one rounding for every term of the longest sum. Others: at most twice the error of
    the plain reference in that dtype, plus a floor of a few roundings of the largest entry."""
    arguments = case.arguments()
    exact = operate(reference.recurrent, case, arguments, torch.float64)
    plain = operate(reference.recurrent, case, arguments, case.dtype)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        ours = operate(ops.recurrent, case, arguments, case.dtype)
    finally:
        torch.set_num_threads(before)
    eps = torch.finfo(case.dtype).eps
    # Of the longest sum, each of unit scale.
    terms = case.time * case.batch + case.input_size + case.hidden_size
    for name, want in exact.items():
        if not want.numel():
            continue
        scale = want.abs().max().item()
        error = (ours[name].double() - want).abs().max().item()
        theirs = (plain[name].double() - want).abs().max().item()
        if case.dtype == torch.float64:
            limit = terms * eps * max(scale, 1.0)
        else:
            # 16-bit types round h once per step, which the reference (float32 inside) does not. And
            # where terms cancel, a sum is rounded by the size of the terms, not of the result: over
            # draws, one number of 100 terms is off by 11 eps (the reference: 9), and half of that
            # by luck. Among a few numbers none may be where the reference is as unlucky.
            roundings = 16 if case.dtype == torch.float32 else 4 * (case.time + 2)
            cancelled = (5 if want.numel() < 16 else 2) * terms**0.5
            limit = 2 * theirs + eps * max(roundings * scale, cancelled)
        assert error <= limit, f"{name}: error {error:.2e}, limit {limit:.2e}, scale {scale:.2e}"


CELLS = ["lstm", "gru", *KERNELS]  # the usual ones twice


@pytest.mark.parametrize("index, cell", [(i, CELLS[i % len(CELLS)]) for i in range(63)])
def test_agrees_with_float64(index: int, cell: str, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed + index)
    torch.manual_seed(seed + index)
    case = random_case(generator, cell)
    print(case)
    check(case, threads=1 + index % 3)


@pytest.mark.slow
@pytest.mark.parametrize("index", range(1500))
def test_agrees_with_float64_at_length(index: int, seed: int) -> None:
    test_agrees_with_float64(1000 + index, seed)


CAPABILITIES = build.levels()


# Which code a process takes is chosen when it loads the library: once in each.
CHOICES = """
import ctypes, os, sys
from fused_rnn import build
for capability in sys.argv[1:]:
    if not os.fork():
        os.environ["FUSED_RNN_CPU_CAPABILITY"] = capability
        library = build.library()
        library.frnn_cpu_capability.restype = ctypes.c_char_p
        os.write(1, library.frnn_cpu_capability() + b"\\n")
        os._exit(0)
    assert os.wait()[1] == 0, capability
"""


@cpu_engine_only
@pytest.mark.parametrize("module", ["GRU", "GRUCell"])
def test_unknown_instruction_set(module: str) -> None:
    """The library refuses what the package refuses, whoever loads it without that check."""
    code = f"""
import sys
from pathlib import Path
import torch, fused_rnn
fused_rnn.build.use("cpu", Path(sys.argv[1]))
fused_rnn.{module}(4, 6)(torch.ones(3, 4))
"""
    env = {**os.environ, "FUSED_RNN_CPU_CAPABILITY": "AVX2"}
    done = forked.python("-c", code, str(build.state().library), env=env)
    assert (
        f"FUSED_RNN_CPU_CAPABILITY is 'AVX2': use one of {', '.join(CAPABILITIES)}" in done.stderr
    )


@pytest.fixture(scope="module")
def chosen() -> dict[str, str]:
    """The instruction set taken, by the one that was asked for."""
    names = CAPABILITIES[:-1]
    done = forked.python("-c", CHOICES, *names)
    assert done.returncode == 0, done.stderr
    return dict(zip(names, done.stdout.split(), strict=True))


@cpu_engine_only
@pytest.mark.drawn(2)
@pytest.mark.parametrize("capability", CAPABILITIES[:-1])
def test_lesser_instruction_sets(
    capability: str, chosen: dict[str, str], seed: int, request: pytest.FixtureRequest
) -> None:
    """The same checks, some of each, on the code for machines that have less."""
    library = build.library()
    library.frnn_cpu_capability.restype = ctypes.c_char_p
    machine = library.frnn_cpu_capability().decode()
    assert chosen[capability] == min(capability, machine, key=CAPABILITIES.index)
    if chosen[capability] == machine:
        return  # whose code the other tests run
    files = __file__, str(Path(__file__).with_name("test_tiles.py"))
    words = "test_agrees_with_float64 or test_tiles and bfloat16"
    quick = request.config.getoption("--quick") or 20
    done = forked.tests_on(capability, seed, *files, words=words, quick=quick)
    assert done.returncode == 0, done.stdout[-3000:]


@pytest.mark.parametrize("cell", KERNELS)
@pytest.mark.parametrize("shape", [(1, 40, 65), (7, 30, 130), (33, 10, 193)], ids=str)
def test_same_for_any_number_of_threads(cell: str, shape: tuple[int, int, int], seed: int) -> None:
    B, T, H = shape
    case = Case(
        cell, time=T, batch=B, input_size=33, hidden_size=H, bidirectional=True, dtype=torch.float32
    )
    arguments = case.arguments()
    before = torch.get_num_threads()
    found = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        found.append(operate(ops.recurrent, case, arguments, case.dtype))
    torch.set_num_threads(before)
    for name, want in found[0].items():
        assert all(torch.equal(other[name], want) for other in found[1:]), name


# The products of torch for arm64, OpenBLAS, wait forever for threads that they do not get.
LIMITED = """
import sys, torch
sys.path[:0] = ["tests"]
from test_ops import Case, check
torch.set_num_threads(1)
sizes = dict(time=6, batch=9, input_size=33, hidden_size=193)
check(Case("lstm", bidirectional=True, **sizes), threads=4)
"""


@pytest.mark.drawn(1)
@cpu_engine_only
@pytest.mark.parametrize(
    "setting", ["OMP_THREAD_LIMIT=1", "OMP_THREAD_LIMIT=3", "OMP_DYNAMIC=true"]
)
def test_fewer_threads_than_asked_for(setting: str, seed: int) -> None:
    """OpenMP may give less than torch.get_num_threads() promises."""
    name, value = setting.split("=")
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    done = subprocess.run(
        [sys.executable, "-c", LIMITED],
        env={**os.environ, name: value},
        cwd=root,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]


OPCHECK = [
    Case("gru", dtype=torch.float32),
    Case("lstm", num_layers=2, bidirectional=True, proj_size=2, dtype=torch.float32),
    Case("rnn_tanh", layout="packed", bidirectional=True, bias=False, dtype=torch.float32),
    Case("lstm", batch_first=True, dtype=torch.bfloat16),
    Case("peephole_lstm", num_layers=2, proj_size=2, dtype=torch.float32),
]


@pytest.mark.drawn(5)
@pytest.mark.parametrize("dropout", [False, True])
@pytest.mark.parametrize("case", OPCHECK, ids=str)
def test_opcheck(case: Case, dropout: bool, seed: int) -> None:
    tensors, batch_sizes = case.arguments()
    x, h0, c0, *weights = leaves(tensors, case.dtype)
    masks, *rest = case.rest_of_schema(batch_sizes)
    if dropout:
        shape = (case.num_layers - 1, *x.shape[:-1], case.directions * case.width)
        masks = torch.rand(shape).to(case.dtype)
    arguments = (case.kernel, x, h0, c0, weights, masks, *rest)
    operators = torch.ops.fused_rnn
    torch.library.opcheck(operators.recurrent.default, arguments)
    torch.library.opcheck(operators.recurrent_recomputed.default, arguments)
    x, h0, c0, *weights = tensors
    plain = (case.kernel, x, h0, c0, weights, masks, *rest)
    torch.library.opcheck(operators.recurrent_infer.default, plain)
    y, h_n, c_n, *kept = operators.recurrent.default(*plain)
    needs = [i for i, t in enumerate(tensors) if t is not None]
    cotangents = (
        torch.randn_like(y),
        torch.randn_like(h_n),
        torch.randn_like(c_n) if c0 is not None else None,
    )
    torch.library.opcheck(operators.recurrent_backward.default, (*cotangents, *kept, needs, *plain))


@pytest.mark.parametrize(
    "case",
    [
        Case("rnn_tanh", bidirectional=True, time=3, batch=2, hidden_size=3),
        Case("rnn_relu", time=2, batch=2, hidden_size=3, bias=False),
        Case("gru", time=3, batch=2, hidden_size=3, layout="packed", bidirectional=True),
        Case("lstm", 2, 3, num_layers=2, bidirectional=True, time=3, batch=2, proj_size=2),
        *(Case(cell, 2, 3, num_layers=2, bidirectional=True, time=3, batch=2) for cell in KERNELS),
    ],
    ids=str,
)
def test_first_and_second_derivatives(case: Case, seed: int) -> None:
    tensors, batch_sizes = case.arguments()
    present = [i for i, t in enumerate(tensors) if t is not None]

    def fn(*values: Tensor) -> tuple[Tensor, ...]:
        filled: list[Tensor | None] = [None] * len(tensors)
        for i, value in zip(present, values, strict=True):
            filled[i] = value
        return tuple(o for o in case.call(ops.recurrent, filled, batch_sizes) if o is not None)

    inputs = tuple(t for t in leaves(tensors, torch.float64) if t is not None)
    assert torch.autograd.gradcheck(fn, inputs)
    assert torch.autograd.gradgradcheck(fn, inputs, fast_mode=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradients_of_any_layout(dtype: torch.dtype, seed: int) -> None:
    """Expanded (stride 0), transposed and sliced incoming gradients act as contiguous ones."""
    case = Case("gru", time=4, batch=3, hidden_size=5, bidirectional=True, dtype=dtype)
    arguments = case.arguments()
    T, B, H = case.time, case.batch, case.hidden_size
    y_shape = (T, B, 2 * H)
    layouts = {
        "expanded": torch.ones((), dtype=dtype).expand(y_shape),
        "transposed": torch.randn(y_shape[::-1], dtype=dtype).permute(2, 1, 0),
        "batch first": torch.randn(B, T, 2 * H, dtype=dtype).transpose(0, 1),
        "sliced": torch.randn(T, B, 3 * H + 1, dtype=dtype)[..., 1 : 1 + 2 * H],
    }
    for name, dy in layouts.items():
        grads = []
        for value in (dy, dy.contiguous()):
            tensors = leaves(arguments[0], dtype)
            case.call(ops.recurrent, tensors, None)[0].backward(value)
            grads.append([t.grad for t in tensors if t is not None])
        assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True)), name


def test_only_wanted_gradients(seed: int) -> None:
    case = Case("lstm", bidirectional=True, proj_size=2, dtype=torch.float32)
    arguments, _ = case.arguments()
    everything = leaves(arguments, case.dtype)
    case.call(ops.recurrent, everything, None)[0].sum().backward()
    for i, name in enumerate(case.names):
        if arguments[i] is None:
            continue
        tensors = [None if t is None else t.clone() for t in arguments]
        tensors[i].requires_grad_()  # type: ignore[union-attr]
        case.call(ops.recurrent, tensors, None)[0].sum().backward()
        assert torch.equal(tensors[i].grad, everything[i].grad), name  # type: ignore[union-attr]


def test_no_grad_saves_nothing(seed: int) -> None:
    from torch.profiler import profile

    case = Case("gru", time=50, batch=16, input_size=32, hidden_size=64, dtype=torch.float32)
    tensors, _ = case.arguments()
    with torch.no_grad(), profile() as trace:
        case.call(ops.recurrent, tensors, None)
    called = {event.key for event in trace.key_averages()}
    assert "fused_rnn::recurrent_infer" in called and "fused_rnn::recurrent" not in called


def test_saved_tensors_are_defined_to_the_last_value(seed: int) -> None:
    """No uninitialised memory in what the forward returns, padding included."""

    def saving(case: Case, tensors: Any, batch_sizes: Tensor | None) -> tuple[Tensor, ...]:
        (x, h0, c0, *weights), rest = tensors, case.rest_of_schema(batch_sizes)
        found: tuple[Tensor, ...] = torch.ops.fused_rnn.recurrent.default(
            case.kernel, x, h0, c0, weights, *rest
        )
        return found

    for case in (
        Case("lstm", hidden_size=17, proj_size=5, num_layers=2, bidirectional=True),
        Case("gru", hidden_size=33, layout="packed", bidirectional=True),
        Case("rnn_tanh", hidden_size=65),
    ):
        tensors, batch_sizes = case.arguments()
        with torch.no_grad():
            first = saving(case, tensors, batch_sizes)
            # Memory that a careless kernel would be handed again.
            junk = [torch.full_like(t, float("nan")) for t in first]
            del junk
            second = saving(case, tensors, batch_sizes)
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True)), case


def change(**changes: Any) -> Any:
    """What replaces arguments of the operator by others, by name: functions of them."""

    def spoil(arguments: dict[str, Any]) -> dict[str, Any]:
        return arguments | {name: fn(arguments[name]) for name, fn in changes.items()}

    return spoil


def weight(at: int, fn: Any) -> Any:
    return change(weights=lambda w: [fn(t) if i == at else t for i, t in enumerate(w)])


BAD = {
    "cell": ("gru", change(cell=lambda _: "lstmm"), "unknown cell 'lstmm'"),
    "x shape": ("gru", change(x=lambda x: x[0]), r"x: expected \[T, B, I\], got shape \(3, 4\)"),
    "h0 shape": (
        "gru",
        change(h0=lambda h: h[:, :2]),
        r"h0: expected shape \(1, 3, 6\), got \(1, 2, 6\)",
    ),
    "w_ih shape": (
        "gru",
        weight(0, lambda w: w[:, 1:]),
        r"w_ih: expected shape \(18, 4\), got \(18, 3\)",
    ),
    "too few weights": (
        "gru",
        change(weights=lambda w: w[1:]),
        "weights: expected 4 for each of 1 layers and directions, got 3",
    ),
    "not its weights": ("gru", change(present=lambda _: 0b111110), "weights: "),
    "projection": ("gru", change(present=lambda _: 0b10111), "takes no projection"),
    "no layers": ("gru", change(layers=lambda _: 0), "layers: expected at least 1, got 0"),
    "directions": ("gru", change(directions=lambda _: 3), "directions: expected 1 or 2, got 3"),
    "c0 given": ("gru", lambda a: a | {"c0": a["h0"]}, "this cell has no c"),
    "bias dtype": (
        "gru",
        weight(2, lambda b: b.float()),
        "b_ih: expected float64, as x is, got float32",
    ),
    "masks": (
        "gru",
        change(masks=lambda _: torch.ones(1, 5, 3, 7, dtype=torch.float64)),
        r"masks: expected shape \(0, 5, 3, 6\), got \(1, 5, 3, 7\)",
    ),
    "no steps": ("gru", change(x=lambda x: x[:0]), "Expected sequence length to be larger than 0"),
    "batch sizes": (
        "gru ragged",
        change(batch_sizes=lambda _: torch.tensor([1, 3])),
        "batch_sizes: expected positive, not increasing",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments_are_refused(name: str, seed: int) -> None:
    cell, spoil, message = BAD[name]
    layout = "packed" if "ragged" in cell else "padded"
    case = Case(cell.split()[0], input_size=4, hidden_size=6, time=5, layout=layout)
    (x, h0, c0, *weights), batch_sizes = case.arguments()
    operator = torch.ops.fused_rnn.recurrent_infer.default
    values = (case.kernel, x, h0, c0, weights, *case.rest_of_schema(batch_sizes))
    arguments = dict(zip((a.name for a in operator._schema.arguments), values, strict=True))
    operator(**arguments)
    with pytest.raises(RuntimeError, match=message):
        operator(**spoil(arguments))


@pytest.mark.parametrize("cell", KERNELS)
def test_library_and_reference_agree_on_a_cell(cell: str) -> None:
    assert_library_agrees(cell)


def test_states_of_zeros_need_not_be_given(seed: int) -> None:
    for case in (
        Case("lstm", num_layers=2, bidirectional=True, proj_size=2),
        Case("gru", time=1),
        Case("rnn_tanh", layout="packed"),
    ):
        tensors, batch_sizes = case.arguments()
        zeros = [
            torch.zeros_like(t) if i in (1, 2) and t is not None else t
            for i, t in enumerate(tensors)
        ]
        found = case.call(ops.recurrent, [tensors[0], None, None, *tensors[3:]], batch_sizes)
        expected = case.call(ops.recurrent, zeros, batch_sizes)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True) if a is not None)
