"""``python -m fused_rnn run``: a program finds what Python gives it, and ends as in Python."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from forked import python

pytestmark = pytest.mark.unit

RUN = ("-m", "fused_rnn", "run")
PATH = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
ENVIRONMENT = {**os.environ, "PYTHONPATH": PATH}


def start(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """A new interpreter."""
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=folder, env=ENVIRONMENT, capture_output=True, text=True)


def assert_as_in_python(folder: Path, *arguments: str) -> None:
    """The same exit code, and not a line more in what is printed."""
    found = python(*RUN, *arguments, cwd=folder, env=ENVIRONMENT)
    expected = start(folder, *arguments)
    assert found.stdout == expected.stdout and found.stderr == expected.stderr
    assert found.returncode == expected.returncode


STATE = """
import builtins, os, pickle, sys
me = sys.modules["__main__"]
assert vars(me) is globals() and __builtins__ is builtins
def function(): pass
assert pickle.loads(pickle.dumps(function)) is function
print(sys.argv, sys.path[0], sys.path.count(sys.path[0]), sorted(vars(me)))
print(__name__, __file__, __package__, __cached__, getattr(__spec__, "name", None), __annotations__)
print(__loader__.get_filename(__loader__.name))
"""

PROGRAMS = {
    "script": ("folder/script.py", "a", "--", "-m", "--help"),
    "roundabout": ("./folder/../folder/script.py",),
    "link": ("link.py", "-h"),
    "folder": ("folder", "a"),
    "module": ("-m", "folder.script", "-m", "x"),
    "package": ("-m", "folder", "doctor"),
    "no script": ("nothing.py",),
    "no module": ("-m", "nothing"),
}


@pytest.mark.parametrize("arguments", PROGRAMS.values(), ids=PROGRAMS)
def test_programs_find_what_python_gives_them(tmp_path: Path, arguments: tuple[str, ...]) -> None:
    (tmp_path / "folder").mkdir()
    for name in ("script", "__main__"):
        (tmp_path / f"folder/{name}.py").write_text(STATE)
    (tmp_path / "link.py").symlink_to("folder/script.py")
    assert_as_in_python(tmp_path, *arguments)


ENDS = {
    "error": "def f(): raise ValueError('x')\nf()",
    "cause": "try: 1 / 0\nexcept ZeroDivisionError as e: raise KeyError from e",
    "exit": "import sys; sys.exit(3)",
    "message": "raise SystemExit('a message')",
    "interrupt": "raise KeyboardInterrupt",
    "syntax": "def f(:",
    "hook": "import sys; sys.excepthook = lambda *a: print(a[1]); raise ValueError('x')",
}


@pytest.mark.parametrize("name", [*ENDS, "error in a module"])
def test_programs_end_as_in_python(tmp_path: Path, name: str) -> None:
    end, _, in_module = name.partition(" in a ")
    (tmp_path / "program.py").write_text(ENDS[end])
    arguments = ("-m", "program") if in_module else ("program.py",)
    assert_as_in_python(tmp_path, *arguments)


def test_programs_run_on_ours(tmp_path: Path) -> None:
    (tmp_path / "package.py").write_text("from torch.nn import LSTM\nclass Mine(LSTM): pass\n")
    (tmp_path / "program.py").write_text(
        "import package, sys\n"
        "print([c.__module__ for c in package.Mine.__mro__[:2]], *sys.argv[1:])\n"
    )
    result = start(tmp_path, *RUN, "program.py", "--lr", "1")
    assert result.stdout == "['package', 'fused_rnn.modules'] --lr 1\n"


def test_a_program_must_be_named(tmp_path: Path) -> None:
    for arguments in ((), ("-m",)):
        result = python(*RUN, *arguments, cwd=tmp_path, env=ENVIRONMENT)
        assert result.returncode == 2 and "PROGRAM" in result.stderr
