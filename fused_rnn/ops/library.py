"""What the native libraries have: kernels for which tensors, cells and stages; shapes of a tape."""

from __future__ import annotations

import ctypes
from collections.abc import Iterable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from .. import build, reference
from ..torch_internals import constant
from . import direct
from .schemas import STORAGES


# Dynamo asks once and keeps the answer: it must not trace into a build.
@constant
def is_native(target: str) -> bool:
    native = build.backend(target) == "native"
    if native and target == "cpu":
        direct.load()
    return native


@constant
def has_cell(target: str, cell: str, dtype: torch.dtype) -> bool:
    known = reference.CELLS[cell]
    if known.source is None:
        return True
    header = lambda: known.source.header  # noqa: E731
    return build.has_cell(target, cell, known.source.type_name, STORAGES[dtype], header)


def supports(tensors: Iterable[Tensor | None], cell: str) -> bool:
    """Whether native kernels take these tensors: one floating dtype, dense, CPU, CUDA or meta.

    The first call for a type of device builds or loads its library, and that of the cell.
    """
    dtype, device = None, None
    for t in tensors:
        if t is None:
            continue
        if dtype is None:
            dtype, device = t.dtype, t.device
        if t.dtype != dtype or t.device != device or t.layout != torch.strided:
            return False
    if dtype not in STORAGES or device is None or device.type not in ("cpu", "cuda", "meta"):
        return False
    target = target_of(device)
    return is_native(target) and has_cell(target, cell, dtype)


def takes(
    stages: reference.Stages,
    cell: str,
    hidden: int,
    device: torch.device,
    *,
    train: bool,
) -> bool:
    """Whether the native kernels have what is to happen between two steps of this cell's layers."""
    if stages.reset_to is not None:
        return False
    if stages.blocks > 1 and hidden % (stages.blocks * _block_units(target_of(device), cell)):
        return False
    # The derivative of such a cell is that at the new h, which a part of the old one is mixed into;
    # or all of it, where that of another state has its share in the gradients.
    known = reference.CELLS[cell]
    mixes = stages.zoneout is not None and (len(known.states) > 1 or stages.zoneout.shape[1] == 1)
    return not (mixes and train and known.reads_new_h)


def target_of(device: torch.device) -> str:
    """The library for a device: of build.TARGETS. Tensors without data have the CPU's shapes."""
    return "cuda" if device.type == "cuda" else "cpu"


class _Facts(ctypes.Structure):
    """frnn_cell_t of csrc/ops/binding.h."""

    _fields_ = [
        (name, ctypes.c_int)
        for name in (
            "gates_x",
            "gates_h",
            "extra_states",
            "tape",
            "given",
            "operands",
            "reads_h",
            "reads_new_h",
            "block_units",
            "shows",
            "adds",
            "projectable",
        )
    ]


class _Tape(ctypes.Structure):
    """frnn_tape_t of csrc/ops/binding.h."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("units", "hs_row", "hs_lead")),
        ("hs_as_x", ctypes.c_bool),
    ]


@lru_cache
def facts_of(target: str, cell: str) -> Any:
    """What the library knows of a cell."""
    facts, find = _Facts(), build.library(target).frnn_cell
    find.restype = ctypes.c_bool
    if not find(cell.encode(), ctypes.byref(facts)):
        raise RuntimeError(f"cell: unknown cell {cell!r}")
    return facts


@lru_cache
def tape_of(target: str, hidden: int, width: int) -> Any:
    """The shape of a tape of so many units, and of h of this width."""
    find = build.library(target).frnn_tape
    find.restype, find.argtypes = _Tape, (ctypes.c_int64, ctypes.c_int64)
    return find(hidden, width)


def tape_values(target: str, cell: str, present: int) -> int:
    """Values of a unit that a row of the tape has: NormTape of csrc/core/params.h and before."""
    facts, values = facts_of(target, cell), 0
    for place in reference.present_norms(cell, present):
        values += 1 + {"input": facts.gates_x, "cell": 1}.get(place, facts.gates_h)
    return facts.tape + values


@constant
def _block_units(target: str, cell: str) -> int:
    """A block of a block-diagonal W_hh has a multiple of so many units."""
    units: int = facts_of(target, cell).block_units
    return units


def tensor_names(target: str, cell: str) -> tuple[str, ...]:
    """What the library calls the tensors of a cell: the same as ``reference.Cell.tensors``."""
    find = build.library(target).frnn_tensor
    find.restype = ctypes.c_char_p
    names: list[str] = []
    while name := find(cell.encode(), len(names)):
        names.append(name.decode())
    return tuple(names)
