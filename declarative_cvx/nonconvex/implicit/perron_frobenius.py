"""Rows in weighted l1 balls, and scalings that show the spectral radius of abs(A) to be small."""

from __future__ import annotations

import torch
from torch import Tensor

# A norm that exceeds the radius by less, in units of rounding, counts as on the boundary, where
# the derivative is the one from inside: the identity.
ON_BOUNDARY = 32.0

# Steps of the search for a scaling on the boundary.
_STEPS = 2000


def project_onto_weighted_l1_ball(
    r: Tensor,  # (..., n)
    weight: Tensor,  # (..., n), positive
    radius: float,
) -> Tensor:
    """The nearest point to r, in the Euclidean norm, with sum_j weight_j abs(y_j) <= radius.

    It is sign(r_j) max(abs(r_j) - theta weight_j, 0), theta found from the sorted breakpoints
    abs(r_j) / weight_j (Duchi et al. 2008, with weights); O(n log n).

    Returns
    -------
    Tensor, shape (..., n)
        Differentiable any number of times, in r and in the weights.
    """
    r, weight = torch.broadcast_tensors(r, weight)
    size = r.abs()
    norm = (weight * size).sum(-1, keepdim=True)
    inside = norm <= radius * (1 + ON_BOUNDARY * torch.finfo(r.dtype).eps)
    # The second threshold is found from numbers of the radius' magnitude, however large r is.
    start = _threshold(size.detach(), weight.detach(), radius)
    rest = size - start * weight
    shift = _threshold(rest.detach(), weight.detach(), radius)
    support = (rest - shift * weight > 0).to(r.dtype)
    within, slopes = support * weight, (support * weight * weight).sum(-1, keepdim=True)
    shift = ((within * rest).sum(-1, keepdim=True) - radius) / slopes.clamp(min=_tiny(r))
    moved = support * (rest - shift * weight) * torch.sign(r)
    return torch.where(inside, r, moved)


def _threshold(size: Tensor, weight: Tensor, radius: float) -> Tensor:
    """The theta with sum_j weight_j max(size_j - theta weight_j, 0) = radius, (..., 1)."""
    breakpoints, order = (size / weight).sort(-1, descending=True)
    size, weight = size.gather(-1, order), weight.gather(-1, order)
    sums, slopes = (weight * size).cumsum(-1), (weight * weight).cumsum(-1)
    candidates = (sums - radius) / slopes
    last = (breakpoints > candidates).sum(-1, keepdim=True) - 1
    return candidates.gather(-1, last.clamp(min=0))


def _tiny(like: Tensor) -> float:
    return torch.finfo(like.dtype).tiny


def perron_scaling(
    A: Tensor,  # (n, n)
    bound: float = 1.0,
) -> Tensor | None:
    """D > 0 with ||diag(d) A diag(d)^-1||_inf < bound, or None if the spectral radius of abs(A),
    the infimum of such norms, is not below the bound (IDL 3.2).

    Returns
    -------
    Tensor, shape (n,), or None
        The norm is that infimum plus at most a tenth of the way from there to the bound. The
        largest entry is 1.
    """
    size = A.abs()
    radius = torch.linalg.eigvals(size).abs().max()
    if not bool(radius < bound):
        return None
    # v = (t I - |A|)^-1 1 is positive for t above the spectral radius, and |A| v = t v - 1 < t v.
    between = radius + 0.1 * (bound - radius)
    eye = torch.eye(len(A), dtype=A.dtype, device=A.device)
    v = torch.linalg.solve(between * eye - size, torch.ones_like(A[:, :1]))[:, 0]
    if not bool((v > 0).all() & (size @ v < bound * v).all()):
        return None
    return v.min() / v


def least_scaling(
    A: Tensor,  # (n, n)
    bound: float,
    widest: float,
) -> Tensor | None:
    """The d > 0 of least spread with ||diag(d) A diag(d)^-1||_inf <= bound, also on the boundary.

    1 / d is the least v >= 1 with abs(A) v <= bound v, approached from below: every such v is above
    all iterates.

    Returns
    -------
    Tensor, shape (n,), or None
        None if entries of v grow beyond `widest`. Otherwise a proposal, to be verified.
    """
    size, v = A.abs() / bound, torch.ones_like(A[:, 0])
    for _ in range(_STEPS):
        before, v = v, torch.maximum(v, size @ v)
        if bool(v.max() > widest):
            return None
        if torch.equal(before, v):
            break
    return v.min() / v
