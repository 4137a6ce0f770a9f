"""Layers as C++ source: compiled by themselves, with the bits of Python's, whatever the blocks."""

from __future__ import annotations

import copy
import ctypes
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import emulated
import pytest
import torch
from helpers import assert_no_worse, native
from torch import Tensor, nn

import fused_rnn
from fused_rnn import zoo
from fused_rnn.build.target import TIERS

pytestmark = pytest.mark.compiling

GXX, CLANGXX = shutil.which("g++"), shutil.which("clang++")
needs_compiler = pytest.mark.skipif(not GXX, reason="there is no g++")
needs_kernels = pytest.mark.skipif(
    emulated.ENGINE != "" or not native(), reason="about the CPU's kernels"
)
WARNINGS = ("-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas")
# Of more than 16 steps weights are packed, and a last chunk of one or two rows is summed otherwise.
STEPS = 4 * 128 + 65
BLOCKS = (1, 7, 64, 512)
PYTHON = (sys.executable, "-c")


@fused_rnn.cell(gates=("f", "g"))
def Minimal(x: Any, r: Any, s: Any, p: Any) -> dict[str, Tensor]:
    f = torch.sigmoid(x.f + r.f)
    return dict(h=f * s.h + (1 - f) * torch.tanh(x.g + r.g))


@fused_rnn.cell(gates=("a", "b", "c"), states=("h", "u", "v"), params={"w": 0.3}, output="v")
def ThreeStates(x: Any, r: Any, s: Any, p: Any) -> dict[str, Tensor]:
    u = torch.sigmoid(x.a + r.a) * s.u + torch.tanh(x.b + r.b)
    v = s.v + p.w * (torch.exp(-torch.abs(u)) - s.v)
    return dict(h=torch.tanh(x.c + r.c + v) + s.h / 2, u=u, v=v)


def compiled(folder: Path, *flags: str, compiler: str | None = GXX) -> Exported:
    """The exported folder as a library."""
    assert compiler is not None
    name = next(folder.glob("*.h")).stem
    library = folder / f"{name}.so"
    command = [compiler, "-std=c++17", "-O2", "-fPIC", "-shared", *WARNINGS, *flags]
    subprocess.run([*command, f"{folder}/{name}.cpp", "-o", str(library)], check=True)
    return Exported(library, name)


class Exported:
    """The five functions, and the sizes that the header has."""

    def __init__(self, library: Path, name: str) -> None:
        header = (library.parent / f"{name}.h").read_text()
        found = {kind: re.search(rf"_{kind} = (\d+)", header) for kind in ("INPUTS", "OUTPUTS")}
        self.inputs, self.outputs = (int(m[1]) for m in found.values() if m)
        self.dtype = torch.float64 if "const double*" in header else torch.float32
        loaded = ctypes.CDLL(str(library))
        for kind in ("create", "reset", "process", "latency", "destroy"):
            setattr(self, kind, getattr(loaded, f"{name}_{kind}"))
        pointer, size = ctypes.c_void_p, ctypes.c_size_t
        self.create.restype = pointer
        self.latency.restype = size
        self.latency.argtypes = self.reset.argtypes = self.destroy.argtypes = [pointer]
        self.process.argtypes = [pointer, pointer, pointer, size]

    create: Any
    reset: Any
    process: Any
    latency: Any
    destroy: Any

    def run(self, x: Tensor, block: int, state: int | None = None) -> Tensor:
        """Outputs of x [T, inputs], in blocks, of a new stream if none is given."""
        own = state is None
        state = self.create() if own else state
        y = torch.full((len(x), self.outputs), torch.nan, dtype=self.dtype)
        assert x.is_contiguous() and x.dtype == self.dtype and x.shape[1] == self.inputs
        for at in range(0, len(x), block):
            part, out = x[at : at + block], y[at : at + block]
            self.process(state, part.data_ptr(), out.data_ptr(), len(part))
        if own:
            self.destroy(state)
        return y


def own_tier() -> str:
    used = str(fused_rnn.backend_info()["instructions"])
    return used if used in TIERS else list(TIERS)[-1]


def own_flags() -> tuple[str, ...]:
    return TIERS[own_tier()]


@torch.no_grad()
def outputs_of(module: Any, x: Tensor, hx: Any = None) -> Tensor:
    y: Tensor = module(x.unsqueeze(1), hx)[0].squeeze(1)
    return y


MODULES: dict[str, Callable[[], nn.Module]] = {
    "LSTM": lambda: fused_rnn.LSTM(1, 8),
    "GRU": lambda: fused_rnn.GRU(16, 32),
    "RNN": lambda: fused_rnn.RNN(3, 65),
    "relu": lambda: fused_rnn.RNN(3, 5, nonlinearity="relu"),
    "one": lambda: fused_rnn.LSTM(1, 1),
    "odd": lambda: fused_rnn.GRU(65, 193),
    "double": lambda: fused_rnn.GRU(3, 17, dtype=torch.float64),
    "layers": lambda: fused_rnn.LSTM(16, 20, num_layers=3),
    "no bias": lambda: fused_rnn.GRU(2, 16, bias=False),
    "dropouts": lambda: fused_rnn.LSTM(
        2, 33, 2, dropout=0.5, recurrent_dropout=0.5, weight_dropout=0.5, dropout_over_time=True
    ).eval(),
    "PeepholeLSTM": lambda: fused_rnn.PeepholeLSTM(1, 24),
    "BlockGRU": lambda: fused_rnn.BlockGRU(4, 32),
    "Minimal": lambda: Minimal(1, 40, 2),
    "ThreeStates": lambda: ThreeStates(2, 19),
    "two products": lambda: zoo.OriginalGRU(3, 35, 2),
    "no product": lambda: zoo.IndRNN(3, 18),
}


@needs_compiler
@needs_kernels
@pytest.mark.drawn(3)
@pytest.mark.parametrize("kind", MODULES)
def test_bits_are_those_of_python(kind: str, tmp_path: Path) -> None:
    """Of one call, and of calls of 64 steps, for any blocks."""
    module = MODULES[kind]().eval()
    made = compiled(fused_rnn.export_cpp(module, tmp_path / "net"), *own_flags())
    x = torch.randn(STEPS, made.inputs, dtype=made.dtype)
    expected = outputs_of(module, x)
    for block in BLOCKS:
        assert torch.equal(made.run(x, block), expected), block
    hx, parts = None, []
    with torch.no_grad():
        for part in x[:512].unsqueeze(1).split(64):
            y, hx = module(part, hx)
            parts.append(y.squeeze(1))
    assert torch.equal(torch.cat(parts), expected[:512])


@needs_compiler
@needs_kernels
@pytest.mark.parametrize("tier", TIERS)
def test_bits_with_every_instruction_set(tier: str, tmp_path: Path) -> None:
    if list(TIERS).index(tier) > list(TIERS).index(own_tier()):
        pytest.skip(f"this machine has no {tier}")
    module = fused_rnn.LSTM(3, 37, 2)
    made = compiled(fused_rnn.export_cpp(module, tmp_path / "net"), *TIERS[tier])
    x = torch.randn(STEPS, 3)
    torch.save((module.state_dict(), x), tmp_path / "in.pt")
    program = (
        "import torch, fused_rnn; rnn = fused_rnn.LSTM(3, 37, 2)\n"
        "state, x = torch.load('in.pt'); rnn.load_state_dict(state)\n"
        "with torch.no_grad(): torch.save(rnn(x.unsqueeze(1))[0].squeeze(1), 'out.pt')\n"
    )
    environment = {**os.environ, "FUSED_RNN_CPU_CAPABILITY": tier}
    subprocess.run([*PYTHON, program], cwd=tmp_path, env=environment, check=True)
    expected = torch.load(tmp_path / "out.pt")
    for block in BLOCKS:
        assert torch.equal(made.run(x, block), expected), block


@needs_compiler
def test_flags_of_the_cmake_file(tmp_path: Path) -> None:
    """-march=native, and -mtune=generic, since tuning may split multiply-adds: a library that is
    as accurate as the reference, and the same bits as with the tier's own flags."""
    module = fused_rnn.LSTM(2, 24)
    folder = fused_rnn.export_cpp(module, tmp_path / "net")
    text = (folder / "CMakeLists.txt").read_text()
    flags = re.findall(r"target_compile_options\(net PRIVATE (.+)\)", text)
    assert len(flags) == 2
    words = " ".join(flags).replace("${NET_ARCH}", "native").split()
    x = torch.randn(STEPS, 2)
    found = compiled(folder, *words).run(x, 64)
    exact = outputs_of(copy.deepcopy(module).double(), x.double())
    ours = outputs_of(module, x)
    assert_no_worse({"y": found}, {"y": ours}, {"y": exact}, terms=24)
    if native() and not emulated.ENGINE and own_tier() == list(TIERS)[-1]:
        assert torch.equal(found, ours)


@needs_compiler
@pytest.mark.skipif(not shutil.which("cmake"), reason="there is no cmake")
def test_cmake_builds_it(tmp_path: Path) -> None:
    rnn, head = fused_rnn.RNN(2, 7), nn.Linear(7, 3)
    folder = fused_rnn.export_cpp(rnn, tmp_path / "net", head=head)
    for command in (
        ["cmake", "-S", str(folder), "-B", str(tmp_path / "out"), "-DBUILD_SHARED_LIBS=ON"],
        ["cmake", "--build", str(tmp_path / "out")],
    ):
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    shutil.copy(tmp_path / "out" / "libnet.so", folder)
    x = torch.randn(40, 2)
    found = Exported(folder / "libnet.so", "net").run(x, 7)
    exact = head.double()(outputs_of(rnn.double(), x.double())).detach()
    torch.testing.assert_close(found.double(), exact, rtol=0, atol=1e-5)


@needs_compiler
@pytest.mark.skipif(not CLANGXX, reason="there is no clang++")
@pytest.mark.parametrize("kind", ["LSTM", "two products", "double"])
def test_clang(kind: str, tmp_path: Path) -> None:
    """It joins other products and sums than g++: bits differ, errors do not."""
    module = MODULES[kind]().eval()
    folder = fused_rnn.export_cpp(module, tmp_path / "net")
    made = compiled(folder, *own_flags(), compiler=CLANGXX)
    x = torch.randn(STEPS, made.inputs, dtype=made.dtype)
    found = [made.run(x, block) for block in BLOCKS]
    assert all(torch.equal(y, found[0]) for y in found)
    exact = outputs_of(copy.deepcopy(module).double(), x.double())
    ours = {"y": outputs_of(module, x)}
    assert_no_worse({"y": found[0]}, ours, {"y": exact}, terms=made.outputs)


@pytest.mark.drawn(2)
@needs_compiler
@pytest.mark.parametrize("outputs", [1, 3, 20])
@pytest.mark.parametrize("bias", [False, True])
def test_head(outputs: int, bias: bool, tmp_path: Path) -> None:
    rnn, head = fused_rnn.GRU(1, 19), nn.Linear(19, outputs, bias=bias)
    made = compiled(fused_rnn.export_cpp(rnn, tmp_path / "net", head=head), *own_flags())
    x = torch.randn(100, 1)
    found = [made.run(x, block) for block in BLOCKS]
    assert all(torch.equal(y, found[0]) for y in found)
    ours = head(outputs_of(rnn, x)).detach()
    exact = head.double()(outputs_of(rnn.double(), x.double())).detach()
    assert_no_worse({"y": found[0]}, {"y": ours}, {"y": exact}, terms=19)


@needs_compiler
def test_streams(tmp_path: Path) -> None:
    """They are apart, go on where they were, begin anew, and may write over their input."""
    module = fused_rnn.LSTM(5, 5, 2)
    made = compiled(fused_rnn.export_cpp(module, tmp_path / "net"), *own_flags())
    x = torch.randn(2, 100, 5)
    alone = [made.run(each, 100) for each in x]
    one, two = made.create(), made.create()
    assert made.latency(one) == 0
    mixed: list[list[Tensor]] = [[], []]
    for at in range(0, 100, 20):
        for i, state in enumerate((one, two)):
            mixed[i].append(made.run(x[i, at : at + 20], 20, state))
    for parts, expected in zip(mixed, alone, strict=True):
        assert torch.equal(torch.cat(parts), expected)
    made.reset(one)
    made.process(one, None, None, 0)
    assert torch.equal(made.run(x[0], 33, one), alone[0])
    in_place = x[1].clone()
    made.reset(two)
    made.process(two, in_place.data_ptr(), in_place.data_ptr(), 100)
    assert torch.equal(in_place, alone[1])
    assert not torch.equal(made.run(x[1], 33, two), alone[1])
    made.destroy(one)
    made.destroy(two)


DRIVER = r"""
#include <cstdio>
#include <cstdlib>
#include <vector>
#include "net.h"
#ifdef COUNT
#include <malloc.h>
static long allocations = 0;
extern "C" {
void* __libc_malloc(size_t);
void* __libc_calloc(size_t, size_t);
void* __libc_realloc(void*, size_t);
void* __libc_memalign(size_t, size_t);
void* malloc(size_t n) { allocations++; return __libc_malloc(n); }
void* calloc(size_t n, size_t m) { allocations++; return __libc_calloc(n, m); }
void* realloc(void* p, size_t n) { allocations++; return __libc_realloc(p, n); }
void* memalign(size_t a, size_t n) { allocations++; return __libc_memalign(a, n); }
void* aligned_alloc(size_t a, size_t n) { allocations++; return __libc_memalign(a, n); }
int posix_memalign(void** p, size_t a, size_t n) {
  allocations++;
  *p = __libc_memalign(a, n);
  return 0;
}
}
#else
static long allocations = 0;
#endif
int main(int, char** argv) {  // x, y, frames
  const long frames = atol(argv[3]), sizes[] = {1, 7, 64, 512};
  std::vector<float> x(frames * NET_INPUTS), y(frames * NET_OUTPUTS);
  FILE* in = fopen(argv[1], "rb");
  if (fread(x.data(), sizeof(float), x.size(), in) != x.size()) return 2;
  fclose(in);
  const long at_first = allocations;
  net_state* state = net_create();
  const long before = allocations;
  if (state == nullptr) return 3;
  for (int round = 0; round < 2; round++) {
    net_reset(state);
    for (long at = 0, i = 0; at < frames; i++) {
      const long left = frames - at, n = sizes[i % 4] < left ? sizes[i % 4] : left;
      net_process(state, x.data() + at * NET_INPUTS, y.data() + at * NET_OUTPUTS, size_t(n));
      at += n;
    }
  }
  if (net_latency(state) != 0) return 4;
  printf("%ld %ld\n", before - at_first, allocations - before);
  net_destroy(state);
  FILE* out = fopen(argv[2], "wb");
  fwrite(y.data(), sizeof(float), y.size(), out);
  fclose(out);
}
"""


def drive(folder: Path, x: Tensor, outputs: int, *flags: str) -> tuple[Tensor, list[int]]:
    """A program's outputs of x, and how often it allocated: in create, and afterwards."""
    (folder / "main.cpp").write_text(DRIVER)
    program = folder / "main"
    sources = [str(folder / "main.cpp"), str(folder / "net.cpp")]
    command = [str(GXX), "-std=c++17", "-O2", *WARNINGS, *flags, *sources, "-o", str(program)]
    subprocess.run(command, check=True)
    x.numpy().tofile(folder / "x")
    done = subprocess.run(
        [program, folder / "x", folder / "y", str(len(x))],
        check=True,
        capture_output=True,
        text=True,
    )
    assert not done.stderr
    y = torch.frombuffer(bytearray((folder / "y").read_bytes()), dtype=torch.float32)
    return y.view(len(x), outputs), [int(word) for word in done.stdout.split()]


@needs_compiler
@pytest.mark.skipif(os.uname().sysname != "Linux", reason="malloc is glibc's")
def test_nothing_allocates_after_create(tmp_path: Path) -> None:
    module, head = fused_rnn.LSTM(3, 40, 2), nn.Linear(40, 2)
    folder = fused_rnn.export_cpp(module, tmp_path / "net", head=head)
    x = torch.randn(1000, 3)
    _, (in_create, after) = drive(folder, x, 2, *own_flags(), "-DCOUNT")
    assert in_create > 0 and after == 0


@needs_compiler
@pytest.mark.skipif(not shutil.which("nm"), reason="there is no nm")
def test_it_asks_for_nothing_that_waits(tmp_path: Path) -> None:
    """What the object leaves to others: memory, and the guard of what is packed once, in create."""
    folder = fused_rnn.export_cpp(fused_rnn.GRU(3, 40, 2), tmp_path / "net")
    compiled(folder, *own_flags())
    symbols = subprocess.run(
        ["nm", "-D", "--undefined-only", folder / "net.so"],
        check=True,
        capture_output=True,
        text=True,
    ).stdout.split()
    names = {name.partition("@")[0] for name in symbols if len(name) > 1}
    known = {"memcpy", "memset", "memmove", "_ITM_deregisterTMCloneTable"}
    known |= {"_ITM_registerTMCloneTable", "__gmon_start__", "__cxa_finalize", "_ZSt7nothrow"}
    known |= {"__cxa_guard_acquire", "__cxa_guard_release", "__cxa_guard_abort"}
    known |= {"__gxx_personality_v0", "_Unwind_Resume"}
    assert {name for name in names - known if not name.startswith(("_Zn", "_Zd"))} == set()
    defined = subprocess.run(
        ["nm", "-D", "--defined-only", folder / "net.so"],
        check=True,
        capture_output=True,
        text=True,
    ).stdout.split()[2::3]
    functions = {f"net_{kind}" for kind in ("create", "reset", "process", "latency", "destroy")}
    assert {name for name in defined if "exported" not in name} == functions


@needs_compiler
@pytest.mark.drawn(1)
@pytest.mark.parametrize("kind", ["LSTM", "odd", "RNN", "two products", "ThreeStates"])
def test_sanitizers(kind: str, tmp_path: Path) -> None:
    module = MODULES[kind]().eval()
    folder = fused_rnn.export_cpp(module, tmp_path / "net")
    sanitizers = ("-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")
    x = torch.randn(700, module.input_size)
    found, _ = drive(folder, x, module.hidden_size, *own_flags(), *sanitizers)
    exact = outputs_of(copy.deepcopy(module).double(), x.double())
    ours = {"y": outputs_of(module, x)}
    assert_no_worse({"y": found}, ours, {"y": exact}, terms=module.hidden_size)


@needs_compiler
def test_two_in_one_program(tmp_path: Path) -> None:
    """Of the same cell and size, and of cells of one name."""
    folders = [
        fused_rnn.export_cpp(fused_rnn.GRU(1, 8), tmp_path / name, name=name) for name in "ab"
    ]
    run = "int main() { a_destroy(a_create()); b_destroy(b_create()); }"
    main = f"#include <a.h>\n#include <b.h>\n{run}\n"
    (tmp_path / "main.cpp").write_text(main)
    sources = [str(tmp_path / "main.cpp"), *(f"{f}/{f.name}.cpp" for f in folders)]
    command = [str(GXX), "-std=c++17", "-O2", *(f"-I{f}" for f in folders), *sources]
    subprocess.run([*command, "-o", str(tmp_path / "main")], check=True)
    subprocess.run([tmp_path / "main"], check=True)


@needs_compiler
def test_large_weights_compile(tmp_path: Path) -> None:
    """Three million of them: as a literal, which compilers read in a second."""
    module = fused_rnn.LSTM(256, 512, 2)
    made = compiled(fused_rnn.export_cpp(module, tmp_path / "net"), *own_flags())
    x = torch.randn(20, 256)
    found = {"y": made.run(x, 7)}
    exact = outputs_of(copy.deepcopy(module).double(), x.double())
    assert_no_worse(found, {"y": outputs_of(module, x)}, {"y": exact}, terms=512)


def test_weights_as_text() -> None:
    """Every byte comes back from the literal, also before digits, quotes and trigraphs."""
    from fused_rnn.cpp import _literal

    data = bytes(range(256)) + b"\0001?" + b'?/"\\' + bytes(torch.randint(256, (999,)).tolist())
    text = "".join(line.strip()[1:-1] for line in _literal(data))
    assert "??" not in text
    unescape = lambda m: chr(int(m[1], 8))  # noqa: E731
    assert re.sub(r"\\([0-7]{3})", unescape, text).encode("latin1") == data


@pytest.mark.parametrize(
    "make, error, words",
    [
        (lambda: nn.LSTM(1, 2), TypeError, "module: expected a layer of fused_rnn, got LSTM"),
        (lambda: fused_rnn.LSTMCell(1, 2), TypeError, "got LSTMCell"),
        (lambda: fused_rnn.GRU(1, 2, bidirectional=True), ValueError, "one direction"),
        (lambda: fused_rnn.LSTM(1, 3, proj_size=2), ValueError, "proj_size=0, got 2"),
        (lambda: fused_rnn.GRU(1, 2, norm="layer"), ValueError, "no norm, got 'layer'"),
        (lambda: fused_rnn.GRU(1, 2, zoneout=0.1), ValueError, "no zoneout, got 0.1"),
        (lambda: fused_rnn.GRU(1, 64, blocks=2), ValueError, "no blocks, got 2"),
        (lambda: fused_rnn.GRU(1, 2).bfloat16(), ValueError, "torch.bfloat16"),
        (lambda: zoo.GRUD(1, 2), ValueError, "values given for each step"),
    ],
)
def test_refused(
    make: Callable[[], nn.Module], error: type[Exception], words: str, tmp_path: Path
) -> None:
    with pytest.raises(error, match=re.escape(words)):
        fused_rnn.export_cpp(make(), tmp_path / "net")
    assert not (tmp_path / "net").exists()


def test_refused_arguments(tmp_path: Path) -> None:
    rnn = fused_rnn.GRU(1, 2)
    with pytest.raises(ValueError, match="name: expected letters"):
        fused_rnn.export_cpp(rnn, tmp_path / "my-net")
    with pytest.raises(ValueError, match="name: expected letters"):
        fused_rnn.export_cpp(rnn, tmp_path / "net", name="1st")
    with pytest.raises(TypeError, match=r"head: expected a torch.nn.Linear, got ReLU"):
        fused_rnn.export_cpp(rnn, tmp_path / "net", head=nn.ReLU())  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="head: expected in_features=2, got 3"):
        fused_rnn.export_cpp(rnn, tmp_path / "net", head=nn.Linear(3, 1))
    with pytest.raises(ValueError, match="head: expected torch.float32"):
        fused_rnn.export_cpp(rnn, tmp_path / "net", head=nn.Linear(2, 1).double())
    rnn.weight_hh_l0 = nn.Parameter(torch.randn(6, 3))
    with pytest.raises(ValueError, match=r"weight_hh_l0 of \[6, 2\], got \[6, 3\]"):
        fused_rnn.export_cpp(rnn, tmp_path / "net")
    assert not list(tmp_path.iterdir())


def test_the_module_stays_as_it_is(tmp_path: Path) -> None:
    rnn = fused_rnn.GRU(1, 2)
    before = copy.deepcopy(rnn.state_dict())
    fused_rnn.export_cpp(rnn, tmp_path / "net")
    assert rnn.training and all(p.requires_grad for p in rnn.parameters())
    assert all(torch.equal(value, before[key]) for key, value in rnn.state_dict().items())
