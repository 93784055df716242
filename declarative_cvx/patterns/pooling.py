"""Pooling: a sum of penalties of differences between a variable and data (DDN Sec. 5.1)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import cvxpy as cp
import numpy as np
from cvxpy.atoms.pnorm import Pnorm

from declarative_cvx.patterns.difference import Difference, difference
from declarative_cvx.patterns.terms import Term
from declarative_cvx.penalties import Huber, Penalty, Quadratic


@dataclass(frozen=True, eq=False)
class Pooling:
    """Minimise sum_i w_i phi(u - x_i; alpha), or phi(||u - x_i||_2; alpha) with `vector`.

    Attributes
    ----------
    variable : cvxpy.Variable
    penalty : Penalty
    alpha : cvxpy.Expression
        A scalar.
    data : tuple of Difference
        With `vector`, of shape (points, entries of the variable).
    weights : tuple of cvxpy.Expression
        Nonnegative, one for each of the data, of its shape or, with `vector`, that of its points.
    vector : bool
    """

    variable: cp.Variable
    penalty: Penalty
    alpha: cp.Expression
    data: tuple[Difference, ...]
    weights: tuple[cp.Expression, ...]
    vector: bool

    def __str__(self) -> str:
        return f"robust {'vector ' * self.vector}pooling ({self.penalty.name})"


def pooling_of(variable: cp.Variable, terms: Sequence[Term]) -> Pooling | None:
    first = terms[0]
    same = all(term.penalty == first.penalty for term in terms)
    if not same or isinstance(first.penalty, Quadratic) or not _same_scale(terms):
        return None
    if not all(_is_known_nonneg(term.weights) for term in terms):
        return None
    norms = [_row_norm(term.residual) for term in terms]
    vector = norms[0] is not None
    if any((norm is not None) != vector for norm in norms):
        return None
    data = [
        difference(norm if norm is not None else term.residual, variable)
        for norm, term in zip(norms, terms, strict=True)
    ]
    found = tuple(difference for difference in data if difference is not None)
    if len(found) < len(data) or not _covers(found, variable, vector):
        return None
    weights = tuple(term.weights for term in terms)
    return Pooling(variable, first.penalty, first.alpha, found, weights, vector)


def _same_scale(terms: Sequence[Term]) -> bool:
    """Whether all alphas are one positive scalar: the same expression, or equal constants."""
    first = terms[0].alpha
    if first.size != 1:
        return False
    if first.parameters():
        # Huber's may be zero, where it is no penalty; other atoms see to it themselves.
        positive = isinstance(first, cp.Parameter) and first.is_pos()
        if isinstance(terms[0].penalty, Huber) and not positive:
            return False
        return all(term.alpha is first for term in terms)
    if not first.value > 0:
        return False
    return all(
        not term.alpha.parameters() and term.alpha.size == 1 and term.alpha.value == first.value
        for term in terms
    )


def _is_known_nonneg(expression: cp.Expression) -> bool:
    return bool(expression.is_nonneg())


def _row_norm(residual: cp.Expression) -> cp.Expression | None:
    """The argument of Euclidean norms of rows, as one row for each of them."""
    if not isinstance(residual, Pnorm) or residual.p != 2 or residual.keepdims:
        return None
    (argument,) = residual.args
    if residual.axis is None:
        return cp.reshape(argument, (1, argument.size), order="C")
    if argument.ndim != 2:
        return None
    return argument if residual.axis in (1, -1) else argument.T


def _covers(data: Sequence[Difference], variable: cp.Variable, vector: bool) -> bool:
    """Whether every entry of the variable has data; with `vector`, all entries in every row."""
    if not vector:
        return len(np.unique(np.concatenate([d.index.ravel() for d in data]))) == variable.size
    order = np.arange(variable.size)
    return all(d.index.shape[1:] == order.shape and (d.index == order).all() for d in data)
