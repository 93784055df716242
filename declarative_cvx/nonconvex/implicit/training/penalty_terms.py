"""Penalties and constraints on the parameters: the P(A, B, C, D) of IDL Sec. 4.1 and 6."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from declarative_cvx.errors import SpecificationError
from declarative_cvx.nonconvex.implicit.training.parameter_matrix import check_region

# Relative violation of a constraint that is rounding.
_SLACK = 1e-9


class PenaltyTerm(ABC):
    """A closed convex function of a region of the matrix (A, B; C, D).

    Attributes
    ----------
    on : str
        The region: "A", "B", "C", "D", "AB", "CD", "AC", "BD" or "ABCD". Biases belong to none.
    by_row : bool
        Whether it is a sum over rows, so that each row may have a step size of its own.
    """

    by_row: ClassVar[bool] = False
    on: str

    def __post_init__(self) -> None:
        check_region(self.on)

    @abstractmethod
    def values(self, W: Tensor) -> Tensor:
        """Of each row of the region W, or of all of it, shape (rows,) or (1,): infinite outside a
        constraint.
        """

    def value(self, W: Tensor) -> Tensor:
        """Shape ()."""
        return self.values(W).sum()

    @abstractmethod
    def prox(self, W: Tensor, step: Tensor) -> Tensor:
        """Argmin over V of ||V - W||^2 / 2 + step * value(V); step is (rows, 1), positive, and the
        same for all rows unless `by_row`.
        """

    def slopes(self, W: Tensor, step: Tensor) -> tuple[Tensor, Tensor]:
        """Derivative of the prox of each row where `by_row`: diag(d) - a a' / a'a.

        Returns
        -------
        d, a : Tensor, shape of W
        """
        raise NotImplementedError


class Constraint(PenaltyTerm):
    """A penalty that is 0 on a closed convex set and infinite outside."""

    @abstractmethod
    def project(self, W: Tensor) -> Tensor:
        """The nearest point of the set."""

    @abstractmethod
    def vertex(self, G: Tensor) -> Tensor:
        """Argmin of <G, V> over the set: what conditional gradients need (IDL Sec. 4.2)."""

    def prox(self, W: Tensor, step: Tensor) -> Tensor:
        return self.project(W)

    def values(self, W: Tensor) -> Tensor:
        distance = (W - self.project(W)).abs().amax(1)
        outside = distance > _SLACK * (1 + W.abs().amax(1))
        found = torch.where(outside, math.inf, 0.0).to(W.dtype)
        return found if self.by_row else found.sum()[None]


@dataclass(frozen=True)
class Ridge(PenaltyTerm):
    """weight / 2 * sum of squares."""

    by_row: ClassVar[bool] = True
    weight: float = 1e-3
    on: str = "ABCD"

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_positive("Ridge.weight", self.weight)

    def values(self, W: Tensor) -> Tensor:
        return self.weight / 2 * W.square().sum(1)

    def prox(self, W: Tensor, step: Tensor) -> Tensor:
        return W / (1 + step * self.weight)


@dataclass(frozen=True)
class L1(PenaltyTerm):
    """weight * sum of absolute values."""

    by_row: ClassVar[bool] = True
    weight: float = 1.0
    on: str = "ABCD"

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_positive("L1.weight", self.weight)

    def values(self, W: Tensor) -> Tensor:
        return self.weight * W.abs().sum(1)

    def prox(self, W: Tensor, step: Tensor) -> Tensor:
        return W.sign() * (W.abs() - step * self.weight).clamp(min=0)

    def slopes(self, W: Tensor, step: Tensor) -> tuple[Tensor, Tensor]:
        return (W.abs() > step * self.weight).to(W.dtype), torch.zeros_like(W)


@dataclass(frozen=True)
class ColumnGroups(PenaltyTerm):
    """weight * sum over columns j of ||W e_j||_alpha, for alpha = 2 or inf.

    On "BD" it is the feature selection of IDL eq. (19): inputs whose column is zero play no part.
    """

    weight: float = 1.0
    alpha: float = 2
    on: str = "BD"

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_positive("ColumnGroups.weight", self.weight)
        if self.alpha not in (2, math.inf):
            raise SpecificationError(f"ColumnGroups.alpha is {self.alpha!r}; expected 2 or inf.")

    def values(self, W: Tensor) -> Tensor:
        return self.weight * torch.linalg.vector_norm(W, self.alpha, 0).sum()[None]

    def prox(self, W: Tensor, step: Tensor) -> Tensor:
        threshold = self.weight * step[0]
        if self.alpha == 2:
            norm = torch.linalg.vector_norm(W, dim=0)
            return W * (1 - threshold / norm.clamp(min=1e-300)).clamp(min=0)
        # By Moreau: the rest after the projection onto the ball of the dual norm.
        return W - _onto_l1_balls(W.mT, threshold).mT


@dataclass(frozen=True)
class L1Ball(Constraint):
    """sum of absolute values <= radius: the bounds on B and C of IDL eq. (6) and (12)."""

    radius: float = 1.0
    on: str = "CD"

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_positive("L1Ball.radius", self.radius)

    def project(self, W: Tensor) -> Tensor:
        return _onto_l1_balls(W.reshape(1, -1), self.radius).view_as(W)

    def vertex(self, G: Tensor) -> Tensor:
        return _largest_entry(G.reshape(1, -1), self.radius).view_as(G)


@dataclass(frozen=True)
class RowBall(Constraint):
    """||W||_inf <= kappa: sum of absolute values of each row at most kappa (IDL eq. 5 and 13).

    On "A" with kappa < 1 it makes the model well posed.
    """

    by_row: ClassVar[bool] = True
    kappa: float = 0.95
    on: str = "A"

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_positive("RowBall.kappa", self.kappa)

    def project(self, W: Tensor) -> Tensor:
        return _onto_l1_balls(W, self.kappa)

    def slopes(self, W: Tensor, step: Tensor) -> tuple[Tensor, Tensor]:
        outside = W.abs().sum(1, keepdim=True) > self.kappa
        signs = self.project(W).sign()
        return torch.where(outside, signs.abs(), 1.0), torch.where(outside, signs, 0.0)

    def vertex(self, G: Tensor) -> Tensor:
        return _largest_entry(G, self.kappa)


@dataclass(frozen=True)
class ColumnBall(Constraint):
    """||W||_1 <= kappa: sum of absolute values of each column at most kappa."""

    kappa: float = 0.95
    on: str = "A"

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_positive("ColumnBall.kappa", self.kappa)

    def project(self, W: Tensor) -> Tensor:
        return _onto_l1_balls(W.mT, self.kappa).mT

    def vertex(self, G: Tensor) -> Tensor:
        return _largest_entry(G.mT, self.kappa).mT


@dataclass(frozen=True)
class SpectralBall(Constraint):
    """||W||_2 <= kappa, the largest singular value."""

    kappa: float = 0.95
    on: str = "A"

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_positive("SpectralBall.kappa", self.kappa)

    def project(self, W: Tensor) -> Tensor:
        left, sizes, right = torch.linalg.svd(W, full_matrices=False)
        return (left * sizes.clamp(max=self.kappa)) @ right

    def vertex(self, G: Tensor) -> Tensor:
        left, _, right = torch.linalg.svd(G, full_matrices=False)
        return -self.kappa * left @ right


@dataclass(frozen=True)
class Triangular(Constraint):
    """Strictly upper triangular: with it on A the model is well posed (IDL eq. 6).

    Parameters
    ----------
    sizes : tuple of int, optional
        Of diagonal blocks that are zero, for strictly *block* upper triangular matrices: the
        layers of a feedforward net, last layer first (IDL Sec. 2.2).
    """

    by_row: ClassVar[bool] = True
    sizes: tuple[int, ...] | None = None
    on: str = "A"

    def project(self, W: Tensor) -> Tensor:
        return W * self.mask(W)

    def slopes(self, W: Tensor, step: Tensor) -> tuple[Tensor, Tensor]:
        return self.mask(W), torch.zeros_like(W)

    def mask(self, W: Tensor) -> Tensor:
        """1 where entries are free."""
        sizes = torch.tensor(self.sizes or (1,) * len(W), device=W.device)
        layer = torch.repeat_interleave(torch.arange(len(sizes), device=W.device), sizes)
        return (layer[:, None] < layer[None]).to(W.dtype)

    def vertex(self, G: Tensor) -> Tensor:
        raise _unbounded(self)


@dataclass(frozen=True)
class Zero(Constraint):
    """W = 0, such as D = 0 in IDL eq. (6)."""

    by_row: ClassVar[bool] = True
    on: str = "D"

    def project(self, W: Tensor) -> Tensor:
        return torch.zeros_like(W)

    def slopes(self, W: Tensor, step: Tensor) -> tuple[Tensor, Tensor]:
        return torch.zeros_like(W), torch.zeros_like(W)

    def vertex(self, G: Tensor) -> Tensor:
        return torch.zeros_like(G)


def sparsity_penalty(
    kappa: float = 0.95, weight_b: float = 1.0, weight_cd: float = 1.0
) -> tuple[PenaltyTerm, ...]:
    """IDL eq. (5): ||B||_1 + ||(C, D)||_1, with ||A||_inf <= kappa."""
    return RowBall(kappa, "A"), L1(weight_b, "B"), L1(weight_cd, "CD")


def triangular_penalty(kappa_b: float, kappa_c: float) -> tuple[PenaltyTerm, ...]:
    """IDL eq. (6): ||B||_1 <= kappa_b, ||C||_1 <= kappa_c, D = 0, A strictly upper triangular."""
    return Triangular(), L1Ball(kappa_b, "B"), L1Ball(kappa_c, "C"), Zero("D")


def _onto_l1_balls(W: Tensor, radius: float | Tensor) -> Tensor:
    """Each row onto the ball, by sorting: for short rows, thousands of times, this is several times
    faster than the library's `project`, which is made for long ones and checks its arguments.
    """
    size = W.abs()
    sums = size.sort(1, descending=True).values.cumsum(1)
    count = torch.arange(1, W.shape[1] + 1, dtype=W.dtype, device=W.device)
    threshold = ((sums - radius) / count).amax(1, keepdim=True).clamp(min=0)
    return W.sign() * (size - threshold).clamp(min=0)


def _largest_entry(G: Tensor, size: float) -> Tensor:
    """-size * sign of the largest entry of each row, at its place; 0 elsewhere."""
    place = G.abs().argmax(1, keepdim=True)
    return torch.zeros_like(G).scatter(1, place, -size * G.gather(1, place).sign())


def _check_positive(name: str, value: float) -> None:
    if not 0 < value < math.inf:
        raise SpecificationError(f"{name} is {value!r}; it must be positive and finite.")


def _unbounded(term: PenaltyTerm) -> SpecificationError:
    return SpecificationError(
        f"{term} is not bounded, so that conditional gradients have no vertex to go to. Use "
        'method="projection".'
    )
