"""The second-order cone {(t, x): ||x||_2 <= t}."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from declarative_cvx.cones import compiled
from declarative_cvx.cones.spectrum import Spectrum

# Share of the distance to the axis up to which a move along it hardly turns the eigenvectors.
_SMALL_MOVE = 0.05
# Cones of several dimensions are treated at once up to this number of entries of eigenvectors.
_SMALL = 4096


def _parts(v: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Apex entry t, direction x / ||x||, norm ||x||, and where v is outside K and its polar."""
    t, x = v[..., :1], v[..., 1:]
    squared = (x * x).sum(-1, keepdim=True)
    zero = squared == 0
    root = squared.masked_fill(zero, 1.0).sqrt()
    norm = root.masked_fill(zero, 0.0)
    return t, x / root, norm, norm > t.abs()


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
    return _projection(v, *_parts(v))


def _projection(v: Tensor, t: Tensor, e: Tensor, norm: Tensor, outside: Tensor) -> Tensor:
    half = (t + norm) / 2
    middle = torch.cat([half, half * e], -1)
    return torch.where(outside, middle, v.masked_fill(t < norm, 0.0))


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
    parts = _parts(v)
    return _projection(v, *parts), Spectrum(partial(_eigen, *parts), partial(_kink, *parts))


def decompose_all(points: Sequence[Tensor]) -> list[tuple[Tensor, Spectrum]]:
    """As `decompose`, for cones of several dimensions: small ones at once, filled up with zeros.

    Parameters
    ----------
    points : sequence of Tensor, each of shape (batch, cones, d)
    """
    if all(map(compiled.suits, points)):
        return [compiled.second_order(v) for v in points]
    widest = max(v.shape[2] for v in points)
    if len(points) == 1 or sum(v.shape[1] for v in points) * widest**2 > _SMALL:
        return [decompose(v) for v in points]
    filled = [torch.nn.functional.pad(v, (0, widest - v.shape[2])) for v in points]
    projection, spectrum = decompose(torch.cat(filled, 1))
    found, start = [], 0
    for _, cones, dim in (v.shape for v in points):
        which = slice(start, start + cones)
        found.append((projection[:, which, :dim], spectrum.part(which, dim)))
        start += cones
    return found


def _eigen(t: Tensor, e: Tensor, norm: Tensor, outside: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvectors and eigenvalues of the derivative."""
    dim, inside = e.shape[-1] + 1, (t >= norm).to(e.dtype)
    share = torch.where(outside, t / norm * 0.5 + 0.5, inside)
    others = share.expand(*e.shape[:-1], max(dim - 2, 0))
    values = torch.cat([inside + outside, inside, others], -1)
    # Elsewhere every vector is an eigenvector: the axes bring no rounding.
    eye = torch.eye(dim, dtype=e.dtype, device=e.device)
    return torch.where(outside[..., None], _vectors(e, eye), eye), values[..., :dim]


def _kink(t: Tensor, e: Tensor, norm: Tensor, outside: Tensor) -> Tensor:
    """Distance to the boundaries, or on which the eigenvectors hardly turn."""
    turn = (_SMALL_MOVE * norm).masked_fill(~outside, torch.inf)
    return torch.minimum((norm - t.abs()).abs(), turn)[..., 0]


def _vectors(e: Tensor, eye: Tensor) -> Tensor:
    """Eigenvectors for directions e of shape (..., d - 1), shape (..., d, d)."""
    if not e.shape[-1]:
        return eye
    first = e[..., :1]
    one = torch.ones_like(first)
    # The reflection that takes e to the first axis or its opposite.
    w = torch.cat([torch.zeros_like(first), first + torch.copysign(one, first), e[..., 1:]], -1)
    mirror = w / (first.abs() + 1)
    out = torch.addcmul(eye, mirror[..., :, None], w[..., None, :], value=-1)
    pair = torch.cat([one, e], -1) / math.sqrt(2.0)
    out[..., 0] = pair
    out[..., 1] = -pair
    out[..., 0, 1] = 1 / math.sqrt(2.0)
    return out
