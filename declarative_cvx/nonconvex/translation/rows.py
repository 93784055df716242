"""Rows of constraints: an expression that is to be zero, or at most zero."""

from __future__ import annotations

import cvxpy as cp
import numpy as np
import torch
from torch import Tensor

from declarative_cvx.nonconvex.translation.expression import translate_expression


class Row:
    """A constraint on each entry of a smooth expression.

    Of matrices that are symmetric or skew-symmetric whatever their variables are, only the rows
    of the upper triangle are kept: the others would repeat them.

    Parameters
    ----------
    expression : cvxpy.Expression
    equality : bool
        Whether the expression is zero; otherwise it is at most zero.
    where : str
        Where the row comes from.

    Attributes
    ----------
    kept : cvxpy.Expression
        The entries that are kept.
    """

    def __init__(self, expression: cp.Expression, equality: bool, where: str) -> None:
        self.equality = equality
        self.where = where
        self._shape = expression.shape
        self._mirror = mirror(expression)
        self._entries = np.arange(expression.size)
        self.kept = expression
        if self._mirror and (equality or self._mirror > 0):
            rows, columns = np.triu_indices(self._shape[-1], k=int(self._mirror < 0))
            self._entries = self._entries.reshape(self._shape)[..., rows, columns].reshape(-1)
            self.kept = cp.vec(expression, order="C")[self._entries]

    @property
    def size(self) -> int:
        return self._entries.size

    def spread(self, multipliers: Tensor) -> Tensor:
        """Multipliers (batch, size) of the kept entries, as (batch, *shape) of the expression.

        Those of an entry that stands for two are shared out between them.
        """
        shape = (len(multipliers), *self._shape)
        if self.kept.size == np.prod(self._shape):
            return multipliers.reshape(shape)
        entries = torch.as_tensor(self._entries, device=multipliers.device)
        full = multipliers.new_zeros(len(multipliers), int(np.prod(self._shape)))
        full = full.index_copy(1, entries, multipliers).reshape(shape)
        return (full + self._mirror * full.mT) / 2


def mirror(expression: cp.Expression) -> int:
    """1 for matrices that are symmetric, -1 for skew-symmetric ones, 0 for others.

    By CVXPY's rules, or else at a random point.
    """
    shape = expression.shape
    if len(shape) < 2 or shape[-1] != shape[-2] or shape[-1] < 2:
        return 0
    if len(shape) == 2 and expression.is_symmetric():
        return 1
    value = _somewhere(expression)
    for sign in (1, -1):
        if torch.allclose(value, sign * value.mT, rtol=1e-12, atol=1e-12):
            return sign
    return 0


def _somewhere(expression: cp.Expression) -> Tensor:
    """Values of a matrix expression at a random point that keeps to declared symmetry."""
    rng = np.random.default_rng(0)
    values = {}
    for leaf in (*expression.variables(), *expression.parameters()):
        value = rng.uniform(0.5, 1.5, leaf.shape)
        if leaf.ndim >= 2 and leaf.is_symmetric():
            value = (value + np.swapaxes(value, -1, -2)) / 2
        values[leaf.id] = torch.from_numpy(value)
    return translate_expression(expression)(values)
