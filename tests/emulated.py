"""Libraries that the tests run on in place of the CPU's, as FUSED_RNN_TEST_ENGINE says.

emulated: the CUDA engine without a card, csrc/cuda, unchanged, compiled for the host on top of
tests/cpp. It has the same operators as on a card, for CPU tensors; only the runtime under it is a
stand-in (tests/cpp/fake_runtime.cpp). emulated-asan: with accesses to memory checked.

cpu-asan: the CPU's engine, with accesses to memory and undefined behaviour checked.

cpu-tiles: the CPU's engine on a processor with AVX-512 and tiles, whose instructions are emulated
(tests/cpp/tile_unit). cpu-tiles-asan: both.

cpu-contract, emulated-contract: these two with the cells of tests/cells, and those from Python of
tests/contract_cells.py, in the place of the package's.

A process that runs on an engine with -asan must preload the sanitizer, see ``sanitizer``.
"""

from __future__ import annotations

import os
import subprocess
from dataclasses import replace
from pathlib import Path

import torch
from bound import FOLDER, ROOT, compiled, digest_of

from fused_rnn import build
from fused_rnn.build import Unit

ENGINE = os.environ.get("FUSED_RNN_TEST_ENGINE", "")
WANTED = ENGINE.startswith("emulated")
EMULATION = sorted(path.name for path in (ROOT / "tests/cpp").glob("emulate*.cpp"))
STAND_INS = ["fake_runtime.cpp", "host.cpp", *EMULATION]  # of tests/cpp
REPLACED = ["runtime.cpp"]  # of csrc/cuda, by the former


# Cells that read and write what others do too; a sanitized engine takes minutes to compile.
ALIKE = {"rnn_relu": "rnn_tanh", "block_gru": "gru"}


def sources_of(engine: str) -> Path:
    """csrc, or a copy of it: with the cells of tests, or to be sanitized without some that others
    stand for."""
    if engine.endswith("-contract"):
        from contract_cells import headers

        made = copied("csrc-contract", ROOT / "tests/cells")
        with (made / "cells" / "registry.def").open("a") as registry:
            for cell, layer in headers(engine).items():
                (made / "cells" / cell.header).write_text(layer.source())
                registry.write(f"CELL({', '.join(cell)})\n")
        return made
    if engine == "emulated-asan":
        made = copied("csrc-few")
        path = made / "cells" / "registry.def"
        lines = path.read_text().splitlines(keepends=True)
        path.write_text("".join(line for line in lines if line[5:].split(",")[0] not in ALIKE))
        return made
    return build.CSRC


def copied(name: str, cells: Path | None = None) -> Path:
    """A copy of csrc, with other ``cells``."""
    made = FOLDER / name
    copies = {
        made / path.relative_to(build.CSRC): path
        for path in build.CSRC.rglob("*")
        if path.is_file()
    }
    copies |= {made / "cells" / path.name: path for path in (cells.iterdir() if cells else ())}
    for path in made.rglob("*"):  # left by other sources than these
        if path.is_file() and path not in copies:
            path.unlink()
    for to, path in copies.items():
        to.parent.mkdir(parents=True, exist_ok=True)
        to.write_bytes(path.read_bytes())
    return made


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
    # Memory that there is not is refused, as without the sanitizer, and not the end.
    own["ASAN_OPTIONS"] = "detect_leaks=0:allocator_may_return_null=1"
    own["UBSAN_OPTIONS"] = "print_stacktrace=1"
    return {**os.environ, **own}


def cpu_target(engine: str) -> tuple[build.Target, str]:
    """The CPU's library with other flags, and a digest of what else it is made of."""
    target, digest = replace(build.CPU, csrc=sources_of(engine)), ""
    if engine.endswith("-contract"):
        # Compiling takes longer than the tests: one set of instructions, the host's.
        flags = build.TIERS.get(torch.backends.cpu.get_cpu_capability().lower(), ())
        target = replace(target, variants=build.cpu_variants({"generic": flags}))
        target = target.plus("-O0", "-DFRNN_TIERS(TIER,cell)=TIER(generic,cell)")
    if engine.endswith("-asan"):
        flags = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]
        target = target.plus("-O1", "-g1", *flags, "-Wno-maybe-uninitialized")
        target = replace(target, link_flags=("-shared", "-fopenmp", *flags))
    if "tiles" in engine:
        unit = ROOT / "tests/cpp/tile_unit"
        digest = digest_of(sorted(unit.iterdir()))
        # Vectors of 64 bytes, of whatever instructions there are: they fit in no register.
        tiers = {"generic": (), "avx2": build.AVX2, "avx512": (*build.AVX2, "-D__AVX512F__")}
        target = replace(target, variants=build.cpu_variants(tiers))
        features = ["-D__builtin_cpu_supports(feature)=1", "-DFRNN_KEEP_IN_REGISTER(v)="]
        features += ["-DFRNN_BYTES_BY=0", "-DFRNN_BOUNDS_BY_ASM=0"]
        target = target.plus(f"-I{unit}", *features, "-mavx2", "-mfma")
    return target, digest


def compile_cpu(engine: str) -> Path:
    """By the package's own build."""
    target, digest = cpu_target(engine)
    tools = target.find_tools()
    key = f"{engine}-{target.cache_key(tools)}{digest}"
    place = build.Place(FOLDER, key)
    library = place.folder / f"{target.stem}.so"
    return library if library.is_file() else build.compile_library(target, place, tools=tools)


def emulated_target() -> build.Target:
    """The CUDA engine's library, without the stand-ins."""
    flags = ["-DFUSED_RNN_EMULATE", f"-I{ROOT / 'tests/cpp'}"]
    flags += ["-O0"]  # compiling takes longer than the tests
    link_flags = build.CPU.link_flags
    if ENGINE.endswith("-asan"):
        flags += ["-g1", "-fsanitize=address", "-Wno-maybe-uninitialized"]
        # Calls instead of code at each access: a quarter less to compile.
        flags += ["--param", "asan-instrumentation-with-call-threshold=0"]
        link_flags = ("-shared", "-fopenmp", "-fsanitize=address")
    return replace(
        build.CUDA,
        csrc=sources_of(ENGINE),
        find_tools=build.CPU.find_tools,
        rule="cxx",
        kernel_flags=(*build.CPU.kernel_flags, *flags, "-x", "c++"),
        binding_flags=(*build.CPU.binding_flags, *flags),
        link_flags=link_flags,
        torch_libraries=build.CPU.torch_libraries,
    )


def compile_emulated(target: build.Target) -> Path:
    # For the stand-ins: all matrix products are there.
    fast = [*target.binding_flags, f"-I{target.csrc}", "-O2"]

    def units(folder: Path) -> list[Unit]:
        plain = [unit for unit in target.units(folder) if unit.source.name not in REPLACED]
        return plain + [Unit(ROOT / "tests/cpp" / name, fast) for name in STAND_INS]

    sources = [*target.source_files(), *sorted((ROOT / "tests/cpp").glob("*.[ch]*"))]
    return compiled("fused_rnn_emulated.so", sources, units, target.link())


def compile_race_check() -> Path:
    """tests/cpp/race_main.cpp with the CPU's engine, under the thread sanitizer."""
    target = replace(build.CPU.plus("-O1", "-g1", "-fsanitize=thread"), bindings=())
    main = ROOT / "tests/cpp/race_main.cpp"

    def units(folder: Path) -> list[Unit]:
        return [Unit(main, [*target.kernel_flags, f"-I{target.csrc}"]), *target.units(folder)]

    link_flags = ["-fsanitize=thread", "-pthread"]
    return compiled("race_check", [*target.source_files(), main], units, link_flags)


def use() -> None:
    """Have the package use it, from now on, for CPU tensors."""
    if WANTED:
        target = emulated_target()
        build.use("cpu", compile_emulated(target), target)
    else:
        # Cells from Python have kernels too where instructions are the machine's own.
        made = cpu_target(ENGINE)[0] if ENGINE == "cpu-asan" else None
        build.use("cpu", compile_cpu(ENGINE), made)
