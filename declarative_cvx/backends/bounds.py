"""Bounds so large that they mean there is none, kept from solvers: their terms drown all others."""

from __future__ import annotations

import torch
from torch import Tensor

from declarative_cvx.program import ConeProgram, Point
from declarative_cvx.scaling import INFINITE


def find_infinite(program: ConeProgram) -> Tensor | None:
    """Inequalities with a right-hand side that means infinity.

    Parameters
    ----------
    program : ConeProgram

    Returns
    -------
    Tensor of bool, shape (batch, m), or None
        None if there are none.
    """
    b, rows = program.b, program.structure.cone.slice_of("nonneg")
    if not b.numel() or float(b.amax()) < INFINITE:
        return None
    out = torch.zeros_like(b, dtype=torch.bool)
    out[:, rows] = b[:, rows] >= INFINITE
    return out


def without(program: ConeProgram, rows: Tensor | None) -> ConeProgram:
    """The program with 0 x <= 1 in the place of these rows."""
    if rows is None:
        return program
    entries = rows[:, program.structure.A.index(rows.device)[0]]
    A = program.A.expand(len(rows), -1).masked_fill(entries, 0.0)
    b = program.b.masked_fill(rows, 1.0)
    return ConeProgram(program.structure, program.P, program.q, A, b)


def inserted(program: ConeProgram, rows: Tensor | None, point: Point) -> Point:
    """A point of the program without these rows as one of the program itself."""
    if rows is None:
        return point
    x, y, s = point
    return x, y.masked_fill(rows, 0.0), torch.where(rows, program.b - program.A_times(x), s)
