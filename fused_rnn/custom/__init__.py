"""Recurrent cells from functions of ten lines, as layers like torch.nn's.

The function says what one unit does in one step, in elementwise functions of torch. It runs as it
is on the reference path, and is compiled for the kernels (``compiler``), with its backward, when a
layer of it first needs them. ``docs/cells.md`` says how to write one.

================  ===============================================================================
``plain.py``      the function run on tensors, for the reference
``family.py``     the cells that a function stands for, one for each set of hyperparameters
``given.py``      what the caller of a layer gives to such a cell for each step
``module.py``     what layers and single steps of such a cell share
``layers.py``     its layers
``single.py``     a single step
``declaring.py``  ``cell``: from a function to these classes
================  ===============================================================================
"""

from ..compiler import CellError
from .declaring import cell

__all__ = ["CellError", "cell"]
