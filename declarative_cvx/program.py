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

# Matrices with at most this many places for each stored entry are multiplied as dense ones.
DENSE_SHARE = 8

Point = tuple[Tensor, Tensor, Tensor]  # (x, y, s) of a batch


def columns(v: Tensor, index: Tensor) -> Tensor:
    """``v[:, index]`` for v of shape (batch, entries, ...), several times faster on a CPU."""
    shape = (v.shape[0], len(index), *v.shape[2:])
    return v.gather(1, index.reshape(1, -1, *(1 for _ in v.shape[2:])).expand(shape))


@dataclass(frozen=True, eq=False)
class Block:
    """Entries of a matrix by their places among the stored values; -1 where none is stored."""

    places: np.ndarray
    takes_all: bool = False  # whether every stored value is read

    def read(self, values: Tensor) -> Tensor:
        """The entries, shape (batch, *places.shape), of values (batch, nnz)."""
        source, target = self._index(values.device)
        batch, size = values.shape[0], self.places.size
        stored = values if source is None else columns(values, source)
        if target is not None:
            index = target.expand(batch, -1)
            stored = values.new_zeros((batch, size)).scatter(1, index, stored)
        return stored.reshape(batch, *self.places.shape)

    @cached_property
    def stored(self) -> int:
        """How many of the entries are stored."""
        return int((self.places >= 0).sum())

    def _index(self, device: torch.device) -> tuple[Tensor | None, Tensor | None]:
        """Which values to take (None: all, in order), and where they go (None: one by one)."""
        cache = self.__dict__.setdefault("_cache", {})
        if device not in cache:
            flat = self.places.ravel()
            target = np.flatnonzero(flat >= 0)
            source = flat[target]
            in_order = self.takes_all and np.array_equal(source, np.arange(source.size))
            cache[device] = (
                None if in_order else torch.as_tensor(source, device=device),
                None if target.size == flat.size else torch.as_tensor(target, device=device),
            )
        return cache[device]

    def __getstate__(self) -> dict:
        return {"places": self.places, "takes_all": self.takes_all}


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

    @cached_property
    def is_dense(self) -> bool:
        """Whether products are faster with dense matrices than entry by entry."""
        return 0 < self.shape[0] * self.shape[1] <= DENSE_SHARE * self.nnz

    def index(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Rows and columns as tensors on a device."""
        cache = self.__dict__.setdefault("_index", {})
        if device not in cache:
            cache[device] = (
                torch.as_tensor(self.rows, device=device),
                torch.as_tensor(self.cols, device=device),
            )
        return cache[device]

    def block(self, rows: np.ndarray, cols: np.ndarray) -> Block:
        """The submatrix of these rows and columns, to be read off stored values."""
        places = np.full(self.shape, -1, dtype=np.int64)
        places[self.rows, self.cols] = np.arange(self.nnz)
        return Block(places[np.ix_(rows, cols)])

    @cached_property
    def whole(self) -> Block:
        """The matrix itself, to be read off stored values."""
        block = self.block(np.arange(self.shape[0]), np.arange(self.shape[1]))
        return replace(block, takes_all=True)

    def __getstate__(self) -> dict:
        return {"shape": self.shape, "rows": self.rows, "cols": self.cols}


def to_dense(values: Tensor, sparsity: Sparsity) -> Tensor:
    """Stored entries (batch, nnz) to matrices (batch, rows, cols)."""
    if sparsity.is_full():
        return values.reshape(values.shape[0], *sparsity.shape)
    return sparsity.whole.read(values)


def matmul(values: Tensor, sparsity: Sparsity, v: Tensor, transpose: bool = False) -> Tensor:
    """Products of a batch of sparse matrices with several vectors each.

    Parameters
    ----------
    values : Tensor, shape (batch or 1, nnz)
    sparsity : Sparsity
    v : Tensor, shape (batch, cols, columns), or (batch, rows, columns) with `transpose`
    transpose : bool
        Multiply by the transposed matrices.

    Returns
    -------
    Tensor, shape (batch, rows, columns), or (batch, cols, columns) with `transpose`
    """
    rows, cols = sparsity.index(v.device)
    size = sparsity.shape[0]
    if transpose:
        rows, cols, size = cols, rows, sparsity.shape[1]
    products = values[:, :, None] * columns(v, cols)
    return v.new_zeros((v.shape[0], size, v.shape[2])).index_add(1, rows, products)


def matvec(values: Tensor, sparsity: Sparsity, v: Tensor, transpose: bool = False) -> Tensor:
    """As `matmul` for one vector each: v of shape (batch, cols or rows)."""
    return matmul(values, sparsity, v[:, :, None], transpose)[:, :, 0]


@dataclass(frozen=True, eq=False)
class Structure:
    """What all elements of a batch share.

    Attributes
    ----------
    P, A : Sparsity
        Patterns; that of P has both triangles.
    cone : Cone
    elimination : Elimination or None
        Variables that equalities define and that are worth substituting.
    """

    P: Sparsity
    A: Sparsity
    cone: Cone
    elimination: Elimination | None = None

    @property
    def variables(self) -> int:
        """Number n of primal variables."""
        return self.A.shape[1]

    @property
    def rows(self) -> int:
        """Number m of rows of A."""
        return self.A.shape[0]

    @cached_property
    def blocks(self) -> Blocks:
        """The blocks of P and A that an elimination works with."""
        assert self.elimination is not None
        E, T, X, R = (getattr(self.elimination, name) for name in "ETXR")
        return Blocks(
            P_X=self.P.block(X, X),
            p=Block(self.P.block(T, T).places.diagonal()),
            A_E=self.A.block(E, X),
            c=Block(self.A.block(E, T).places.diagonal()),
            A_R=self.A.block(R, X),
            A_R_values=Block(np.flatnonzero(np.isin(self.A.rows, R) & np.isin(self.A.cols, X))),
        )

    @property
    def reduced(self) -> Structure:
        """The structure that solvers see."""
        return self if self.elimination is None else self.elimination.reduced


@dataclass(frozen=True, eq=False)
class Elimination:
    """Variables T that the equalities E define, and the smaller structure without them.

    Attributes
    ----------
    reduced : Structure
        Over the remaining variables X and rows R; its P is dense.
    E, T, X, R : ndarray of int64
        Rows and variables; E[k] defines T[k].
    """

    reduced: Structure
    E: np.ndarray
    T: np.ndarray
    X: np.ndarray
    R: np.ndarray

    def index(self, device: torch.device) -> tuple[Tensor, ...]:
        """E, T, X and R as tensors on a device."""
        cache = self.__dict__.setdefault("_index", {})
        if device not in cache:
            arrays = (self.E, self.T, self.X, self.R)
            cache[device] = tuple(torch.as_tensor(array, device=device) for array in arrays)
        return cache[device]

    def __getstate__(self) -> dict:
        return {key: value for key, value in self.__dict__.items() if key != "_index"}


@dataclass(frozen=True)
class Blocks:
    """Blocks of P and A by variables (X, T) and rows (E, R) of an `Elimination`.

    `p` is the diagonal of P at T, `c` the coefficients of T in E, `A_R_values` the stored entries
    of A in the remaining rows and variables.
    """

    P_X: Block
    p: Block
    A_E: Block
    c: Block
    A_R: Block
    A_R_values: Block


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

    @cached_property
    def dense_P(self) -> Tensor:
        """The matrices P, shape (batch or 1, n, n)."""
        return to_dense(self.P, self.structure.P)

    @cached_property
    def dense_A(self) -> Tensor:
        """The matrices A, shape (batch or 1, m, n)."""
        return to_dense(self.A, self.structure.A)

    def P_matmul(self, v: Tensor) -> Tensor:
        """P @ v for v of shape (batch, n, columns)."""
        if self.structure.P.is_dense:
            return self.dense_P @ v
        return matmul(self.P, self.structure.P, v)

    def A_matmul(self, v: Tensor) -> Tensor:
        """A @ v for v of shape (batch, n, columns)."""
        if self.structure.A.is_dense:
            return self.dense_A @ v
        return matmul(self.A, self.structure.A, v)

    def At_matmul(self, v: Tensor) -> Tensor:
        """A' @ v for v of shape (batch, m, columns)."""
        if self.structure.A.is_dense:
            return self.dense_A.mT @ v
        return matmul(self.A, self.structure.A, v, transpose=True)

    def P_times(self, x: Tensor) -> Tensor:
        """P x for x of shape (batch, n)."""
        return self.P_matmul(x[:, :, None])[:, :, 0]

    def A_times(self, x: Tensor) -> Tensor:
        """A x for x of shape (batch, n)."""
        return self.A_matmul(x[:, :, None])[:, :, 0]

    def At_times(self, y: Tensor) -> Tensor:
        """A'y for y of shape (batch, m)."""
        return self.At_matmul(y[:, :, None])[:, :, 0]

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
