"""The contract of a solver, kept by every entry of the table `BACKENDS`."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import cvxpy as cp
import numpy as np
import pytest
import torch
from kkt import infeasibility_violation, unboundedness_violation, violations
from numpy.testing import assert_allclose
from problems import ALL_KINDS, CASES, Built, Case, case_named
from torch import Tensor

from declarative_cvx import (
    BackendError,
    Clarabel,
    DeclarativeLayer,
    Moreau,
    Solution,
    SolveError,
    Status,
)
from declarative_cvx.backends import BACKENDS, Answer, Point, dispatch, installed
from declarative_cvx.canonical import ParamConeProgram, canonicalize
from declarative_cvx.host import Element, HostProgram

ACCURACY = 1e-6  # relative to the largest entry
SOLVERS = sorted(installed())


def tensors(values: tuple[np.ndarray, ...] | list[Any]) -> list[Tensor]:
    return [torch.as_tensor(np.asarray(value, dtype=float)) for value in values]


@lru_cache
def canonical(case: Case) -> ParamConeProgram:
    problem, parameters, _ = case.build()
    return canonicalize(problem, parameters, case.gp)


def cone_element(program: ParamConeProgram, values: list[Tensor], element: int = 0) -> Element:
    """The cone program that parameter values of one element stand for."""
    unbatched = [False] * len(values)
    applied, _ = program.apply(values, unbatched, 1, torch.device("cpu"))
    return HostProgram.of(applied).element(element)


def takes(solver: str, structure: Any) -> bool:
    return BACKENDS[solver]().obstacle(structure) is None


def assert_close(actual: Tensor, expected: np.ndarray, accuracy: float = ACCURACY) -> None:
    scale = np.abs(expected).max(initial=0) or 1.0
    assert_allclose(actual.detach().numpy(), expected, rtol=0, atol=accuracy * scale)


@lru_cache
def layer_of(solver: str, case: Case) -> tuple[Built, DeclarativeLayer]:
    built = case.build()
    return built, DeclarativeLayer(*built, solver=solver, gp=case.gp, on_failure="nan")


@lru_cache
def solution_by(solver: str, case: Case) -> Solution:
    return layer_of(solver, case)[1].solve(*tensors(case.values))


def solve_with(solver: str, case: Case, **options: Any) -> Solution:
    return layer_of(solver, case)[1].solve(*tensors(case.values), solver_args=options)


PAIRS = [
    pytest.param(solver, case, id=f"{solver}-{case}")
    for solver in SOLVERS
    for case in CASES
    if takes(solver, canonical(case).structure)
]
QP_CASES = ("inequality_qp_with_psd_parameter", "simplex_projection", "best_asset_maximised")


# The collection itself


@pytest.mark.parametrize("case", CASES, ids=str)
def test_case_needs_the_cones_it_says(case: Case) -> None:
    assert canonical(case).structure.cone.kinds == case.cones


def test_collection_covers_every_pair_of_cones() -> None:
    covered = {frozenset(pair) for case in CASES for pair in _pairs(case.cones)}
    assert covered == set(_pairs(frozenset(ALL_KINDS)))


def _pairs(kinds: frozenset[str]) -> list[frozenset[str]]:
    return [frozenset((a, b)) for a in kinds for b in kinds if a < b]


def test_every_cone_is_taken_by_some_solver_and_every_case_by_several() -> None:
    for case in CASES:
        able = [solver for solver in SOLVERS if takes(solver, canonical(case).structure)]
        assert len(able) >= 3, (case.name, able)


# Solutions


@pytest.mark.parametrize(("solver", "case"), PAIRS)
def test_solution_is_the_known_one(solver: str, case: Case) -> None:
    solution = solution_by(solver, case)
    assert solution.status == (Status.OPTIMAL,)
    assert solution.backend == (solver,)
    for found, expected in zip(solution.variables, case.expected(), strict=True):
        assert_close(found, expected)
    if case.value is not None:
        value = float(case.value(*case.values))
        assert float(solution.value) == pytest.approx(value, rel=ACCURACY, abs=ACCURACY)


@pytest.mark.parametrize(("solver", "case"), PAIRS)
def test_solution_satisfies_the_optimality_conditions(solver: str, case: Case) -> None:
    solution = solution_by(solver, case)
    program = cone_element(canonical(case), tensors(case.values))
    found = violations(program, *(v[0].numpy() for v in _point(solution)))
    assert max(found.values()) <= ACCURACY, found


def _point(solution: Solution) -> tuple[Tensor, Tensor, Tensor]:
    return solution.cone.x, solution.cone.y, solution.cone.s


@pytest.mark.parametrize(
    "name",
    [
        "linear_program_vertex",
        "linear_over_a_ball_with_dual",
        "smallest_eigenvalue_of_order_3",
        "exponential_cone_with_duals",
        "weighted_geometric_mean_under_a_budget",
    ],
)
@pytest.mark.parametrize(
    ("changed", "condition"), [(0, "A x + s = b"), (1, "y in K*"), (2, "s in K")]
)
def test_oracle_notices_points_that_are_off(name: str, changed: int, condition: str) -> None:
    case = case_named(name)
    program = cone_element(canonical(case), tensors(case.values))
    point = [v[0].numpy().copy() for v in _point(solution_by("Clarabel", case))]
    first = program.cone.zero  # first row of a cone that can be left
    outward = 1 if program.cone.exp else -1
    point[changed][0 if changed == 0 else first] += outward * (10 if changed == 1 else 1e-2)
    assert violations(program, *point)[condition] > 1e-4


@lru_cache
def cvxpy_solution(case: Case) -> tuple[float, list[list[np.ndarray]]]:
    """Optimal value and duals of every constraint by CVXPY's own way."""
    problem, parameters, _ = case.build()
    for parameter, value in zip(parameters, case.values, strict=True):
        parameter.value = value
    tight = dict.fromkeys(("tol_gap_abs", "tol_gap_rel", "tol_feas"), 1e-12)
    problem.solve(solver="CLARABEL", gp=case.gp, **tight)
    duals = [[dual.value for dual in con.dual_variables] for con in problem.constraints]
    return float(problem.value), duals


@pytest.mark.parametrize(
    ("solver", "case"), [pair for pair in PAIRS if pair.values[1].unique_duals]
)
def test_duals_and_value_are_those_of_cvxpy(solver: str, case: Case) -> None:
    (problem, _, _), _ = layer_of(solver, case)
    solution = solution_by(solver, case)
    value, duals = cvxpy_solution(case)
    # An interior-point method on unscaled data, which CVXPY's answer is, is good to about 1e-5.
    assert float(solution.value) == pytest.approx(value, rel=1e-5, abs=1e-5)
    for constraint, expected in zip(problem.constraints, duals, strict=True):
        for variable, known in zip(constraint.dual_variables, expected, strict=True):
            known = np.asarray(known).reshape(variable.shape)
            size = max(1.0, np.abs(known).max())
            assert_allclose(solution[variable].numpy(), known, rtol=0, atol=1e-5 * size)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("name", QP_CASES)
def test_batch_holds_the_answer_to_each_element(solver: str, name: str) -> None:
    case = case_named(name)
    layer = DeclarativeLayer(*case.build(), solver=solver)
    solution = layer.solve(*tensors(list(case.draw_batch(7))))
    assert solution.status == (Status.OPTIMAL,) * 7
    assert len(solution.iterations) == len(solution.backend) == 7
    for seed in range(7):
        for found, expected in zip(solution.variables, case.expected(case.draw(seed)), strict=True):
            assert_close(found[seed], expected)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("name", QP_CASES)
def test_empty_batch_gives_empty_outputs(solver: str, name: str) -> None:
    case = case_named(name)
    layer = DeclarativeLayer(*case.build(), solver=solver, optimal_value=True)
    inputs = [torch.zeros((0, *value.shape), requires_grad=True) for value in case.values]
    solution = layer.solve(*inputs)
    shapes = [(0, *np.shape(expected)) for expected in case.expected()]
    assert [tuple(out.shape) for out in solution.variables] == [*shapes, (0,)]
    assert solution.status == solution.backend == solution.iterations == ()
    sum(out.sum() for out in layer(*inputs)).backward()
    assert all(tensor.grad.shape == tensor.shape for tensor in inputs)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("name", [*QP_CASES, "ball_projection", "softmax_as_entropy_maximisation"])
def test_warm_start_gives_the_same_answer_in_no_more_iterations(solver: str, name: str) -> None:
    case = case_named(name)
    if not takes(solver, canonical(case).structure):
        pytest.skip("no such cone")
    layer = DeclarativeLayer(*case.build(), solver=solver, warm_start=True)
    cold = layer.solve(*tensors(list(case.draw_batch(3))))
    warm = layer.solve(*tensors(list(case.draw_batch(3))))
    assert warm.status == (Status.OPTIMAL,) * 3
    assert sum(warm.iterations) <= sum(cold.iterations)
    moved = [0.9 * batch + 0.1 * batch[::-1] for batch in case.draw_batch(3)]
    elsewhere = layer.solve(*tensors(moved))
    for element in range(3):
        for solution, values in (
            (warm, case.draw(element)),
            (elsewhere, tuple(batch[element] for batch in moved)),
        ):
            for found, expected in zip(solution.variables, case.expected(values), strict=True):
                assert_close(found[element], expected)


@pytest.mark.parametrize("threads", [1, 5])
def test_number_of_threads_does_not_change_the_answer(threads: int) -> None:
    case = case_named("softmax_as_entropy_maximisation")
    layer = DeclarativeLayer(*case.build(), solver=Clarabel(threads=threads))
    (out,) = layer(*tensors(list(case.draw_batch(9))))
    assert_close(out, np.stack([case.expected(case.draw(seed))[0] for seed in range(9)]))


# Problems without a solution


@dataclass(frozen=True)
class Family:
    """A problem whose only parameter decides whether it has a solution."""

    name: str
    build: Callable[[], Built]
    status: Status
    good: float
    bad: float

    def __str__(self) -> str:
        return f"{self.name}-{self.status.name}"


def _family(objective: Callable, constraints: Callable) -> Callable[[], Built]:
    def build() -> Built:
        x, a = cp.Variable(3, name="x"), cp.Parameter(name="a")
        return cp.Problem(objective(x, a), constraints(x, a)), [a], [x]

    return build


def _matrix_family(objective: Callable, constraints: Callable) -> Callable[[], Built]:
    def build() -> Built:
        X, a = cp.Variable((3, 3), symmetric=True, name="X"), cp.Parameter(name="a")
        return cp.Problem(objective(X, a), constraints(X, a)), [a], [X]

    return build


FAMILIES = [
    Family(
        "orthant",
        _family(lambda x, a: cp.Minimize(cp.sum(x)), lambda x, a: [x >= 1, x <= a]),
        Status.INFEASIBLE, good=2.0, bad=0.5,
    ),
    Family(
        "orthant",
        _family(lambda x, a: cp.Minimize(a * cp.sum(x)), lambda x, a: [x >= -1]),
        Status.UNBOUNDED, good=2.0, bad=-1.0,
    ),
    Family(
        "equalities",
        _family(
            lambda x, a: cp.Minimize(cp.sum_squares(x)),
            lambda x, a: [cp.sum(x) == 1, a * x[0] + x[1] + x[2] == 3],
        ),
        Status.INFEASIBLE, good=2.0, bad=1.0,
    ),
    Family(
        "quadratic",
        _family(
            lambda x, a: cp.Minimize(cp.square(x[0]) + a * x[1] + cp.sum(x[1:])),
            lambda x, a: [x[1:] >= -1],
        ),
        Status.UNBOUNDED, good=1.0, bad=-2.0,
    ),
    Family(
        "second-order",
        _family(lambda x, a: cp.Minimize(x[1]), lambda x, a: [cp.norm(x) <= 1, x[0] >= a]),
        Status.INFEASIBLE, good=0.5, bad=2.0,
    ),
    Family(
        "second-order",
        _family(
            lambda x, a: cp.Minimize(a * x[0] + x[1]), lambda x, a: [cp.norm(x[1:]) <= x[0]]
        ),
        Status.UNBOUNDED, good=2.0, bad=0.5,
    ),
    Family(
        "semidefinite",
        _matrix_family(
            lambda X, a: cp.Minimize(X[0, 1]), lambda X, a: [X >> 0, cp.trace(X) <= a]
        ),
        Status.INFEASIBLE, good=1.0, bad=-1.0,
    ),
    Family(
        "semidefinite",
        _matrix_family(
            lambda X, a: cp.Minimize(a * cp.trace(X) + 2 * X[0, 1]), lambda X, a: [X >> 0]
        ),
        Status.UNBOUNDED, good=2.0, bad=0.5,
    ),
    Family(
        "exponential",
        _family(
            lambda x, a: cp.Maximize(x[0]),
            lambda x, a: [cp.exp(x[0]) <= x[1], x[1] <= a, x[2] == 0],
        ),
        Status.INFEASIBLE, good=2.0, bad=-1.0,
    ),
    Family(
        "exponential",
        _family(
            lambda x, a: cp.Minimize(x[1] + a * x[0]),
            lambda x, a: [cp.exp(x[0]) <= x[1], x[2] == 0],
        ),
        Status.UNBOUNDED, good=-1.0, bad=1.0,
    ),
    Family(
        "power",
        _family(
            lambda x, a: cp.Minimize(cp.sum(x[:2])),
            lambda x, a: [cp.PowCone3D(x[0], x[1], x[2], 0.3), x[:2] <= 1, x[2] >= a],
        ),
        Status.INFEASIBLE, good=0.5, bad=2.0,
    ),
    Family(
        "power",
        _family(
            lambda x, a: cp.Minimize(x[0] + a * x[1] - x[2]),
            lambda x, a: [cp.PowCone3D(x[0], x[1], x[2], 0.3), x[0] <= 5],
        ),
        Status.UNBOUNDED, good=1.0, bad=-1.0,
    ),
]  # fmt: skip


def _family_pairs() -> list[Any]:
    out = []
    for family in FAMILIES:
        problem, parameters, _ = family.build()
        structure = canonicalize(problem, parameters).structure
        out += [
            pytest.param(solver, family, id=f"{solver}-{family}")
            for solver in SOLVERS
            if takes(solver, structure)
        ]
    return out


@pytest.mark.parametrize(("solver", "family"), _family_pairs())
def test_certificate_proves_that_there_is_no_solution(solver: str, family: Family) -> None:
    built = family.build()
    layer = DeclarativeLayer(*built, solver=solver, on_failure="nan")
    solution = layer.solve(*tensors([family.bad]))
    assert solution.status == (family.status,)
    assert torch.isnan(solution.variables[0]).all()
    program = cone_element(canonicalize(built[0], built[1]), tensors([family.bad]))
    if family.status is Status.INFEASIBLE:
        violation = infeasibility_violation(program, solution.cone.y[0].numpy())
    else:
        violation = unboundedness_violation(program, solution.cone.x[0].numpy())
    assert violation <= 1e-5


@pytest.mark.parametrize(("solver", "family"), _family_pairs())
def test_nearby_problem_with_a_solution_is_solved(solver: str, family: Family) -> None:
    built = family.build()
    solution = DeclarativeLayer(*built, solver=solver).solve(*tensors([family.good]))
    assert solution.status == (Status.OPTIMAL,)
    program = cone_element(canonicalize(built[0], built[1]), tensors([family.good]))
    found = violations(program, *(v[0].numpy() for v in _point(solution)))
    assert max(found.values()) <= ACCURACY, found


def _mixed() -> tuple[Built, list[Tensor], list[Status]]:
    """Minimise -x + (y - p)^2, x >= low, a x <= 1: solution x = 1 / a, y = p.

    Element 1 is infeasible (low > 1 / a), element 3 unbounded (a = 0).
    """
    x, y = cp.Variable(name="x"), cp.Variable(name="y")
    a, low, p = cp.Parameter(name="a"), cp.Parameter(name="low"), cp.Parameter(name="p")
    problem = cp.Problem(cp.Minimize(-x + cp.square(y - p)), [x >= low, a * x <= 1])
    values = [
        torch.tensor([1.0, 1.0, 2.0, 0.0, 0.5], dtype=torch.float64),
        torch.tensor([0.0, 2.0, 0.0, 0.0, 0.0], dtype=torch.float64),
        torch.tensor([3.0, 1.0, -2.0, 1.0, 0.25], dtype=torch.float64),
    ]
    ok = Status.OPTIMAL
    return (problem, [a, low, p], [x, y]), values, [ok, Status.INFEASIBLE, ok, Status.UNBOUNDED, ok]


@pytest.mark.parametrize("solver", [*SOLVERS, "auto"])
def test_elements_without_a_solution_do_not_disturb_the_others(solver: str) -> None:
    built, values, statuses = _mixed()
    layer = DeclarativeLayer(*built, solver=solver, on_failure="nan")
    solution = layer.solve(*values)
    assert solution.status == tuple(statuses)
    x, y = (out.numpy() for out in solution.variables)
    assert_allclose(x, [1.0, np.nan, 0.5, np.nan, 2.0], rtol=ACCURACY)
    assert_allclose(y, [3.0, np.nan, -2.0, np.nan, 0.25], rtol=ACCURACY)


@pytest.mark.parametrize("solver", [*SOLVERS, "auto"])
def test_raising_names_exactly_the_elements_that_failed(solver: str) -> None:
    built, values, _ = _mixed()
    layer = DeclarativeLayer(*built, solver=solver)
    with pytest.raises(SolveError) as caught:
        layer(*values)
    message = str(caught.value)
    assert re.findall(r"element (\d+): (\w+)", message) == [
        ("1", "INFEASIBLE"),
        ("3", "UNBOUNDED"),
    ]
    assert message.startswith("2 of 5")


@pytest.mark.parametrize("solver", [*SOLVERS, "auto"])
@pytest.mark.parametrize("derivative", ["implicit", "diffcp"])
def test_failed_elements_have_zero_gradient_and_others_the_right_one(
    solver: str, derivative: str
) -> None:
    built, values, _ = _mixed()
    layer = DeclarativeLayer(*built, solver=solver, derivative=derivative, on_failure="nan")
    a, low, p = (value.requires_grad_() for value in values)
    x, y = layer(a, low, p)
    torch.autograd.backward([x, y], [torch.ones_like(x), torch.ones_like(y)])
    assert_allclose(a.grad.numpy(), [-1.0, 0.0, -0.25, 0.0, -4.0], rtol=0, atol=1e-5)
    assert_allclose(low.grad.numpy(), np.zeros(5), rtol=0, atol=1e-5)
    assert_allclose(p.grad.numpy(), [1.0, 0.0, 1.0, 0.0, 1.0], rtol=0, atol=1e-5)


# Options


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize(
    ("option", "right"),
    [("tols", "tol"), ("max_itrs", "max_iters"), ("verbos", "verbose"), ("seting", "settings")],
)
def test_misspelt_option_is_answered_with_the_nearest(solver: str, option: str, right: str) -> None:
    built = case_named("simplex_projection").build()
    attempts = [
        lambda: BACKENDS[solver](**{option: 1}),
        lambda: BACKENDS[solver].configured({option: 1}),
        lambda: DeclarativeLayer(*built, solver=solver, solver_args={option: 1}),
    ]
    for attempt in attempts:
        with pytest.raises(BackendError) as caught:
            attempt()
        assert repr(option) in str(caught.value)
        assert f"Did you mean {right!r}" in str(caught.value)
        assert solver.lower() in str(caught.value).lower()


@pytest.mark.parametrize("solver", SOLVERS)
def test_unknown_setting_of_the_solver_is_answered_with_the_nearest(solver: str) -> None:
    if solver == "DualActiveSet":
        with pytest.raises(BackendError, match="no setting 'exchanges'"):
            BACKENDS[solver](settings={"exchanges": 1})
        return
    known = sorted(BACKENDS[solver].native_settings(), key=len)[-1]
    with pytest.raises(BackendError, match=f"Did you mean '{known}'"):
        BACKENDS[solver](settings={known + "x": 1})


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("tol", 0.0),
        ("tol", -1e-8),
        ("tol", float("nan")),
        ("tol", "tight"),
        ("max_iters", 0),
        ("max_iters", 2.5),
        ("time_limit", -1.0),
        ("time_limit", 0.0),
    ],
)
def test_wrong_value_of_an_option_is_refused_by_name(solver: str, option: str, value: Any) -> None:
    with pytest.raises(BackendError) as caught:
        BACKENDS[solver](**{option: value})
    assert option.replace("_", " ") in str(caught.value).replace("_", " ")


LOOSE_SETTINGS = {
    "Moreau": ("tol_gap_abs", "tol_gap_rel", "tol_feas"),
    "Clarabel": ("tol_gap_abs", "tol_gap_rel", "tol_feas"),
    "SCS": ("eps_abs", "eps_rel"),
    "ECOS": ("abstol", "reltol", "feastol"),
    "OSQP": ("eps_abs", "eps_rel"),
    "diffcp": ("eps_abs", "eps_rel"),
}


@pytest.mark.parametrize("solver", sorted(set(SOLVERS) - {"DualActiveSet"}))
def test_settings_by_the_solvers_own_names_reach_it(solver: str) -> None:
    case = case_named("best_asset_maximised")
    loose = dict.fromkeys(LOOSE_SETTINGS[solver], 0.1)
    tight = solution_by(solver, case)
    by_settings = solve_with(solver, case, settings=loose)
    flat = solve_with(solver, case, **loose)
    assert by_settings.iterations < tight.iterations
    assert flat.iterations == by_settings.iterations


@pytest.mark.parametrize(("solver", "case"), PAIRS)
def test_one_iteration_never_passes_a_wrong_answer_as_optimal(solver: str, case: Case) -> None:
    solution = solve_with(solver, case, max_iters=1)
    (status,) = solution.status
    if status is Status.OPTIMAL:  # rightly: one iteration, or what was made of it, was enough
        for found, expected in zip(solution.variables, case.expected(), strict=True):
            assert_close(found, expected)
    else:
        assert status in (Status.ITERATION_LIMIT, Status.INACCURATE, Status.NUMERICAL_ERROR)
        assert all(torch.isnan(out).all() for out in solution.variables)


def test_refinement_that_fails_leaves_the_answer_that_came(monkeypatch: pytest.MonkeyPatch) -> None:
    """A weakly active row: s and y are both the root of s'y, so that s - y says little of them."""
    x, p = cp.Variable(2), cp.Parameter(2)
    problem = cp.Problem(cp.Minimize(cp.sum_squares(x - p)), [x <= 1])
    value = torch.tensor([1.0, 0.0], dtype=torch.float64)

    def worst(refine: bool) -> float:
        solver = Clarabel(tol=1e-9, refine=refine)
        layer = DeclarativeLayer(problem, [p], [x], solver=solver, on_irregular="ignore")
        return float(layer.solve(value).residuals.worst)

    assert worst(refine=True) < 1e-13
    monkeypatch.setattr(dispatch, "newton_step", lambda program, point, violations: point)
    monkeypatch.setattr(dispatch, "refine", lambda program, x, y, s, scale: (x, y, s))
    assert worst(refine=True) <= worst(refine=False)


@pytest.mark.parametrize("solver", SOLVERS)
def test_time_limit_is_kept_or_refused(solver: str) -> None:
    case = case_named("logistic_regression")
    if not takes(solver, canonical(case).structure):
        case = case_named("simplex_projection")
    if solver in ("ECOS", "diffcp"):
        with pytest.raises(BackendError, match="no time limit"):
            BACKENDS[solver](time_limit=1.0)
        return
    solution = solve_with(solver, case, time_limit=1e-9)
    if solution.status == (Status.OPTIMAL,):
        assert_close(solution.variables[0], case.expected()[0])
    else:
        assert solution.status[0] in (Status.TIME_LIMIT, Status.INACCURATE)


# Solvers that say what is not so


@dataclass(frozen=True, kw_only=True)
class Liar(Clarabel):
    """Solves, then says something else."""

    lie: Callable[[Answer], Answer]

    def solve(self, program: HostProgram, start: Point | None = None) -> Answer:
        return self.lie(super().solve(program, start))


def _claim(status: Status, **vectors: Callable[[np.ndarray], np.ndarray]) -> Callable:
    def lie(answer: Answer) -> Answer:
        changed = {name: change(getattr(answer, name)) for name, change in vectors.items()}
        return replace(answer, status=[status] * len(answer.status), **changed)

    return lie


def _noise(like: np.ndarray) -> np.ndarray:
    return np.random.default_rng(5).standard_normal(like.shape)


LIES_ABOUT_SOLUTIONS = {
    "shifted x": _claim(Status.OPTIMAL, x=lambda x: x + 0.1),
    "x of zeros": _claim(Status.OPTIMAL, x=np.zeros_like),
    "y of zeros": _claim(Status.OPTIMAL, y=np.zeros_like),
    "all zeros": _claim(Status.OPTIMAL, x=np.zeros_like, y=np.zeros_like, s=np.zeros_like),
    "negative duals": _claim(Status.OPTIMAL, y=lambda y: -y),
    "noise": _claim(
        Status.OPTIMAL,
        x=_noise,
        y=_noise,
        s=_noise,
    ),
    "NaN": _claim(Status.OPTIMAL, x=lambda x: np.full_like(x, np.nan)),
    "infinite": _claim(Status.OPTIMAL, x=lambda x: np.full_like(x, np.inf)),
}


@pytest.mark.parametrize("lie", LIES_ABOUT_SOLUTIONS)
@pytest.mark.parametrize(
    "name", ["linear_program_vertex", "ball_projection", "smallest_eigenvalue_of_order_3"]
)
def test_wrong_solution_is_never_optimal(lie: str, name: str) -> None:
    case = case_named(name)
    layer = DeclarativeLayer(*case.build(), solver=Liar(lie=LIES_ABOUT_SOLUTIONS[lie]))
    solution = layer.solve(*tensors(case.values))
    if solution.status == (Status.OPTIMAL,):  # it was repaired
        for found, expected in zip(solution.variables, case.expected(), strict=True):
            assert_close(found, expected)
    else:
        with pytest.raises(SolveError, match="element 0"):
            layer(*tensors(case.values))


@pytest.mark.parametrize("vector", [np.zeros_like, np.ones_like, lambda y: y, lambda y: y * np.nan])
@pytest.mark.parametrize("claim", [Status.INFEASIBLE, Status.UNBOUNDED])
def test_wrong_certificate_is_not_believed(claim: Status, vector: Callable) -> None:
    case = case_named("ball_projection")
    layer = DeclarativeLayer(
        *case.build(), solver=Liar(lie=_claim(claim, x=vector, y=vector)), on_failure="nan"
    )
    (status,) = layer.solve(*tensors(case.values)).status
    assert not status.final


@pytest.mark.parametrize("family", FAMILIES, ids=str)
def test_problem_without_a_solution_is_never_optimal(family: Family) -> None:
    liar = Liar(lie=_claim(Status.OPTIMAL))
    layer = DeclarativeLayer(*family.build(), solver=liar, on_failure="nan")
    solution = layer.solve(*tensors([family.bad]))
    assert not solution.status[0].solved
    assert torch.isnan(solution.variables[0]).all()


@pytest.mark.parametrize("family", FAMILIES, ids=str)
@pytest.mark.parametrize("scale", [1e-9, 1e9])
def test_certificate_counts_in_any_scale(family: Family, scale: float) -> None:
    liar = Liar(lie=_claim(family.status, x=lambda x: scale * x, y=lambda y: scale * y))
    layer = DeclarativeLayer(*family.build(), solver=liar, on_failure="nan")
    assert layer.solve(*tensors([family.bad])).status == (family.status,)


def test_solution_called_inaccurate_by_a_modest_solver_counts_if_it_is_right() -> None:
    case = case_named("ball_projection")
    layer = DeclarativeLayer(*case.build(), solver=Liar(lie=_claim(Status.INACCURATE)))
    assert_close(layer(*tensors(case.values))[0], case.expected()[0])


# solver="auto"


def _fails_on(elements: Callable[[int], list[int]]) -> Callable:
    original = Moreau.solve

    def solve(self: Moreau, program: HostProgram, start: Point | None = None) -> Answer:
        answer = original(self, program, start)
        for element in elements(program.batch):
            answer.status[element] = Status.NUMERICAL_ERROR
            answer.said[element] = "broken on purpose"
            answer.x[element] = np.nan
        return answer

    return solve


def test_auto_goes_on_to_the_next_solver(monkeypatch: pytest.MonkeyPatch) -> None:
    case = case_named("softmax_as_entropy_maximisation")
    monkeypatch.setattr(Moreau, "solve", _fails_on(lambda batch: list(range(batch))))
    solution = DeclarativeLayer(*case.build()).solve(*tensors(list(case.draw_batch(3))))
    assert solution.status == (Status.OPTIMAL,) * 3
    assert [attempt.backend for attempt in solution.cone.attempts] == ["Moreau", "Clarabel"]
    assert solution.cone.attempts[0].said == ("broken on purpose",) * 3
    assert solution.backend == ("Clarabel",) * 3
    for seed in range(3):
        assert_close(solution.variables[0][seed], case.expected(case.draw(seed))[0])


def test_auto_sends_on_only_the_elements_that_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    case = case_named("smallest_eigenvalue_of_order_3")
    monkeypatch.setattr(Moreau, "solve", _fails_on(lambda batch: [1, 4]))
    solution = DeclarativeLayer(*case.build()).solve(*tensors(list(case.draw_batch(6))))
    assert solution.cone.attempts[0].elements == tuple(range(6))
    assert solution.cone.attempts[1].elements == (1, 4)
    assert solution.backend == tuple(
        "Clarabel" if element in (1, 4) else "Moreau" for element in range(6)
    )
    for seed in range(6):
        assert_close(solution.variables[0][seed], case.expected(case.draw(seed))[0])


def test_auto_takes_a_certificate_for_an_answer() -> None:
    built, values, _ = _mixed()
    attempts = DeclarativeLayer(*built, on_failure="nan").solve(*values).cone.attempts
    certified = set()
    for attempt in attempts:
        assert not certified & set(attempt.elements)
        outcomes = zip(attempt.elements, attempt.status, strict=True)
        certified |= {e for e, s in outcomes if s in (Status.INFEASIBLE, Status.UNBOUNDED)}
    assert certified == {1, 3}


def test_auto_takes_options_that_all_solvers_share_and_no_others() -> None:
    built = case_named("simplex_projection").build()
    DeclarativeLayer(*built, solver_args={"tol": 1e-7})
    with pytest.raises(BackendError, match=r"eps.*Name a solver"):
        DeclarativeLayer(*built, solver_args={"eps_abs": 1e-7})
