"""Python programs in a process of their own, forked from one that has imported torch.

That import takes longer than what most of them do. Not for what reads its environment before: torch
and OpenMP, when they are loaded, and the system's loader.
"""

from __future__ import annotations

import atexit
import functools
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

# For each line of input a child, which leaves the loop, and the exit code of that. The child goes
# on to the end of this text as if the interpreter had been started for its program.
SERVER = """
import json, os, runpy, sys, types, torch
for line in sys.stdin:
    child = os.fork()
    if not child:
        break
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
else:
    os._exit(0)
asked = json.loads(line)
for number, path in enumerate([os.devnull, *asked["outputs"]]):
    os.dup2(os.open(path, os.O_RDWR), number)
os.chdir(asked["folder"])
os.environ.clear()
os.environ.update(asked["environment"])
kind, program, *rest = asked["arguments"]
sys.argv = [kind, *rest]
sys.path[0] = "" if kind == "-c" else os.getcwd()
paths = os.environ.get("PYTHONPATH", "")
sys.path[1:1] = [os.path.abspath(path) for path in paths.split(os.pathsep) if paths]
main = sys.modules["__main__"] = types.ModuleType("__main__")
if kind == "-c":
    exec(compile(program, "<string>", "exec"), vars(main))
else:
    runpy._run_module_as_main(program)
"""


@functools.cache
def server() -> subprocess.Popen[str]:
    command = [sys.executable, "-c", SERVER]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    atexit.register(process.communicate)  # it ends when its input does
    return process


def python(
    *arguments: str, cwd: Path | None = None, env: Mapping[str, str] = os.environ
) -> subprocess.CompletedProcess[str]:
    """What ``python -c PROGRAM ...`` or ``python -m MODULE ...`` says, and its exit code."""
    process = server()
    assert process.stdin and process.stdout
    with tempfile.TemporaryDirectory() as folder:
        outputs = [Path(folder, name) for name in ("stdout", "stderr")]
        for path in outputs:
            path.touch()
        asked = {
            "arguments": arguments,
            "outputs": list(map(str, outputs)),
            "folder": str(cwd or Path.cwd()),
            "environment": dict(env),
        }
        print(json.dumps(asked), file=process.stdin, flush=True)
        code = int(process.stdout.readline())
        return subprocess.CompletedProcess(arguments, code, *(p.read_text() for p in outputs))


def tests_on(
    capability: str, seed: int, *files: str, words: str, quick: int
) -> subprocess.CompletedProcess[str]:
    """Some cases of the tests of files that ``words`` name, on these instructions at most."""
    env = {**os.environ, "FUSED_RNN_CPU_CAPABILITY": capability, "FUSED_RNN_TEST_SEED": str(seed)}
    options = ["-q", "-x", "-p", "no:cacheprovider", f"--quick={quick}", "-k", words]
    return python("-m", "pytest", *options, *files, env=env)
