"""The rows of constraints as CVXPY stacks them, and as `Cone` orders them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import cvxpy as cp
import numpy as np
from cvxpy.constraints import PowCone3D


class _Rows(NamedTuple):
    """For each entry of a constraint's arguments its row in the cone, and its share of that.

    Attributes
    ----------
    place : ndarray of int64
    share : ndarray of float
    size : int
        Number of rows in the cone.
    """

    place: np.ndarray
    share: np.ndarray
    size: int

    @classmethod
    def of(cls, constraint: cp.Constraint) -> _Rows:
        if isinstance(constraint, cp.PSD):
            return cls._triangles(constraint.args[0].shape)
        heads, size = constraint.args[0].size, constraint.size
        place = np.arange(size)
        if isinstance(constraint, cp.SOC):  # heads of the cones, then their vectors
            table = place.reshape(heads, -1)
            place = np.concatenate([table[:, 0], table[:, 1:].ravel()])
        elif isinstance(constraint, cp.ExpCone | PowCone3D):
            place = place.reshape(heads, 3).T.ravel()
        return cls(place, np.ones(size), size)

    @classmethod
    def _triangles(cls, shape: tuple[int, ...]) -> _Rows:
        """Of matrices (..., n, n): off-diagonal rows are sqrt(2) times the mean of two entries."""
        n, count = shape[-1], int(np.prod(shape[:-2]))
        size = n * (n + 1) // 2
        col, row = np.triu_indices(n)  # lower triangle, column by column
        number = np.zeros((n, n), dtype=np.int64)
        number[row, col] = number[col, row] = np.arange(size)
        share = np.where(np.eye(n, dtype=bool), 1.0, np.sqrt(0.5))
        place = size * np.arange(count)[:, None, None] + number
        return cls(
            place.reshape(shape).ravel(order="F"),
            np.broadcast_to(share, shape).ravel(order="F"),
            size * count,
        )


class RowOrder:
    """Where CVXPY's rows of constraints, ordered by kind, stand among those of a `Cone`.

    Attributes
    ----------
    place : ndarray of int64
        For each of CVXPY's rows the one that it is part of.
    share : ndarray of float
        What it is multiplied by there.
    size : int
        Number of rows of the cone.
    """

    def __init__(self, constraints: Sequence[cp.Constraint]) -> None:
        self._parts = [(constraint, _Rows.of(constraint)) for constraint in constraints]
        self.size = sum(rows.size for _, rows in self._parts)
        nothing = np.zeros(0, dtype=np.int64)
        places = (start + rows.place for start, _, rows in self._stacked())
        self.place = np.concatenate([nothing, *places])
        self.share = np.concatenate([nothing, *(rows.share for _, rows in self._parts)])

    def duals(self, y: np.ndarray) -> Iterator[tuple[cp.Constraint, np.ndarray]]:
        """The constraints, and their dual values, out of one for each row of the cone."""
        for start, constraint, rows in self._stacked():
            piece = y[start : start + rows.size]
            if isinstance(constraint, cp.PSD):
                shape = constraint.args[0].shape
                piece = (piece[rows.place] * rows.share).reshape(shape, order="F")
            yield constraint, piece[0] if piece.shape == (1,) else piece

    def _stacked(self) -> Iterator[tuple[int, cp.Constraint, _Rows]]:
        """The constraints, each with the first of its rows in the cone."""
        start = 0
        for constraint, rows in self._parts:
            yield start, constraint, rows
            start += rows.size
