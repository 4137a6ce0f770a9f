"""``make arm64``: tests on the kernels for arm64, where there is no such machine, under qemu.

Needs Debian, whose packages for arm64 bring Python and what it links to, and of its packages those
that PROGRAMS names. They are unpacked into a folder of build/, with torch for arm64 beside them.
Python runs emulated and takes what it starts itself for programs of this machine: so the kernels
are compiled by the package's own build, with a cross compiler at full speed.

An emulator shows whether values are right. It shows neither speed nor what weakly ordered memory
does to threads: reads and writes come in the order of this machine. For that there are
``make sanitize``, which looks at the order that the program asks for, and machines.
"""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from fused_rnn import build
from fused_rnn.build.target import TIERS_OF

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "build" / "arm64"
SYSTEM, PYTHON = FOLDER / "system", FOLDER / "env" / "bin" / "python"
COMPILER, QEMU = "aarch64-linux-gnu-g++", "qemu-aarch64"
# One that is made: of the most that qemu has, torch takes instructions that qemu then lacks.
PROCESSOR = "neoverse-n1"

# What this needs, and the Debian package that has it.
PROGRAMS = {
    COMPILER: "g++-aarch64-linux-gnu",
    QEMU: "qemu-user",
    "apt-get": "apt",
    "dpkg-deb": "dpkg",
}
# For arm64, with all that they depend on.
PACKAGES = ("python3", "libpython3-dev", "python3-pip-whl", "libstdc++6", "libgomp1")
# What the package and these tests import.
MODULES = ("numpy", "networkx", "setuptools>=77", "pytest", "hypothesis", "expecttest", "tqdm")
# The one looks at the time of a process that an emulator takes longer to start. Of the other, torch
# 2.10 refuses some: it does not compile layers with options.
LEFT_OUT = "not busy_neighbours and not (test_stages and test_compile)"

APT = """\
APT::Architecture "arm64";
APT::Architectures "arm64";
Dir::State::Lists "{folder}/lists";
Dir::State::status "{folder}/status";
Dir::Cache "{folder}";
Dir::Cache::archives "{folder}/archives";
"""
USED = """
import sys
from fused_rnn import build
assert build.backend() == "native" and build.info()["instructions"] == sys.argv[1], build.info()
"""
EMULATED = """\
#!/bin/sh
exec {qemu} -cpu {cpu} -L {system} -0 "$0" {python} "$@"
"""


def run(title: str, command: Sequence[str | Path], **env: str) -> None:
    """Exit if it fails."""
    print(f"== {title}", flush=True)
    done = subprocess.run([*map(str, command)], cwd=ROOT, env={**os.environ, **env})
    if done.returncode:
        sys.exit(f"{title}: failed")


def check_programs() -> None:
    missing = [package for program, package in PROGRAMS.items() if not shutil.which(program)]
    if missing:
        sys.exit(f"make arm64 needs what is missing here: apt-get install {' '.join(missing)}")


def unpack_system() -> None:
    """Debian's packages into SYSTEM. Apt has a state of its own: nothing is installed, and the
    architectures of this machine stay as they are."""
    apt, new = FOLDER / "apt", FOLDER / "system.new"
    for folder in (apt / "lists" / "partial", apt / "archives" / "partial"):
        folder.mkdir(parents=True, exist_ok=True)
    (apt / "status").touch()
    (apt / "apt.conf").write_text(APT.format(folder=apt))
    config = {"APT_CONFIG": str(apt / "apt.conf")}
    run("lists of packages for arm64", ["apt-get", "-q", "update"], **config)
    options = ["--download-only", "--yes", "--no-install-recommends"]
    run("packages for arm64", ["apt-get", "-q", *options, "install", *PACKAGES], **config)
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir()
    for package in sorted((apt / "archives").glob("*.deb")):
        subprocess.run(["dpkg-deb", "--extract", str(package), str(new)], check=True)
    new.rename(SYSTEM)


def make_environment(torch: list[str]) -> None:
    """A virtual environment whose Python is a program of this machine that starts the emulator:
    so emulated programs can start it, too."""
    shutil.rmtree(PYTHON.parents[1], ignore_errors=True)
    PYTHON.parent.mkdir(parents=True)
    home = SYSTEM / "usr" / "bin"
    (PYTHON.parents[1] / "pyvenv.cfg").write_text(f"home = {home}\n")
    words = {"qemu": QEMU, "cpu": PROCESSOR, "system": SYSTEM}
    words["python"] = (home / "python3").resolve()
    words = {name: shlex.quote(str(word)) for name, word in words.items()}
    PYTHON.write_text(EMULATED.format(**words))
    PYTHON.chmod(0o755)
    # Where the build looks for it: a ninja for arm64 would be a program that this machine lacks.
    (PYTHON.parent / "ninja").symlink_to(Path(build.find_ninja()).resolve())
    (pip,) = (SYSTEM / "usr" / "share" / "python-wheels").glob("pip-*.whl")
    install = [PYTHON, "-m", "pip", "install", "--quiet", "--only-binary=:all:"]
    for modules in (torch, [*MODULES]):
        run(f"for arm64: {shlex.join(modules)}", [*install, *modules], PYTHONPATH=str(pip))


def main() -> None:
    parser = argparse.ArgumentParser(description="Tests on the kernels for arm64, under qemu.")
    parser.add_argument("--torch", default="torch==2.10.0", help="what pip is to install")
    parser.add_argument("--quick", default="2", metavar="N", help="cases of each test")
    parser.add_argument("--roles", default="parity", help="of tests that run on each tier")
    args = parser.parse_args()

    check_programs()
    FOLDER.mkdir(parents=True, exist_ok=True)
    if not SYSTEM.is_dir():
        unpack_system()
    made = PYTHON.parents[1] / "made-of"
    facts = repr((args.torch, MODULES, EMULATED, PROCESSOR))
    if not made.is_file() or made.read_text() != facts:
        make_environment(shlex.split(args.torch))
        made.write_text(facts)

    # Debian's Python.h asks for another header, which lies among those of the system.
    compiler = [COMPILER, "-idirafter", str(SYSTEM / "usr" / "include")]
    env = {
        "CXX": shlex.join(compiler),
        "FUSED_RNN_BACKEND": "native",
        "FUSED_RNN_CACHE_DIR": str(FOLDER / "cache"),
        "OMP_WAIT_POLICY": "passive",
        "PYTHONPATH": str(ROOT),
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    run("the kernels", [PYTHON, "-m", "fused_rnn", "build"], **env)
    run("doctor", [PYTHON, "-m", "fused_rnn", "doctor", "--build"], **env)
    test = [PYTHON, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    run("gate functions and plans", [*test, "tests/test_math.py", "tests/test_cpu_plan.py"], **env)
    draw = f"--quick={args.quick}"
    run("tests without kernels", [*test, "--roles=unit", draw, "-k", LEFT_OUT], **env)
    for tier in TIERS_OF["aarch64"]:
        own = env | {"FUSED_RNN_CPU_CAPABILITY": tier}
        run(f"instructions: {tier}", [PYTHON, "-c", USED, tier], **own)
        run(f"tests on {tier}", [*test, f"--roles={args.roles}", draw, "-k", LEFT_OUT], **own)


if __name__ == "__main__":
    main()
