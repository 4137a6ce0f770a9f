"""Compiles CUDA kernels for sm_75 to sm_120a, holds them to a budget. Needs nvcc, no card.

    python tests/compile_gate.py [--all] [ARCH ...]

What differs in no register is compiled once: float16 is like bfloat16, and that is what sm_80 is
tried with. That sm_75 compiles is enough. sm_86 and sm_89 have the instructions and registers of
sm_80, sm_100a and sm_120a get from the same sources what sm_90a gets: each is tried with one cell
in one type, a different one. --all leaves out nothing and takes ten times as long; ARCH, such as
sm_86, leaves out the others. Of cells from Python (gate_cells.py) gate kernels and scans are
compiled, of two cells for all of these.

A kernel that spills registers, has a stack, or takes more registers than the table allows is an
error: on a card it would be slow without being wrong. So is a resident kernel whose steps wait for
longer than they must: where nvdisasm is found, sass.py looks at its instructions.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import sass

ROOT = Path(__file__).resolve().parents[1]
# Registers per thread, in single and double precision. With 64, 1024 threads live on a
# multiprocessor of 65 536 registers, enough to hide the latency of memory.
REGISTERS = {
    "GateForward": (64, 104),
    "GateBackward": (64, 104),
    "OperandForward": (64, 104),
    "OperandBackward": (64, 104),
    "ForwardToShown": (80, 128),
    "ForwardOutput": (48, 64),
    "BackwardToShown": (48, 64),
    "BackwardFromShown": (80, 128),
    "ScanForward": (64, 104),
    "ScanForwardMaps": (64, 104),
    "ScanBackward": (64, 104),
    "ScanBackwardMaps": (64, 104),
    "ScanStarts": (48, 64),
    # A few warps on a multiprocessor, each with a step's weights of a unit on their way.
    "OneStep": (128, 128),
    "Convert": (32, 32),
    "Publish": (40, 40),
    "ScaleBy": (32, 32),
    "AddTo": (32, 32),
    "SumGradients": (32, 32),
    "ColumnSumParts": (40, 40),
    "ColumnSum": (32, 32),
    "Transpose": (32, 32),
    "StartStates": (48, 48),
    "SwapFirst": (32, 32),
    "WholeMatrix": (32, 32),
    "NormRows": (32, 32),
    "NormGrads": (32, 32),
    "StoreOffsets": (32, 32),
    "MaskStates": (40, 40),
    "FindCuts": (32, 32),
    # One block on a multiprocessor, most registers full of weights.
    "ResidentForward": (255, 0),
    "ResidentBackward": (255, 0),
}
# Multiprocessors that hold 1536 threads, where others hold 2048: with a third more registers each,
# as large a part of them lives there.
FEWER_THREADS = ("sm_86", "sm_89", "sm_120a")
# Where loops of small kernels, which wait for memory, are unrolled further: 48 registers are for
# 1365 of 2048 threads.
UNROLLED = {
    ("sm_100a", name): 8 for name in ("ColumnSumParts", "SumGradients", "NormRows", "ScanStarts")
}
# Of a cell whose parameters take registers of their own.
WIDER = {"GateForward<PeepholeLSTM": 72}
# With what happens between two steps beside the cell; in double precision as without.
GATES_WITH_STAGES = r"Gate(For|Back)ward<.*, true>"
MOST_WITH_STAGES = 80
# Of cells from Python, which may be as wide as an LSTM with two more states.
PYTHON = r"(Gate|Operand|Scan)(For|Back)ward(Maps)?<custom::"
MOST_OF_PYTHON = (96, 136)
# In double precision and in scans their sine may call libm's, which has this stack for what is far
# out.
STACK_OF_PYTHON = 40
# Bytes that may be spilled all the same, by kernels that have as many registers as there are.
SPILLS = {
    ("sm_80", "ResidentForward<PeepholeLSTM"): 8,
    ("sm_90a", "ResidentForward<PeepholeLSTM"): 16,
    ("sm_90a", "ResidentForward<LSTM, float, 4, 1, 4, InMemory"): 8,
    ("sm_120a", "ResidentForward<GRU, __nv_bfloat16, 4, 1, 4, InMemory"): 8,
    ("sm_120a", "ResidentBackward<GRU"): 120,
}
# The compiler compares the h of a relu with 0 where it is loaded, and so waits for it too early.
COMPARES_EARLY = "ResidentBackward<Rnn<ReluFn>", "is waited for by FSETP"
# Where the instructions of resident kernels are looked at.
LOOKED_AT = ("sm_80", "sm_90a")
# What is compiled unless --all says all: types, of all cells or of one.
WANTED = {
    "sm_75": ("half",),
    "sm_80": ("bfloat16",),
    "sm_86": ("float gru",),
    "sm_89": ("bfloat16 rnn_tanh",),
    "sm_90a": ("bfloat16", "float", "double"),
    "sm_100a": ("float rnn_tanh",),
    "sm_120a": ("bfloat16 gru",),
}
# Of cells from Python: types, of all of them or of two.
PYTHON_WANTED = {arch: ("simple",) for arch in WANTED}
PYTHON_WANTED |= {arch: ("float", "bfloat16", "double") for arch in LOOKED_AT}


def load_builder():
    """fused_rnn/build by its path: torch need not be installed."""
    path = ROOT / "fused_rnn" / "build" / "__init__.py"
    spec = importlib.util.spec_from_file_location("fused_rnn_build", path)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def demangle(names: list[str]) -> list[str]:
    done = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True)
    return done.stdout.splitlines()


def shorten(name: str) -> str:
    """Kernels without stages have the names of kernels that know none."""
    short = re.sub(r"^void |frnn::cuda::|frnn::", "", name).partition("(")[0]
    return re.sub(r", false>$", ">", short)


def is_let_wait(kernel: str) -> bool:
    """With stages, what is loaded depends on which of them there are: branches, which wait."""
    return kernel.endswith("true>")


def is_of_cluster(kernel: str) -> bool:
    """From sm_90 on there are clusters; before, such a kernel is empty."""
    return kernel.endswith("InCluster>")


def compile_kernels(
    nvcc: str, flags: list[str], source: Path, arch: str, disassembler: str | None
) -> tuple[str, list[str]]:
    """What ptxas says about the kernels of a source, and what is wrong with their instructions."""
    cubin = source.with_suffix(f".{arch}.cubin")
    command = [nvcc, *flags, f"-arch={arch}", "-Xptxas", "-v", "-cubin", "-o", str(cubin)]
    command += [str(source)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(command)}\n{done.stdout}{done.stderr}")
    errors = []
    if disassembler and arch in LOOKED_AT:
        kernels = sass.disassemble(disassembler, cubin)
        for name, code in zip(map(shorten, demangle(list(kernels))), kernels.values(), strict=True):
            if name.startswith("Resident") and not (arch == "sm_80" and is_of_cluster(name)):
                found = sass.look(code, waits="InMemory" in name)
                errors += [
                    f"{arch} {name}: {error}"
                    for error in found.errors
                    if not (name.startswith(COMPARES_EARLY[0]) and COMPARES_EARLY[1] in error)
                    if not (is_let_wait(name) and ("waited for" in error or "polls" in error))
                ]
    return done.stdout + done.stderr, errors


def check(report: str, arch: str) -> tuple[dict[str, int], list[str]]:
    """Registers by kernel, and what is wrong."""
    pattern = (
        r"Function properties for (\w+)\s+(\d+) bytes stack frame, (\d+) bytes spill stores, "
        # Of kernels, not of functions that they call, the registers come next.
        r"(\d+) bytes spill loads\s+(?:(?!Function).)*?Used (\d+) registers"
    )
    found = re.findall(pattern, report, re.DOTALL)
    registers, errors = {}, []
    for name, (_, *numbers) in zip(demangle([f[0] for f in found]), found, strict=True):
        stack, stores, loads, used = map(int, numbers)
        short = shorten(name)
        kind = short.partition("<")[0]
        if kind not in REGISTERS:
            errors.append(f"{arch} {short}: not in the table of kernels")
            continue
        wider = next((n for name, n in WIDER.items() if short.startswith(name)), 0)
        if re.match(GATES_WITH_STAGES, short):
            wider = MOST_WITH_STAGES
        most = 0  # of stack and spills
        if re.match(PYTHON, short):
            wider = MOST_OF_PYTHON["double" in short]
            most = STACK_OF_PYTHON * ("double" in short or kind.startswith("Scan"))
        allowed = max(REGISTERS[kind]["double" in short], wider)
        allowed += UNROLLED.get((arch, kind), 0)
        if arch in FEWER_THREADS:
            allowed = min(255, allowed * 4 // 3 // 8 * 8)
        registers[short] = used
        if arch == "sm_75":
            continue
        budgets = [n for (on, name), n in SPILLS.items() if on == arch and short.startswith(name)]
        if max(stack, stores, loads) > max(budgets, default=most):
            errors.append(f"{arch} {short}: {stack} bytes of stack, spills {stores} + {loads}")
        if used > allowed:
            errors.append(f"{arch} {short}: {used} registers, {allowed} allowed")
    return registers, errors


def is_wanted(arch: str, storage: str, cell: str) -> bool:
    return bool({storage, f"{storage} {cell}"} & set(WANTED[arch]))


def python_sources(folder: Path, target) -> dict[str, Path]:
    """None where there is no torch, which traces them."""
    sys.path.insert(0, str(ROOT))
    try:
        import gate_cells
    except ImportError as error:
        print(f"cells from Python were not compiled: {error}")
        return {}
    scalars = {variant.name: variant.words["scalar"] for variant in target.variants}
    return gate_cells.sources(folder, scalars)


def main() -> None:
    chosen = [word for word in sys.argv[1:] if word != "--all"] or list(WANTED)
    if unknown := set(chosen) - WANTED.keys():
        sys.exit(f"unknown: {' '.join(sorted(unknown))}; there are {' '.join(WANTED)}")
    target = load_builder().CUDA
    nvcc = shutil.which("nvcc") or sys.exit("nvcc was not found")
    disassembler = sass.find_disassembler()
    flags = [*target.kernel_flags, f"-I{target.csrc}"]
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(os.cpu_count()) as pool:
        everything, flags = "--all" in sys.argv[1:], [*flags, f"-I{folder}"]
        wanted = [
            (source, arch)
            for source, variant in target.instances(Path(folder))
            for arch in chosen
            if everything
            or is_wanted(arch, variant.name, source.stem.partition(f"_{variant.name}_")[2])
        ]
        wanted += [
            (source, arch)
            for name, source in python_sources(Path(folder), target).items()
            for arch in chosen
            if everything or name in PYTHON_WANTED[arch]
        ]
        jobs = [
            (arch, pool.submit(compile_kernels, nvcc, flags, source, arch, disassembler))
            for source, arch in wanted
        ]
        errors, most, kernels = [], {}, 0
        for arch, job in jobs:
            report, waits = job.result()
            registers, wrong = check(report, arch)
            errors += wrong + waits
            kernels += len(registers)
            for name, used in registers.items():
                kind = name.partition("<")[0]
                most[kind, arch] = max(most.get((kind, arch), 0), used)
    for (kind, arch), used in sorted(most.items()):
        print(f"{arch:7} {kind:16} at most {used:3} registers")
    missing = REGISTERS.keys() - {kind for kind, _ in most}
    errors += [f"{kind}: was not compiled" for kind in sorted(missing)]
    print(f"{kernels} kernels in {time.monotonic() - start:.0f} s, {len(errors)} errors")
    if disassembler is None:
        print("nvdisasm was not found: the instructions of resident kernels were not looked at")
    if errors:
        sys.exit("\n".join(errors))


if __name__ == "__main__":
    main()
