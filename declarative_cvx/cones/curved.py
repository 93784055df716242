r"""The derivative of projections onto three-dimensional cones with a curved boundary.

Where a point :math:`v = s a(\rho) + t b(\rho)` projects to the curved boundary, swept by the rays
a (and that of the polar cone by b), :math:`D\Pi = \hat a \hat a^T + \theta \hat c \hat c^T` with
:math:`c = b \times a` and

.. math::
    \theta = \frac{s\,a'\!\cdot c}{s\,a'\!\cdot c + t\,b'\!\cdot c}, \qquad
    d\rho = \frac{c \cdot dv}{s\,a'\!\cdot c + t\,b'\!\cdot c}.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from declarative_cvx.cones.spectrum import Spectrum

# Share of the distances to the kinks up to which a move hardly changes the derivative.
_SMALL_MOVE = 0.01

# a and c, shapes (..., 3), then s a'.c and the sum of that and t b'.c, shapes (...).
Frame = tuple[Tensor, Tensor, Tensor, Tensor]


def spectrum(
    frame: Callable[[], Frame],
    v: Tensor,
    projection: Tensor,
    sizes: Tensor,
    curved: Tensor,
    diagonal: Tensor,
) -> Spectrum:
    r"""Eigenvectors of DΠ, and distances to kinks.

    Parameters
    ----------
    frame : callable
        Gives the frame of v / sizes.
    v, projection : Tensor, shape (..., 3)
    sizes : Tensor, shape (..., 1)
    curved : Tensor of bool, shape (...)
        Which points project to the curved boundary.
    diagonal : Tensor, shape (..., 3)
        Of the derivative elsewhere.

    Notes
    -----
    A move by dv changes :math:`\rho` by at most
    :math:`|c| |dv| / (2 \sqrt{s a'\!\cdot c\; t b'\!\cdot c})`; the other distances that count are
    those to the two kinks at its ends, :math:`s |a|` and :math:`t |b|`. Where the boundary is not
    curved, kinks are not looked for.
    """

    @cache
    def parts() -> tuple[Tensor, ...]:
        ray, tangent, numerator, denominator = frame()
        vectors = torch.stack((ray, tangent, torch.linalg.cross(ray, tangent)), -1)
        return vectors, torch.linalg.vector_norm(vectors, dim=-2), numerator, denominator

    def compute() -> tuple[Tensor, Tensor]:
        vectors, lengths, numerator, denominator = parts()
        theta = numerator / denominator
        values = torch.stack((curved, theta, torch.zeros_like(theta)), -1)
        eye = torch.eye(3, dtype=v.dtype, device=v.device)
        return (
            torch.where(curved[..., None, None], vectors / lengths[..., None, :], eye),
            torch.where(curved[..., None], values, diagonal),
        )

    def kink() -> Tensor:
        _, lengths, numerator, denominator = parts()
        ends = torch.linalg.vector_norm(torch.stack((projection, v - projection)), dim=-1)
        middle = 2 * (numerator * (denominator - numerator)).clamp(min=0).sqrt() / lengths[..., 1]
        nearest = torch.minimum(ends.amin(0), middle * sizes[..., 0])
        return torch.where(curved, _SMALL_MOVE * nearest, 0.0)

    return Spectrum(compute, kink)
