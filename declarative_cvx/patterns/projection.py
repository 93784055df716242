"""Projection: the least distance from data to a set (DDN Sec. 5.2)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import cvxpy as cp
import numpy as np
from cvxpy.atoms import norm1, norm_inf, quad_over_lin
from cvxpy.atoms.affine.sum import Sum
from cvxpy.atoms.pnorm import Pnorm

from declarative_cvx.patterns.difference import Difference, difference
from declarative_cvx.patterns.terms import Term
from declarative_cvx.penalties import Quadratic


@dataclass(frozen=True, eq=False)
class ProjectionPattern:
    """Minimise ||u - x||_2 over a sphere, a ball or the simplex.

    Attributes
    ----------
    variable : cvxpy.Variable
    data : Difference
    onto : {"sphere", "ball", "simplex"}
    p : float or None
    radius : cvxpy.Expression
        Known to be positive.
    """

    variable: cp.Variable
    data: Difference
    onto: str
    p: float | None
    radius: cp.Expression

    def __str__(self) -> str:
        norm = "" if self.p is None else f"L{self.p:g} "
        return f"projection onto the {norm}{self.onto}"


def projection_of(
    variable: cp.Variable,
    attributes: set[str],
    terms: Sequence[Term],
    constraints: Sequence[cp.Constraint],
) -> ProjectionPattern | None:
    data = _distance(variable, terms)
    if data is None:
        return None
    if attributes <= {"nonneg"}:
        radius = _simplex(variable, bool(attributes), constraints)
        if radius is not None:
            return ProjectionPattern(variable, data, "simplex", None, radius)
    if attributes or len(constraints) != 1:
        return None
    return _sphere_or_ball(variable, data, constraints[0])


def _distance(variable: cp.Variable, terms: Sequence[Term]) -> Difference | None:
    """Data to which the sum of squared distances is least."""
    if len(terms) != 1 or not isinstance(terms[0].penalty, Quadratic):
        return None
    weights, residual = terms[0].weights, terms[0].residual
    if weights.parameters() or np.unique(weights.value).size != 1 or not np.all(weights.value > 0):
        return None
    data = difference(residual, variable)
    one_to_one = data is not None and np.array_equal(
        np.sort(data.index, axis=None), np.arange(variable.size)
    )
    return data if one_to_one else None


def _simplex(
    variable: cp.Variable, nonneg: bool, constraints: Sequence[cp.Constraint]
) -> cp.Expression | None:
    """The sum of the entries, where they have to be nonnegative; None if it is not so."""
    total = None
    for constraint in constraints:
        if isinstance(constraint, cp.constraints.zero.Equality):
            sides = _sides(constraint, lambda e: isinstance(e, Sum) and e.axis is None)
            if sides is None or sides[0].args[0] is not variable or total is not None:
                return None
            total = sides[1]
        elif _is_nonneg_constraint(constraint, variable) and not nonneg:
            nonneg = True
        else:
            return None
    known = nonneg and total is not None and _is_known_positive(total)
    return total if known else None


def _is_nonneg_constraint(constraint: cp.Constraint, variable: cp.Variable) -> bool:
    if isinstance(constraint, cp.constraints.nonpos.Inequality):
        low, high = constraint.args
        return high is variable and low.is_constant() and _is_zero(low)
    return isinstance(constraint, cp.constraints.NonNeg) and constraint.args[0] is variable


def _is_zero(expression: cp.Expression) -> bool:
    return not expression.parameters() and not np.any(expression.value)


def _sphere_or_ball(
    variable: cp.Variable, data: Difference, constraint: cp.Constraint
) -> ProjectionPattern | None:
    sides = _sides(constraint, lambda e: _norm_of(e, variable) is not None)
    if sides is None:
        return None
    inside, radius = sides
    if isinstance(constraint, cp.constraints.nonpos.Inequality):
        if constraint.args[0] is not inside:
            return None  # outside a ball
        onto = "ball"
    else:
        onto = "sphere"
    if not _is_known_positive(radius) or radius.size != 1:
        return None
    if isinstance(inside, quad_over_lin):  # ||u||^2 / y = radius
        radius = cp.sqrt(cp.multiply(radius, inside.args[1]))
    return ProjectionPattern(variable, data, onto, _norm_of(inside, variable), radius)


def _sides(
    constraint: cp.Constraint, wanted: Callable[[cp.Expression], bool]
) -> tuple[cp.Expression, cp.Expression] | None:
    """The side of a comparison that is wanted, and the other if it is free of variables."""
    if not isinstance(constraint, cp.constraints.zero.Equality | cp.constraints.nonpos.Inequality):
        return None
    for side, other in (constraint.args, constraint.args[::-1]):
        if wanted(side) and not other.variables():
            return side, other
    return None


def _norm_of(expression: cp.Expression, variable: cp.Variable) -> float | None:
    """The order p of ||variable||_p; None for anything else."""
    plain = getattr(expression, "axis", None) is None and not getattr(expression, "keepdims", False)
    if not expression.args or expression.args[0] is not variable or not plain:
        return None
    if isinstance(expression, norm1):
        return 1
    if isinstance(expression, norm_inf):
        return math.inf
    if isinstance(expression, quad_over_lin):
        scale = expression.args[1]
        return 2 if not scale.variables() and _is_known_positive(scale) else None
    if isinstance(expression, Pnorm) and expression.p == 2:
        return 2
    return None


def _is_known_positive(expression: cp.Expression) -> bool:
    """Whether an expression is positive for all admissible values of its parameters."""
    if not expression.parameters():
        return bool(np.all(expression.value > 0))
    return isinstance(expression, cp.Parameter) and expression.is_pos()
