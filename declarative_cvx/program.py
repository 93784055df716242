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
from declarative_cvx.sparsity import Block, Sparsity, matmul, to_dense
from declarative_cvx.transforms import outside_transforms

Point = tuple[Tensor, Tensor, Tensor]  # (x, y, s) of a batch


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
            with outside_transforms():
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
    def absolute(self) -> ConeProgram:
        """The program whose data are the absolute values."""
        return replace(self, P=self.P.abs(), q=self.q.abs(), A=self.A.abs(), b=self.b.abs())

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
