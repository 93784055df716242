"""The data of a cone program as sparse affine functions of parameters, while it is put together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import scipy.sparse as sp

from declarative_cvx.cones import Cone
from declarative_cvx.linear_map import AffineMap
from declarative_cvx.program import Structure
from declarative_cvx.sparsity import Sparsity

# Matrices with at most so many entries, zeros included, have them numbered by a table; others by
# sorting, which takes longer but no memory for the zeros.
TABLE = 10_000_000


class Coefficients(NamedTuple):
    """What entries of the data have of the parameters; those of one pair are added.

    Attributes
    ----------
    row : ndarray of int64
        Entries of the data.
    column : ndarray of int
        Entries of the vector (parameters, logarithms of some, 1).
    value : ndarray of float
        None of them zero.
    """

    row: np.ndarray
    column: np.ndarray
    value: np.ndarray

    @classmethod
    def of(cls, matrix: sp.csr_array | sp.csc_array) -> Coefficients:
        matrix.sum_duplicates()
        line = np.repeat(np.arange(matrix.indptr.size - 1), np.diff(matrix.indptr))
        other = matrix.indices.astype(np.int64)
        row, column = (line, other) if matrix.format == "csr" else (other, line)
        return cls(row, column, matrix.data).where(matrix.data != 0)

    def where(self, kept: np.ndarray) -> Coefficients:
        """Some of them."""
        return self if kept.all() else Coefficients(*(part[kept] for part in self))

    def shared(self, first: np.ndarray, second: np.ndarray) -> Coefficients:
        """With columns ``first[column]`` and ``second[column]``, which get half of each value."""
        one, other = first[self.column], second[self.column]
        return self._replace(column=one)._halved(one != other, column=other)

    def symmetrised(self, n: int) -> Coefficients:
        """The mean of a matrix, (n, n), and its transpose; entry (i, j) is in row ``i * n + j``."""
        i, j = self.row // n, self.row % n
        return self._halved(i != j, row=j * n + i)

    def _halved(self, which: np.ndarray, **other: np.ndarray) -> Coefficients:
        """Some of them twice, with half their values, once with another row or column."""
        if not which.any():
            return self
        one = self._replace(value=np.where(which, self.value / 2, self.value))
        two = one._replace(**other).where(which)
        return Coefficients(*(np.concatenate(pair) for pair in zip(one, two, strict=True)))


@dataclass(frozen=True, eq=False)
class ParamData:
    """The data of a cone program as affine functions of parameters.

    Attributes
    ----------
    structure : Structure
    blocks : dict of str to Coefficients
        For the stored entries of P, q, the stored entries of A, b, and the objective's constant d.
    """

    structure: Structure
    blocks: dict[str, Coefficients]

    @classmethod
    def of(
        cls, P: Coefficients, q: Coefficients, Ab: Coefficients, n: int, cone: Cone
    ) -> ParamData:
        """Find the patterns of P and A.

        Parameters
        ----------
        P, q, Ab : Coefficients
            Row ``i * n + j`` is the entry (i, j) of P; row n of q is the constant; row
            ``i * (n + 1) + j`` is the entry (i, j) of (A, b).
        n : int
            Number of variables.
        cone : Cone
        """
        m = cone.rows
        i, j = Ab.row // (n + 1), Ab.row % (n + 1)
        in_b, in_d = j == n, q.row == n
        P_pattern, P = _stored(P.symmetrised(n), (n, n))
        A_pattern, A = _stored(Ab._replace(row=i * n + j).where(~in_b), (m, n))
        blocks = {
            "P": P,
            "q": q.where(~in_d),
            "A": A,
            "b": Ab._replace(row=i).where(in_b),
            "d": q._replace(row=np.zeros_like(q.row)).where(in_d),
        }
        return cls(Structure(P_pattern, A_pattern, cone), blocks)

    def constants(self, one: int) -> np.ndarray:
        """Values of the entries of A that depend on no parameter, NaN for the others.

        `one` is the column of the constant 1.
        """
        row, column, value = self.blocks["A"]
        known = np.where(column == one, value, np.nan)
        return np.bincount(row, known, minlength=self.structure.A.nnz)

    def ordered(self, structure: Structure, orders: Mapping[str, np.ndarray]) -> ParamData:
        """With the values of a block taken from other places, as a structure has it."""
        blocks = dict(self.blocks)
        for name, order in orders.items():
            place = np.empty_like(order)
            place[order] = np.arange(order.size)
            blocks[name] = blocks[name]._replace(row=place[blocks[name].row])
        return replace(self, structure=structure, blocks=blocks)

    def map(self, widths: Sequence[int]) -> AffineMap:
        """The map from blocks of the vector (parameters, logarithms) to those of the data."""
        structure = self.structure
        n, m = structure.variables, structure.rows
        heights = {"P": structure.P.nnz, "q": n, "A": structure.A.nnz, "b": m, "d": 1}
        first = dict(zip(heights, np.cumsum([0, *heights.values()]), strict=False))
        parts = [self.blocks[name] for name in heights]
        row = np.concatenate([self.blocks[name].row + first[name] for name in heights])
        column, value = (np.concatenate([part[k] for part in parts]) for k in (1, 2))
        shape = (sum(heights.values()), sum(widths) + 1)
        return AffineMap(sp.csr_array((value, (row, column)), shape), [*heights.values()], widths)


def _stored(coefficients: Coefficients, shape: tuple[int, int]) -> tuple[Sparsity, Coefficients]:
    """Which entries of a matrix are ever nonzero; the coefficients by their numbers."""
    if shape[0] * shape[1] > TABLE:
        places, number = np.unique(coefficients.row, return_inverse=True)
    else:
        occurs = np.zeros(shape[0] * shape[1], dtype=bool)
        occurs[coefficients.row] = True
        places, table = np.flatnonzero(occurs), np.empty(occurs.size, dtype=np.int64)
        table[places] = np.arange(places.size)
        number = table[coefficients.row]
    pattern = Sparsity(shape, *np.divmod(places, max(shape[1], 1)))
    return pattern, coefficients._replace(row=number)
