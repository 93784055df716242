"""The threshold of projections onto the simplex and the L1 ball, without sorting."""

from __future__ import annotations

import torch
from torch import Tensor

# Each pass of Newton's method divides the product of excess and slope by four at least, so that
# log4(n^2 / tolerance) passes are enough: fewer than this. Data of usual distributions take five.
MAX_PASSES = 64

# Error of the sum, relative to the radius, with which the threshold is good enough to start from.
ROUGH = 1e-3

# Entries that a thread of a CPU works on together: all passes but the first find them in cache.
BLOCK = 2**17


def shrink_(
    x: Tensor,  # (*batch, n), contiguous, overwritten
    radius: Tensor,  # (*batch, 1)
) -> Tensor:
    """max(x - theta, 0), with theta such that its sum is the radius; in place, in O(n log n).

    Source: Duchi et al. 2008; Newton's method from below theta is the algorithm of Michelot 1986.
    """
    n = x.shape[-1]
    entries = BLOCK * torch.get_num_threads() if x.device.type == "cpu" else x.numel()
    rows = max(entries // n, 1)
    for block, sums in zip(
        x.view(-1, n).split(rows), radius.reshape(-1, 1).split(rows), strict=True
    ):
        _shrink_block_(block, sums)
    return x


def _shrink_block_(x: Tensor, radius: Tensor) -> None:
    """Shrink points by a threshold that is first found as a distance from the largest entry, then
    corrected by a small shift: theta itself would lose to rounding what a small radius leaves of
    the largest entries, or what a small theta leaves of the others.
    """
    top = x.amax(-1, keepdim=True)
    x.sub_(top - _shift(x - top, radius, radius, ROUGH))
    exact = 8 * torch.finfo(x.dtype).eps
    x.add_(_shift(x, radius, torch.zeros_like(radius), exact)).relu_()


def _shift(x: Tensor, radius: Tensor, shift: Tensor, tolerance: float) -> Tensor:
    """The shift with which the sum of max(x + shift, 0) is the radius, by Newton's method.

    The sum is convex and piecewise linear in the shift, so that the iterates fall monotonically,
    but for the first, and end at the solution itself.
    """
    rest, active = torch.empty_like(x), torch.ones_like(radius)
    for _ in range(MAX_PASSES):
        torch.add(x, shift, out=rest).relu_()
        excess = rest.sum(-1, keepdim=True) - radius
        settled = excess.abs() <= tolerance * radius
        # A step upwards can pass the solution by far; one downwards never passes it.
        step = torch.where(settled, excess.clamp(min=0), excess) * active
        before, slope = shift, rest.sign_().sum(-1, keepdim=True)
        shift = shift - step / slope.clamp(min=1)
        # Points that are done stay as they are, whatever others in the batch still need.
        active = active * ~(settled | (shift == before))
        if not bool(active.any()):
            break
    return shift
