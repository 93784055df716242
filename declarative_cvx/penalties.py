"""Penalties of residuals: the one place where their formulas stand.

Atoms, pooling, reweighting and tests all take a `Penalty`, so that a function is written down
once. A penalty of the user's own is a class with a method `rho`::

    class Logcosh(Penalty):
        name = "logcosh"
        convex = True

        def rho(self, r):
            return r.abs() + torch.nn.functional.softplus(-2 * r.abs()) - math.log(2)
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor

from declarative_cvx.errors import SpecificationError, nearest


class Penalty:
    """An even function of a residual z, nondecreasing in abs(z), with a scale alpha > 0.

    It is given in units of alpha, by `rho`: phi(z; alpha) = alpha**power * rho(z / alpha).

    Attributes
    ----------
    name : str
    power : int
        2 if the penalty is z**2 / 2 near zero whatever alpha is; 0 if its height is 1.
    convex : bool
    smooth : bool
        Whether the first derivative is continuous.
    breakpoints : tuple of float
        Values of abs(z) / alpha where the first or the second derivative jumps. There the
        derivatives are those from the side of zero.
    support : float
        Value of abs(z) / alpha beyond which the penalty is constant.
    dip : float or None
        Value of abs(z) / alpha where the second derivative is least: it falls up to there and
        rises beyond. None if that is not known; then a search has only the monotonicity to
        bound the penalty by, and takes longer.
    """

    name: ClassVar[str]
    power: ClassVar[int] = 2
    convex: ClassVar[bool] = False
    smooth: ClassVar[bool] = True
    breakpoints: ClassVar[tuple[float, ...]] = ()
    support: ClassVar[float] = math.inf
    dip: ClassVar[float | None] = None

    def rho(self, r: Tensor) -> Tensor:
        """The penalty in units of alpha, elementwise."""
        raise NotImplementedError

    def rho_slope(self, r: Tensor) -> Tensor:
        """Derivative of `rho`; unless overridden, by automatic differentiation."""
        return _derivative(self.rho)(r)

    def rho_curvature(self, r: Tensor) -> Tensor:
        """Second derivative of `rho`; unless overridden, by automatic differentiation."""
        return _derivative(self.rho_slope)(r)

    def rho_derivatives(self, r: Tensor) -> tuple[Tensor, Tensor]:
        """First and second derivative of `rho`, where they are cheaper together."""
        return self.rho_slope(r), self.rho_curvature(r)

    def rho_weight(self, r: Tensor) -> Tensor:
        """rho'(r) / r, continued by rho''(0) at zero: the weight in reweighted least squares."""
        zero = r == 0
        ratio = self.rho_slope(r) / torch.where(zero, 1.0, r)
        return torch.where(zero, self.rho_curvature(r), ratio)

    def value(self, z: Tensor, alpha: Tensor | float) -> Tensor:
        """phi(z; alpha)."""
        return self.rho(z / alpha) * alpha**self.power

    def slope(self, z: Tensor, alpha: Tensor | float) -> Tensor:
        """Derivative of phi in z."""
        return self.rho_slope(z / alpha) * alpha ** (self.power - 1)

    def curvature(self, z: Tensor, alpha: Tensor | float) -> Tensor:
        """Second derivative of phi in z: the weight of a point in the derivative of pooling."""
        return self.rho_curvature(z / alpha) * alpha ** (self.power - 2)

    def weight(self, z: Tensor, alpha: Tensor | float) -> Tensor:
        """phi'(z) / z: the weight of a point in iteratively reweighted least squares."""
        return self.rho_weight(z / alpha) * alpha ** (self.power - 2)

    def slope_by_alpha(self, z: Tensor, alpha: Tensor | float) -> Tensor:
        """Derivative of phi' in alpha."""
        r = z / alpha
        change = (self.power - 1) * self.rho_slope(r) - r * self.rho_curvature(r)
        return change * alpha ** (self.power - 2)

    def __repr__(self) -> str:
        return f"{type(self).__name__}()"

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other) and vars(self) == vars(other)

    def __hash__(self) -> int:
        return hash(type(self))


def _derivative(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """Derivative of an elementwise function, itself differentiable."""

    def total(r: Tensor) -> Tensor:
        return function(r).sum()

    return torch.func.grad(total)


class Quadratic(Penalty):
    """z**2 / 2."""

    name = "quadratic"
    convex = True

    def rho(self, r: Tensor) -> Tensor:
        return r * r / 2

    def rho_slope(self, r: Tensor) -> Tensor:
        return r

    def rho_curvature(self, r: Tensor) -> Tensor:
        return torch.ones_like(r)

    def rho_weight(self, r: Tensor) -> Tensor:
        return torch.ones_like(r)


class PseudoHuber(Penalty):
    """alpha**2 (sqrt(1 + (z / alpha)**2) - 1)."""

    name = "pseudo_huber"
    convex = True

    def rho(self, r: Tensor) -> Tensor:
        return r * (r / (1 + _root(r)))

    def rho_slope(self, r: Tensor) -> Tensor:
        return r / _root(r)

    def rho_curvature(self, r: Tensor) -> Tensor:
        return (1 / _root(r)) ** 3

    def rho_derivatives(self, r: Tensor) -> tuple[Tensor, Tensor]:
        weight = self.rho_weight(r)
        return r * weight, weight**3

    def rho_weight(self, r: Tensor) -> Tensor:
        return 1 / _root(r)


class Huber(Penalty):
    """z**2 / 2 for abs(z) <= alpha, else alpha (abs(z) - alpha / 2)."""

    name = "huber"
    convex = True
    breakpoints = (1.0,)

    def rho(self, r: Tensor) -> Tensor:
        inside = r.clamp(-1, 1)
        return inside * (r - inside / 2)

    def rho_slope(self, r: Tensor) -> Tensor:
        return r.clamp(-1, 1)

    def rho_curvature(self, r: Tensor) -> Tensor:
        return (r.abs() <= 1).to(r.dtype)

    def rho_weight(self, r: Tensor) -> Tensor:
        return 1 / r.abs().clamp(min=1)


class Welsch(Penalty):
    """1 - exp(-z**2 / (2 alpha**2))."""

    name = "welsch"
    dip = math.sqrt(3)
    power = 0

    def rho(self, r: Tensor) -> Tensor:
        return -torch.expm1(-r * r / 2)

    def rho_slope(self, r: Tensor) -> Tensor:
        return r * self.rho_weight(r)

    def rho_curvature(self, r: Tensor) -> Tensor:
        # (1 - r^2) exp(-r^2 / 2) with no product of infinity and zero for any r.
        return (1 - r) * self.rho_weight(r) * (1 + r)

    def rho_derivatives(self, r: Tensor) -> tuple[Tensor, Tensor]:
        weight = self.rho_weight(r)
        return r * weight, (1 - r) * weight * (1 + r)

    def rho_weight(self, r: Tensor) -> Tensor:
        return torch.exp(-r * r / 2)


class TruncatedQuadratic(Penalty):
    """min(z**2, alpha**2) / 2."""

    name = "truncated_quadratic"
    smooth = False
    breakpoints = (1.0,)
    support = 1.0

    def rho(self, r: Tensor) -> Tensor:
        return r.clamp(-1, 1) ** 2 / 2

    def rho_slope(self, r: Tensor) -> Tensor:
        return torch.where(r.abs() <= 1, r, 0.0)

    def rho_curvature(self, r: Tensor) -> Tensor:
        return (r.abs() <= 1).to(r.dtype)

    def rho_weight(self, r: Tensor) -> Tensor:
        return (r.abs() <= 1).to(r.dtype)


class Cauchy(Penalty):
    """alpha**2 / 2 log(1 + (z / alpha)**2), also called Lorentzian."""

    name = "cauchy"
    dip = math.sqrt(3)

    def rho(self, r: Tensor) -> Tensor:
        return torch.where(r.abs() < 1, torch.log1p(r.clamp(-1, 1) ** 2) / 2, torch.log(_root(r)))

    def rho_slope(self, r: Tensor) -> Tensor:
        return r / _root(r) / _root(r)

    def rho_curvature(self, r: Tensor) -> Tensor:
        root = _root(r)
        return (1 / root - r / root) / root * ((1 / root + r / root) / root)

    def rho_weight(self, r: Tensor) -> Tensor:
        return _root(r) ** -2


class GemanMcClure(Penalty):
    """z**2 / (2 (1 + (z / alpha)**2))."""

    name = "geman_mcclure"
    dip = 1.0

    def rho(self, r: Tensor) -> Tensor:
        return (r / _root(r)) ** 2 / 2

    def rho_slope(self, r: Tensor) -> Tensor:
        return r * self.rho_weight(r)

    def rho_curvature(self, r: Tensor) -> Tensor:
        root = _root(r)
        return (1 / root**2 - 3 * (r / root) ** 2) / root**4

    def rho_weight(self, r: Tensor) -> Tensor:
        return _root(r) ** -4


class Tukey(Penalty):
    """alpha**2 / 6 (1 - (1 - (z / alpha)**2)**3) for abs(z) <= alpha, else alpha**2 / 6."""

    name = "tukey"
    dip = math.sqrt(0.6)
    support = 1.0

    def rho(self, r: Tensor) -> Tensor:
        square = r.clamp(-1, 1) ** 2
        return square * (1 - square + square * square / 3) / 2

    def rho_slope(self, r: Tensor) -> Tensor:
        return r * self.rho_weight(r)

    def rho_curvature(self, r: Tensor) -> Tensor:
        square = r.clamp(-1, 1) ** 2
        return (1 - square) * (1 - 5 * square)

    def rho_weight(self, r: Tensor) -> Tensor:
        return (1 - r.clamp(-1, 1) ** 2) ** 2


def _root(r: Tensor) -> Tensor:
    """sqrt(1 + r^2), which does not overflow."""
    return torch.hypot(torch.ones_like(r), r)


PENALTIES: dict[str, Penalty] = {
    penalty.name: penalty
    for penalty in (
        Quadratic(),
        PseudoHuber(),
        Huber(),
        Welsch(),
        TruncatedQuadratic(),
        Cauchy(),
        GemanMcClure(),
        Tukey(),
    )
}


def penalty_named(choice: str | Penalty) -> Penalty:
    """The penalty that a name means; a `Penalty` is returned as it is.

    Raises
    ------
    SpecificationError
        If there is none of that name.
    """
    if isinstance(choice, Penalty):
        return choice
    if not isinstance(choice, str):
        raise SpecificationError(f"penalty must be a name or a Penalty object, got {choice!r}.")
    if choice not in PENALTIES:
        raise SpecificationError(f"Unknown penalty {choice!r}. {nearest(choice, PENALTIES)}")
    return PENALTIES[choice]
