"""Interval arithmetic for implicit models, rounded outward.

A product of k terms in floating point is off by at most about k roundings of the sum of absolute
values (Higham, *Accuracy and Stability of Numerical Algorithms*, Sec. 3.1), in any order of
summation. Every enclosure here is widened by four times that, so that it holds for real numbers.
Matrices whose entries are themselves rounded once are covered, too.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from declarative_cvx.nonconvex.implicit.activations import Activation

_TINY = 1e-300  # covers underflow in tanh and sigmoid


@dataclass(frozen=True)
class Box:
    """Intervals, one for each entry.

    Attributes
    ----------
    lower, upper : Tensor, shape (batch, k)
    """

    lower: Tensor
    upper: Tensor

    @property
    def center(self) -> Tensor:
        """The middle, as rounded."""
        return self.lower / 2 + self.upper / 2

    @property
    def radius(self) -> Tensor:
        """The larger distance from `center` to an end."""
        return torch.maximum(self.upper - self.center, self.center - self.lower)

    @property
    def magnitude(self) -> Tensor:
        """The largest absolute value."""
        return torch.maximum(self.upper.abs(), self.lower.abs())

    def intersect(self, other: Box) -> Box:
        return Box(torch.maximum(self.lower, other.lower), torch.minimum(self.upper, other.upper))

    def where(self, mask: Tensor, other: Box) -> Box:
        """These intervals where the mask says so, elsewhere the others."""
        ends = ((self.lower, other.lower), (self.upper, other.upper))
        return Box(*(torch.where(mask, mine, theirs) for mine, theirs in ends))

    def join(self, other: Box) -> Box:
        """Both, one after the other."""
        return Box(torch.cat([self.lower, other.lower], 1), torch.cat([self.upper, other.upper], 1))

    def rounded_to(self, dtype: torch.dtype) -> Box:
        """As tensors of another type, no narrower."""
        unit = torch.finfo(dtype).eps if dtype != self.lower.dtype else 0
        lower, upper = self.lower.to(dtype), self.upper.to(dtype)
        return Box(lower - unit * lower.abs(), upper + unit * upper.abs())

    @classmethod
    def around(cls, center: Tensor, radius: Tensor) -> Box:
        """All points no farther from `center` than `radius`."""
        spread = radius + rounding(1) * (radius + center.abs())
        return cls(center - spread, center + spread)


def rounding(terms: int) -> float:
    """Relative to the sum of absolute values, more than the error of so many terms in float64."""
    return 2 * (terms + 4) * torch.finfo(torch.float64).eps


def image(
    matrix: Tensor,  # (m, k), dense or sparse
    offset: Tensor,  # (m,)
    box: Box,  # (batch, k)
) -> Box:
    """All ``matrix @ v + offset`` for v in the box: the least intervals that hold them."""
    unit = rounding(matrix.shape[1])
    center = box.center
    middle = center @ matrix.t() + offset
    spread = (box.radius + unit * (box.radius + center.abs())) @ matrix.abs().t()
    spread = spread + unit * (spread + offset.abs() + middle.abs())
    return Box(middle - spread, middle + spread)


def applied(activation: Activation, box: Box) -> Box:
    """All phi(z) for z in the box, where phi is componentwise and nondecreasing."""
    lower, upper = activation(box.lower), activation(box.upper)
    unit, tiny = rounding(4), 0.0 if activation.piecewise_linear else _TINY
    least, most = activation.bounds(lower)
    return Box(
        torch.maximum(lower - unit * lower.abs() - tiny, least),
        torch.minimum(upper + unit * upper.abs() + tiny, most),
    )
