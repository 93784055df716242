"""The smooth terms of the objective in a state p, one problem for each data point."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from declarative_cvx.nonconvex.implicit.activations import Activation
from declarative_cvx.nonconvex.implicit.training.losses import Loss


class StateTerm(Protocol):
    """A twice differentiable function of p (batch, n)."""

    @property
    def quadratic(self) -> bool:
        """Whether the second derivative is constant and positive semidefinite."""

    def value(self, p: Tensor) -> Tensor:
        """Shape (batch,)."""

    def gradient(self, p: Tensor) -> Tensor:
        """Shape (batch, n)."""

    def hessian(self, p: Tensor) -> Tensor:
        """Shape (n, n), shared, or (batch, n, n); positive semidefinite."""


@dataclass(frozen=True, eq=False)
class PredictionLoss:
    """L(y, C p + offset)"""

    loss: Loss
    C: Tensor  # (q, n)
    offset: Tensor  # (batch, q)
    y: Tensor  # (batch, q)

    @property
    def quadratic(self) -> bool:
        return self.loss.quadratic

    def value(self, p: Tensor) -> Tensor:
        return self.loss.value(self.y, p @ self.C.T + self.offset)

    def gradient(self, p: Tensor) -> Tensor:
        return self.loss.gradient(self.y, p @ self.C.T + self.offset) @ self.C

    def hessian(self, p: Tensor) -> Tensor:
        return self.C.T @ self.loss.hessian(p @ self.C.T + self.offset) @ self.C


@dataclass(frozen=True, eq=False)
class Proximity:
    """mu / 2 ||p - x||^2"""

    mu: float
    x: Tensor  # (batch, n)
    quadratic: bool = True

    def value(self, p: Tensor) -> Tensor:
        return self.mu / 2 * (p - self.x).square().sum(1)

    def gradient(self, p: Tensor) -> Tensor:
        return self.mu * (p - self.x)

    def hessian(self, p: Tensor) -> Tensor:
        return self.mu * torch.eye(p.shape[1], dtype=p.dtype, device=p.device)


@dataclass(frozen=True, eq=False)
class NextDivergence:
    """sum_j w_j (Psi(z_j) - x_j z_j) with z = W p + offset: the divergence of the states x after p,
    without its part that does not depend on p.
    """

    activation: Activation
    W: Tensor  # (rows, n)
    offset: Tensor  # (batch or 1, rows)
    x: Tensor  # (batch, rows)
    weight: Tensor  # (rows,)
    quadratic: bool = False

    def value(self, p: Tensor) -> Tensor:
        z = p @ self.W.T + self.offset
        return (self.weight * (self.activation.potential(z) - self.x * z)).sum(1)

    def gradient(self, p: Tensor) -> Tensor:
        z = p @ self.W.T + self.offset
        return (self.weight * (self.activation(z) - self.x)) @ self.W

    def hessian(self, p: Tensor) -> Tensor:
        slopes = self.weight * self.activation.slope(p @ self.W.T + self.offset)
        return (self.W.T * slopes[:, None]) @ self.W


@dataclass(frozen=True, eq=False)
class OwnDivergence:
    """sum_j w_j (Psi(z_j) - p_j (A p)_j) with z = A p + offset: what objective (9) has in the state
    besides the conjugate of Psi.

    It need not be convex. `hessian` leaves the negative part of the bilinear form out, so that
    steps with it go downhill.
    """

    activation: Activation
    A: Tensor  # (n, n)
    offset: Tensor  # (batch, n)
    weight: Tensor  # (n,)
    quadratic: bool = False

    def value(self, p: Tensor) -> Tensor:
        Ap = p @ self.A.T
        return (self.weight * (self.activation.potential(Ap + self.offset) - p * Ap)).sum(1)

    def gradient(self, p: Tensor) -> Tensor:
        Ap = p @ self.A.T
        pushed = self.activation(Ap + self.offset) - p
        return (self.weight * pushed) @ self.A - self.weight * Ap

    def hessian(self, p: Tensor) -> Tensor:
        slopes = self.weight * self.activation.slope(p @ self.A.T + self.offset)
        return (self.A.T * slopes[:, None]) @ self.A + self._bilinear()

    def _bilinear(self) -> Tensor:
        product = self.weight[:, None] * self.A
        values, vectors = torch.linalg.eigh(-(product + product.T))
        return (vectors * values.clamp(min=0)) @ vectors.T


@dataclass(frozen=True)
class StateTerms:
    """A sum of terms.

    Attributes
    ----------
    terms : sequence of StateTerm
    curvature : float
        A lower bound on the eigenvalues of the second derivative.
    """

    terms: Sequence[StateTerm]
    curvature: float = 0.0

    @property
    def quadratic(self) -> bool:
        return all(term.quadratic for term in self.terms)

    def value(self, p: Tensor) -> Tensor:
        return torch.stack([term.value(p) for term in self.terms]).sum(0)

    def gradient(self, p: Tensor) -> Tensor:
        return torch.stack([term.gradient(p) for term in self.terms]).sum(0)

    def hessian(self, p: Tensor) -> Tensor:
        first, *others = (term.hessian(p) for term in self.terms)
        for other in others:
            first = first + other
        return first
