"""Libraries that the tests run on in place of the CPU's, as FUSED_RNN_TEST_ENGINE says.

emulated: the CUDA engine without a card, csrc/cuda, unchanged, compiled for the host on top of
tests/cpp. It has the same operators as on a card, for CPU tensors; only matrix products, streams
and graphs are stand-ins (tests/cpp/host.cpp). emulated-asan: with accesses to memory checked.

cpu-asan: the CPU's engine, with accesses to memory and undefined behaviour checked.

cpu-tiles: the CPU's engine on a processor with AVX-512 and tiles, whose instructions are emulated
(tests/cpp/tile_unit). cpu-tiles-asan: both.

A process that runs on an engine with -asan must preload the sanitizer, see ``sanitizer``.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch.utils.cpp_extension import include_paths

from fused_rnn import build

ROOT = Path(__file__).resolve().parents[1]
ENGINE = os.environ.get("FUSED_RNN_TEST_ENGINE", "")
WANTED = ENGINE.startswith("emulated")
STAND_INS = ["host.cpp", "emulate.cpp"]  # of tests/cpp
REPLACED = ["cublas.cpp", "graph.cpp", "device.cpp"]  # of csrc/cuda, by the former


def sanitizer(engine: str) -> dict[str, str] | None:
    """The environment of a process that tests ``engine``; None if the compiler has no sanitizer."""

    def path_of(library: str) -> str:
        command = [*build.find_compiler().command, f"-print-file-name={library}"]
        return subprocess.run(command, capture_output=True, text=True).stdout.strip()

    # The second is where the first looks for what throws exceptions; python itself loads none.
    preload = [path_of("libasan.so"), path_of("libstdc++.so")]
    if not all(Path(path).is_file() for path in preload):
        return None
    own = {"FUSED_RNN_TEST_ENGINE": engine, "LD_PRELOAD": " ".join(preload)}
    options = {"ASAN_OPTIONS": "detect_leaks=0", "UBSAN_OPTIONS": "print_stacktrace=1"}
    return {**os.environ, **own, **options}


def compile_cpu(engine: str) -> Path:
    """The CPU's library by the package's own build, with other flags."""
    before = build.BASE_FLAGS, build.LINK_FLAGS, build.X86_TIERS
    digest = ""
    if engine.endswith("-asan"):
        flags = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]
        build.BASE_FLAGS = [*build.BASE_FLAGS, "-O1", "-g1", *flags, "-Wno-maybe-uninitialized"]
        build.LINK_FLAGS = ["-shared", "-fopenmp", *flags]
    if "tiles" in engine:
        unit = ROOT / "tests/cpp/tile_unit"
        digest = _digest(sorted(unit.iterdir()))
        # Vectors of 64 bytes, of whatever instructions there are: they fit in no register.
        build.X86_TIERS = {**build.X86_TIERS, "avx512": [*build.AVX2_FLAGS, "-D__AVX512F__"]}
        features = ["-D__builtin_cpu_supports(feature)=1", "-DFRNN_KEEP_IN_REGISTER(v)="]
        build.BASE_FLAGS = [*build.BASE_FLAGS, f"-I{unit}", *features, "-mavx2", "-mfma"]
    try:
        folder = ROOT / "build" / f"{engine}-{build.cache_key(build.find_compiler())}{digest}"
        library = folder / f"{build.LIBRARY['cpu']}.so"
        return library if library.is_file() else build.compile_library(folder)
    finally:
        build.BASE_FLAGS, build.LINK_FLAGS, build.X86_TIERS = before


def compile_emulated() -> Path:
    """The CUDA engine's library."""
    flags = [*build.BASE_FLAGS, "-DFUSED_RNN_EMULATE", f"-I{ROOT / 'tests/cpp'}", f"-I{build.CSRC}"]
    flags += ["-O0"]  # compiling takes longer than the tests
    link_flags = build.LINK_FLAGS
    if ENGINE.endswith("-asan"):
        flags += ["-g1", "-fsanitize=address", "-Wno-maybe-uninitialized"]
        # Calls instead of code at each access: a quarter less to compile.
        flags += ["--param", "asan-instrumentation-with-call-threshold=0"]
        link_flags = ["-shared", "-fopenmp", "-fsanitize=address"]
    torch_flags = [build.TORCH_TARGET]
    for include in include_paths():
        torch_flags += ["-isystem", str(include)]
    plain = [p for p in sorted((build.CSRC / "cuda").glob("*.cpp")) if p.name not in REPLACED]
    stand_ins = [ROOT / "tests/cpp" / name for name in STAND_INS]
    fast = [*flags, "-O2"]  # for the stand-ins: all matrix products are there
    libraries = [f"-L{Path(torch.__file__).parent / 'lib'}", "-ltorch", "-ltorch_cpu", "-lc10"]

    def units(folder: Path) -> Units:
        generated = list(build._write_cuda_instances(folder))
        binding = (build.CSRC / "ops" / "cuda.cpp", [*flags, *torch_flags])
        return [
            *((path, flags) for path in (*plain, *generated)),
            *((path, fast) for path in stand_ins),
            binding,
        ]

    sources = [*build.source_files("cuda"), *sorted((ROOT / "tests/cpp").glob("*.[ch]*"))]
    return _compile("fused_rnn_emulated.so", sources, units, fast, [*link_flags, *libraries])


def compile_race_check() -> Path:
    """tests/cpp/race_main.cpp with the CPU's engine, under the thread sanitizer."""
    flags = [*build.BASE_FLAGS, "-O1", "-g1", "-fsanitize=thread", f"-I{build.CSRC}"]
    main = ROOT / "tests/cpp/race_main.cpp"

    def units(folder: Path) -> Units:
        plain = [main, *sorted((build.CSRC / "cpu").glob("*.cpp"))]
        for old in folder.glob("*.cpp"):  # of a build that failed: they would not be named again
            old.unlink()
        generated = build._write_instances(folder)
        return [*((p, flags) for p in plain), *((p, [*flags, *own]) for p, own in generated)]

    sources = [*build.source_files("cpu"), main]
    return _compile("race_check", sources, units, flags, ["-fsanitize=thread", "-pthread"])


Units = list[tuple[Path, list[str]]]  # a source and its flags


def _digest(sources: Sequence[Path], facts: str = "") -> str:
    digest = hashlib.sha256(facts.encode())
    for path in sources:
        digest.update(path.read_bytes())
    return f"-{digest.hexdigest()[:12]}"


def _compile(
    name: str,
    sources: Sequence[Path],
    units: Callable[[Path], Units],
    flags: list[str],
    link_flags: list[str],
) -> Path:
    """``name`` in a folder of ``build/``, from there if it was made of the same sources before."""
    facts = [flags, torch.__version__, build.find_compiler()]
    folder = ROOT / "build" / f"{Path(name).stem}{_digest(sources, repr(facts))}"
    made = folder / name
    if made.is_file():
        return made
    folder.mkdir(parents=True, exist_ok=True)
    lines = [
        f"cxx = {build._ninja_words(build.find_compiler().command)}",
        "rule compile",
        "  command = $cxx $flags -x c++ -c $in -o $out",
        "rule link",
        "  command = $cxx $in $flags -o $out",
    ]
    count = 0
    for count, (path, own) in enumerate(units(folder), 1):
        lines.append(f"build {count}.o: compile {build._ninja_path(path)}")
        lines.append(f"  flags = {build._ninja_words(own)}")
    lines.append(f"build made: link {' '.join(f'{n + 1}.o' for n in range(count))}")
    lines.append(f"  flags = {build._ninja_words(link_flags)}\n")
    (folder / "build.ninja").write_text("\n".join(lines))
    command = [build.find_ninja(), "-C", str(folder), "-j", str(build.max_jobs())]
    env = {k: v for k, v in os.environ.items() if k != "LD_PRELOAD"}  # a compiler is not checked
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stdout[-4000:]
    os.replace(folder / "made", made)
    return made


def use() -> None:
    """Have the package use it, from now on, for CPU tensors."""
    library = compile_emulated() if WANTED else compile_cpu(ENGINE)
    torch.ops.load_library(str(library))
    build._states["cpu"] = build.State("native", "the tests ask for it", library, "built now")
