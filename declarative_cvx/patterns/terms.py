"""A sum of penalties, in CVXPY's expression trees."""

from __future__ import annotations

from dataclasses import dataclass

import cvxpy as cp
from cvxpy.atoms import huber, quad_over_lin
from cvxpy.atoms.affine.add_expr import AddExpression
from cvxpy.atoms.affine.binary_operators import DivExpression, MulExpression, multiply
from cvxpy.atoms.affine.sum import Sum
from cvxpy.atoms.elementwise.power import Power

from declarative_cvx.atoms import PenaltyAtom
from declarative_cvx.penalties import Huber, Penalty, Quadratic

# Atoms that are penalties, or are with some arguments.
_PENALTIES = (PenaltyAtom, huber, Power, quad_over_lin)


@dataclass(frozen=True, eq=False)
class Term:
    """A weighted sum of penalties; `weights` broadcasts to the shape of `residual`.

    Attributes
    ----------
    penalty : Penalty
    alpha, weights, residual : cvxpy.Expression
    """

    penalty: Penalty
    alpha: cp.Expression
    weights: cp.Expression
    residual: cp.Expression


def penalty_terms(expression: cp.Expression, weights: cp.Expression) -> list[Term] | None:
    """The weighted penalties whose sum an expression is, up to a constant; None if it is not."""
    if not expression.variables():
        return []
    if any(_lacks_penalty(part) for part in _summands(expression)):
        return None  # before weights are put together
    penalty = _penalty(expression, weights)
    if penalty is not None:
        return [penalty]
    parts = _parts(expression, weights)
    if parts is None:
        return None
    found: list[Term] = []
    for part, part_weights in parts:
        terms = penalty_terms(part, part_weights)
        if terms is None:
            return None
        found += terms
    return found


def _summands(expression: cp.Expression) -> list[cp.Expression]:
    return expression.args if isinstance(expression, AddExpression) else [expression]


def _lacks_penalty(expression: cp.Expression) -> bool:
    atoms = expression.atoms()
    return bool(expression.variables()) and not any(issubclass(a, _PENALTIES) for a in atoms)


def _parts(
    expression: cp.Expression, weights: cp.Expression
) -> list[tuple[cp.Expression, cp.Expression]] | None:
    """Expressions and their weights, whose weighted sum an expression with weights is."""
    if isinstance(expression, AddExpression):
        if any(arg.shape != expression.shape for arg in expression.args):
            return None
        return [(arg, weights) for arg in expression.args]
    if isinstance(expression, Sum) and expression.axis is None and not weights.shape:
        return [(expression.args[0], weights)]
    if isinstance(expression, DivExpression) and not expression.args[1].variables():
        return [(expression.args[0], weights / expression.args[1])]
    if isinstance(expression, multiply | MulExpression):
        return _product(expression, weights)
    return None


def _product(
    expression: cp.Expression, weights: cp.Expression
) -> list[tuple[cp.Expression, cp.Expression]] | None:
    factor, rest = sorted(expression.args, key=lambda arg: bool(arg.variables()))
    if factor.variables():
        return None
    if isinstance(expression, multiply) or not factor.shape or not rest.shape:
        if rest.shape != expression.shape:
            return None
        return [(rest, cp.multiply(weights, factor))]
    inner = len(factor.shape) == len(rest.shape) == 1
    return [(rest, cp.multiply(weights, factor))] if inner else None


def _penalty(expression: cp.Expression, weights: cp.Expression) -> Term | None:
    """An atom that is a penalty, elementwise or (for a sum of squares) summed."""
    one = cp.Constant(1.0)
    if isinstance(expression, PenaltyAtom):
        residual, alpha = expression.args
        return Term(expression.penalty, alpha, weights, residual)
    if isinstance(expression, huber):
        return Term(Huber(), expression.M, 2 * weights, expression.args[0])
    if isinstance(expression, Power) and _is_two(expression.p):
        return Term(Quadratic(), one, 2 * weights, expression.args[0])
    summed = isinstance(expression, quad_over_lin) and getattr(expression, "axis", None) is None
    if summed and not expression.args[1].variables():
        return Term(Quadratic(), one, 2 * weights / expression.args[1], expression.args[0])
    return None


def _is_two(p: object) -> bool:
    value = getattr(p, "value", p)
    return not getattr(p, "parameters", list)() and value is not None and bool(value == 2)
