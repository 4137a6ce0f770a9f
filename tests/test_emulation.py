"""The emulation of CUDA device code on the CPU (tests/cpp/emulate.h), checked against itself.

tests/cpp/test_emulation.cpp holds small kernels and their mutants: a barrier or a poll that is
taken out must be found. It is a program, because it is built twice: plain, and with the address and
undefined behaviour sanitizers.
"""

from __future__ import annotations

import subprocess
from pathlib import Path

import emulated
import pytest

from fused_rnn import build

pytestmark = pytest.mark.compiling

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "tests" / "cpp"
SOURCES = [str(FOLDER / name) for name in ("test_emulation.cpp", *emulated.EMULATION)]
CASES = [
    "clusters",
    "conversions",
    "coordinates",
    "matrices",
    "reduction",
    "reports",
    "warp",
    "words",
]

try:
    COMPILER = list(build.find_compiler().command)
except build.BuildError as error:
    pytest.skip(f"{error}", allow_module_level=True)


def compile_with(target: Path, *arguments: str) -> Path:
    command = [*COMPILER, "-std=c++17", "-Wall", "-Wextra", "-Werror", f"-I{FOLDER}"]
    done = subprocess.run(
        [*command, *arguments, "-o", str(target)], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return target


def works(folder: Path, flag: str) -> bool:
    """Whether programs built with the flag compile, link and run here."""
    source, program = folder / "probe.cpp", folder / "probe"
    source.write_text("int main() {}\n")
    for command in ([*COMPILER, flag, str(source), "-o", str(program)], [str(program)]):
        if subprocess.run(command, capture_output=True, timeout=60).returncode:
            return False
    return True


def run(program: Path, *cases: str) -> str:
    done = subprocess.run([program, *cases], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr[-4000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("emulation")


@pytest.fixture(scope="module")
def plain(folder: Path) -> Path:
    """-rdynamic: reports name kernels by their symbols."""
    return compile_with(folder / "plain", "-O1", "-rdynamic", *SOURCES)


@pytest.fixture(scope="module")
def sanitized(folder: Path) -> Path:
    # A store through null is a case of "reports", and goes on to the fault that it expects.
    flag = "-fsanitize=address,undefined"
    if not works(folder, flag):
        pytest.skip(f"{COMPILER[0]} has no working {flag}")
    options = [flag, "-fno-sanitize=null", "-fno-sanitize-recover=undefined", "-g1", "-rdynamic"]
    return compile_with(folder / "sanitized", "-O0", *options, *SOURCES)


def test_all_cases_are_run(plain: Path) -> None:
    assert run(plain).split() == CASES


@pytest.mark.parametrize("case", CASES)
def test_emulation(plain: Path, case: str) -> None:
    assert run(plain, case)


def test_under_sanitizers(sanitized: Path) -> None:
    assert run(sanitized, *CASES)


def test_shared_keyword_is_refused(folder: Path) -> None:
    """A function's static in place of a shared variable would be one for all CTAs."""
    source = folder / "shared.cpp"
    source.write_text(
        '#include "emulate.h"\n'
        "__global__ void k(float* p) {\n  __shared__ float box[32];\n  *p = box[0];\n}\n"
    )
    done = subprocess.run(
        [*COMPILER, "-std=c++17", f"-I{FOLDER}", "-fsyntax-only", str(source)],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode != 0 and "declare shared memory by FRNN_SHARED" in done.stderr
