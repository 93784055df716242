"""Conditions for a minimum, evaluated through `Expression.value` alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import cvxpy as cp
import numpy as np
from scipy.optimize import lsq_linear

from nonconvex_collection.problem import NonconvexProblem, assign

# Weights of central differences of order eight, for steps of 1 to 4.
_WEIGHTS = np.array([4 / 5, -1 / 5, 4 / 105, -1 / 280])


@dataclass(frozen=True)
class Rows:
    """Objective and constraints at a point: minimise f with equal == 0 and below <= 0."""

    f: float
    equal: np.ndarray
    below: np.ndarray

    def stacked(self) -> np.ndarray:
        """All of them in one vector, the objective first."""
        return np.concatenate([[self.f], self.equal, self.below])


class PlainFunctions:
    """Objective and constraints of a problem as functions of one vector.

    The parameters have their values in the problem; bounds that are attributes of variables count
    as constraints.
    """

    def __init__(self, problem: cp.Problem, variables: list[cp.Variable]) -> None:
        self.problem, self.variables = problem, variables
        self.lower, self.upper = (
            np.concatenate([np.broadcast_to(v.get_bounds()[k], v.shape).ravel() for v in variables])
            for k in (0, 1)
        )

    def __call__(self, x: np.ndarray) -> Rows:
        self._set(x)
        sign = -1.0 if isinstance(self.problem.objective, cp.Maximize) else 1.0
        equal, below = [], [(self.lower - x)[np.isfinite(self.lower)]]
        below.append((x - self.upper)[np.isfinite(self.upper)])
        for constraint in self.problem.constraints:
            equality = isinstance(constraint, cp.constraints.Equality | cp.Zero)
            (equal if equality else below).append(np.ravel(_excess(constraint)))
        f = sign * float(self.problem.objective.expr.value)
        return Rows(f, np.concatenate([np.zeros(0), *equal]), np.concatenate(below))

    def _set(self, x: np.ndarray) -> None:
        sizes = np.cumsum([v.size for v in self.variables])[:-1]
        assign(self.variables, np.split(x, sizes))


def _excess(constraint: cp.Constraint) -> np.ndarray:
    """By how much the left side exceeds the right side of a row."""
    if isinstance(constraint, cp.constraints.Equality | cp.constraints.Inequality):
        return constraint.args[0].value - constraint.args[1].value
    sign = -1.0 if isinstance(constraint, cp.NonNeg) else 1.0
    return sign * constraint.args[0].value


def flat(values: list[np.ndarray]) -> np.ndarray:
    """One vector, each array by rows."""
    return np.concatenate([np.ravel(value) for value in values])


def jacobian(
    function: Callable[[np.ndarray], np.ndarray], x: np.ndarray, step: float = 1e-3
) -> np.ndarray:
    """Central differences of order eight, one column for each entry of `x`."""
    columns = []
    for i, width in enumerate(step * np.maximum(1.0, np.abs(x))):
        shift = width * np.eye(len(x))[i]
        change = [function(x + k * shift) - function(x - k * shift) for k in (1, 2, 3, 4)]
        columns.append(np.tensordot(_WEIGHTS, np.array(change), 1) / width)
    return np.stack(columns, axis=-1)


@dataclass(frozen=True)
class Conditions:
    """How far a point is from being stationary.

    Attributes
    ----------
    objective : float
    violation : float
        Of the constraints, relative to the size of their gradients.
    stationarity : float
        What nonnegative multipliers of active inequalities and free ones of equalities leave of
        the gradient of the objective, relative to it.
    rank_gap : int
        Number of active rows less their rank.
    """

    objective: float
    violation: float
    stationarity: float
    rank_gap: int


def conditions(
    case: NonconvexProblem, solution: list[np.ndarray] | None = None, active: float = 1e-7
) -> Conditions:
    """Conditions at a point, or the stated one; rows within `active` of their bound are active."""
    problem, _, variables = case.solved()
    point = case.solution if solution is None else solution
    functions, x = PlainFunctions(problem, variables), flat(point)
    rows, objective = functions(x), float(problem.objective.value)
    slopes = jacobian(lambda z: functions(z).stacked(), x)
    gradient, equal = slopes[0], slopes[1 : 1 + rows.equal.size]
    below = slopes[1 + rows.equal.size :]
    size = np.maximum(1.0, np.abs(below).max(axis=1, initial=0.0))
    touching = rows.below > -active * size
    normals = np.vstack([equal, below[touching]])
    violation = np.concatenate([[0.0], np.abs(rows.equal), rows.below / size])
    return Conditions(
        objective,
        float(violation.max()),
        _remainder(gradient, normals, rows.equal.size),
        len(normals) - _rank(normals),
    )


def _remainder(gradient: np.ndarray, normals: np.ndarray, equalities: int) -> float:
    scale = max(1.0, float(np.abs(gradient).max()))
    if not len(normals):
        return float(np.abs(gradient).max()) / scale
    least = np.r_[np.full(equalities, -np.inf), np.zeros(len(normals) - equalities)]
    length = np.linalg.norm(normals, axis=1)
    length[length == 0] = 1.0
    unit = (normals / length[:, None]).T
    found = lsq_linear(unit, -gradient / scale, (least, np.inf), method="bvls", tol=1e-15)
    return float(np.abs(unit @ found.x + gradient / scale).max())


def _rank(normals: np.ndarray) -> int:
    length = np.linalg.norm(normals, axis=1, keepdims=True)
    return int(np.linalg.matrix_rank(normals / np.where(length > 0, length, 1.0), tol=1e-6))
