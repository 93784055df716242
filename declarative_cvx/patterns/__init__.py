"""Problems that a fast kernel solves, recognised in CVXPY's expression trees.

What is found is said in CVXPY's terms; nothing is computed here. A problem that fits only nearly is
none of them.
"""

from __future__ import annotations

import cvxpy as cp

from declarative_cvx.patterns.difference import Difference
from declarative_cvx.patterns.pooling import Pooling, pooling_of
from declarative_cvx.patterns.projection import ProjectionPattern, projection_of
from declarative_cvx.patterns.terms import penalty_terms

__all__ = ["Difference", "Pattern", "Pooling", "ProjectionPattern", "recognise"]

Pattern = Pooling | ProjectionPattern


def recognise(problem: cp.Problem) -> Pattern | None:
    """The kernel's problem that a problem is; None if it is not exactly one of them.

    Parameters
    ----------
    problem : cvxpy.Problem
    """
    variables = problem.variables()
    if len(variables) != 1 or not isinstance(problem.objective, cp.Minimize):
        return None
    (variable,) = variables
    attributes = {name for name, value in variable.attributes.items() if value}
    if attributes - {"nonneg"}:
        return None
    terms = penalty_terms(problem.objective.expr, cp.Constant(1.0))
    if terms is None or not terms:
        return None
    if not problem.constraints:
        return None if attributes else pooling_of(variable, terms)
    return projection_of(variable, attributes, terms, problem.constraints)
