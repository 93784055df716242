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
from declarative_cvx.sparsity import DENSE_SHARE, Block, Sparsity, columns, matmul, to_dense
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
            p=Block(self.P.block(T, T).places.diagonal(), self.P.nnz),
            A_E=self.A.block(E, X),
            c=Block(self.A.block(E, T).places.diagonal(), self.A.nnz),
            A_R=self.A.block(R, X),
            A_R_values=Block(
                np.flatnonzero(np.isin(self.A.rows, R) & np.isin(self.A.cols, X)), self.A.nnz
            ),
        )

    @cached_property
    def has_dense_blocks(self) -> bool:
        """Whether products with A are fastest by the dense blocks that an elimination leaves."""
        if self.elimination is None:
            return False
        A_E, A_R = self.blocks.A_E, self.blocks.A_R
        return A_E.places.size + A_R.places.size <= DENSE_SHARE * (A_E.stored + A_R.stored)

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
        Over the remaining variables X and rows R.
    E, T, X, R : ndarray of int64
        Rows and variables; E[k] defines T[k].
    """

    reduced: Structure
    E: np.ndarray
    T: np.ndarray
    X: np.ndarray
    R: np.ndarray

    def index(self, device: torch.device) -> tuple[Tensor, ...]:
        """E, T, X and R as tensors on a device, then where rows (E, R) and variables (T, X) go."""
        cache = self.__dict__.setdefault("_index", {})
        if device not in cache:
            rows, variables = np.concatenate([self.E, self.R]), np.concatenate([self.T, self.X])
            arrays = (self.E, self.T, self.X, self.R, np.argsort(rows), np.argsort(variables))
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

    @property
    def absolute(self) -> ConeProgram:
        """The program whose data are the absolute values."""
        return replace(self, P=self.P.abs(), q=self.q.abs(), A=self.A.abs(), b=self.b.abs())

    @cached_property
    def dense_P(self) -> Tensor:
        """The matrices P, shape (batch or 1, n, n)."""
        return to_dense(self.P, self.structure.P)

    @cached_property
    def blocks(self) -> tuple[Tensor, Tensor, Tensor]:
        """Of A: over (E, X), over (R, X), and its coefficients of T in E (see `Elimination`)."""
        blocks = self.structure.blocks
        return tuple(block.read(self.A) for block in (blocks.A_E, blocks.A_R, blocks.c))  # type: ignore[return-value]

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
        if self.structure.has_dense_blocks:
            _, T, X, _, rows, _ = self.structure.elimination.index(v.device)  # type: ignore[union-attr]
            A_E, A_R, c = self.blocks
            x = columns(v, X)
            return columns(torch.cat([A_E @ x + c[:, :, None] * columns(v, T), A_R @ x], 1), rows)
        if self.structure.A.is_dense:
            return self.dense_A @ v
        return matmul(self.A, self.structure.A, v)

    def At_matmul(self, v: Tensor) -> Tensor:
        """A' @ v for v of shape (batch, m, columns)."""
        if self.structure.has_dense_blocks:
            E, _, _, R, _, variables = self.structure.elimination.index(v.device)  # type: ignore[union-attr]
            A_E, A_R, c = self.blocks
            y = columns(v, E)
            x = A_E.mT @ y + A_R.mT @ columns(v, R)
            return columns(torch.cat([c[:, :, None] * y, x], 1), variables)
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
        """The elements of the batch named by an increasing index tensor."""
        if len(index) == self.batch:
            return self
        return replace(
            self,
            P=self.P if self.P.shape[0] == 1 else self.P[index],
            q=self.q[index],
            A=self.A if self.A.shape[0] == 1 else self.A[index],
            b=self.b[index],
        )

    def detach(self) -> ConeProgram:
        """The same values without their history."""
        if not any(v.requires_grad for v in (self.P, self.q, self.A, self.b)):
            return self
        return replace(
            self, P=self.P.detach(), q=self.q.detach(), A=self.A.detach(), b=self.b.detach()
        )
