"""A batch of cone programs with one sparsity pattern.

minimise   1/2 x'P x + q'x      subject to   A x + s = b,  s in K
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from declarative_cvx.cones import Cone
from declarative_cvx.sparsity import (
    Block,
    Places,
    Sparsity,
    image,
    matmul,
    matvec,
    product,
    to_dense,
)

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
            A_R_values=Places(np.flatnonzero(np.isin(self.A.rows, R) & np.isin(self.A.cols, X))),
        )

    @cached_property
    def has_joined_blocks(self) -> bool:
        """Whether the entries of A are A_E and A_R, none of them missing, and then c."""
        if self.elimination is None:
            return False
        blocks, count = self.blocks, self.elimination.T.size
        places = (blocks.A_E.places.ravel(), blocks.A_R.places.ravel(), blocks.c.places)
        first = [self.elimination.E, self.elimination.T]
        return np.array_equal(np.concatenate(places), np.arange(self.A.nnz)) and all(
            np.array_equal(numbers, np.arange(count)) for numbers in first
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
        Over the remaining variables X and rows R.
    E, T, X, R : ndarray of int64
        Rows and variables; E[k] defines T[k].
    """

    reduced: Structure
    E: np.ndarray
    T: np.ndarray
    X: np.ndarray
    R: np.ndarray

    @cached_property
    def places(self) -> Arrangement:
        """E, T, X and R as places, then those of rows in (E, R) and of variables in (T, X)."""
        rows, variables = np.concatenate([self.E, self.R]), np.concatenate([self.T, self.X])
        arrays = (self.E, self.T, self.X, self.R, np.argsort(rows), np.argsort(variables))
        return Arrangement(*map(Places, arrays))


class Arrangement(NamedTuple):
    """The parts of an `Elimination` in vectors of rows or variables, and the way back."""

    E: Places
    T: Places
    X: Places
    R: Places
    rows: Places
    variables: Places


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
    A_R_values: Places


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
    def blocks(self) -> tuple[Tensor, Tensor, Tensor]:
        """Of A: over (E, X), over (R, X), and its coefficients of T in E (see `Elimination`)."""
        blocks = self.structure.blocks
        return tuple(block.read(self.A) for block in (blocks.A_E, blocks.A_R, blocks.c))  # type: ignore[return-value]

    @cached_property
    def curvature(self) -> tuple[Tensor, Tensor | None]:
        """Of P: its diagonal at T, and P over X, None if it is zero (see `Elimination`)."""
        p, P_X = self.structure.blocks.p, self.structure.blocks.P_X
        return p.read(self.P), P_X.read(self.P) if P_X.stored else None

    @cached_property
    def dense_A(self) -> Tensor:
        """The matrices A, shape (batch or 1, m, n)."""
        return to_dense(self.A, self.structure.A)

    def P_matmul(self, v: Tensor) -> Tensor:
        """P @ v for v of shape (batch, n, columns)."""
        if self.structure.P.is_dense:
            return product(self.dense_P, v)
        return matmul(self.P, self.structure.P, v)

    def A_matmul(self, v: Tensor) -> Tensor:
        """A @ v for v of shape (batch, n, columns)."""
        if self.structure.A.is_dense:
            return product(self.dense_A, v)
        return matmul(self.A, self.structure.A, v)

    def At_matmul(self, v: Tensor) -> Tensor:
        """A' @ v for v of shape (batch, m, columns)."""
        if self.structure.A.is_dense:
            return product(self.dense_A.mT, v)
        return matmul(self.A, self.structure.A, v, transpose=True)

    def P_times(self, x: Tensor) -> Tensor:
        """P x for x of shape (batch, n)."""
        return self.P_matmul(x.unsqueeze(2)).squeeze(2)

    def A_times(self, x: Tensor) -> Tensor:
        """A x for x of shape (batch, n)."""
        if self.structure.A.is_dense:
            return image(self.dense_A, x)
        return matvec(self.A, self.structure.A, x)

    def At_times(self, y: Tensor) -> Tensor:
        """A'y for y of shape (batch, m)."""
        if self.structure.A.is_dense:
            return image(self.dense_A.mT, y)
        return matvec(self.A, self.structure.A, y, transpose=True)

    def conditions(self, x: Tensor, y: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
        """P x + q + A'y, shape (batch, n), and A x + s - b, shape (batch, m)."""
        return self.P_times(x) + self.q + self.At_times(y), self.A_times(x) + s - self.b

    def terms(
        self, x: Tensor, y: Tensor, s: Tensor, size: Callable[[Tensor], Tensor]
    ) -> tuple[Tensor, Tensor]:
        """The largest terms of every entry of `conditions`; `size` takes vectors to entries'."""
        sizes = self.absolute
        dual = torch.maximum(sizes.P_times(size(x)), sizes.At_times(size(y)))
        primal = torch.maximum(sizes.A_times(size(x)), s.abs())
        return torch.maximum(dual, sizes.q), torch.maximum(primal, sizes.b)

    def objective(self, x: Tensor) -> Tensor:
        """1/2 x'P x + q'x, shape (batch,)."""
        return (x * (self.P_times(x) / 2 + self.q)).sum(1)

    def forget(self, *names: str) -> None:
        """Free what was computed of the program and kept: all of it, or what is named."""
        fields = ("structure", "P", "q", "A", "b")
        for name in names or [name for name in self.__dict__ if name not in fields]:
            self.__dict__.pop(name, None)

    def select(self, index: Tensor) -> ConeProgram:
        """The elements of the batch named by an increasing index tensor."""
        if index.shape[0] == self.batch:
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
