"""A batch of cone programs as NumPy and SciPy see it, in the forms that solvers ask for."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import scipy.sparse as sp

from declarative_cvx.cones import Cone
from declarative_cvx.program import ConeProgram, Structure
from declarative_cvx.sparsity import Sparsity


@dataclass(frozen=True)
class Element:
    """One cone program.

    Attributes
    ----------
    P : csc_matrix, shape (n, n)
        Upper triangle.
    q : ndarray, shape (n,)
    A : csc_matrix, shape (m, n)
    b : ndarray, shape (m,)
    cone : Cone
    """

    P: sp.csc_matrix
    q: np.ndarray
    A: sp.csc_matrix
    b: np.ndarray
    cone: Cone


@dataclass(frozen=True)
class HostProgram:
    """Values of a batch of cone programs in host memory, float64, C order.

    Attributes
    ----------
    structure : Structure
    P, A : ndarray, shape (batch or 1, nnz)
    q : ndarray, shape (batch, n)
    b : ndarray, shape (batch, m)
    """

    structure: Structure
    P: np.ndarray
    q: np.ndarray
    A: np.ndarray
    b: np.ndarray

    @classmethod
    def of(cls, program: ConeProgram) -> HostProgram:
        """Copy a program from wherever its tensors live."""
        values = (program.P, program.q, program.A, program.b)
        arrays = [np.ascontiguousarray(value.detach().cpu().numpy()) for value in values]
        return cls(program.structure, *arrays)

    @property
    def batch(self) -> int:
        return self.q.shape[0]

    def element(self, i: int) -> Element:
        """Element i in the column-compressed form that most solvers want."""
        structure = self.structure
        P_values = self.P[0 if self.P.shape[0] == 1 else i]
        A_values = self.A[0 if self.A.shape[0] == 1 else i]
        return Element(
            P=csc(P_values, structure.P, structure.P.upper_csc_order),
            q=self.q[i],
            A=csc(A_values, structure.A, structure.A.csc_order),
            b=self.b[i],
            cone=structure.cone,
        )


def csc(values: np.ndarray, sparsity: Sparsity, order: np.ndarray) -> sp.csc_matrix:
    """Stored entries, taken in an order that is sorted by column, as a CSC matrix."""
    offsets = np.searchsorted(sparsity.cols[order], np.arange(sparsity.shape[1] + 1))
    return sp.csc_matrix((values[order], sparsity.rows[order], offsets), shape=sparsity.shape)


def upper_triangle_order(cone: Cone) -> np.ndarray:
    """Row permutation to the form in which semidefinite cones are upper triangles by columns.

    ``rows[order]`` is in that form; assigning to ``out[order]`` goes back.
    """
    order = np.arange(cone.rows)
    start = cone.slice_of("psd").start
    for k in cone.psd:
        size = k * (k + 1) // 2
        position = np.zeros((k, k), dtype=np.int64)
        col, row = np.triu_indices(k)  # lower triangle, column by column
        position[row, col] = position[col, row] = np.arange(size)
        upper_row, upper_col = np.tril_indices(k)[::-1]  # upper triangle, column by column
        order[start : start + size] = start + position[upper_row, upper_col]
        start += size
    return order
