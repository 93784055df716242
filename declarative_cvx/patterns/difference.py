"""A variable minus data, in CVXPY's expression trees."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import cvxpy as cp
import numpy as np
from cvxpy.atoms.affine.add_expr import AddExpression
from cvxpy.atoms.affine.broadcast_to import broadcast_to
from cvxpy.atoms.affine.promote import Promote
from cvxpy.atoms.affine.unary_operators import NegExpression


@dataclass(frozen=True, eq=False)
class Difference:
    """Entries ``variable[index] - data`` (or the negative of it, which no penalty tells apart).

    Attributes
    ----------
    index : ndarray of int64
        For each entry the one of the variable (C order) that it has.
    data : cvxpy.Expression
        Of the same shape, free of the variable.
    """

    index: np.ndarray
    data: cp.Expression


def difference(expression: cp.Expression, variable: cp.Variable) -> Difference | None:
    """An expression as plus or minus (variable[index] - data)."""
    signed = list(_summands(expression, 1))
    own = [(part, sign) for part, sign in signed if part.variables()]
    if len(own) != 1:
        return None
    (part, sign), shape = own[0], expression.shape
    index = _index(part, variable)
    if index is None:
        return None
    data = cp.Constant(np.zeros(shape))
    for other, other_sign in signed:
        if other is not part:
            data = data - other * (sign * other_sign)
    return Difference(np.broadcast_to(index, shape), data)


def _summands(expression: cp.Expression, sign: int) -> Iterator[tuple[cp.Expression, int]]:
    """The signed terms of a sum; wrappers that copy entries are kept around terms."""
    if isinstance(expression, AddExpression) and all(
        arg.shape == expression.shape for arg in expression.args
    ):
        for arg in expression.args:
            yield from _summands(arg, sign)
    elif isinstance(expression, NegExpression):
        yield from _summands(expression.args[0], -sign)
    elif isinstance(expression, _COPIES) and isinstance(expression.args[0], NegExpression):
        inner = expression.args[0].args[0]
        yield expression.copy([inner]), -sign
    elif isinstance(expression, _SHAPES) and isinstance(expression.args[0], AddExpression):
        for arg in expression.args[0].args:
            yield from _summands(expression.copy([arg]), sign)
    else:
        yield expression, sign


_SHAPES = (cp.reshape, cp.transpose)
_COPIES = (Promote, broadcast_to, *_SHAPES)


def _index(expression: cp.Expression, variable: cp.Variable) -> np.ndarray | None:
    """Which entry of the variable (C order) each entry of a copy of it is."""
    if expression is variable:
        return np.arange(variable.size).reshape(variable.shape)
    if not isinstance(expression, _COPIES):
        return None
    inner = _index(expression.args[0], variable)
    if inner is None:
        return None
    if isinstance(expression, Promote | broadcast_to):
        return np.broadcast_to(inner, expression.shape)
    if isinstance(expression, cp.reshape):
        return inner.reshape(expression.shape, order=expression.order)
    return inner.transpose(expression.axes)
