"""Ninja: the text of its file, a run of it, and what a failed run means."""

from __future__ import annotations

import contextlib
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from . import settings
from .messages import BuildError, CompileError
from .tools import environment, max_jobs


class Unit(NamedTuple):
    """One source to compile."""

    source: Path
    flags: Sequence[str]
    rule: str = "cxx"  # a name among the commands


def write(
    folder: Path,
    commands: Mapping[str, Sequence[str]],
    units: Iterable[Unit],
    link_flags: Sequence[str],
    output: str,
) -> None:
    """``folder/build.ninja``, which compiles the units and links them into ``folder/output``.

    The command "cxx" links too.
    """
    lines = []
    for rule, command in commands.items():
        lines += [
            f"rule {rule}",
            f"  command = {_words(command)} $flags -c $in -o $out",
            "  description = $out",
        ]
    lines += [
        "rule link",
        f"  command = {_words(commands['cxx'])} $in $flags -o $out",
        "  description = $out",
    ]
    objects = []
    for number, unit in enumerate(units):
        objects.append(f"{number}_{unit.source.stem}.o")
        source = unit.source
        if source.is_relative_to(folder):  # whose name is another each time: caches of compilers
            source = source.relative_to(folder)
        lines.append(f"build {objects[-1]}: {unit.rule} {_path(source)}")
        lines.append(f"  flags = {_words(unit.flags)}")
    lines.append(f"build {output}: link {' '.join(objects)}")
    lines.append(f"  flags = {_words(link_flags)}\n")
    (folder / "build.ninja").write_text("\n".join(lines), encoding="utf-8")


def _words(words: Sequence[str]) -> str:
    return shlex.join(words).replace("$", "$$")


def _path(path: Path) -> str:
    return re.sub(r"([$ :])", r"$\1", str(path))


# Ends what it becomes once its input ends, as it does when this process is gone, however it ended;
# a line of input calls that off.
_UNTIL_INPUT_ENDS = 'exec 3<&0; (read _ <&3 || kill -TERM $$) & exec "$@" </dev/null 3<&-'


def run(program: str, folder: Path, log: Path) -> None:
    """Run ninja in the folder with its output in log, showing how far it is. Raises BuildError."""
    verbose = settings.flag("FUSED_RNN_VERBOSE")
    live = sys.stderr.isatty() and not verbose
    command = ["/bin/sh", "-c", _UNTIL_INPUT_ENDS, "sh", program]
    command += ["-C", str(folder), "-j", str(max_jobs()), *(["-v"] if verbose else [])]
    # Compilers leave files of their own where there is room, as has been asked.
    env = environment(NINJA_STATUS="[%f/%t] ", TMPDIR=str(folder))
    start, steps, code = time.monotonic(), "starting", None
    with (
        log.open("wb") as sink,
        log.open(encoding="utf-8", errors="replace") as source,
        subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=sink, stderr=sink, env=env
        ) as process,
    ):
        try:
            while code is None:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    code = process.wait(timeout=0.2)
                text = source.read()
                steps = (re.findall(r"^\[\d+/\d+\]", text, re.MULTILINE) or [steps])[-1]
                if verbose:
                    sys.stderr.write(text)
                elif live:
                    seconds = time.monotonic() - start
                    sys.stderr.write(f"\rfused_rnn: {steps} {seconds:.0f} s\x1b[K")
                sys.stderr.flush()
            process.communicate(b"\n")
        except BaseException:  # such as Ctrl-C: ninja then stops its compilers
            process.terminate()
            raise
        finally:
            if live:
                sys.stderr.write("\r\x1b[K")
    if code:
        raise _failure(log)


def _failure(log: Path) -> BuildError:
    text = log.read_text(encoding="utf-8", errors="replace")
    error = re.search(r"^.*(error: |undefined reference|cannot find).*$", text, re.MULTILINE)
    reason = error[0].strip() if error else text.strip().rpartition("\n")[2]
    reason = f"the kernels do not compile: {reason}"
    # A full disk may have no place for what compilers say of it.
    if "No space left on device" in text or shutil.disk_usage(log.parent).free < 1 << 20:
        remedy = f"see {log}, and free disk space"
    elif "Killed" in text:  # the system ran out of memory
        remedy = f"see {log}, or set FUSED_RNN_MAX_JOBS=1, so that fewer compilers share the memory"
    else:
        return CompileError(reason, f"see {log}, or try another compiler by setting CXX")
    return BuildError(reason, remedy)
