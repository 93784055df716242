"""The cone of positive semidefinite matrices, vectorised.

A symmetric matrix of order k is stored as its lower triangle stacked by columns with
off-diagonal entries times sqrt(2), so that inner products are those of matrices.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from declarative_cvx.cones import compiled
from declarative_cvx.cones.spectrum import Spectrum
from declarative_cvx.transforms import apply_function, outside_transforms


def order_of(rows: int) -> int:
    """Order k of the matrix that a vector of k (k + 1) / 2 rows stores."""
    return (math.isqrt(8 * rows + 1) - 1) // 2


class _Layout(NamedTuple):
    """Where the entries of a matrix of order k stand in its vector, and by what they differ."""

    lower: Tensor
    """Places of the lower triangle, column by column, in the matrix row by row, shape (r,)."""
    factor: Tensor
    """Entry of the vector over that of the matrix, shape (r,)."""
    place: Tensor
    """Which entry of the vector belongs to every one of the matrix, row by row, shape (k k,)."""
    ends: Tensor
    """Columns that take the row of each entry, times its factor over sqrt(2), and its column, of
    rows of length k: shape (k, 2 r)."""
    sums: Tensor
    """Columns that add those two, shape (k, r)."""


@lru_cache(maxsize=256)
def _layout(k: int, dtype: torch.dtype, device: torch.device) -> _Layout:
    with outside_transforms():
        col, row = torch.triu_indices(k, k, device=device)
        place = torch.zeros((k, k), dtype=torch.int64, device=device)
        place[row, col] = place[col, row] = torch.arange(len(row), device=device)
        factor = torch.full(row.shape, math.sqrt(2.0), dtype=dtype, device=device)
        factor[row == col] = 1.0
        eye = torch.eye(k, dtype=dtype, device=device)
        rows, cols = eye[:, row], eye[:, col]
        ends = torch.cat([rows * (factor / math.sqrt(2.0)), cols], 1)
    return _Layout(row * k + col, factor, place.flatten(), ends, rows + cols)


def to_matrix(v: Tensor) -> Tensor:
    """Vectors (..., k (k + 1) / 2) to symmetric matrices (..., k, k)."""
    k = order_of(v.shape[-1])
    layout = _layout(k, v.dtype, v.device)
    return (v / layout.factor).index_select(-1, layout.place).unflatten(-1, (k, k))


def to_vector(matrix: Tensor) -> Tensor:
    """Symmetric matrices (..., k, k) to vectors (..., k (k + 1) / 2)."""
    layout = _layout(matrix.shape[-1], matrix.dtype, matrix.device)
    return matrix.flatten(-2).index_select(-1, layout.lower) * layout.factor


def project(v: Tensor) -> Tensor:
    """Euclidean projection onto the semidefinite cone.

    Parameters
    ----------
    v : Tensor, shape (..., k (k + 1) / 2)

    Returns
    -------
    Tensor, same shape
    """
    return apply_function(_Projection, v)


def derivative(v: Tensor) -> Tensor:
    """Jacobian of the projection (Malick and Sendov 2006): divided differences in the eigenbasis.

    At a zero eigenvalue the one-sided derivative from below is chosen (0).

    Parameters
    ----------
    v : Tensor, shape (..., r) with r = k (k + 1) / 2

    Returns
    -------
    Tensor, shape (..., r, r)
        Symmetric, eigenvalues in [0, 1].
    """
    r = v.shape[-1]
    eigenvalues, eigenvectors = torch.linalg.eigh(to_matrix(v))
    basis = to_matrix(torch.eye(r, dtype=v.dtype, device=v.device))  # (r, k, k)
    q = eigenvectors[..., None, :, :]
    inner = q.mT @ basis @ q
    image = q @ (_divided_differences(eigenvalues)[..., None, :, :] * inner) @ q.mT
    return to_vector(image)


def _divided_differences(eigenvalues: Tensor) -> Tensor:
    """(max(a, 0) - max(b, 0)) / (a - b) for all pairs of eigenvalues, without cancellation."""
    a, b = eigenvalues[..., :, None], eigenvalues[..., None, :]
    up, down = a.clamp(min=0) + b.clamp(min=0), (-a).clamp(min=0) + (-b).clamp(min=0)
    total = up + down
    ratio = up / torch.where(total > 0, total, 1.0)
    both_up, one_up = (a > 0) & (b > 0), (a > 0) ^ (b > 0)
    return torch.where(both_up, torch.ones_like(ratio), torch.where(one_up, ratio, 0.0))


class _Projection(torch.autograd.Function):
    """Projection whose derivative does not go through that of the eigenvectors,
    which does not exist at repeated eigenvalues.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(v: Tensor) -> Tensor:
        eigenvalues, eigenvectors = torch.linalg.eigh(to_matrix(v))
        positive = eigenvectors * eigenvalues.clamp(min=0)[..., None, :]
        return to_vector(positive @ eigenvectors.mT)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:  # type: ignore[no-untyped-def,override]
        (v,) = ctx.saved_tensors
        return (derivative(v) @ grad[..., None])[..., 0]

    @staticmethod
    def jvp(ctx, tangent: Tensor) -> Tensor:  # type: ignore[no-untyped-def,override]
        (v,) = ctx.saved_tensors
        return (derivative(v) @ tangent[..., None])[..., 0]


def decompose(v: Tensor) -> tuple[Tensor, Spectrum]:
    """Projection, and eigenvectors of its derivative: products of those of the matrix.

    Parameters
    ----------
    v : Tensor, shape (..., k (k + 1) / 2)
    """
    eigenvalues, q = torch.linalg.eigh(to_matrix(v))
    positive = eigenvalues.clamp(min=0)
    projection = to_vector((q * positive[..., None, :]) @ q.mT)

    def compute() -> tuple[Tensor, Tensor]:
        if compiled.suits(v):
            return compiled.semidefinite(eigenvalues, q)
        sums = _layout(q.shape[-1], v.dtype, v.device).sums
        up, total = positive @ sums, sizes @ sums
        return _pairs(q), up / total.masked_fill(total == 0, 1.0)

    sizes = eigenvalues.abs()
    return projection, Spectrum(compute, lambda: sizes.amin(-1))


def _pairs(q: Tensor) -> Tensor:
    """The vectors of (q_i q_j' + q_j q_i') / sqrt(2), or q_i q_i', for all pairs i >= j."""
    ends = _layout(q.shape[-1], q.dtype, q.device).ends
    rows, cols = ((q.mT @ ends).mT @ ends).chunk(2, -2)
    (row_i, row_j), (col_i, col_j) = rows.chunk(2, -1), cols.chunk(2, -1)
    return torch.addcmul(row_i * col_j, row_j, col_i)
