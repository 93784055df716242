"""The sets that can be projected onto: nearest points, derivatives, conditions for a minimum.

A point is the last dimension of a tensor, (*batch, n); `norm` is that of the point projected,
(*batch, 1). On the boundary of a set derivatives are those from outside (DDN Sec. 5.2), so that the
nearest point y alone tells which constraints are active.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from declarative_cvx.nonconvex.kernels.projection.checks import (
    check_finite,
    check_order,
    check_radius,
)
from declarative_cvx.nonconvex.kernels.projection.l1_projection import shrink_

# Entries from which `vector_norm`, which adds one after the other where `sum` adds in pairs, is
# faster but no longer accurate.
LONG = 4096


class ProjectionSet(ABC):
    """A closed set described by tensors, its bounds: a radius, or two corners of a box.

    Attributes
    ----------
    smooth_norm : bool
        Whether Dy(x) depends on the norm of x smoothly, so that second derivatives need its slope.
    """

    smooth_norm: ClassVar[bool] = False

    @abstractmethod
    def nearest(self, x: Tensor, *bounds: Tensor) -> tuple[Tensor, Tensor]:
        """The nearest point of the set, (*batch, n), and the norm of x, (*batch, 1)."""

    @abstractmethod
    def times(self, g: Tensor, y: Tensor, norm: Tensor, *bounds: Tensor) -> Tensor:
        """Dy(x) g. The matrix is symmetric, so this serves forward and reverse mode."""

    @abstractmethod
    def by_bounds(self, y: Tensor, norm: Tensor, *bounds: Tensor) -> tuple[Tensor, ...]:
        """Derivative of each entry of y in the bounds that belong to it, (*batch, n) each."""

    @abstractmethod
    def residual(self, x: Tensor, y: Tensor, norm: Tensor, *bounds: Tensor) -> Tensor:
        """Relative violation of the conditions for y to be nearest to x, (*batch, 1)."""

    @abstractmethod
    def regular(self, x: Tensor, y: Tensor, norm: Tensor, *bounds: Tensor) -> Tensor:
        """Whether the projection is differentiable at x, (*batch, 1)."""


@dataclass(frozen=True)
class NormSet(ProjectionSet):
    """A sphere or a ball of a norm.

    Attributes
    ----------
    ball : bool
        Whether the inside belongs to the set.
    masked : bool
        Whether Dy(x) vanishes in the coordinates that a face of the set holds fixed.
    """

    ball: bool = False
    masked: bool = True
    p: ClassVar[float]
    dual: ClassVar[float]

    def moved(self, norm: Tensor, radius: Tensor) -> Tensor:
        """Whether x is projected onto the sphere, (*batch, 1)."""
        return norm >= radius if self.ball else torch.ones_like(norm, dtype=torch.bool)

    def residual(self, x: Tensor, y: Tensor, norm: Tensor, *bounds: Tensor) -> Tensor:
        """From inside the distance is known. From outside, x - y is normal to the ball at y:
        radius ||x - y||_dual = y'(x - y).
        """
        (radius,) = bounds
        length = _norm(y / radius, self.p)
        off = (length - 1).clamp(min=0) if self.ball else (length - 1).abs()
        depth = torch.zeros_like(norm) if self.ball else self._depth(norm, radius, x.shape[-1])
        short = (_norm((x - y) / radius, 2) - depth / radius).abs()
        return torch.maximum(off, torch.where(norm < radius, short, self._angle(x, y, radius)))

    def _depth(self, norm: Tensor, radius: Tensor, n: int) -> Tensor:
        """Euclidean distance from a point inside to the sphere."""
        return radius - norm

    def _angle(self, x: Tensor, y: Tensor, radius: Tensor) -> Tensor:
        size = _positive(x.abs().amax(-1, keepdim=True))
        step = x / size - y / size
        return (_norm(step, self.dual) - _dot(step, y / radius)) / _norm(x / size, self.dual)


class L1(NormSet):
    """sum abs(u_i) = radius, or <= radius."""

    p, dual = 1, math.inf

    def nearest(self, x: Tensor, *bounds: Tensor) -> tuple[Tensor, Tensor]:
        (radius,) = bounds
        size = x.abs()
        norm = size.sum(-1, keepdim=True)
        check_finite(x, norm)
        check_radius(radius)
        return torch.copysign(_on_rows_(self.moved(norm, radius), shrink_, size, radius), x), norm

    def times(self, g: Tensor, y: Tensor, norm: Tensor, *bounds: Tensor) -> Tensor:
        sign, count = _support(y)
        product = sign * g
        mean = product.sum(-1, keepdim=True) / count
        if self.masked:
            product = product.sub_(mean).mul_(sign)
        else:
            product = torch.addcmul(g, sign, mean, value=-1)
        if self.ball:
            # Weights of 0 and 1 choose exactly, and several times faster than `where`.
            inside = (norm < bounds[0]).to(g.dtype)
            product = torch.addcmul(product * (1 - inside), g, inside)
        return product

    def by_bounds(self, y: Tensor, norm: Tensor, *bounds: Tensor) -> tuple[Tensor, ...]:
        sign, count = _support(y)
        return (sign * (self.moved(norm, bounds[0]) / count),)

    def regular(self, x: Tensor, y: Tensor, norm: Tensor, *bounds: Tensor) -> Tensor:
        (radius,) = bounds
        inside, clear = norm < radius, ~_at_threshold(x.abs(), y)
        if self.ball:
            return inside | ((norm > radius) & clear)
        return torch.where(inside, (x != 0).all(-1, keepdim=True), clear)

    def _depth(self, norm: Tensor, radius: Tensor, n: int) -> Tensor:
        return (radius - norm) / n**0.5


class Simplex(L1):
    """u >= 0, sum u_i = radius."""

    def nearest(self, x: Tensor, *bounds: Tensor) -> tuple[Tensor, Tensor]:
        total = x.sum(-1, keepdim=True)
        check_finite(x, total)
        check_radius(bounds[0])
        return shrink_(x.clone(), bounds[0]), total

    def residual(self, x: Tensor, y: Tensor, norm: Tensor, *bounds: Tensor) -> Tensor:
        """Here radius max(x - y) = y'(x - y): x - y is normal to the simplex at y."""
        share = y / bounds[0]
        off = torch.maximum((share.sum(-1, keepdim=True) - 1).abs(), -share.amin(-1, keepdim=True))
        size = torch.maximum(x.abs().amax(-1, keepdim=True), bounds[0])
        step = x / size - y / size
        return torch.maximum(off, step.amax(-1, keepdim=True) - _dot(step, share))

    def regular(self, x: Tensor, y: Tensor, norm: Tensor, *bounds: Tensor) -> Tensor:
        return ~_at_threshold(x, y)


class L2(NormSet):
    """sqrt(sum u_i^2) = radius, or <= radius."""

    p = dual = 2
    smooth_norm = True

    def nearest(self, x: Tensor, *bounds: Tensor) -> tuple[Tensor, Tensor]:
        (radius,) = bounds
        check_radius(radius)
        norm = _norm(x, 2)
        scale = radius / norm
        limits = torch.finfo(x.dtype)
        # Above `least`, the squares that underflow are below the rounding of their sum.
        least = (x.shape[-1] * limits.tiny / limits.eps) ** 0.5
        if bool(((norm > least) & (norm < torch.inf) & (scale >= limits.tiny)).all()):
            return x * (scale.clamp(max=1) if self.ball else scale), norm
        return self._nearest_in_units(x, radius)

    def _nearest_in_units(self, x: Tensor, radius: Tensor) -> tuple[Tensor, Tensor]:
        """The same in units of the largest entry, where nothing overflows or underflows."""
        size = x.abs().amax(-1, keepdim=True)
        check_finite(x, size)
        unit = torch.where(size > 0, x / _positive(size), 1.0)
        length = _norm(unit, 2)
        norm = size * length
        return torch.where(self.moved(norm, radius), unit / length * radius, x), norm

    def times(self, g: Tensor, y: Tensor, norm: Tensor, *bounds: Tensor) -> Tensor:
        (radius,) = bounds
        moved = self.moved(norm, radius)
        # Divided twice, for the square of a small radius would underflow.
        along = _dot(y, g) * moved / radius / radius
        shrinkage = (norm > 0) * radius / _positive(norm)
        return torch.addcmul(g, y, along, value=-1) * torch.where(moved, shrinkage, 1.0)

    def by_bounds(self, y: Tensor, norm: Tensor, *bounds: Tensor) -> tuple[Tensor, ...]:
        return (y * (self.moved(norm, bounds[0]) / bounds[0]),)

    def norm_slope(self, y: Tensor, norm: Tensor, *bounds: Tensor) -> Tensor:
        """Derivative of the norm of x, which is x / norm; zero at zero."""
        length = torch.where(self.moved(norm, bounds[0]), bounds[0], _positive(norm))
        return y * ((norm > 0) / length)

    def regular(self, x: Tensor, y: Tensor, norm: Tensor, *bounds: Tensor) -> Tensor:
        return norm != bounds[0] if self.ball else norm > 0


class LInf(NormSet):
    """max abs(u_i) = radius, or <= radius."""

    p, dual = math.inf, 1

    def nearest(self, x: Tensor, *bounds: Tensor) -> tuple[Tensor, Tensor]:
        (radius,) = bounds
        norm = torch.maximum(x.amax(-1, keepdim=True), -x.amin(-1, keepdim=True))
        check_finite(x, norm)
        check_radius(radius)
        y = x.clamp(max=radius).clamp_(min=-radius)
        return (y if self.ball else _on_rows_(norm < radius, _push, y, radius)), norm

    def times(self, g: Tensor, y: Tensor, norm: Tensor, *bounds: Tensor) -> Tensor:
        free = _free(y, bounds[0])
        if self.masked:
            return g * free
        held = y.detach().sign() * (1 - free)
        mean = _dot(held, g) / _dot(held, held).clamp(min=1)
        return torch.addcmul(g, held, mean, value=-1)

    def by_bounds(self, y: Tensor, norm: Tensor, *bounds: Tensor) -> tuple[Tensor, ...]:
        return (y.detach().sign() * (1 - _free(y, bounds[0])),)

    def regular(self, x: Tensor, y: Tensor, norm: Tensor, *bounds: Tensor) -> Tensor:
        size, (radius,) = x.abs(), bounds
        clear = (size != radius).all(-1, keepdim=True)
        single = ((size == norm).sum(-1, keepdim=True) == 1) & (norm > 0)
        return clear if self.ball else torch.where(norm > radius, clear, single)


class Box(ProjectionSet):
    """lower <= u <= upper, elementwise."""

    def nearest(self, x: Tensor, *bounds: Tensor) -> tuple[Tensor, Tensor]:
        total = x.sum(-1, keepdim=True)
        check_finite(x, total)
        check_order(*bounds)
        return x.clamp(*bounds), total

    def times(self, g: Tensor, y: Tensor, norm: Tensor, *bounds: Tensor) -> Tensor:
        lower, upper = bounds
        return g * (y > lower) * (y < upper)

    def by_bounds(self, y: Tensor, norm: Tensor, *bounds: Tensor) -> tuple[Tensor, ...]:
        at_lower, at_upper = (y == bound for bound in bounds)
        return at_lower.to(y.dtype), (at_upper & ~at_lower).to(y.dtype)

    def residual(self, x: Tensor, y: Tensor, norm: Tensor, *bounds: Tensor) -> Tensor:
        """The nearest point has x, or the bound that x is beyond, in each entry."""
        lower, upper = bounds
        beyond = torch.where(x > y, y - upper, torch.where(x < y, y - lower, 0.0)).abs()
        off = torch.maximum(beyond, torch.maximum(lower - y, y - upper).clamp(min=0))
        return (off / _positive(x.abs() + y.abs())).amax(-1, keepdim=True)

    def regular(self, x: Tensor, y: Tensor, norm: Tensor, *bounds: Tensor) -> Tensor:
        lower, upper = bounds
        return ((x != lower) & (x != upper)).all(-1, keepdim=True)


def _on_rows_(
    rows: Tensor,  # (*batch, 1)
    change: Callable[[Tensor, Tensor], Tensor],
    x: Tensor,  # (*batch, n), overwritten
    radius: Tensor,  # (*batch, 1)
) -> Tensor:
    """The points chosen, changed; the others as they are."""
    chosen = rows.squeeze(-1)
    if bool(chosen.all()):
        return change(x, radius)
    if bool(chosen.any()):
        x[chosen] = change(x[chosen], radius[chosen])
    return x


def _push(x: Tensor, radius: Tensor) -> Tensor:
    """The entry of largest size, the first of them if several, moved to the radius."""
    largest = x.abs().argmax(-1, keepdim=True)
    return x.scatter(-1, largest, torch.copysign(radius, x.gather(-1, largest)))


def _support(y: Tensor) -> tuple[Tensor, Tensor]:
    """Signs of the entries and how many are not zero; at least 1, for the sake of zero points."""
    sign = y.detach().sign()
    return sign, sign.abs().sum(-1, keepdim=True).clamp(min=1)


def _free(y: Tensor, radius: Tensor) -> Tensor:
    """1 where abs(y) is below the radius, else 0, as numbers: faster than a mask of bools."""
    return torch.sub(radius.detach(), y.detach().abs()).sign_()


def _at_threshold(size: Tensor, y: Tensor) -> Tensor:
    """Whether shrinking size to abs(y) met an entry at the threshold itself, up to rounding."""
    depth = y.abs().amax(-1, keepdim=True)
    rest = (size - size.amax(-1, keepdim=True)) + depth
    return (rest.abs() <= 4 * torch.finfo(y.dtype).eps * depth).any(-1, keepdim=True)


def _norm(x: Tensor, p: float) -> Tensor:
    if p == 1:
        return x.abs().sum(-1, keepdim=True)
    if p == math.inf:
        return x.abs().amax(-1, keepdim=True)
    if x.shape[-1] > LONG:
        return x.square().sum(-1, keepdim=True).sqrt()
    return torch.linalg.vector_norm(x, dim=-1, keepdim=True)


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum(-1, keepdim=True)


def _positive(size: Tensor) -> Tensor:
    """A divisor: the size, or 1 where it is zero."""
    return torch.where(size > 0, size, 1.0)


SETS: dict[str, ProjectionSet] = {"simplex": Simplex(), "box": Box()} | {
    f"{onto} {kind.p} {derivative}": kind(onto == "ball", derivative == "exact")
    for onto in ("sphere", "ball")
    for kind in (L1, L2, LInf)
    for derivative in ("exact", "unmasked")
}
