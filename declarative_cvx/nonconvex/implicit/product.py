"""Products of one or two matrices: dense weights A, and those of low rank, A = L R'."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from declarative_cvx.least_squares import Factors, least_norm

# Numbers in the matrices that are factorised at once.
ROOM = 2**24

Matrices = tuple[Tensor, ...]  # M = M_1 ... M_k, k = 1 or 2


def times(x: Tensor, matrices: Sequence[Tensor]) -> Tensor:
    """The rows x M for rows x, (batch, n)."""
    for matrix in matrices:
        x = x @ matrix
    return x


def affine(x: Tensor, matrices: Sequence[Tensor], c: Tensor) -> Tensor:
    """The rows x M + c."""
    *first, last = matrices
    return torch.addmm(c, times(x, first), last)


def transposed(matrices: Sequence[Tensor]) -> Matrices:
    """M'."""
    return tuple(matrix.mT for matrix in reversed(matrices))


def norm_of(matrices: Sequence[Tensor], p: float) -> float:
    """A bound on the norm of M', for p 1 or inf."""
    dim = 0 if p == math.inf else 1
    return math.prod(float(matrix.abs().sum(dim).amax()) for matrix in matrices)


def sizes_of_terms(x: Tensor, matrices: Sequence[Tensor]) -> Tensor:
    """What the terms of x M add up to in size."""
    return times(x.abs(), [matrix.abs() for matrix in matrices])


def bilinear_gradient(w: Tensor, matrices: Sequence[Tensor], u: Tensor) -> Matrices:
    """The gradient of sum w M u' by each of the matrices; w and u are (batch, n)."""
    if len(matrices) == 1:
        return (w.mT @ u,)
    left, right = matrices
    return w.mT @ (u @ right.mT), (w @ left).mT @ u


def bilinear_change(
    w: Tensor, matrices: Sequence[Tensor], changes: Sequence[Tensor | None]
) -> Tensor | None:
    """The change of w M for changes of the matrices; None if there are none."""
    total = None
    for k, change in enumerate(changes):
        if change is not None:
            part = times(w, [*matrices[:k], change, *matrices[k + 1 :]])
            total = part if total is None else total + part
    return total


def solve_scaled(
    slope: Tensor, matrices: Sequence[Tensor], rhs: Tensor, exact: bool = True
) -> Tensor:
    """The solution w of ``w = slope (w M) + rhs`` (the product elementwise), by LU.

    Parameters
    ----------
    slope, rhs : Tensor, shape (batch, n)
    matrices : sequence of Tensor
        Their product is M. For low rank the systems are of that order.
    exact : bool, optional
        False asks for least-squares solutions of least norm.
    """
    order = min(matrix.shape[0] for matrix in matrices)
    chunk = max(1, ROOM // max(1, order * order))
    pairs = zip(slope.split(chunk), rhs.split(chunk), strict=True)
    solve = _of_low_rank if len(matrices) == 2 and exact else _dense
    return torch.cat([solve(s, matrices, r, exact) for s, r in pairs])


def _dense(s: Tensor, matrices: Sequence[Tensor], rhs: Tensor, exact: bool) -> Tensor:
    M = times(matrices[0], matrices[1:])
    K = _identity(M, len(M)) - s[:, :, None] * M.mT
    if exact:
        return Factors.of(K).solve(rhs[:, :, None])[:, :, 0]
    return least_norm(K, rhs[:, :, None])[:, :, 0]


def _of_low_rank(s: Tensor, matrices: Sequence[Tensor], rhs: Tensor, _: bool) -> Tensor:
    """For M = F G: y = w F solves y (I - G S F) = rhs F (Woodbury; IDL Sec. 6.3)."""
    F, G = matrices
    K = _identity(F, F.shape[1]) - F.mT @ (s[:, :, None] * G.mT)
    y = Factors.of(K).solve((rhs @ F)[:, :, None])[:, :, 0]
    return s * (y @ G) + rhs


def _identity(like: Tensor, order: int) -> Tensor:
    return torch.eye(order, dtype=like.dtype, device=like.device)
