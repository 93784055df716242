"""The second-order cone {(t, x): ||x||_2 <= t}."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from declarative_cvx.cones.spectrum import Spectrum

# Share of the distance to the axis up to which a move along it hardly turns the eigenvectors.
_SMALL_MOVE = 0.05


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


def decompose(v: Tensor) -> tuple[Tensor, Spectrum]:
    """Projection, and eigenvectors of its derivative (the constants of `derivative`).

    They are (1, e) / sqrt(2) and (1, -e) / sqrt(2) for the direction e of x, with eigenvalues 1 and
    0 outside of the cone and its polar; orthogonal to both, the eigenvalue is (1 + t / ||x||) / 2.

    Parameters
    ----------
    v : Tensor, shape (..., d)
    """
    t, e, norm, outside = _parts(v)
    inside = t >= norm
    half = (t + norm) / 2
    middle = torch.cat([half, half * e], -1)
    projection = torch.where(outside, middle, v * inside)
    share = (1 + t / torch.where(outside, norm, 1.0)) / 2
    share = torch.where(outside, share, inside.to(v.dtype))
    values = torch.cat([outside | inside, inside, share.expand_as(v)[..., 2:]], -1)
    kink = torch.minimum(
        (norm - t.abs()).abs(), torch.where(outside, _SMALL_MOVE * norm, torch.inf)
    )
    # Elsewhere every vector is an eigenvector: the axes bring no rounding.
    eye = torch.eye(v.shape[-1], dtype=v.dtype, device=v.device)
    vectors = torch.where(outside[..., None], _vectors(e), eye)
    return projection, Spectrum(vectors, values[..., : v.shape[-1]], kink[..., 0])


def _vectors(e: Tensor) -> Tensor:
    """Eigenvectors for directions e of shape (..., d - 1), shape (..., d, d)."""
    dim = e.shape[-1] + 1
    if dim == 1:
        return e.new_ones((*e.shape[:-1], 1, 1))
    eye = torch.eye(dim, dtype=e.dtype, device=e.device)
    first = e[..., :1]
    positive = first >= 0
    w = torch.cat([torch.where(positive, first + 1, first - 1), e[..., 1:]], -1)
    # The reflection that takes e to the first axis or its opposite.
    mirror = torch.nn.functional.pad(w / (1 + first.abs()), (1, 0))
    out = eye - mirror[..., :, None] * torch.nn.functional.pad(w, (1, 0))[..., None, :]
    pair = torch.cat([torch.ones_like(first), e], -1) / math.sqrt(2.0)
    out[..., 0] = pair
    out[..., 1] = torch.cat([pair[..., :1], -pair[..., 1:]], -1)
    return out
