"""The global minimum of sums of penalties, by bounds on ever smaller intervals."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from declarative_cvx.nonconvex.kernels.pooling.lattice import least_curvature, least_of_quadratic
from declarative_cvx.nonconvex.kernels.pooling.pools import Pools, blocks
from declarative_cvx.nonconvex.kernels.pooling.safeguarded_newton import polish
from declarative_cvx.penalties import Penalty

_ROUNDS = 40
_PARTS = 4
# Intervals a pool may have open on average before the search settles for the gap it has.
_OPEN = 512
_NARROW = 1e-5
_REACH = 0.1
_DISTINCT = 1e-6
_ROUNDING = 1e-13
# What is asked for where nothing is known but that the penalty is nondecreasing.
_COARSE = 1e-4


@dataclass(frozen=True)
class Intervals:
    """Intervals [low, high] of some pools; every tensor has the shape (intervals,)."""

    pool: Tensor
    low: Tensor
    high: Tensor

    def __getitem__(self, which: Tensor | slice) -> Intervals:
        return Intervals(self.pool[which], self.low[which], self.high[which])

    def split(self) -> Intervals:
        """Each cut into equal parts."""
        share = torch.linspace(0, 1, _PARTS + 1, device=self.low.device, dtype=self.low.dtype)
        edges = torch.lerp(self.low.unsqueeze(-1), self.high.unsqueeze(-1), share)
        pool = self.pool.repeat_interleave(_PARTS)
        return Intervals(pool, edges[:, :-1].flatten(), edges[:, 1:].flatten())


@dataclass(frozen=True)
class Findings:
    """What is known of intervals: a point in each and the value there, and a lower bound.

    `settled` says that the point is the minimum over the interval.
    """

    point: Tensor
    value: Tensor
    least: Tensor
    settled: Tensor


class Search:
    """A search in pools given in float64, from a local minimum `point` (batch,) of each.

    Attributes
    ----------
    point : Tensor, shape (batch,)
        The best so far. Among equals it is the smallest.
    unique : Tensor of bool, shape (batch,)
        Whether no other point is as good.
    """

    def __init__(self, penalty: Penalty, pools: Pools, point: Tensor) -> None:
        self._penalty, self._pools = penalty, pools
        self.point = point
        self._value = pools.total(penalty.rho(point.unsqueeze(-1) - pools.points))
        self.unique = torch.ones_like(point, dtype=torch.bool)
        self._floor = torch.full_like(point, torch.inf)
        self._rounding = _ROUNDING * (pools.mass + self._value)

    @property
    def gap(self) -> Tensor:
        """Bound on how far the best values are above the minimum, for each unit of weight."""
        return (self._value - self._floor).clamp(min=0) / self._pools.mass

    def run(self, intervals: Intervals) -> None:
        """Search the intervals, outside of which there is nothing better."""
        limit = _OPEN * self.point.numel()
        for _ in range(_ROUNDS):
            found = self._examine(intervals)
            self._accept(intervals.pool, found)
            live = self._promising(intervals, found)
            if int(live.sum()) > limit:
                live = torch.zeros_like(live)
            dropped = ~live & ~found.settled
            self._floor.scatter_reduce_(
                0, intervals.pool[dropped], found.least[dropped], "amin", include_self=True
            )
            intervals = intervals[live].split()
            if not intervals.pool.numel():
                break
        self._settle()

    def _settle(self) -> None:
        """Make the best points stationary: some may be middles of intervals."""
        u = polish(self._penalty, self._pools, self.point, self.point - _REACH, self.point + _REACH)
        value = self._pools.total(self._penalty.rho(u.unsqueeze(-1) - self._pools.points))
        better = value <= self._value + self._rounding
        self.point = torch.where(better, u, self.point)
        self._value = torch.where(better, value, self._value)

    def _promising(self, intervals: Intervals, found: Findings) -> Tensor:
        """Which intervals are to be looked at more closely."""
        margin = self._rounding
        if self._penalty.dip is None:
            margin = -_COARSE * self._pools.mass
        lower = found.least <= (self._value + margin)[intervals.pool]
        return lower & ~found.settled & (intervals.high - intervals.low > _NARROW)

    def _examine(self, intervals: Intervals) -> Findings:
        parts = [
            _examined(self._penalty, self._pools.rows(intervals.pool[rows]), intervals[rows])
            for rows in blocks(self._pools.points, intervals.pool.numel())
        ]
        fields = zip(*((f.point, f.value, f.least, f.settled) for f in parts), strict=True)
        return Findings(*(torch.cat(field) for field in fields))

    def _accept(self, pool: Tensor, found: Findings) -> None:
        """Take over what is better than the best so far, and note what is as good."""
        old, old_value = self.point, self._value
        value = old_value.scatter_reduce(0, pool, found.value, "amin")
        ceiling = value + self._rounding
        better = found.value < (old_value - self._rounding)[pool]
        equal = found.settled & (found.value <= ceiling[pool])
        stays = old_value <= ceiling
        candidate = torch.where(
            equal | (better & (found.value == value[pool])), found.point, torch.inf
        )
        point = torch.where(stays, old, torch.inf)
        self.point = point.scatter_reduce(0, pool, candidate, "amin")
        self._value = torch.where(self.point == old, old_value, value)
        apart = equal & ((found.point - self.point[pool]).abs() > _DISTINCT)
        ties = torch.zeros_like(stays, dtype=torch.int32).scatter_reduce(
            0, pool, apart.to(torch.int32), "amax"
        )
        self.unique = (self.unique | ~stays) & (ties == 0)
        self.unique &= ~stays | ((old - self.point).abs() <= _DISTINCT)


def _examined(penalty: Penalty, pools: Pools, intervals: Intervals) -> Findings:
    """Findings of intervals, of the pools given row by row."""
    middle, half = (intervals.low + intervals.high) / 2, (intervals.high - intervals.low) / 2
    residuals = middle.unsqueeze(-1) - pools.points
    distance = residuals.abs()
    nearest = (distance - half.unsqueeze(-1)).clamp(min=0)
    value = pools.total(penalty.rho(residuals))
    least = pools.total(penalty.rho(nearest))
    if penalty.dip is None:
        return Findings(middle, value, least, torch.zeros_like(value, dtype=torch.bool))
    bend = least_curvature(penalty, nearest, distance + half.unsqueeze(-1))
    curvature = pools.total(bend)
    slope = pools.total(penalty.rho_slope(residuals))
    _, parabola = least_of_quadratic(value, slope, curvature, half)
    least = torch.maximum(least, parabola)
    settled = curvature > _ROUNDING * pools.total(bend.abs())
    return _minimised(penalty, pools, intervals, Findings(middle, value, least, settled))


def _minimised(penalty: Penalty, pools: Pools, intervals: Intervals, found: Findings) -> Findings:
    """The findings with the minima over intervals where the sum is convex."""
    index = found.settled.nonzero().squeeze(-1)
    pools, chosen = pools.rows(index), intervals[index]
    point = polish(penalty, pools, found.point[index], chosen.low, chosen.high)
    value = pools.total(penalty.rho(point.unsqueeze(-1) - pools.points))
    return Findings(
        found.point.index_copy(0, index, point),
        found.value.index_copy(0, index, value),
        found.least,
        found.settled,
    )
