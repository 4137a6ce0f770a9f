"""The native operators by themselves.

Schema, fake, autograd and tracing (opcheck), agreement with the float64 reference for every engine
stage, derivatives of second order, the instruction sets, and refusal of bad arguments.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fused_rnn import build, ops, reference

cpu_engine_only = pytest.mark.skipif(
    os.environ.get("FUSED_RNN_TEST_ENGINE", "").startswith("emulated"),
    reason="about the CPU's engine",
)
pytestmark = pytest.mark.skipif(build.backend() != "native", reason="tests of the native library")

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Case:
    cell: str
    T: int = 5
    B: int = 3
    I: int = 4  # noqa: E741
    H: int = 6
    L: int = 1
    D: int = 1
    P: int = 0
    bias: bool = True
    ragged: bool = False
    batch_first: bool = False
    dtype: torch.dtype = torch.float64

    def __str__(self) -> str:
        flags = "".join(f"-{f}" for f in ("bias", "ragged", "batch_first") if getattr(self, f))
        kind = str(self.dtype).removeprefix("torch.")
        sizes = "".join(f"{name}{getattr(self, name)}" for name in "TBIHLDP")
        return f"{self.cell}-{sizes}{flags}-{kind}"

    @property
    def present(self) -> int:
        return reference.present_bits(self.cell, biases=self.bias, projection=self.P > 0)

    @property
    def names(self) -> tuple[str, ...]:
        """Of ``arguments``."""
        weights = reference.present_names(self.cell, self.present)
        runs = [f"{i}{'_r' * d}" for i in range(self.L) for d in range(self.D)]
        return ("x", "h0", "c0", *(f"{name}_{run}" for run in runs for name in weights))

    def rest(self, batch_sizes: Tensor | None) -> tuple[Any, ...]:
        """What stands behind the weights in the operators' schemas, without dropout."""
        return None, batch_sizes, self.L, self.D, self.present

    def arguments(self) -> tuple[list[Tensor | None], Tensor | None]:
        """(x, h0, c0, *weights) with unit-scale entries, and batch_sizes."""
        cell = reference.CELLS[self.cell]
        width, rows = self.P or self.H, cell.gates * self.H

        def draw(*shape: int, scale: float = 1.0) -> Tensor:
            return (torch.randn(*shape, dtype=torch.float64) * scale).to(self.dtype)

        batch_sizes = None
        if self.ragged:
            lengths = [self.T] + torch.randint(1, self.T + 1, (self.B - 1,)).tolist()
            batch_sizes = torch.tensor([sum(n > t for n in lengths) for t in range(self.T)])
            x = draw(int(batch_sizes.sum()), self.I)
        elif self.batch_first:
            x = draw(self.B, self.T, self.I).transpose(0, 1)
        else:
            x = draw(self.T, self.B, self.I)
        runs, others = self.L * self.D, len(cell.states) - 1
        c0 = draw(runs, self.B, others * self.H) if others else None
        weights: list[Tensor | None] = []
        for run in range(runs):
            shapes = {
                "w_ih": (rows, self.I if run < self.D else self.D * width),
                "w_hh": (rows, width),
                "b_ih": (rows,),
                "b_hh": (rows,),
                "w_hr": (self.P, self.H),
            }
            weights += [
                draw(*shapes.get(name, (self.H,)), scale=self.H**-0.5)
                for name in reference.present_names(self.cell, self.present)
            ]
        return [x, draw(runs, self.B, width), c0, *weights], batch_sizes


def run(
    fn: Any, case: Case, tensors: Sequence[Tensor | None], batch_sizes: Tensor | None
) -> tuple[Any, ...]:
    x, h0, c0, *weights = tensors
    return fn(case.cell, x, h0, c0, weights, *case.rest(batch_sizes))


def leaves(tensors: Sequence[Tensor | None], dtype: torch.dtype) -> list[Tensor | None]:
    return [None if t is None else t.detach().to(dtype).requires_grad_() for t in tensors]


def results(
    fn: Any, case: Case, arguments: tuple[Any, Any], dtype: torch.dtype, seed: int
) -> dict[str, Tensor]:
    """Outputs and gradients by name, for random cotangents of unit scale."""
    tensors, batch_sizes = leaves(arguments[0], dtype), arguments[1]
    outputs = run(fn, case, tensors, batch_sizes)
    generator = torch.Generator().manual_seed(seed)
    pairs = [
        (o, torch.randn(o.shape, dtype=torch.float64, generator=generator).to(case.dtype).to(dtype))
        for o in outputs
        if o is not None
    ]
    torch.autograd.backward([o for o, _ in pairs], [g for _, g in pairs])
    found = {
        n: o.detach() for n, o in zip(("y", "h_n", "c_n"), outputs, strict=True) if o is not None
    }
    found |= {f"d{n}": t.grad for n, t in zip(case.names, tensors, strict=True) if t is not None}
    return found


def check(case: Case, threads: int, seed: int) -> None:
    """float64: one rounding for every term of the longest sum. Others: at most twice the error of
    the plain reference in that dtype, plus a floor of a few roundings of the largest entry."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        arguments = case.arguments()
        exact = results(reference.recurrent, case, arguments, torch.float64, seed)
        ours = results(ops.recurrent, case, arguments, case.dtype, seed)
        plain = results(reference.recurrent, case, arguments, case.dtype, seed)
    finally:
        torch.set_num_threads(before)
    eps = torch.finfo(case.dtype).eps
    terms = case.T * case.B + case.I + case.H  # of the longest sum, each of unit scale
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
            roundings = 16 if case.dtype == torch.float32 else 4 * (case.T + 2)
            cancelled = (5 if want.numel() < 16 else 2) * terms**0.5
            limit = 2 * theirs + eps * max(roundings * scale, cancelled)
        assert error <= limit, f"{name}: error {error:.2e}, limit {limit:.2e}, scale {scale:.2e}"


def random_case(generator: Any) -> Case:
    def pick(*options: Any) -> Any:
        return options[int(torch.randint(len(options), (), generator=generator))]

    cell = pick("lstm", "gru", *reference.CELLS)
    H = pick(1, 3, 16, 17, 33, 64, 65, 130, 193)
    dtype = pick(*DTYPES)
    if cell == "rnn_relu":  # any rounding may flip its derivative; test_parity keeps off the kink
        dtype = torch.float64
    return Case(
        cell,
        T=pick(1, 2, 5, 9),
        B=pick(1, 2, 3, 7, 16, 33),
        I=pick(1, 3, 17, 33, 64, 65),
        H=H,
        L=pick(1, 1, 2, 3),
        D=pick(1, 2),
        P=pick(0, max(1, H // 3)) if cell.endswith("lstm") and H > 1 else 0,
        bias=pick(True, True, False),
        ragged=pick(True, False, False),
        batch_first=pick(True, False, False),
        dtype=dtype,
    )


@pytest.mark.parametrize("index", range(60))
def test_agrees_with_float64(index: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed + index)
    torch.manual_seed(seed + index)
    case = random_case(generator)
    print(case)
    check(case, threads=1 + index % 3, seed=seed)


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
    command = [sys.executable, "-c", code, str(build.state().library)]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert (
        f"FUSED_RNN_CPU_CAPABILITY is 'AVX2': use one of {', '.join(CAPABILITIES)}" in done.stderr
    )


@pytest.fixture(scope="module")
def chosen() -> dict[str, str]:
    """The instruction set taken, by the one that was asked for."""
    names = CAPABILITIES[:-1]
    command = [sys.executable, "-c", CHOICES, *names]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return dict(zip(names, done.stdout.split(), strict=True))


@cpu_engine_only
@pytest.mark.parametrize("capability", CAPABILITIES[:-1])
def test_lesser_instruction_sets(capability: str, chosen: dict[str, str], seed: int) -> None:
    """The same checks on the code for machines that have less, chosen when it is loaded."""
    env = {**os.environ, "FUSED_RNN_CPU_CAPABILITY": capability, "FUSED_RNN_TEST_SEED": str(seed)}
    library = build.library()
    library.frnn_cpu_capability.restype = ctypes.c_char_p
    machine = library.frnn_cpu_capability().decode()
    assert chosen[capability] == min(capability, machine, key=CAPABILITIES.index)
    if chosen[capability] == machine:
        return  # whose code the other tests run
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-x",
        "-p",
        "no:cacheprovider",
        __file__,
        str(Path(__file__).with_name("test_tiles.py")),
        "-k",
        "test_agrees_with_float64 or test_tiles and bfloat16",
    ]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:]


@pytest.mark.parametrize("cell", reference.CELLS)
@pytest.mark.parametrize("shape", [(1, 40, 65), (7, 30, 130), (33, 10, 193)], ids=str)
def test_same_for_any_number_of_threads(cell: str, shape: tuple[int, int, int], seed: int) -> None:
    B, T, H = shape
    case = Case(cell, T=T, B=B, I=33, H=H, D=2, dtype=torch.float32)
    arguments = case.arguments()
    before = torch.get_num_threads()
    found = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        found.append(results(ops.recurrent, case, arguments, case.dtype, seed))
    torch.set_num_threads(before)
    for name, want in found[0].items():
        assert all(torch.equal(other[name], want) for other in found[1:]), name


LIMITED = """
import torch
from fused_rnn import ops
from tests import test_ops as t
torch.set_num_threads(4)
case = t.Case("lstm", T=6, B=9, I=33, H=193, D=2, dtype=torch.float64)
t.check(case, threads=4, seed=1)
"""


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


def test_constants_are_marked_as_torch_marks_them() -> None:
    def marked(mark: Any) -> dict[str, Any]:
        return vars(mark(lambda: 0))

    assert marked(ops._constant) == marked(torch.compiler.assume_constant_result) != {}


OPCHECK = [
    Case("gru", dtype=torch.float32),
    Case("lstm", L=2, D=2, P=2, dtype=torch.float32),
    Case("rnn_tanh", ragged=True, D=2, bias=False, dtype=torch.float32),
    Case("lstm", batch_first=True, dtype=torch.bfloat16),
    Case("peephole_lstm", L=2, P=2, dtype=torch.float32),
]


@pytest.mark.parametrize("dropout", [False, True])
@pytest.mark.parametrize("case", OPCHECK, ids=str)
def test_opcheck(case: Case, dropout: bool, seed: int) -> None:
    tensors, batch_sizes = case.arguments()
    x, h0, c0, *weights = leaves(tensors, case.dtype)
    masks, *rest = case.rest(batch_sizes)
    if dropout:
        masks = torch.rand(case.L - 1, *x.shape[:-1], case.D * (case.P or case.H)).to(case.dtype)
    arguments = (case.cell, x, h0, c0, weights, masks, *rest, False)
    operators = torch.ops.fused_rnn
    torch.library.opcheck(operators.recurrent.default, arguments)
    torch.library.opcheck(operators.recurrent_recomputed.default, arguments)
    x, h0, c0, *weights = tensors
    plain = (case.cell, x, h0, c0, weights, masks, *rest, False)
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
        Case("rnn_tanh", D=2, T=3, B=2, H=3),
        Case("rnn_relu", T=2, B=2, H=3, bias=False),
        Case("gru", T=3, B=2, H=3, ragged=True, D=2),
        Case("lstm", T=3, B=2, I=2, H=3, P=2, L=2, D=2),
        Case("peephole_lstm", T=3, B=2, I=2, H=3, L=2, D=2),
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
        return tuple(o for o in run(ops.recurrent, case, filled, batch_sizes) if o is not None)

    inputs = tuple(t for t in leaves(tensors, torch.float64) if t is not None)
    assert torch.autograd.gradcheck(fn, inputs)
    assert torch.autograd.gradgradcheck(fn, inputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradients_of_any_layout(dtype: torch.dtype, seed: int) -> None:
    """Expanded (stride 0), transposed and sliced incoming gradients act as contiguous ones."""
    case = Case("gru", T=4, B=3, H=5, D=2, dtype=dtype)
    arguments = case.arguments()
    y_shape = (case.T, case.B, 2 * case.H)
    layouts = {
        "expanded": torch.ones((), dtype=dtype).expand(y_shape),
        "transposed": torch.randn(y_shape[::-1], dtype=dtype).permute(2, 1, 0),
        "batch first": torch.randn(case.B, case.T, 2 * case.H, dtype=dtype).transpose(0, 1),
        "sliced": torch.randn(case.T, case.B, 3 * case.H + 1, dtype=dtype)[..., 1 : 1 + 2 * case.H],
    }
    for name, dy in layouts.items():
        grads = []
        for value in (dy, dy.contiguous()):
            tensors = leaves(arguments[0], dtype)
            run(ops.recurrent, case, tensors, None)[0].backward(value)
            grads.append([t.grad for t in tensors if t is not None])
        assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True)), name


def test_only_wanted_gradients(seed: int) -> None:
    case = Case("lstm", D=2, P=2, dtype=torch.float32)
    arguments, _ = case.arguments()
    everything = leaves(arguments, case.dtype)
    run(ops.recurrent, case, everything, None)[0].sum().backward()
    for i, name in enumerate(case.names):
        if arguments[i] is None:
            continue
        tensors = [None if t is None else t.clone() for t in arguments]
        tensors[i].requires_grad_()  # type: ignore[union-attr]
        run(ops.recurrent, case, tensors, None)[0].sum().backward()
        assert torch.equal(tensors[i].grad, everything[i].grad), name  # type: ignore[union-attr]


def test_no_grad_saves_nothing(seed: int) -> None:
    from torch.profiler import profile

    case = Case("gru", T=50, B=16, I=32, H=64, dtype=torch.float32)
    tensors, _ = case.arguments()
    with torch.no_grad(), profile() as trace:
        run(ops.recurrent, case, tensors, None)
    called = {event.key for event in trace.key_averages()}
    assert "fused_rnn::recurrent_infer" in called and "fused_rnn::recurrent" not in called


def test_saved_tensors_are_defined_to_the_last_value(seed: int) -> None:
    """No uninitialised memory in what the forward returns, padding included."""

    def saving(*arguments: Any) -> tuple[Tensor, ...]:
        found: tuple[Tensor, ...] = torch.ops.fused_rnn.recurrent.default(*arguments, False)
        return found

    for case in (
        Case("lstm", H=17, P=5, L=2, D=2),
        Case("gru", H=33, ragged=True, D=2),
        Case("rnn_tanh", H=65),
    ):
        tensors, batch_sizes = case.arguments()
        with torch.no_grad():
            first = run(saving, case, tensors, batch_sizes)
            # Memory that a careless kernel would be handed again.
            junk = [torch.full_like(t, float("nan")) for t in first]
            del junk
            second = run(saving, case, tensors, batch_sizes)
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
    case = Case(cell.split()[0], ragged="ragged" in cell)
    (x, h0, c0, *weights), batch_sizes = case.arguments()
    operator = torch.ops.fused_rnn.recurrent_infer.default
    values = (case.cell, x, h0, c0, weights, *case.rest(batch_sizes), False)
    arguments = dict(zip((a.name for a in operator._schema.arguments), values, strict=True))
    operator(**arguments)
    with pytest.raises(RuntimeError, match=message):
        operator(**spoil(arguments))


@pytest.mark.parametrize("cell", reference.CELLS)
def test_library_and_reference_agree_on_a_cell(cell: str) -> None:
    """What csrc/cells declares, and what reference.py says of the same cell."""
    known, facts = reference.CELLS[cell], ops._facts("cpu", cell)
    assert ops.tensor_names("cpu", cell) == known.tensors
    assert facts.gates_x == known.gates and facts.extra_states == len(known.states) - 1


def test_states_of_zeros_need_not_be_given(seed: int) -> None:
    for case in (Case("lstm", L=2, D=2, P=2), Case("gru", T=1), Case("rnn_tanh", ragged=True)):
        tensors, batch_sizes = case.arguments()
        zeros = [
            torch.zeros_like(t) if i in (1, 2) and t is not None else t
            for i, t in enumerate(tensors)
        ]
        found = run(ops.recurrent, case, [tensors[0], None, None, *tensors[3:]], batch_sizes)
        expected = run(ops.recurrent, case, zeros, batch_sizes)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True) if a is not None)
