"""What is done to matrices of a batch, whether they are full or sparse."""

from __future__ import annotations

import torch
from torch import Tensor

from declarative_cvx.nonconvex.minimization.sparse.matrix import SparseMatrix

# (batch, rows, columns)
Matrix = Tensor | SparseMatrix


def mix(weights: Tensor, matrix: Matrix) -> Tensor:
    """Weighted sums of rows: (batch, r) and (batch, r, n) to (batch, n)."""
    if isinstance(matrix, SparseMatrix):
        return matrix.mix(weights)
    return torch.bmm(weights[:, None], matrix)[:, 0]


def along(matrix: Matrix, x: Tensor) -> Tensor:
    """Products of rows and x: (batch, r, n) and (batch, n) to (batch, r)."""
    if isinstance(matrix, SparseMatrix):
        return matrix.along(x)
    return torch.bmm(matrix, x[:, :, None])[:, :, 0]


def scale(matrix: Matrix, rows: Tensor | None = None, columns: Tensor | None = None) -> Matrix:
    """Rows and columns times factors, (batch, r) and (batch, n)."""
    if isinstance(matrix, SparseMatrix):
        return matrix.scaled(rows, columns)
    matrix = matrix if rows is None else matrix * rows[:, :, None]
    return matrix if columns is None else matrix * columns[:, None]


def absolute(matrix: Matrix) -> Matrix:
    """Absolute values."""
    return matrix.abs()


def row_largest(matrix: Matrix) -> Tensor:
    """Largest absolute value of each row, (batch, r), zero of rows without entries."""
    return matrix.largest(0) if isinstance(matrix, SparseMatrix) else matrix.abs().amax(2)


def column_largest(matrix: Matrix) -> Tensor:
    """Largest absolute value of each column, shape (batch, n)."""
    return matrix.largest(1) if isinstance(matrix, SparseMatrix) else matrix.abs().amax(1)


def row_norms(matrix: Matrix) -> Tensor:
    """Euclidean norms of the rows, shape (batch, r)."""
    if isinstance(matrix, SparseMatrix):
        return matrix.norms()
    return torch.linalg.vector_norm(matrix, dim=2)


def select(matrix: Matrix, index: Tensor) -> Matrix:
    """The elements named by an index tensor."""
    return matrix.select(index) if isinstance(matrix, SparseMatrix) else matrix[index]


def largest_entry(matrix: Matrix) -> Tensor:
    """Largest absolute value, shape (batch,)."""
    values = matrix.values if isinstance(matrix, SparseMatrix) else matrix.flatten(1)
    return values.abs().amax(1) if values.shape[1] else values.new_zeros(len(values))


def entry_sum(matrix: Matrix) -> Tensor:
    """Sum of all entries, shape (batch,)."""
    return matrix.values.sum(1) if isinstance(matrix, SparseMatrix) else matrix.sum((1, 2))


def first_row(matrix: Matrix) -> Tensor:
    return matrix.first() if isinstance(matrix, SparseMatrix) else matrix[:, 0]


def other_rows(matrix: Matrix) -> Matrix:
    return matrix.rest() if isinstance(matrix, SparseMatrix) else matrix[:, 1:]


def full(matrix: Matrix) -> Tensor:
    return matrix.dense() if isinstance(matrix, SparseMatrix) else matrix
