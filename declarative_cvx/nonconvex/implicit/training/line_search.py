"""How far to go along a direction in which a convex function falls."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

# Share of the slope at which a search may stop, and the trials it may take.
_FLAT, _TRIALS = 0.1, 40
# Share of it that is rounding.
_ROUNDING = 1e-6


def downhill(
    slope: Callable[[Tensor], Tensor],  # (batch,) -> (batch,), nondecreasing
    like: Tensor,  # (batch,)
) -> Tensor:
    """A t in (0, 1] for each element where the slope is still negative, or nearly zero; 1 if it is
    there.

    By convexity the function is lower there. Slopes are exact where differences of values are
    lost in rounding.
    """
    low, high = torch.zeros_like(like), torch.ones_like(like)
    at_low, at_high = slope(low), slope(high)
    enough = _FLAT * at_low.abs()
    done = at_high <= _ROUNDING * at_low.abs()
    low = torch.where(done, 1.0, low)
    for _ in range(_TRIALS):
        if bool(done.all()):
            break
        width = high - low
        secant = low - at_low * width / (at_high - at_low)
        t = torch.maximum(torch.minimum(secant, high - 0.1 * width), low + 0.1 * width)
        found = slope(t)
        below = found <= 0
        low, at_low = torch.where(below & ~done, t, low), torch.where(below, found, at_low)
        high, at_high = torch.where(below, high, t), torch.where(below, at_high, found)
        done = done | (below & (found.abs() <= enough))
    return low
