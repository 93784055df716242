"""A batch of cone programs with one sparsity pattern.

minimise   1/2 x'P x + q'x      subject to   A x + s = b,  s in K
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from declarative_cvx.cones import Cone


@dataclass(frozen=True, eq=False)
class Sparsity:
    """Positions of the stored entries of a matrix, sorted by row, then column (CSR order).

    Attributes
    ----------
    shape : (int, int)
    rows, cols : ndarray of int64, shape (nnz,)
    """

    shape: tuple[int, int]
    rows: np.ndarray
    cols: np.ndarray

    @property
    def nnz(self) -> int:
        return len(self.rows)

    @cached_property
    def row_offsets(self) -> np.ndarray:
        """CSR row pointers, shape (rows + 1,)."""
        return np.searchsorted(self.rows, np.arange(self.shape[0] + 1))

    @cached_property
    def csc_order(self) -> np.ndarray:
        """Permutation that takes the stored entries to CSC order."""
        return np.lexsort((self.rows, self.cols))

    @cached_property
    def upper_csc_order(self) -> np.ndarray:
        """As `csc_order`, entries of the upper triangle only."""
        order = self.csc_order
        return order[self.rows[order] <= self.cols[order]]

    @cached_property
    def transposed_order(self) -> np.ndarray:
        """For a symmetric pattern: where entry (j, i) stands, for every entry (i, j)."""
        return np.lexsort((self.rows, self.cols))

    def is_full(self) -> bool:
        """Whether every entry is stored, so that values reshape to matrices."""
        return self.nnz == self.shape[0] * self.shape[1]

    def index(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Rows and columns as tensors on a device."""
        cache = self.__dict__.setdefault("_index", {})
        if device not in cache:
            cache[device] = (
                torch.as_tensor(self.rows, device=device),
                torch.as_tensor(self.cols, device=device),
            )
        return cache[device]

    def __getstate__(self) -> dict:
        return {"shape": self.shape, "rows": self.rows, "cols": self.cols}


def to_dense(values: Tensor, sparsity: Sparsity) -> Tensor:
    """Stored entries (batch, nnz) to matrices (batch, rows, cols)."""
    if sparsity.is_full():
        return values.reshape(values.shape[0], *sparsity.shape)
    rows, cols = sparsity.index(values.device)
    out = values.new_zeros((values.shape[0], sparsity.shape[0] * sparsity.shape[1]))
    out = out.index_copy(1, rows * sparsity.shape[1] + cols, values)
    return out.reshape(values.shape[0], *sparsity.shape)


def matvec(values: Tensor, sparsity: Sparsity, v: Tensor, transpose: bool = False) -> Tensor:
    """Products of a batch of sparse matrices with a batch of vectors.

    Parameters
    ----------
    values : Tensor, shape (batch or 1, nnz)
    sparsity : Sparsity
    v : Tensor, shape (batch, cols), or (batch, rows) with `transpose`
    transpose : bool
        Multiply by the transposed matrices.

    Returns
    -------
    Tensor, shape (batch, rows), or (batch, cols) with `transpose`
    """
    if sparsity.is_full() and sparsity.nnz:
        matrix = values.reshape(-1, *sparsity.shape)
        return ((matrix.mT if transpose else matrix) @ v[:, :, None])[:, :, 0]
    rows, cols = sparsity.index(v.device)
    size = sparsity.shape[0]
    if transpose:
        rows, cols, size = cols, rows, sparsity.shape[1]
    out = v.new_zeros((v.shape[0], size))
    return out.index_add(1, rows, values * v[:, cols])


@dataclass(frozen=True, eq=False)
class Structure:
    """What all elements of a batch share: patterns of P (both triangles) and A, and the cone."""

    P: Sparsity
    A: Sparsity
    cone: Cone

    @property
    def variables(self) -> int:
        """Number n of primal variables."""
        return self.A.shape[1]

    @property
    def rows(self) -> int:
        """Number m of rows of A."""
        return self.A.shape[0]


@dataclass(frozen=True, eq=False)
class ConeProgram:
    """Values of a batch of cone programs.

    Attributes
    ----------
    structure : Structure
    P : Tensor, shape (batch or 1, nnz of P)
        Entries of the symmetric matrices P, both triangles; one row if all elements share them.
    q : Tensor, shape (batch, n)
    A : Tensor, shape (batch or 1, nnz of A)
    b : Tensor, shape (batch, m)
    """

    structure: Structure
    P: Tensor
    q: Tensor
    A: Tensor
    b: Tensor

    @property
    def batch(self) -> int:
        return self.q.shape[0]

    def P_times(self, x: Tensor) -> Tensor:
        """P x for x of shape (batch, n)."""
        return matvec(self.P, self.structure.P, x)

    def A_times(self, x: Tensor) -> Tensor:
        """A x for x of shape (batch, n)."""
        return matvec(self.A, self.structure.A, x)

    def At_times(self, y: Tensor) -> Tensor:
        """A'y for y of shape (batch, m)."""
        return matvec(self.A, self.structure.A, y, transpose=True)

    def objective(self, x: Tensor) -> Tensor:
        """1/2 x'P x + q'x, shape (batch,)."""
        return (x * (self.P_times(x) / 2 + self.q)).sum(1)

    def select(self, index: Tensor) -> ConeProgram:
        """The elements of the batch named by an index tensor."""
        return replace(
            self,
            P=self.P if self.P.shape[0] == 1 else self.P[index],
            q=self.q[index],
            A=self.A if self.A.shape[0] == 1 else self.A[index],
            b=self.b[index],
        )

    def detach(self) -> ConeProgram:
        """The same values without their history."""
        return replace(
            self, P=self.P.detach(), q=self.q.detach(), A=self.A.detach(), b=self.b.detach()
        )
