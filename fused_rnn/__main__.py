"""``python -m fused_rnn doctor | build | clean``: looks after the native libraries."""

from __future__ import annotations

import argparse
import sys

from . import build


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
        return build.report.doctor(build.libraries, arguments.build)
    if arguments.command == "build":
        return build.report.build(build.libraries)
    for path in build.clean():
        print(f"deleted {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
