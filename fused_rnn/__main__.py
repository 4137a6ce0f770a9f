"""``python -m fused_rnn doctor | build | cells | clean`` looks after the native libraries;
``python -m fused_rnn run PROGRAM`` runs a program with this package in torch.nn's place."""

from __future__ import annotations

import argparse
import sys

from . import build
from .run import run_program


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m fused_rnn", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("doctor", help="say what is used and why, and how to mend it")
    command.add_argument("--build", action="store_true", help="load or build the library first")
    commands.add_parser("build", help="build what this machine needs into the cache now")
    commands.add_parser("clean", help="delete the libraries in the cache")
    commands.add_parser("cells", help="list the cells that have kernels")
    command = commands.add_parser(
        "run",
        help="run a script, or with -m a module, with these RNN, LSTM, GRU and cells as torch.nn's",
        usage="%(prog)s [-h] [-m] PROGRAM [ARGUMENT ...]",
    )
    command.add_argument("-m", action="store_true", dest="is_module", help="PROGRAM is a module")
    command.add_argument("program", metavar="PROGRAM")
    own, others = sys.argv[1:], []
    if own[:1] == ["run"]:  # what follows the program is for the program
        end = 3 if own[1:2] == ["-m"] else 2
        own, others = own[:end], own[end:]
    arguments = parser.parse_args(own)
    if arguments.command == "run":
        return run_program(arguments.program, others, is_module=arguments.is_module)
    try:
        return run(arguments)
    except ValueError as error:  # a setting that cannot be
        parser.error(str(error))


def run(arguments: argparse.Namespace) -> int:
    """Carry out one command. Returns the exit code."""
    if arguments.command == "doctor":
        return build.report.doctor(build.libraries, arguments.build)
    if arguments.command == "build":
        return build.report.build(build.libraries)
    if arguments.command == "cells":
        return build.report.cells(build.libraries)
    for path in build.clean():
        print(f"deleted {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
