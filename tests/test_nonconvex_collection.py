"""The nonconvex collection is right in itself: no solver of the library takes part here."""

from __future__ import annotations

import cvxpy as cp
import numpy as np
import pytest
from nonconvex_collection import (
    NonconvexProblem,
    all_problems,
    loss,
    reference_gradient,
    resolved,
    weights,
)
from nonconvex_collection.conditions import PlainFunctions, conditions, flat
from nonconvex_collection.problem import arrays, assign
from numpy.testing import assert_allclose
from scipy.optimize import OptimizeResult, minimize

from declarative_cvx.atoms import PenaltyAtom

PROBLEMS = all_problems()
# Multistarts of the others take long, or lead through points where their functions are undefined.
SMALL = [p for p in PROBLEMS if sum(v.size for v in p.start) <= 4]
SLOW = {"perspective_n_point", "bundle_adjustment", "hs57", "hs107", "phase_retrieval"}
SLOW |= {"wahba_by_quaternion", "nonnegative_principal_direction"}
WITH_FORMULA = [p for p in PROBLEMS if p.answer is not None and p.regular and p.dnlp]


def named(problems: list[NonconvexProblem]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("case", problems, ids=[p.name for p in problems])


def test_there_are_enough_problems_of_different_names() -> None:
    names = {p.name for p in PROBLEMS}
    assert len(names) == len(PROBLEMS) >= 65
    assert sum(name.startswith("hs") for name in names) >= 40


@named(PROBLEMS)
def test_rules_of_cvxpy_find_what_is_stated(case: NonconvexProblem) -> None:
    problem, parameters, variables = case.build()
    assert (problem.is_dcp(), problem.is_dnlp()) == (case.convex, case.dnlp)
    assert {p.id for p in parameters} == {p.id for p in problem.parameters()}
    assert {v.id for v in variables} == {v.id for v in problem.variables()}
    for parameter, value in zip(parameters, case.values(), strict=True):
        parameter.value = value  # refuses what does not fit its shape and sign


@named(PROBLEMS)
def test_solution_is_stationary_and_has_the_stated_value(case: NonconvexProblem) -> None:
    found = conditions(case)
    assert_allclose(found.objective, case.optimum, rtol=1e-8, atol=1e-9)
    assert found.violation <= 1e-9
    assert found.stationarity <= 1e-7
    assert (found.rank_gap == 0) == case.independent


def descended(functions: PlainFunctions, x: np.ndarray, steps: int) -> OptimizeResult:
    """A run of sequential quadratic programming on differences."""

    def bounded(z: np.ndarray) -> np.ndarray:
        return np.clip(z, functions.lower, functions.upper)

    rows = [
        {"type": "eq", "fun": lambda z: functions(bounded(z)).equal},
        {"type": "ineq", "fun": lambda z: -functions(bounded(z)).below},
    ]
    sizes = functions(x).equal.size, functions(x).below.size
    return minimize(
        lambda z: functions(bounded(z)).f,
        x,
        method="SLSQP",
        bounds=list(zip(functions.lower, functions.upper, strict=True)),
        constraints=[row for row, size in zip(rows, sizes, strict=True) if size],
        options={"maxiter": steps, "ftol": 1e-12},
    )


@named(SMALL)
@pytest.mark.filterwarnings("ignore")
def test_no_other_start_leads_lower(case: NonconvexProblem) -> None:
    problem, parameters, variables = case.build()
    assign(parameters, case.values())
    functions = PlainFunctions(problem, variables)
    rng, best = np.random.default_rng(0), flat(case.solution)
    known = functions(best).f
    for width in (0.3, 2.0):
        x = best + width * rng.standard_normal(best.size) * np.maximum(1.0, np.abs(best))
        found = descended(functions, np.clip(x, functions.lower, functions.upper), 40)
        rows = functions(np.clip(found.x, functions.lower, functions.upper))
        feasible = np.abs(rows.equal).max(initial=0.0) < 1e-9 and rows.below.max(initial=0.0) < 1e-9
        if feasible and np.isfinite(rows.f):
            assert rows.f >= known - 1e-6 * max(1.0, abs(known))


@named([p for p in SMALL if p.regular])
@pytest.mark.filterwarnings("ignore")
def test_start_leads_to_the_stated_solution(case: NonconvexProblem) -> None:
    problem, parameters, variables = case.build()
    assign(parameters, case.values())
    found = descended(PlainFunctions(problem, variables), flat([v.value for v in variables]), 150)
    assert_allclose(found.x, flat(case.solution), rtol=1e-3, atol=1e-3)


@named([p for p in WITH_FORMULA if p.name not in SLOW])
def test_formula_and_newtons_method_have_one_derivative(case: NonconvexProblem) -> None:
    if any(issubclass(atom, PenaltyAtom) for atom in case.build()[0].atoms()):
        pytest.skip("CVXPY has no derivatives of penalty atoms for its nonlinear solvers")
    by_newton = flat(reference_gradient(case, by_newton=True))
    by_formula = flat(reference_gradient(case))
    assert np.abs(by_formula).max() > 1e-3
    assert_allclose(by_newton, by_formula, rtol=1e-7, atol=1e-8 * np.abs(by_formula).max())


@named([p for p in PROBLEMS if p.answer is None and p.name not in SLOW])
@pytest.mark.filterwarnings("ignore:.*denominator")  # they are positive by the problems' bounds
def test_loss_follows_the_reference_gradient(case: NonconvexProblem) -> None:
    """Solutions a larger step away in all parameters at once: another set of points."""
    rng, gradient = np.random.default_rng(1), reference_gradient(case)
    direction = [rng.uniform(-1, 1, v.shape) * np.abs(v) for v in case.data]
    answer, width = resolved(case), 5e-4
    ends = [
        loss(
            case, answer([v + sign * width * d for v, d in zip(case.data, direction, strict=True)])
        )
        for sign in (2, 1, -1, -2)
    ]
    slope = (-ends[0] + 8 * ends[1] - 8 * ends[2] + ends[3]) / (12 * width)
    terms = [np.sum(np.abs(g * d)) for g, d in zip(gradient, direction, strict=True)]
    expected = sum(np.sum(g * d) for g, d in zip(gradient, direction, strict=True))
    assert_allclose(slope, expected, rtol=0, atol=1e-6 * sum(terms))


def test_weights_are_cosines_by_rows() -> None:
    case = next(p for p in PROBLEMS if p.name == "hanging_chain")
    assert_allclose(weights(case)[0][2], np.cos([4, 5]))
    assert_allclose(loss(case, case.solution), np.sum(weights(case)[0] * case.solution[0]))


def test_values_and_solutions_are_fresh() -> None:
    case = PROBLEMS[0]
    case.values()[0][...] = 7.0
    assert not np.any(case.values()[0] == 7.0)


def test_a_wrong_point_is_not_stationary() -> None:
    case = next(p for p in PROBLEMS if p.name == "outside_a_circle")
    moved = NonconvexProblem(
        "moved",
        case.statement,
        case.data,
        case.start,
        case.optimum,
        lambda *_: arrays([[1.0, 0.1]]),
    )
    found = conditions(moved)
    assert found.stationarity > 1e-2


def test_a_multiplier_of_the_wrong_sign_is_not_accepted() -> None:
    def statement() -> tuple[cp.Problem, list, list]:
        x, a = cp.Variable(), cp.Parameter()
        return cp.Problem(cp.Minimize(x), [x**2 <= a]), [a], [x]

    case = NonconvexProblem(
        "top", statement, tuple(arrays([1.0])), tuple(arrays([1.0])), 1.0, lambda a: arrays([1.0])
    )
    assert conditions(case).stationarity > 0.5
