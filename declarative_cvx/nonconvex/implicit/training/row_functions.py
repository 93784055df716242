"""The smooth part of the objective in the parameters: (A, B, b) by rows, (C, D, c), or both."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from declarative_cvx.nonconvex.implicit.distributed import DataSum
from declarative_cvx.nonconvex.implicit.training.composite import Composite
from declarative_cvx.nonconvex.implicit.training.losses import Loss

Product = Callable[[Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class Curvature:
    """The second derivative at a point.

    Attributes
    ----------
    product : callable
        H S, for S of shape (rows, k).
    bound : Tensor, shape (rows, 1)
        On its eigenvalues, row by row.
    matrices : Tensor or None, shape (rows, k, k)
        H itself, if it does not tie rows to each other.
    """

    product: Product
    bound: Tensor
    matrices: Tensor | None = None


class RowFunction(Protocol):
    """A smooth convex function of a matrix V (rows, k)."""

    def values(self, V: Tensor) -> Tensor:
        """Of each row if it is a sum over rows, shape (rows,), else of all, (1,)."""

    def gradient(self, V: Tensor) -> Tensor:
        """Shape of V."""

    def scale(self, V: Tensor) -> Tensor:
        """Size of the terms of the gradient, row by row: (rows, 1)."""

    def curvature(self, V: Tensor) -> Curvature:
        """The second derivative at V."""


@dataclass(frozen=True, eq=False)
class SeparateRows:
    """A sum over rows: divergences, or a squared loss."""

    rows: Composite

    def values(self, V: Tensor) -> Tensor:
        return self.rows.value(V)

    def gradient(self, V: Tensor) -> Tensor:
        return self.rows.gradient(V)

    def scale(self, V: Tensor) -> Tensor:
        return self.rows.scale(V)

    def curvature(self, V: Tensor) -> Curvature:
        H = self.rows.hessian(V)
        bound = torch.linalg.eigvalsh(H)[:, -1:].clamp(min=1e-300)

        def product(S: Tensor) -> Tensor:
            return (H @ S[:, :, None])[:, :, 0]

        return Curvature(product, bound, H)


@dataclass(frozen=True, eq=False)
class LossRows:
    """L(Y, K V') + <V, R V> / 2 - <T, V> with any smooth loss.

    Attributes
    ----------
    loss : Loss
    K : Tensor, shape (batch, k)
    y : Tensor, shape (batch, rows)
    Q : Tensor, shape (rows, k, k)
        R, one matrix for each row.
    r : Tensor, shape (rows, k)
        T
    total : DataSum
    """

    loss: Loss
    K: Tensor
    y: Tensor
    Q: Tensor
    r: Tensor
    total: DataSum = field(default_factory=DataSum)

    def values(self, V: Tensor) -> Tensor:
        fit = self.total.sum(self.loss.value(self.y, self.K @ V.T).sum())
        return (fit + (V * (self._quadratic(V) / 2 - self.r)).sum())[None]

    def gradient(self, V: Tensor) -> Tensor:
        return self._fit(V) + self._quadratic(V) - self.r

    def scale(self, V: Tensor) -> Tensor:
        # The gradient of the loss is small where the loss is: what it was made of is not.
        terms = [self.K.abs().T @ self.loss.gradient(self.y, self.K @ V.T).abs(), self.r.abs().T]
        size = torch.maximum(self.total.sum(terms[0]), terms[1]).amax(0)
        return size[:, None].clamp(min=1e-300)

    def curvature(self, V: Tensor) -> Curvature:
        H = self.loss.hessian(self.K @ V.T)
        largest = torch.linalg.eigvalsh(self.total.sum(self.K.T @ self.K))[-1]
        own = torch.linalg.eigvalsh(self.Q)[:, -1:]

        def product(S: Tensor) -> Tensor:
            pushed = (H @ (self.K @ S.T)[:, :, None])[:, :, 0]
            return self.total.sum(pushed.T @ self.K) + self._quadratic(S)

        return Curvature(product, self.loss.curvature * largest + own)

    def _fit(self, V: Tensor) -> Tensor:
        return self.total.sum(self.loss.gradient(self.y, self.K @ V.T).T @ self.K)

    def _quadratic(self, V: Tensor) -> Tensor:
        return (self.Q @ V[:, :, None])[:, :, 0]


@dataclass(frozen=True, eq=False)
class Stacked:
    """The sum of a function of the first rows and one of the others."""

    top: RowFunction
    bottom: RowFunction
    split: int

    def values(self, V: Tensor) -> Tensor:
        top, bottom = self.top.values(V[: self.split]), self.bottom.values(V[self.split :])
        return (top.sum() + bottom.sum())[None]

    def gradient(self, V: Tensor) -> Tensor:
        pair = self.top.gradient(V[: self.split]), self.bottom.gradient(V[self.split :])
        return torch.cat(pair)

    def scale(self, V: Tensor) -> Tensor:
        return torch.cat([self.top.scale(V[: self.split]), self.bottom.scale(V[self.split :])])

    def curvature(self, V: Tensor) -> Curvature:
        first = self.top.curvature(V[: self.split])
        second = self.bottom.curvature(V[self.split :])

        def product(S: Tensor) -> Tensor:
            return torch.cat([first.product(S[: self.split]), second.product(S[self.split :])])

        return Curvature(product, torch.cat([first.bound, second.bound]))
