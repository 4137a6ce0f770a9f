"""``make sanitize``: tests of values, gradients and direct calls on a CPU engine whose accesses are
checked.

Address and undefined behaviour sanitizers, once for each instruction set; those that the machine
lacks are emulated (tests/cpp/tile_unit). Then races, in a program of its own. First, mistakes are
made on purpose: who finds none there would find none elsewhere.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import emulated

from fused_rnn import build

ROOT = Path(__file__).resolve().parents[1]
CAPABILITIES = build.levels()[::-1]  # at most
TESTS = """ops parity ragged tiles norm stages native_stages streams freeze int8 lengths
direct direct_modules direct_operators""".split()
# Of each test, drawn anew in every run.
CASES = 24
# About torch, the reference, or processes that this library is not loaded in.
LEFT_OUT = "not opcheck and not lesser and not fewer and not derivatives and not reaches"
# Of options between two steps, mixtures are what pairs are; and no graphs.
LEFT_OUT += " and not sound and not pairs and not compile"
# What is emulated is slow (some minutes each): each way through the code once, mostly.
EMULATED = "projection or apart or growing or cells or range and gru and h0"

PREPARE = 'import sys; sys.path.insert(0, "tests"); import emulated; emulated.use()'

# An input that claims one step more than its memory has.
TOO_LONG = f"""
{PREPARE}
import numpy, torch, fused_rnn
x = numpy.zeros((40, 30, 50), dtype="float32")
x = numpy.lib.stride_tricks.as_strided(x, (41, 30, 50), x.strides)
fused_rnn.GRU(50, 64)(torch.from_numpy(x))
"""
# A value past the end of a piece of workspace, inside the block.
PAST_A_PIECE = """
#include "core/scratch.h"
int main() {
  float *a = nullptr, *b = nullptr;
  frnn::Scratch scratch;
  scratch.Build([&](frnn::Scratch& s) { a = s.Take<float>(10), b = s.Take<float>(10); });
  a[9] = b[9] = 1;
  a[10] = 1;
}
"""


def run(title: str, command: list[str], env: dict[str, str], fails_by: str = "") -> list[str]:
    """Its title if it failed; with ``fails_by``, exit if it does not fail so."""
    print(f"== {title}", flush=True)
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=bool(fails_by), text=True)
    if not fails_by and done.returncode:
        print(f"== {title}: failed", flush=True)
        return [title]
    if fails_by and (done.returncode == 0 or fails_by not in done.stdout + done.stderr):
        sys.exit(f"{title}: not found\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    return []


def instructions(env: dict[str, str]) -> str:
    """The best of CAPABILITIES that there is here."""
    code = f'{PREPARE}; import fused_rnn; print(fused_rnn.backend_info()["instructions"])'
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=True)
    return done.stdout.split()[-1]


def main() -> None:
    argparse.ArgumentParser(description=__doc__).parse_args()
    env = emulated.sanitizer("cpu-asan")
    if env is None:
        sys.exit("this compiler has no address sanitizer")
    emulated.compile_cpu("cpu-asan")

    compiler = [*build.find_compiler().command, "-std=c++17", "-fsanitize=address"]
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "planted.cpp"
        source.write_text(PAST_A_PIECE)
        program = str(source.with_suffix(""))
        sources = [str(source), str(build.CSRC / "cpu" / "scratch.cpp")]
        subprocess.run([*compiler, f"-I{build.CSRC}", *sources, "-o", program], check=True)
        run("planted: past a piece", [program], dict(os.environ), fails_by="use-after-poison")

    failed: list[str] = []
    capabilities = CAPABILITIES[CAPABILITIES.index(instructions(env)) :]
    if len(capabilities) < len(CAPABILITIES):
        emulated.compile_cpu("cpu-tiles-asan")
    for capability in CAPABILITIES:
        own = env | {"FUSED_RNN_CPU_CAPABILITY": capability}
        here = capability in capabilities
        if not here:
            own["FUSED_RNN_TEST_ENGINE"] = "cpu-tiles-asan"
            assert instructions(own) == capability
        command = [sys.executable, "-c", TOO_LONG]
        run(f"planted: x too short, {capability}", command, own, fails_by="heap-buffer-overflow")
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
        command += ["-k", LEFT_OUT if here else EMULATED]
        command += ["--quick", str(CASES)]
        names = TESTS if here else ["tiles"]
        command += [f"tests/test_{name}.py" for name in names]
        failed += run(f"tests, {capability}", command, own)

    program = str(emulated.compile_race_check())
    run("planted: a race", [program, "0"], dict(os.environ), fails_by="data race")
    for capability in capabilities:
        own = {**os.environ, "FUSED_RNN_CPU_CAPABILITY": capability}
        failed += run(f"races, {capability}", [program, "3"], own)
    if failed:
        sys.exit("failed: " + "; ".join(failed))


if __name__ == "__main__":
    main()
