"""Batches of square linear systems, by factorisation or, where they are singular, least squares."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

# Residual, relative to the right-hand side, up to which a factorisation's answer is taken.
FACTORED = 1e-9
# Singular values below this multiple of the largest count as zero.
RANK_TOLERANCE = 1e-11
# Order from which systems on the CPU are factorised one at a time.
LARGE = 128


def factor_and_solve(matrix: Tensor, rhs: Tensor) -> Tensor:
    """Solutions by LU; NaN or meaningless where a matrix is singular.

    Parameters
    ----------
    matrix : Tensor, shape (batch, k, k)
    rhs : Tensor, shape (batch, k, columns)
    """
    return _each(_lu, matrix, rhs)


def least_norm(matrix: Tensor, rhs: Tensor) -> Tensor:
    """Least-squares solutions of least norm; same shapes."""
    return _each(_pseudo_inverse, matrix, rhs)


def _lu(matrix: Tensor, rhs: Tensor) -> Tensor:
    factors, pivots, _ = torch.linalg.lu_factor_ex(matrix)
    return torch.linalg.lu_solve(factors, pivots, rhs)


def _pseudo_inverse(matrix: Tensor, rhs: Tensor) -> Tensor:
    return torch.linalg.pinv(matrix, rtol=RANK_TOLERANCE) @ rhs


def _each(method: Callable[[Tensor, Tensor], Tensor], matrix: Tensor, rhs: Tensor) -> Tensor:
    """Apply a method to a batch of systems, at once or, on the CPU, one large one at a time.

    Large systems keep all cores busy one by one. Batched factorisations of them run LAPACK from
    several threads at once, which some builds of MKL do not survive (orders from about 200 on).
    """
    if matrix.device.type != "cpu" or matrix.shape[1] < LARGE or len(matrix) < 2:
        return method(matrix, rhs)
    return torch.stack([method(m, v) for m, v in zip(matrix, rhs, strict=True)])
