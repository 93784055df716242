"""Square linear systems that may be singular."""

from __future__ import annotations

import torch
from torch import Tensor

# Residual, relative to the right-hand side, up to which a factorisation's answer is taken.
FACTORED = 1e-9
# Singular values below this multiple of the largest count as zero.
RANK_TOLERANCE = 1e-11


def solve_consistent(matrix: Tensor, rhs: Tensor) -> tuple[Tensor, Tensor]:
    """Solve square systems that may be singular.

    Parameters
    ----------
    matrix : Tensor, shape (batch, k, k)
    rhs : Tensor, shape (batch, k)

    Returns
    -------
    solution : Tensor, shape (batch, k)
        The solution; the one of least norm where there are many, the least-squares one where
        there is none.
    residual : Tensor, shape (batch,)
        Relative to the right-hand side.
    """
    # In units of the right-hand side, so that gradients of 1e-12 and of 1e+12 are treated alike.
    unit = rhs.detach().abs().amax(1, keepdim=True)
    unit = torch.where(unit > 0, unit, 1.0)
    scaled = rhs / unit
    w, residual = _by_factorisation(matrix, scaled)
    failed = torch.where(~(residual <= FACTORED))[0]
    if len(failed):
        part = _least_squares(matrix[failed], scaled[failed])
        found = _residual(matrix[failed], part, scaled[failed])
        worse = found > residual[failed]  # False where the factorisation gave NaN
        part = torch.where(worse[:, None], w[failed], part)
        w = w.index_copy(0, failed, part)
        residual = residual.index_copy(0, failed, torch.fmin(found, residual[failed]))
    return w * unit, residual


def _by_factorisation(matrix: Tensor, rhs: Tensor) -> tuple[Tensor, Tensor]:
    """LU for the elements without a zero pivot; the others get zero and an infinite residual.

    Leaving them out, rather than overwriting their NaN, keeps NaN out of second derivatives.
    """
    factors, pivots, info = torch.linalg.lu_factor_ex(matrix)
    if not info.any():
        w = torch.linalg.lu_solve(factors, pivots, rhs[:, :, None])[:, :, 0]
        return w, _residual(matrix, w, rhs)
    regular = torch.where(info == 0)[0]
    part = torch.linalg.solve(matrix[regular], rhs[regular])
    found = _residual(matrix[regular], part, rhs[regular])
    w = torch.zeros_like(rhs).index_copy(0, regular, part)
    return w, torch.full_like(rhs[:, 0], torch.inf).index_copy(0, regular, found)


def _residual(matrix: Tensor, w: Tensor, rhs: Tensor) -> Tensor:
    """Largest error of each system, shape (batch,)."""
    error = (matrix.detach() @ w.detach()[:, :, None])[:, :, 0] - rhs.detach()
    return error.abs().amax(1)


def _least_squares(matrix: Tensor, rhs: Tensor) -> Tensor:
    return (torch.linalg.pinv(matrix, rtol=RANK_TOLERANCE) @ rhs[:, :, None])[:, :, 0]
