"""The libraries that there are, one per type of device: what each is made of, as data."""

from __future__ import annotations

import dataclasses
import hashlib
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from . import tools
from .ninja import Unit
from .sources import CSRC, PACKAGE, cells, machine, source_files
from .tools import Tools
from .version import TORCH_MIN, VERSION

TORCH_TARGET = f"-DTORCH_TARGET_VERSION=0x{TORCH_MIN[0]:02X}{TORCH_MIN[1]:02X}000000000000"

# No -march=native: caches are shared between machines. No -ffast-math: it breaks inf and NaN.
FLAGS = tuple(
    "-std=c++17 -O2 -fPIC -fopenmp -fvisibility=hidden -fno-math-errno -fno-trapping-math "
    "-Wall -Wextra -Wno-psabi -Wno-unknown-pragmas".split()
)
AVX2 = tuple("-mavx2 -mfma -mf16c".split())
AVX512 = tuple("-mavx512f -mavx512dq -mavx512bw -mavx512vl -mprefer-vector-width=512".split())
# Relaxed constexpr: kernels call std::numeric_limits and the like.
NVCC_FLAGS = tuple(
    "-std=c++17 -O3 --expt-relaxed-constexpr -Xcompiler -fPIC,-fvisibility=hidden -lineinfo".split()
)
# A missing symbol fails here, not at load. Torch's libraries are named as needed even where weak
# symbols alone ask for them: without libc10 newer linkers take those for missing.
LINUX = sys.platform.startswith("linux")
# What is exported for libraries of single cells is called directly from within.
STRICT = ("-Wl,--as-needed", "-Wl,-z,defs", "-Wl,-Bsymbolic-functions") if LINUX else ()
NEEDED = ("-Wl,--no-as-needed",) if LINUX else ()


class Variant(NamedTuple):
    """One way to compile the templates of a folder: what replaces @WORDS@ in them, and flags."""

    name: str
    words: Mapping[str, str]
    flags: tuple[str, ...] = ()


def cpu_variants(tiers: Mapping[str, tuple[str, ...]]) -> tuple[Variant, ...]:
    """Each computing type with each set of instructions, given with its flags.

    Lowest first: of the copies of an inline function (of the standard library, say) the linker
    keeps the first, which every processor must be able to run.
    """
    return tuple(
        Variant(f"{tier}_{scalar}", {"tier": tier, "scalar": scalar}, flags)
        for tier, flags in tiers.items()
        for scalar in ("float", "double")
    )


def filled(template: Path, words: Mapping[str, str]) -> str:
    """The text of a template with each @WORD@ replaced."""
    text = template.read_text(encoding="utf-8")
    for word, value in words.items():
        text = text.replace(f"@{word.upper()}@", value)
    return text


# Needs no flag to be used. For AArch64, and not for x86, gcc moves loads ahead before it gives out
# registers: of tiles that fill all of them, sums would go through memory.
NEON = ("-fno-schedule-insns",)
# By machine, the first levels of csrc/cpu/levels.def with their flags.
TIERS_OF: dict[str, dict[str, tuple[str, ...]]] = {
    "x86_64": {"generic": (), "avx2": AVX2, "avx512": AVX512 + AVX2},
    "aarch64": {"generic": ("-DFRNN_GENERIC",), "neon": NEON},
}
TIERS = TIERS_OF.get(machine(), {"generic": ()})

# In the order of enum Storage; the second is the type in C++.
CUDA_VARIANTS = tuple(
    Variant(storage, {"storage": storage, "scalar": scalar})
    for storage, scalar in {
        "float": "float",
        "double": "double",
        "bfloat16": "__nv_bfloat16",
        "half": "__half",
    }.items()
)


@dataclass(frozen=True)
class Target:
    """A library: ``dataclasses.replace`` makes others of it, for tests."""

    name: str  # a folder of csrc, and a type of devices
    title: str  # in messages
    stem: str  # of the library and of its record in the cache
    ahead_of_time: str  # the same beside the package, "" if setup.py does not compile it
    bindings: tuple[str, ...]  # stems of files in csrc/ops
    variants: tuple[Variant, ...]
    kinds: tuple[str, ...]  # of processors it is for; empty if the tools say
    find_tools: Callable[[], Tools]
    rule: str  # the tool for what is in the folder: a key of Tools.commands
    kernel_flags: tuple[str, ...]  # of what is in the folder
    binding_flags: tuple[str, ...]
    link_flags: tuple[str, ...]
    torch_flags: tuple[str, ...]  # for the linker, before torch's libraries
    torch_libraries: tuple[str, ...]
    space: int  # bytes on disk that compiling may take
    csrc: Path = CSRC
    package: Path = PACKAGE

    def plus(self, *flags: str) -> Target:
        """The same, with more flags for the C++ compiler."""
        return dataclasses.replace(
            self,
            kernel_flags=(*self.kernel_flags, *flags),
            binding_flags=(*self.binding_flags, *flags),
        )

    def source_files(self) -> list[Path]:
        """Everything that a build of this target may read, in a fixed order."""
        others = [other for other in TARGETS.values() if other.name != self.name]
        folders = {other.name for other in others}
        stems = {stem for other in others for stem in other.bindings}

        def wanted(path: Path) -> bool:
            return path.parent.name not in folders and path.stem not in stems

        return source_files(self.csrc, wanted)

    def source_hash(self) -> str:
        """Hash of all that decides what the library does: sources, flags, platform. 12 digits."""
        facts = [self.kernel_flags, self.binding_flags, self.link_flags, self.variants]
        facts += [(TORCH_TARGET, sys.platform, machine())]
        digest = hashlib.sha256(repr(facts).encode())
        for path in self.source_files():
            content = path.read_bytes()
            name = path.relative_to(self.csrc).as_posix()
            digest.update(f"{name} {len(content)}\n".encode() + content)
        return digest.hexdigest()[:12]

    def cache_key(self, tools: Tools) -> str:
        """Name of the library's folder in a cache: new inputs, new folder; none is built twice."""
        import torch

        facts = [torch.__version__, torch.version.git_version, tools.found, self._python_flags()]
        tools_hash = hashlib.sha256(repr(facts).encode()).hexdigest()[:12]
        return f"{VERSION}-{self.source_hash()}-{tools_hash}"

    def units(self, folder: Path) -> list[Unit]:
        """All to compile; what is generated of templates is written into the folder."""
        from torch.utils.cpp_extension import include_paths

        include = f"-I{self.csrc}"
        flags = [*self.binding_flags, include, TORCH_TARGET, *self._python_flags()]
        named = {self.csrc: "csrc"}
        for folder_of_torch in include_paths():
            flags += ["-isystem", str(folder_of_torch)]
            named[Path(folder_of_torch)] = "torch"
        # In messages, files have names that do not tell where the library was compiled.
        flags += [f"-ffile-prefix-map={path}={name}" for path, name in named.items()]
        found = [Unit(self.csrc / "ops" / f"{stem}.cpp", flags) for stem in self.bindings]
        kernel_flags = [*self.kernel_flags, include]
        for path in sorted((self.csrc / self.name).glob("*.cpp")):
            found.append(Unit(path, kernel_flags, self.rule))
        for path, variant in self.instances(folder):
            found.append(Unit(path, [*kernel_flags, *variant.flags], self.rule))
        return found

    def instances(self, folder: Path) -> Iterator[tuple[Path, Variant]]:
        """Writes a file for each variant of each template, and each cell if it names the cell.

        Yields each with its variant.
        """
        known = cells(self.csrc)
        templates = sorted((self.csrc / self.name).glob("*.in"))
        for variant in self.variants:
            for template in templates:
                text = template.read_text(encoding="utf-8")
                stem, suffix = template.name.removesuffix(".in").split(".")
                for cell in known if "@NAME@" in text else [None]:
                    parts = [stem, variant.name, *([cell.name] if cell else [])]
                    words = {**variant.words, **(cell._asdict() if cell else {})}
                    path = folder / f"{'_'.join(parts)}.{suffix}"
                    path.write_text(filled(template, words), encoding="utf-8")
                    yield path, variant

    def facts(self) -> dict[str, Any]:
        """What the record says of the library beside how it was made."""
        return {"cells": [cell.name for cell in cells(self.csrc)]}

    def label(self, kinds: list[str]) -> str:
        """What is compiled, for people."""
        return f"{self.name.upper()} kernels ({', '.join(kinds)})"

    def link(self) -> list[str]:
        """The flags for the linker."""
        import torch

        folder = Path(torch.__file__).parent / "lib"
        torch_libraries = (f"-l{name}" for name in self.torch_libraries)
        return [*self.link_flags, f"-L{folder}", *self.torch_flags, *torch_libraries]

    def _python_flags(self) -> list[str]:
        return tools.python_include() if "direct" in self.bindings else []


CPU = Target(
    name="cpu",
    title="native",
    stem="fused_rnn_native",
    ahead_of_time="_native",
    bindings=("cpu", "direct", "glibc"),
    variants=cpu_variants(TIERS),
    kinds=tuple(TIERS),
    find_tools=tools.for_cpu,
    rule="cxx",
    kernel_flags=FLAGS,
    binding_flags=FLAGS,
    link_flags=("-shared", "-fopenmp", *STRICT),
    torch_flags=NEEDED,
    torch_libraries=("torch_cpu", "c10"),
    space=30 << 20,  # 5 MB were seen, without the files that compilers delete at once
)
CUDA = Target(
    name="cuda",
    title="CUDA",
    stem="fused_rnn_cuda",
    ahead_of_time="",
    bindings=("cuda",),
    variants=CUDA_VARIANTS,
    kinds=(),
    find_tools=tools.for_cuda,
    rule="nvcc",
    kernel_flags=NVCC_FLAGS,
    binding_flags=(*FLAGS, "-DUSE_CUDA"),
    # The CUDA runtime and cuBLAS are the copies that torch loads, found through its libraries.
    link_flags=("-shared",),
    torch_flags=(),
    torch_libraries=("torch", "torch_cpu", "c10", "torch_cuda", "c10_cuda"),
    space=200 << 20,
)
TARGETS = {target.name: target for target in (CPU, CUDA)}
