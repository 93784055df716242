"""The second-order cone {(t, x): ||x||_2 <= t}."""

from __future__ import annotations

import torch
from torch import Tensor


def _parts(v: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Apex entry t, direction x / ||x||, norm ||x||, and where v is outside K and its polar."""
    t, x = v[..., :1], v[..., 1:]
    squared = (x * x).sum(-1, keepdim=True)
    positive = squared > 0
    norm = torch.where(positive, squared, 1.0).sqrt() * positive
    direction = x / torch.where(positive, norm, 1.0)
    return t, direction, norm, norm > t.abs()


def project(v: Tensor) -> Tensor:
    """Euclidean projection onto the second-order cone.

    Parameters
    ----------
    v : Tensor, shape (..., d)
        Points (t, x), d >= 1.

    Returns
    -------
    Tensor, shape (..., d)
    """
    t, direction, norm, outside = _parts(v)
    half = (t + norm) / 2
    middle = torch.cat([half, half * direction], -1)
    return torch.where(outside, middle, torch.where(t >= norm, v, torch.zeros_like(v)))


def derivative(v: Tensor) -> Tensor:
    """Jacobian of the projection: rank-one correction of a multiple of the identity.

    On the boundary of the cone the identity is chosen, on that of the polar cone zero.

    Parameters
    ----------
    v : Tensor, shape (..., d)

    Returns
    -------
    Tensor, shape (..., d, d)
        Symmetric, eigenvalues in [0, 1].
    """
    t, e, norm, outside = _parts(v)
    dim = v.shape[-1]
    ratio = (t / torch.where(outside, norm, 1.0))[..., None]
    eye = torch.eye(dim - 1, dtype=v.dtype, device=v.device)
    outer = e[..., :, None] * e[..., None, :]
    corner = ((1 + ratio) * eye - ratio * outer) / 2
    column = e[..., :, None] / 2
    top = torch.cat([torch.full_like(ratio, 0.5), column.mT], -1)
    middle = torch.cat([top, torch.cat([column, corner], -1)], -2)
    inside = (t >= norm)[..., None] * torch.eye(dim, dtype=v.dtype, device=v.device)
    return torch.where(outside[..., None], middle, inside)
