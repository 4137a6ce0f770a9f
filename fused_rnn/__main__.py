"""``python -m fused_rnn doctor | build | clean``: looks after the native libraries."""

from __future__ import annotations

import argparse
import contextlib
import sys
import warnings

import torch

from . import build


def doctor(try_it: bool) -> int:
    """Print what is known about the native library. Returns 1 if native is asked for in vain."""
    requested = build.requested_backend()
    if try_it:
        load()
    facts = build.info()
    problem, remedy = facts.pop("problem"), facts.pop("remedy")
    for name, value in facts.items():
        print(f"{name:9} {show(value)}")
    print()
    if problem:
        print(f"problem   {problem}\nremedy    {remedy}")
    elif facts["backend"]:
        print("all is well" if facts["backend"] == "native" else "native is switched off")
    elif facts["library"]:
        print("all is well: the library is loaded at the first use")
    else:
        print("all is well: the first use, or `python -m fused_rnn build`, builds the library")
    return int(requested == "native" and problem is not None)


def show(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key}={show(item)}" for key, item in value.items()) or "-"
    if isinstance(value, list):
        return ", ".join(value)
    if isinstance(value, float):
        return f"{value:.3g}"
    return "-" if value in (None, "") else str(value)


def load() -> None:
    """Load or build the libraries of this machine; a failure is left for build.info() to tell."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        for target in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
            with contextlib.suppress(RuntimeError):
                build.backend(target)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m fused_rnn", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("doctor", help="say what is used and why, and how to mend it")
    command.add_argument("--build", action="store_true", help="load or build the library first")
    commands.add_parser("build", help="build what this machine needs into the cache now")
    commands.add_parser("clean", help="delete the libraries in the cache")
    arguments = parser.parse_args()
    try:
        return run(arguments)
    except ValueError as error:  # a setting that cannot be
        parser.error(str(error))


def run(arguments: argparse.Namespace) -> int:
    """Carry out one command. Returns the exit code."""
    if arguments.command == "doctor":
        return doctor(arguments.build)
    if arguments.command == "clean":
        for path in build.clean():
            print(f"deleted {path}")
        return 0
    load()
    facts = build.info()
    if facts["backend"] != "native":
        reason = f"{facts['problem']}\n{facts['remedy']}" if facts["problem"] else facts["reason"]
        print(reason, file=sys.stderr)
        return 1
    print(f"{facts['library']} ({facts['origin']})")
    return 0


if __name__ == "__main__":
    sys.exit(main())
