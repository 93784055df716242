"""Exact minima for penalties that are piecewise quadratic, by sorting and running sums."""

from __future__ import annotations

import torch
from torch import Tensor

from declarative_cvx.nonconvex.kernels.pooling.pools import Pools, ascending, ascending_order

# Between points further apart than 2 no argument has both within reach.
_FAR = 2.5
_ROUNDING = 1e-12


def truncated_quadratic(pools: Pools) -> tuple[Tensor, Tensor]:
    """Minimise sum w min((u - x)**2, 1) / 2; the minimum and whether it is the only one.

    As u grows, a point x enters the window [u - 1, u + 1] at u = x - 1 and leaves it at x + 1.
    After each of these 2 n events the points in the window are known by running sums, and the best
    u for them is their mean. Of equal minima the smallest is taken.
    """
    ordered = _ordered(pools)
    place = _closed_up(ordered.points)
    position, sign = _events(place, ordered.weights)
    inside = sign.cumsum(-1)
    first = (sign * position).cumsum(-1)
    second = (sign * position * position).cumsum(-1)
    # The largest weight is 1, so of a window with nearly none it only matters that it is bad.
    mean = first / inside.clamp(min=1e-6)
    gain = inside - (second - first * mean)
    best = gain.amax(-1) - _ROUNDING * ordered.mass
    good = gain >= best.unsqueeze(-1)
    index = good.to(torch.uint8).argmax(-1, keepdim=True)
    middle = (place[:, -1:] - place[:, :1]) / 2
    u = _opened(mean.gather(-1, index) + middle, place, ordered.points)
    return _mean_within_reach(pools, u), good.sum(-1) == 1


def huber(pools: Pools) -> tuple[Tensor, Tensor]:
    """Minimise the sum of Huber penalties; the minimum and whether it is the only one.

    The derivative is piecewise linear and nondecreasing, with breakpoints x - 1 and x + 1. Those
    of either kind where it is negative are counted by bisection; then its zero is in one piece.
    Where the minima fill an interval, its middle is taken.
    """
    ordered = _ordered(pools)
    sums = _RunningSums(ordered)
    above, below = sums.negative_breakpoints().unbind(-1)
    mass_above, moment_above = sums.upto(above)
    mass_below, moment_below = sums.upto(below)
    pull = moment_above - moment_below + sums.mass - mass_above - mass_below
    inside = (mass_above - mass_below).clamp(min=_ROUNDING)
    u = pull / inside
    # The sums have rounding errors of the size of the furthest point; a step without them.
    residuals = pools.points - u.to(pools.points.dtype).unsqueeze(-1)
    u = u + pools.total(residuals.clamp(-1, 1)) / inside
    flat, middle = sums.plateau()
    return torch.where(flat, middle, u), ~flat


def _ordered(pools: Pools) -> Pools:
    """The pools sorted, in float64."""
    if pools.weights is None:
        return Pools(ascending(pools.points).double(), None)
    order = ascending_order(pools.points)
    return Pools(pools.points.gather(-1, order).double(), pools.weights.gather(-1, order).double())


def _closed_up(x: Tensor) -> Tensor:
    """Sorted points moved together where they are far apart, from zero: sums stay accurate."""
    gaps = torch.diff(x, dim=-1, prepend=x[:, :1])
    return gaps.clamp_(max=_FAR).cumsum(-1)


def _opened(u: Tensor, place: Tensor, x: Tensor) -> Tensor:
    """What an argument u (batch, 1) among the places is among the points x, shape (batch,)."""
    right = torch.searchsorted(place, u).clamp(max=place.shape[-1] - 1)
    left = (right - 1).clamp(min=0)
    nearer_left = u - place.gather(-1, left) < place.gather(-1, right) - u
    nearest = torch.where(nearer_left, left, right)
    return (x.gather(-1, nearest) + (u - place.gather(-1, nearest))).squeeze(-1)


def _mean_within_reach(pools: Pools, u: Tensor) -> Tensor:
    """Mean of the points not further than 1 from u, to the accuracy of the points."""
    residuals = pools.points - u.to(pools.points.dtype).unsqueeze(-1)
    inside = (residuals.abs() <= 1).to(residuals.dtype)
    return u + pools.total(residuals * inside) / pools.total(inside)


def _events(place: Tensor, weights: Tensor | None) -> tuple[Tensor, Tensor]:
    """Points in the order in which they enter and leave the window, and the weight so gained.

    The points are given from the middle of each pool.
    """
    middle = (place[:, -1:] - place[:, :1]) / 2
    keys = torch.cat([place, place + 2], dim=-1)
    if weights is not None:
        order = ascending_order(keys)
        sign = torch.cat([weights, -weights], dim=-1).gather(-1, order)
        return torch.cat([place, place], dim=-1).gather(-1, order) - middle, sign
    # The last bit of a key says whether the point leaves, so that values alone need be sorted.
    bits = keys.view(torch.int64)
    bits.bitwise_and_(-2)
    bits[:, place.shape[-1] :].bitwise_or_(1)
    keys = ascending(keys)
    sign = 1.0 - 2.0 * keys.view(torch.int64).bitwise_and(1).to(keys.dtype)
    return keys.add_(sign).sub_(middle + 1), sign


class _RunningSums:
    """Weights, and weighted points, of the first k points of sorted pools in sum."""

    def __init__(self, pools: Pools) -> None:
        self._points = pools.points
        self._masses = None if pools.weights is None else pools.weights.cumsum(-1)
        self._moments = pools.weighted(pools.points).cumsum(-1)
        self.mass = pools.mass

    def upto(self, count: Tensor) -> tuple[Tensor, Tensor]:
        """Weight and moment of the first points, for counts (batch, k) or (batch,)."""
        index = count.reshape(count.shape[0], -1)
        some = index > 0
        last = (index - 1).clamp(min=0)
        mass = index if self._masses is None else self._masses.gather(-1, last) * some
        moment = self._moments.gather(-1, last) * some
        return mass.to(moment.dtype).reshape(count.shape), moment.reshape(count.shape)

    def slope(self, u: Tensor) -> Tensor:  # (batch, k) -> (batch, k)
        """Derivative of the sum of Huber penalties at u."""
        mass_below, moment_below = self.upto(torch.searchsorted(self._points, u - 1))
        mass_upto, moment_upto = self.upto(torch.searchsorted(self._points, u + 1))
        within = u * (mass_upto - mass_below) - (moment_upto - moment_below)
        return within + mass_below + mass_upto - self.mass.unsqueeze(-1)

    def negative_breakpoints(self) -> Tensor:
        """How many of the breakpoints x - 1, and x + 1, have a negative slope: (batch, 2)."""
        batch, n = self._points.shape
        shift = self._points.new_tensor([-1.0, 1.0])
        low = torch.zeros(batch, 2, dtype=torch.int64, device=shift.device)
        high = torch.full_like(low, n)
        for _ in range(n.bit_length()):
            probe = (low + high) // 2
            u = self._points.gather(-1, probe.clamp(max=n - 1)) + shift
            negative = (self.slope(u) < 0) & (probe < high)
            low = torch.where(negative, probe + 1, low)
            high = torch.where(negative, high, probe)
        return low

    def plateau(self) -> tuple[Tensor, Tensor]:
        """Whether half of the weight is at least 2 below the other half, and the middle between."""
        half = self.mass.unsqueeze(-1) / 2
        n = self._points.shape[-1]
        if self._masses is None:
            count = torch.full_like(half, n // 2, dtype=torch.int64)
        else:
            count = torch.searchsorted(self._masses, half * (1 - _ROUNDING)) + 1
        left = self._points.gather(-1, (count - 1).clamp(min=0))
        right = self._points.gather(-1, count.clamp(max=n - 1))
        even = (self.upto(count)[0] - half).abs() <= half * _ROUNDING
        flat = even & (right - left > 2)
        return flat.squeeze(-1), ((left + right) / 2).squeeze(-1)
