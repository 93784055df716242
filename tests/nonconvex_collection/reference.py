"""Derivatives of solutions by differences of solutions.

The solutions come from a formula where a problem has one. Elsewhere Newton's method solves the
conditions for a minimum with the active constraints as equations, to rounding, once for every
displaced parameter. Values and derivatives of the functions are those of CVXPY's own compiled
differentiation engine.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import cvxpy as cp
import numpy as np
from cvxpy.reductions.cvx_attr2constr import CvxAttr2Constr
from cvxpy.reductions.dnlp2smooth.dnlp2smooth import Dnlp2Smooth
from cvxpy.reductions.flip_objective import FlipObjective
from cvxpy.reductions.inverse_data import InverseData
from cvxpy.reductions.solvers.nlp_solvers.nlp_solver import Bounds, Oracles
from scipy.linalg import null_space

from nonconvex_collection.problem import NonconvexProblem, arrays, assign

Answer = Callable[[Sequence[np.ndarray]], list[np.ndarray]]

STEP = 3e-4
ACTIVE = 1e-6
SETTLED = 1e-11  # relative size of a step of Newton's method
# Central differences of order four.
_STENCIL = ((1, 8 / 12), (2, -1 / 12))


class SmoothForm:
    """A problem as minimise f(z) subject to c(z) == 0 or c(z) >= 0, and bounds on z.

    z holds the problem's variables and those that CVXPY adds, at the values that the problem's
    variables have now; the parameters too are as they are now.
    """

    def __init__(self, problem: cp.Problem) -> None:
        flip = [FlipObjective()] if isinstance(problem.objective, cp.Maximize) else []
        for reduction in (*flip, CvxAttr2Constr(reduce_bounds=False), Dnlp2Smooth()):
            problem = reduction.apply(problem)[0]
        bounds = Bounds(problem)
        self.z, self.lower, self.upper = bounds.x0, bounds.lb, bounds.ub
        self.equality = bounds.cu == 0.0
        self.offsets = InverseData(bounds.new_problem).var_offsets
        self.oracles = Oracles(bounds.new_problem, verbose=False)

    def rows(self, z: np.ndarray) -> np.ndarray:
        """c(z), then z - lower and upper - z where they are finite."""
        c = self.oracles.constraints(z) if len(self.equality) else np.zeros(0)
        return np.concatenate([c, (z - self.lower)[self._below()], (self.upper - z)[self._above()]])

    def slopes(self, z: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Gradient of f and Jacobian of `rows`."""
        self.oracles.objective(z)
        gradient = self.oracles.gradient(z).copy()
        J = np.zeros((len(self.equality), len(z)))
        if len(J):
            self.oracles.constraints(z)
            np.add.at(J, self.oracles.jacobianstructure(), self.oracles.jacobian(z))
        unit = np.eye(len(z))
        return gradient, np.vstack([J, unit[self._below()], -unit[self._above()]])

    def hessian(self, z: np.ndarray, multipliers: np.ndarray) -> np.ndarray:
        """Of f - multipliers @ rows; `slopes` has been called at `z`."""
        duals = -multipliers[: len(self.equality)]
        lower = np.zeros((len(z), len(z)))
        np.add.at(
            lower, self.oracles.hessianstructure(), self.oracles.hessian(z, duals.copy(), 1.0)
        )
        return lower + np.tril(lower, -1).T

    def equations(self) -> np.ndarray:
        """Which of `rows` are equalities, bool."""
        bounds = np.count_nonzero(self._below()) + np.count_nonzero(self._above())
        return np.concatenate([self.equality, np.zeros(bounds, bool)])

    def part(self, variable: cp.Variable, z: np.ndarray) -> np.ndarray:
        """A variable's entries of z."""
        start = self.offsets[variable.id]
        return z[start : start + variable.size].reshape(variable.shape, order="F")

    def _below(self) -> np.ndarray:
        return np.isfinite(self.lower)

    def _above(self) -> np.ndarray:
        return np.isfinite(self.upper)


def newton(form: SmoothForm, active: np.ndarray | None = None, rounds: int = 30) -> np.ndarray:
    """Solve the conditions for a minimum with the active rows as equations, from ``form.z``.

    Least squares throughout, so that dependent rows and more of them than variables are allowed.
    """
    z = form.z.copy()
    on = active_rows(form) if active is None else active
    gradient, J = form.slopes(z)
    multipliers = np.zeros(len(on))
    multipliers[on] = np.linalg.lstsq(J[on].T, gradient, rcond=None)[0]
    before = np.inf
    for _ in range(rounds):
        H, A = form.hessian(z, multipliers), J[on]
        system = np.block([[H, -A.T], [A, np.zeros((len(A), len(A)))]])
        right = -np.concatenate([gradient - A.T @ multipliers[on], form.rows(z)[on]])
        step = _least_squares(system, right)
        size = float(np.abs(step[: len(z)] / np.maximum(1.0, np.abs(z))).max())
        if size < SETTLED and size >= 0.5 * before:
            return z
        z, before = z + step[: len(z)], size
        multipliers[on] += step[len(z) :]
        gradient, J = form.slopes(z)
    if before < SETTLED:
        return z
    raise ArithmeticError(f"Newton's method did not settle: last step {before:.1e}")


def _least_squares(system: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Of least norm, after a scaling that keeps small units from being taken for zeros."""
    scale = np.ones(len(system))
    for _ in range(10):
        largest = np.abs(scale[:, None] * system * scale).max(axis=1)
        scale /= np.sqrt(np.where(largest > 0, largest, 1.0))
    return scale * np.linalg.lstsq(scale[:, None] * system * scale, scale * right, rcond=1e-14)[0]


def curvatures(form: SmoothForm) -> np.ndarray:
    """Of the Lagrangian at a solution ``form.z``, in the directions that active rows leave."""
    on, (gradient, J) = active_rows(form), form.slopes(form.z)
    multipliers = np.zeros(len(on))
    multipliers[on] = np.linalg.lstsq(J[on].T, gradient, rcond=None)[0]
    left = null_space(J[on], rcond=1e-9)
    return np.linalg.eigvalsh(left.T @ form.hessian(form.z, multipliers) @ left)


def active_rows(form: SmoothForm) -> np.ndarray:
    """Rows that hold as equations at ``form.z``, bool."""
    return form.equations() | (form.rows(form.z) <= ACTIVE)


def resolved(case: NonconvexProblem) -> Answer:
    """Solution as a function of the parameters, near the case's own, by `newton`."""
    problem, parameters, variables = case.solved()
    active = active_rows(SmoothForm(problem))

    def answer(values: Sequence[np.ndarray]) -> list[np.ndarray]:
        assign(parameters, values)
        assign(variables, case.solution)
        form = SmoothForm(problem)
        z = newton(form, active)
        return [form.part(variable, z) for variable in variables]

    return answer


def weights(case: NonconvexProblem) -> list[np.ndarray]:
    """Of the entries in the loss: cos(0), cos(1), ..., by rows, from the first variable on."""
    shapes = [value.shape for value in case.start]
    sizes = [int(np.prod(shape)) for shape in shapes]
    parts = np.split(np.cos(np.arange(sum(sizes))), np.cumsum(sizes)[:-1])
    return [part.reshape(shape) for part, shape in zip(parts, shapes, strict=True)]


def loss(case: NonconvexProblem, solution: Sequence[np.ndarray]) -> float:
    """Sum of the solution's entries, weighted by `weights`."""
    return sum(float(np.sum(w * y)) for w, y in zip(weights(case), solution, strict=True))


def reference_gradient(case: NonconvexProblem, *, by_newton: bool = False) -> list[np.ndarray]:
    """Gradient of `loss` with respect to every parameter.

    Parameters
    ----------
    case : NonconvexProblem
    by_newton : bool
        Differentiate solutions found by `newton` even where a formula is known.

    Returns
    -------
    list of array
        One of each parameter's shape, with a relative error of about 1e-9.
    """
    formula = case.answer is not None and not by_newton
    answer = (lambda values: arrays(case.answer(*values))) if formula else resolved(case)
    return [_differences(case, answer, index) for index in range(len(case.data))]


def _differences(case: NonconvexProblem, answer: Answer, index: int) -> np.ndarray:
    value = case.data[index]
    out, typical = np.zeros(value.shape), float(np.abs(value).mean()) or 1.0
    for place in np.ndindex(out.shape):
        width = STEP * max(typical / 30, abs(float(value[place])))
        out[place] = sum(
            weight * sign * loss(case, answer(_moved(case, index, place, sign * k * width)))
            for k, weight in _STENCIL
            for sign in (1, -1)
        )
        out[place] /= width
    return out


def _moved(
    case: NonconvexProblem, index: int, place: tuple[int, ...], by: float
) -> list[np.ndarray]:
    values = case.values()
    values[index][place] += by
    return values
