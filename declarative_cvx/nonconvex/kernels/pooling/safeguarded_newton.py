"""Stationary points on a line, by Newton's method kept inside an interval."""

from __future__ import annotations

import torch
from torch import Tensor

from declarative_cvx.nonconvex.kernels.pooling.pools import Pools
from declarative_cvx.penalties import Penalty

_STEPS = 150


def polish(
    penalty: Penalty,
    pools: Pools,
    start: Tensor,  # (batch,)
    low: Tensor,  # (batch,)
    high: Tensor,  # (batch,)
) -> Tensor:
    """A point in [low, high] of each pool where the slope of the sum of penalties is zero.

    Should the slope not change its sign from negative to positive there, the result is an end of
    the interval. Bisection takes over where Newton's step leaves the bracket or does not at least
    halve the one before it, so that the method always ends.
    """
    precision = torch.finfo(start.dtype).eps
    # A step of Newton's squares the error, so the one after a small one would be nothing.
    small = 0.1 * precision**0.5
    u, before = start, high - low
    done = torch.zeros_like(start, dtype=torch.bool)
    for _ in range(_STEPS):
        residuals = u.unsqueeze(-1) - pools.points
        slope, curvature = map(pools.total, penalty.rho_derivatives(residuals))
        low, high = torch.where(slope < 0, u, low), torch.where(slope > 0, u, high)
        step = -slope / curvature
        newton = (curvature > 0) & (step.abs() <= (before.abs() / 2).clamp(min=small))
        newton &= (u + step >= low) & (u + step <= high)
        step = torch.where(newton, step, (low + high) / 2 - u)
        before = torch.where(done | (slope == 0), 0.0, step)
        u = u + before
        limit = torch.where(newton, small, 2 * precision * (1 + u.abs()))
        done = done | (before.abs() <= limit)
        if bool(done.all()):
            break
    return u
