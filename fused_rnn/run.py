"""Run a program as ``python SCRIPT`` and ``python -m MODULE`` do, with ours in torch.nn's place.

``sys.argv``, ``sys.path[0]``, ``__main__``, the exit code, and what is printed of an error that
nobody catches, are as there.
"""

from __future__ import annotations

import builtins
import io
import os
import pkgutil
import runpy
import sys
from importlib.machinery import SourceFileLoader
from types import ModuleType
from typing import Any

from .patch import patch_torch


def run_program(program: str, arguments: list[str], *, is_module: bool) -> int:
    """Run a script, a folder or archive with a ``__main__.py``, or a module. Returns the exit code.

    The patch stays until the process ends, for what the program leaves to be done then.
    """
    patch = patch_torch()
    if os.environ.get("FUSED_RNN_VERBOSE") == "1":
        print(patch, file=sys.stderr)
    sys.argv = [program, *arguments]
    main = sys.modules["__main__"] = ModuleType("__main__")
    vars(main).update(__builtins__=builtins, __annotations__={}, __cached__=None)
    try:
        if is_module:
            runpy._run_module_as_main(program)  # type: ignore[attr-defined]
        elif pkgutil.get_importer(program) is not None:
            _set_first_path(os.path.realpath(program))
            runpy._run_module_as_main("__main__", alter_argv=False)  # type: ignore[attr-defined]
        else:
            return _run_script(program, vars(main))
    except BaseException as error:
        _show_without_us(error)
        raise
    return 0


def _run_script(script: str, namespace: dict[str, Any]) -> int:
    path = os.path.join(os.getcwd(), script)
    try:
        with io.open_code(path) as file:
            source = file.read()
    except OSError as error:
        what = f"can't open file {path!r}: [Errno {error.errno}] {error.strerror}"
        print(f"{sys.executable}: {what}", file=sys.stderr)
        return 2
    _set_first_path(os.path.dirname(os.path.realpath(path)))
    namespace.update(__file__=path, __loader__=SourceFileLoader("__main__", path))
    exec(compile(source, path, "exec", dont_inherit=True), namespace)
    return 0


def _show_without_us(error: BaseException) -> None:
    """Let the interpreter, when it prints the error, begin where the program does."""
    trace, show = error.__traceback__, sys.excepthook
    while trace is not None and trace.tb_frame.f_globals is globals():
        trace = trace.tb_next
    sys.excepthook = lambda kind, value, _: show(kind, value.with_traceback(trace), trace)


def _set_first_path(path: str) -> None:
    """In place of the folder that ``python -m fused_rnn`` put there, unless it was told not to."""
    if not (sys.flags.isolated or getattr(sys.flags, "safe_path", False)):
        sys.path[0] = path
