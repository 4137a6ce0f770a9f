"""What is wrong with a cell, said at the line of its author."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch

_INSIDE = (f"{Path(__file__).parents[1]}{os.sep}", f"{Path(torch.__file__).parent}{os.sep}")


class CellError(TypeError):
    """A function that is no cell, or not one that can be compiled.

    The message begins with the file and the line of the author.
    """


def refuse(text: str) -> CellError:
    """The error for the author's line, which is the innermost outside of this package."""
    frame = sys._getframe(1)
    while frame.f_back and frame.f_code.co_filename.startswith(_INSIDE):
        frame = frame.f_back
    return CellError(f"{frame.f_code.co_filename}:{frame.f_lineno}: {text}")
