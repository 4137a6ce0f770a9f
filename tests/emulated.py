"""The CUDA engine without a card: csrc/cuda, unchanged, compiled for the host on top of tests/cpp.

The library has the same operators as on a card, for CPU tensors; only matrix products, streams and
graphs are stand-ins (tests/cpp/host.cpp). With FUSED_RNN_TEST_ENGINE=emulated the tests run on it
in place of the CPU's library; with emulated-asan on one whose accesses to memory are checked, in a
process that preloads the sanitizer (see test_cuda_engine.py).
"""

from __future__ import annotations

import hashlib
import os
import subprocess
from pathlib import Path

import torch
from torch.utils.cpp_extension import include_paths

from fused_rnn import build

ROOT = Path(__file__).resolve().parents[1]
ENGINE = os.environ.get("FUSED_RNN_TEST_ENGINE", "")
WANTED = ENGINE.startswith("emulated")
STAND_INS = ["host.cpp", "emulate.cpp"]  # of tests/cpp
REPLACED = ["cublas.cpp", "graph.cpp", "device.cpp"]  # of csrc/cuda, by the former


def compile_library() -> Path:
    """The library, from ``build/`` if it was made of the same sources before."""
    flags = [*build.BASE_FLAGS, "-DFUSED_RNN_EMULATE", f"-I{ROOT / 'tests/cpp'}", f"-I{build.CSRC}"]
    link_flags = build.LINK_FLAGS
    if ENGINE.endswith("-asan"):
        flags += ["-O1", "-g1", "-fsanitize=address", "-Wno-maybe-uninitialized"]
        link_flags = ["-shared", "-fopenmp", "-fsanitize=address"]
    sources = [*build.source_files("cuda"), *sorted((ROOT / "tests/cpp").glob("*.[ch]*"))]
    digest = hashlib.sha256(repr([flags, torch.__version__, build.find_compiler()]).encode())
    for path in sources:
        digest.update(path.read_bytes())
    folder = ROOT / "build" / f"emulated-{digest.hexdigest()[:12]}"
    library = folder / "fused_rnn_emulated.so"
    if library.is_file():
        return library
    folder.mkdir(parents=True, exist_ok=True)

    torch_flags = [build.TORCH_TARGET]
    for include in include_paths():
        torch_flags += ["-isystem", str(include)]
    plain = [p for p in sorted((build.CSRC / "cuda").glob("*.cpp")) if p.name not in REPLACED]
    plain += [ROOT / "tests/cpp" / name for name in STAND_INS]
    plain += list(build._write_cuda_instances(folder))
    units = [(path, flags) for path in plain]
    units.append((build.CSRC / "ops" / "cuda.cpp", [*flags, *torch_flags]))
    libraries = [f"-L{Path(torch.__file__).parent / 'lib'}", "-ltorch", "-ltorch_cpu", "-lc10"]
    lines = [
        f"cxx = {build._ninja_words(build.find_compiler().command)}",
        "rule compile",
        "  command = $cxx $flags -x c++ -c $in -o $out",
        "rule link",
        "  command = $cxx $in $flags -o $out",
    ]
    for number, (path, own) in enumerate(units):
        lines.append(f"build {number}.o: compile {build._ninja_path(path)}")
        lines.append(f"  flags = {build._ninja_words(own)}")
    lines.append(f"build made.so: link {' '.join(f'{n}.o' for n in range(len(units)))}")
    lines.append(f"  flags = {build._ninja_words([*link_flags, *libraries])}\n")
    (folder / "build.ninja").write_text("\n".join(lines))
    command = [build.find_ninja(), "-C", str(folder), "-j", str(build.max_jobs())]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:]
    os.replace(folder / "made.so", library)
    return library


def use() -> None:
    """Have the package use it, from now on, for CPU tensors."""
    library = compile_library()
    torch.ops.load_library(str(library))
    build._states["cpu"] = build.State("native", "the tests ask for it", library, "built now")
