"""Bounds on a sum of penalties everywhere on a line, from moments of the data in cells.

The line is cut into cells of equal width. For a point x = b + s of the cell around b, and an
argument u = a + t of the cell around a, Taylor's theorem with the least second derivative k that
the penalty has between the two cells gives

    rho(u - x) >= rho(a - b) + rho'(a - b) (t - s) + k (t - s)**2 / 2,

and the sum over the data is a quadratic in t whose coefficients are the zeroth, first and second
moments of the data in the cells, times matrices that depend on a - b alone. Data and arguments
outside the lattice are moved to its ends: that brings none of them further apart, so as the
penalties are nondecreasing the bounds still hold.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from declarative_cvx.nonconvex.kernels.pooling.pools import Pools
from declarative_cvx.penalties import Penalty

# Width of a cell, relative to the cube of where the penalty's second derivative is least: the
# narrower a penalty, the flatter are the sum's minima in proportion to its terms' bends.
_FINENESS = 0.048
# Cells for data too far apart for any number of them, and for others at most.
_FEW, _MOST = 128, 4096
_STEP = 16
# Cells up to which products with matrices are faster than Fourier transforms.
_DIRECT = 256
# Of the sums in single precision, relative to the largest.
_ROUNDING = 1e-5
_NOTHING = 1e-25


Coefficients = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class Cells:
    """Bounds over the cells of a lattice; every tensor but `origin` is (batch, cells).

    Attributes
    ----------
    width : float
    origin : Tensor, shape (batch,)
        Where the first cell begins.
    least : Tensor
        Lower bound of the sum of penalties over the cell.
    best : Tensor
        Where in the cell the bound is least.
    convex : Tensor of bool
        Whether the sum is certainly convex in the cell.
    """

    width: float
    origin: Tensor
    least: Tensor
    best: Tensor
    convex: Tensor

    def lowest(self) -> Tensor:
        """Where the bound is least, shape (batch,)."""
        return self.best.gather(-1, self.least.argmin(-1, keepdim=True)).squeeze(-1)

    def open(self, u: Tensor, value: Tensor, stationary: Tensor) -> Tensor:
        """Which cells may hold something better than u, where the sum has that value."""
        margin = _ROUNDING * (1 + value.abs().unsqueeze(-1) + self.least.abs())
        rivals = self.least < value.unsqueeze(-1) + margin
        last = self.convex.shape[-1] - 1
        own = ((u - self.origin) / self.width).floor().clamp(0, last).long().unsqueeze(-1)
        # Cells with only convex ones between them and u's share its count of the others.
        count = (~self.convex).to(torch.int32).cumsum(-1, dtype=torch.int32)
        same = self.convex & (count == count.gather(-1, own))
        return rivals & ~(same & stationary.unsqueeze(-1))


class Lattice:
    """The matrices of one penalty, in single precision, whose rounding the bounds allow for."""

    def __init__(self, penalty: Penalty, device: torch.device) -> None:
        self._reach = 0.0 if penalty.dip is None else penalty.dip
        self.width = _FINENESS * (self._reach or 1.0) ** 3
        offset = torch.arange(1 - _MOST, _MOST, device=device, dtype=torch.float32) * self.width
        self._tables = _envelope(penalty, offset, self.width)
        self._kernels: dict[int, tuple[Tensor, ...]] = {}

    def cells(self, pools: Pools) -> Cells:
        """Bounds for each pool."""
        points, width = pools.points.float(), self.width
        first, last = points.amin(-1), points.amax(-1)
        count = _count((last - first) / width)
        origin = _origin(first, last, count, width)
        a, b, c = self._coefficients(_moments(points, pools.weights, origin, count, width))
        t, least = least_of_quadratic(a, b, c, a.new_tensor(width / 2))
        middle = (torch.arange(count, device=a.device) + 0.5) * width
        convex = c > _ROUNDING * a.abs()
        # Data moved to an end bend the sum otherwise than where they are, in the cells near them.
        near = math.ceil(self._reach / width) + 1
        convex[:, :near] &= (first >= origin).unsqueeze(-1)
        convex[:, -near:] &= (last <= origin + count * width).unsqueeze(-1)
        convex[:, 0] = convex[:, -1] = False
        return Cells(width, origin, least, origin.unsqueeze(-1) + middle + t, convex)

    def _coefficients(self, moments: Tensor) -> Coefficients:  # (batch, 3, count)
        count = moments.shape[-1]
        if count not in self._kernels:
            make = _toeplitz if count <= _DIRECT else _spectrum
            self._kernels[count] = tuple(make(table, count) for table in self._tables)
        value, slope, curvature = self._kernels[count]
        if count > _DIRECT:
            zeroth, first, second = torch.fft.rfft(moments, 2 * count).unbind(1)
            a = zeroth * value - first * slope + second * curvature / 2
            b = zeroth * slope - first * curvature
            products = torch.stack([a, b, zeroth * curvature])
            a, b, c = torch.fft.irfft(products, 2 * count)[..., :count]
            return a, b, c
        zeroth, first, second = moments.unbind(1)
        a = zeroth @ value - first @ slope + second @ (curvature / 2)
        return a, zeroth @ slope - first @ curvature, zeroth @ curvature


def least_curvature(penalty: Penalty, nearest: Tensor, furthest: Tensor) -> Tensor:
    """Least second derivative of the penalty at distances between two."""
    assert penalty.dip is not None
    return penalty.rho_curvature(torch.clamp(nearest, min=penalty.dip).minimum(furthest))


def least_of_quadratic(
    value: Tensor, slope: Tensor, curvature: Tensor, half: Tensor
) -> tuple[Tensor, Tensor]:
    """Where value + slope t + curvature t**2 / 2 is least for abs(t) <= half, and a lower bound."""
    tiny = torch.finfo(curvature.dtype).tiny
    t = (-slope / curvature.clamp(min=tiny)).clamp(-half, half)
    bent = curvature.clamp(min=0) * t * t + curvature.clamp(max=0) * half * half
    return t, value + slope * t + bent / 2


def _envelope(penalty: Penalty, offset: Tensor, width: float) -> Coefficients:
    """Value, slope and least curvature by the distance of two cells."""
    distance = offset.abs()
    nearest = (distance - width).clamp(min=0)
    if penalty.dip is None:
        return penalty.rho(nearest), torch.zeros_like(offset), torch.zeros_like(offset)
    curvature = least_curvature(penalty, nearest, distance + width)
    return penalty.rho(offset), penalty.rho_slope(offset), curvature


def _toeplitz(table: Tensor, count: int) -> Tensor:
    """Matrix with the entry for cell k minus cell j in row j, column k."""
    index = torch.arange(count, device=table.device)
    # Denormal numbers would slow the products down a hundredfold.
    table = table * (table.abs() > _NOTHING)
    return table[index.unsqueeze(0) - index.unsqueeze(1) + _MOST - 1]


def _spectrum(table: Tensor, count: int) -> Tensor:
    """Fourier transform of the entries by the distance of two cells, for a circular convolution."""
    middle = table.shape[0] // 2
    negative, rest = table[middle - count + 1 : middle], table[middle : middle + count]
    return torch.fft.rfft(torch.cat([rest, rest.new_zeros(1), negative]))


def _count(spread: Tensor) -> int:
    """Number of cells for data of these spreads in cells, with room at the ends."""
    fitting = torch.where(spread < _MOST - 4, spread, _FEW - 4)
    return -(-(int(fitting.amax()) + 4) // _STEP) * _STEP


def _origin(first: Tensor, last: Tensor, count: int, width: float) -> Tensor:
    """Where the lattice begins: before the data, or so that zero is in the middle."""
    length = (count - 3) * width
    start = torch.maximum(first, torch.clamp(last - length, max=-length / 2))
    return start - 1.5 * width


def _moments(
    points: Tensor, weights: Tensor | None, origin: Tensor, count: int, width: float
) -> Tensor:
    """Zeroth, first and second moments of the points in each cell about its middle."""
    position = (points - origin.unsqueeze(-1)) / width
    cell = position.floor().clamp_(0, count - 1)
    s = ((position - cell - 0.5) * width).clamp_(-width / 2, width / 2)
    index = cell.long()
    moments = points.new_zeros(points.shape[0], 3, count)
    term = torch.ones_like(s) if weights is None else weights.float()
    for order in range(3):
        moments[:, order].scatter_add_(-1, index, term)
        term = term * s
    return moments
