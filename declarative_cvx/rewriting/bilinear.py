"""Kronecker products and convolutions as matrices times vectors.

CVXPY's rules allow no parameters in these atoms, although they are products like others.
"""

from __future__ import annotations

import cvxpy as cp
import numpy as np
import scipy.sparse as sp
from cvxpy.atoms.affine.binary_operators import MulExpression
from cvxpy.atoms.affine.conv import conv, convolve
from cvxpy.atoms.affine.kron import kron

from declarative_cvx.rewriting.products import Factor

BILINEAR = (kron, conv, convolve)


def as_matrix_product(expression: cp.Expression) -> tuple[Factor, cp.Expression] | None:
    """The matrix and the vector whose product has the entries of an expression, in Fortran order.

    None if the factor without variables has no parameters either: CVXPY allows that.
    """
    left, right = expression.args
    data, unknown = (right, left) if left.variables() else (left, right)
    if unknown.variables() and not data.parameters():
        return None
    first, second = _numbers(left.shape), _numbers(right.shape)
    if isinstance(expression, kron):
        row = _numbers(expression.shape)
        columns = [
            np.kron(a, b) for a, b in ((first, np.ones_like(second)), (np.ones_like(first), second))
        ]
    else:
        i, j = np.meshgrid(first.ravel(), second.ravel(), indexing="ij")
        row, columns = i + j, [i, j]
    by_data, by_unknown = columns if data is left else columns[::-1]
    matrix = _linear(row, by_unknown, by_data, (expression.size, unknown.size, data.size))
    entries = matrix @ cp.vec(data, order="F")
    value = cp.reshape(entries, (expression.size, unknown.size), order="F")
    return Factor(MulExpression, value), cp.vec(unknown, order="F")


def _numbers(shape: tuple[int, ...]) -> np.ndarray:
    return np.arange(int(np.prod(shape))).reshape(shape, order="F")


def _linear(
    row: np.ndarray, column: np.ndarray, source: np.ndarray, sizes: tuple[int, int, int]
) -> sp.csr_array:
    """From a vector to the entries (row, column), in Fortran order, of a matrix that holds it."""
    rows, columns, sources = sizes
    place = row.ravel() + rows * column.ravel()
    ones = np.ones(place.size)
    return sp.csr_array((ones, (place, source.ravel())), shape=(rows * columns, sources))
