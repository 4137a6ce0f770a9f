"""C++ that tests call directly: of the library, bound with pybind11 (tests/cpp/bind_*.cpp), or
their own."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import subprocess
import sysconfig
from pathlib import Path
from types import ModuleType

from torch.utils.cpp_extension import include_paths

from fused_rnn import build

ROOT = Path(__file__).resolve().parents[1]


def compiled(name: str, *sources: str, flags: tuple[str, ...] = ()) -> Path:
    """tests/cpp/``name``.cpp as a library, with these files of csrc."""
    paths = [ROOT / f"tests/cpp/{name}.cpp", *(build.CSRC / source for source in sources)]
    command = [*build.find_compiler().command, "-std=c++17", "-O0", "-fPIC", "-shared"]
    command += [*flags, f"-I{build.CSRC}"]
    for folder in (*include_paths(), sysconfig.get_path("include")):  # torch brings pybind11
        command += ["-isystem", folder]
    digest = hashlib.sha256(repr((command, sysconfig.get_config_var("EXT_SUFFIX"))).encode())
    for path in (*paths, *sorted(build.CSRC.rglob("*.h"))):
        digest.update(path.read_bytes())
    made = ROOT / "build" / f"{name}-{digest.hexdigest()[:12]}.so"
    if not made.is_file():
        made.parent.mkdir(exist_ok=True)
        new = made.with_suffix(f".{os.getpid()}")
        done = subprocess.run(
            [*command, "-x", "c++", *map(str, paths), "-o", str(new)],
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        os.replace(new, made)
    return made


def bound(name: str, *sources: str, flags: tuple[str, ...] = ()) -> ModuleType:
    """``compiled``, a pybind11 module."""
    made = compiled(name, *sources, flags=("-fvisibility=hidden", *flags))
    spec = importlib.util.spec_from_file_location(name, made)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
