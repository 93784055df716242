"""Problems that are not convex, in CVXPY syntax, as layers."""

from __future__ import annotations

import copy
import pickle

import cvxpy as cp
import numpy as np
import pytest
import torch
from nonconvex_collection import NonconvexProblem, all_problems, reference_gradient, weights
from nonconvex_collection.conditions import conditions
from nonconvex_collection.problem import assign
from nonconvex_collection.reference import SmoothForm, curvatures

import declarative_cvx as dcx
from declarative_cvx.specification import Verdict

VALUE, GRADIENT = 1e-7, 1e-6
# Reference gradients that take seconds each.
SLOW = {"perspective_n_point", "bundle_adjustment", "hs107", "hs57"}
# Values of other local minima that the stated starts lead to: Haverly's own, and one with another
# way to swing, where IPOPT stays, too.
OTHER_MINIMUM = {"pooling_of_streams": -100.0, "pendulum_swing_up": 111.7180086310}
# Problems with several solutions of the same value, of which another one is found.
OTHER_SOLUTION = {"car_parking", "hs56", "hs81", "smallest_circle_around_three"}


def solved(case: NonconvexProblem, near: float = 0.0) -> tuple[dcx.Solution, list[torch.Tensor]]:
    """From the start, or some part of the way to the stated solution."""
    problem, parameters, variables = case.build()
    for variable, stated in zip(variables, case.solution, strict=True):
        variable.value = (1 - near) * variable.value + near * np.reshape(stated, variable.shape)
    layer = dcx.DeclarativeLayer(
        problem, parameters, variables, on_failure="nan", on_irregular="ignore"
    )
    values = [
        torch.tensor(np.asarray(value), dtype=torch.float64, requires_grad=True)
        for value in case.values()
    ]
    return layer.solve(*values), values


CASES = [pytest.param(case, id=case.name) for case in all_problems()]


@pytest.mark.parametrize("case", CASES)
def test_minimum_and_gradient(case: NonconvexProblem) -> None:
    """The stated optimum, and central differences of an independent tight re-solve."""
    solution, values = solved(case, near=0.9 if case.name in OTHER_MINIMUM else 0.0)
    assert bool(solution.solved.all())
    assert float(solution.residuals.worst) <= 1e-7
    scale = max(1.0, abs(case.optimum))
    assert float(solution.value) == pytest.approx(case.optimum, abs=VALUE * scale)
    if not case.regular:
        assert solution.derivative.regular.tolist() == [False]
        return
    if case.name in SLOW | OTHER_SOLUTION:
        check_by_differences(case, solution, values)
        return
    terms = zip(weights(case), solution.variables, strict=True)
    sum((torch.tensor(np.asarray(w)) * out).sum() for w, out in terms).backward()
    expected = reference_gradient(case)
    size = max(float(np.abs(v).max()) for v in expected) or 1.0
    for value, exact in zip(values, expected, strict=True):
        np.testing.assert_allclose(value.grad.numpy(), exact, rtol=0, atol=GRADIENT * size)


@pytest.mark.parametrize("name", OTHER_MINIMUM)
def test_another_minimum_and_its_gradient(name: str) -> None:
    """By conditions of first and second order that know nothing of the library."""
    case = next(case for case in all_problems() if case.name == name)
    solution, values = solved(case)
    assert float(solution.value) == pytest.approx(OTHER_MINIMUM[name], rel=1e-9)
    point = [value.detach().numpy() for value in solution.variables]
    found = conditions(case, point)
    assert found.violation <= 1e-9
    assert found.stationarity <= 1e-7
    problem, _, variables = case.solved()
    assign(variables, point)
    assert bool((curvatures(SmoothForm(problem)) > 1e-6).all())
    check_by_differences(case, solution, values)


def check_by_differences(
    case: NonconvexProblem, solution: dcx.Solution, values: list[torch.Tensor]
) -> None:
    """Against central differences along one direction, re-solved from the solution found."""
    problem, parameters, variables = case.build()
    for variable, value in zip(variables, solution.variables, strict=True):
        variable.value = value.detach().numpy()
    layer = dcx.DeclarativeLayer(problem, parameters, variables, on_irregular="ignore")
    generator = torch.Generator().manual_seed(0)
    along = [torch.randn(v.shape, generator=generator, dtype=v.dtype) for v in values]
    scales = [torch.tensor(np.asarray(w)) for w in weights(case)]

    def loss(outputs: tuple[torch.Tensor, ...]) -> torch.Tensor:
        return torch.stack([(w * v).sum() for w, v in zip(scales, outputs, strict=True)]).sum()

    def moved(step: float) -> float:
        shifted = [v.detach() + step * d for v, d in zip(values, along, strict=True)]
        return float(loss(layer(*shifted)))

    size = 1e-4 * min(1.0, *(float(v.detach().abs().amax()) or 1.0 for v in values))
    near, far = moved(size) - moved(-size), moved(2 * size) - moved(-2 * size)
    expected = (8 * near - far) / (12 * size)
    grads = torch.autograd.grad(loss(solution.variables), values, allow_unused=True)
    found = sum(float((g * d).sum()) for g, d in zip(grads, along, strict=True) if g is not None)
    assert found == pytest.approx(expected, rel=GRADIENT, abs=GRADIENT)


def rosenbrock() -> tuple[cp.Problem, list[cp.Parameter], list[cp.Variable]]:
    x, a, r = cp.Variable(2, name="x"), cp.Parameter(name="a"), cp.Parameter(pos=True, name="r")
    x.value = np.array([1.0, 1.2])
    objective = 100 * cp.square(x[1] - cp.square(x[0])) + cp.square(a - x[0])
    return cp.Problem(cp.Minimize(objective), [cp.sum_squares(x) == r]), [a, r], [x]


def test_multiplier_value_and_every_parameter() -> None:
    problem, parameters, variables = rosenbrock()
    multiplier = problem.constraints[0].dual_variables[0]
    layer = dcx.DeclarativeLayer(problem, parameters, [*variables, multiplier], optimal_value=True)
    inputs = [
        torch.tensor([1.3, 1.5, 0.7], dtype=torch.float64, requires_grad=True),
        torch.tensor(2.0, dtype=torch.float64, requires_grad=True),
    ]
    assert torch.autograd.gradcheck(layer, inputs)
    assert torch.autograd.gradgradcheck(layer, inputs)
    x, y, value = layer(*inputs)
    # The multiplier is the slope of the optimal value in the right-hand side, up to CVXPY's sign.
    (slope,) = torch.autograd.grad(value.sum(), inputs[1])
    assert float(slope) == pytest.approx(-float(y.sum()), rel=1e-8)
    assert x.shape == (3, 2)


def test_elements_do_not_touch_each_other() -> None:
    """An infeasible and an unbounded element among solvable ones."""
    x, p, q = cp.Variable(name="x"), cp.Parameter(), cp.Parameter()
    problem = cp.Problem(cp.Minimize(cp.square(x - p) * cp.square(x + 2)), [cp.square(x) <= q])
    layer = dcx.DeclarativeLayer(problem, [p, q], [x], on_failure="nan")
    p_value = torch.tensor([0.5, 0.5, 0.25], dtype=torch.float64, requires_grad=True)
    q_value = torch.tensor([1.0, -1.0, 1.0], dtype=torch.float64)
    solution = layer.solve(p_value, q_value)
    assert [status.name for status in solution.status] == ["OPTIMAL", "INFEASIBLE", "OPTIMAL"]
    (found,) = solution.variables
    assert torch.isnan(found).tolist() == [False, True, False]
    alone = layer(p_value[2:].detach(), q_value[2:])[0]
    assert float(found[2]) == pytest.approx(float(alone), abs=1e-12)
    found[[0, 2]].sum().backward()
    assert p_value.grad.tolist() == pytest.approx([1.0, 0.0, 1.0], abs=1e-9)
    strict = dcx.DeclarativeLayer(problem, [p, q], [x])
    with pytest.raises(dcx.SolveError, match="element 1: INFEASIBLE"):
        strict(p_value, q_value)


def test_a_constraint_of_parameters_only_is_checked() -> None:
    x, p = cp.Variable(), cp.Parameter()
    problem = cp.Problem(cp.Minimize(cp.sin(x) if hasattr(cp, "sin") else cp.nlp.sin(x)),
                         [p >= 0, x >= -2, x <= 2])  # fmt: skip
    layer = dcx.DeclarativeLayer(problem, [p], [x], on_failure="nan")
    p_value = torch.tensor([1.0, -1.0], dtype=torch.float64, requires_grad=True)
    solution = layer.solve(p_value)
    assert [s.name for s in solution.status] == ["OPTIMAL", "INFEASIBLE"]
    assert torch.isnan(solution.variables[0]).tolist() == [False, True]
    assert torch.isnan(solution.value).tolist() == [False, True]


def test_bounds_that_are_parameters() -> None:
    """One that is active moves the solution; bounds that cross leave no point."""
    low, high = cp.Parameter(), cp.Parameter()
    y = cp.Variable(bounds=[low, high])
    problem = cp.Problem(cp.Minimize(cp.square(y) * cp.square(y - 1) + y))
    layer = dcx.DeclarativeLayer(problem, [low, high], [y], on_failure="nan")
    lows = torch.tensor([0.5, 2.0], dtype=torch.float64, requires_grad=True)
    solution = layer.solve(lows, torch.tensor([1.5, 1.0], dtype=torch.float64))
    assert [s.name for s in solution.status] == ["OPTIMAL", "INFEASIBLE"]
    assert float(solution.variables[0][0]) == 0.5
    solution.variables[0][0].backward()
    assert lows.grad.tolist() == [1.0, 0.0]


def test_options_that_would_do_nothing_are_refused() -> None:
    with pytest.raises(dcx.BackendError, match="derivative"):
        dcx.DeclarativeLayer(*rosenbrock(), derivative="diffcp")
    with pytest.raises(dcx.SpecificationError, match="restarts"):
        dcx.DeclarativeLayer(*rosenbrock(), restarts=-1)
    with pytest.raises(dcx.BackendError, match=r"max_iter'.*max_iters"):
        dcx.DeclarativeLayer(*rosenbrock(), solver_args={"max_iter": 3})


def test_convex_problems_that_are_not_dpp_are_solved_too() -> None:
    """Against the same problem with the product of the parameters as one parameter."""
    y, p, q, pq = cp.Variable(3), cp.Parameter(3), cp.Parameter(nonneg=True), cp.Parameter(3)
    problem = cp.Problem(
        cp.Minimize(cp.sum_squares(cp.multiply(q * p, y) - 1) + cp.norm1(y)), [y >= 0]
    )
    layer = dcx.DeclarativeLayer(problem, [p, q], [y])
    assert layer.spec.verdict is Verdict.CONVEX
    direct = dcx.DeclarativeLayer(
        cp.Problem(cp.Minimize(cp.sum_squares(cp.multiply(pq, y) - 1) + cp.norm1(y)), [y >= 0]),
        [pq],
        [y],
    )
    generator = torch.Generator().manual_seed(0)
    p_value = (torch.rand(4, 3, generator=generator, dtype=torch.float64) + 0.8).requires_grad_()
    q_value = torch.tensor(1.3, dtype=torch.float64, requires_grad=True)
    grads = []
    for found in (layer(p_value, q_value)[0], direct(p_value * q_value)[0]):
        grads.append(torch.autograd.grad((found**2).sum(), [p_value, q_value]))
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-10)
    with pytest.raises(dcx.SpecificationError, match="not disciplined parametrized"):
        dcx.DeclarativeLayer(problem, [p, q], [y], nonconvex=False)


def test_restarts_find_the_better_minimum_and_are_repeatable() -> None:
    x, tilt = cp.Variable(bounds=[-3, 3]), cp.Parameter()
    x.value, x.sample_bounds = 2.0, [-3, 3]
    objective = cp.square(cp.square(x) - 4) + tilt * x  # minima near -2 and 2
    build = (cp.Problem(cp.Minimize(objective)), [tilt], [x])
    tilts = torch.tensor([1.0, -1.0], dtype=torch.float64)
    single = dcx.DeclarativeLayer(*build)(tilts)[0]
    assert bool((single > 1.5).all())
    layer = dcx.DeclarativeLayer(*build, restarts=8)
    best = layer(tilts)[0]
    assert (best > 0).tolist() == [False, True]
    assert torch.equal(best, layer(tilts)[0])


def test_a_warm_start_keeps_the_branch() -> None:
    x, tilt = cp.Variable(bounds=[-3, 3]), cp.Parameter()
    objective = cp.square(cp.square(x) - 4) + tilt * x
    layer = dcx.DeclarativeLayer(cp.Problem(cp.Minimize(objective)), [tilt], [x], warm_start=True)
    x.value = -2.0
    first = layer(torch.tensor([0.01], dtype=torch.float64))[0]
    assert float(first) < -1.5
    x.value = 2.0
    second = layer(torch.tensor([-0.01], dtype=torch.float64))[0]
    assert float(second) < -1.5


@pytest.mark.parametrize("name", ["InteriorPoint", "TrustRegion", "LBFGS"])
def test_minimisers_by_name_and_by_option(name: str) -> None:
    x, p = cp.Variable(3), cp.Parameter(3)
    x.value = np.ones(3)
    problem = cp.Problem(cp.Minimize(cp.sum(cp.power(x - p, 4) + cp.multiply(x, cp.square(x)) / 9)))
    p_value = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    layer = dcx.DeclarativeLayer(problem, [p], [x], solver=name, on_failure="nan")
    solution = layer.solve(p_value)
    assert set(solution.backend) == {name}
    with pytest.raises(dcx.BackendError, match="max_iters"):
        dcx.DeclarativeLayer(problem, [p], [x], solver=name, solver_args={"max_iter": 3})


def test_unknown_solvers_are_answered_with_the_nearest() -> None:
    with pytest.raises(dcx.BackendError, match="InteriorPoint"):
        dcx.DeclarativeLayer(*rosenbrock(), solver="InteriorPiont")


def test_integers_are_refused() -> None:
    x, p = cp.Variable(integer=True), cp.Parameter()
    with pytest.raises(dcx.SpecificationError, match="mixed-integer"):
        dcx.DeclarativeLayer(cp.Problem(cp.Minimize(cp.square(x - p) * x)), [p], [x])


def test_types_and_copies() -> None:
    problem, parameters, variables = rosenbrock()
    layer = dcx.DeclarativeLayer(problem, parameters, variables)
    (single,) = layer(torch.tensor(1.0), torch.tensor(2.0))
    assert single.shape == (2,)
    assert single.dtype == torch.float32
    (twin,) = copy.deepcopy(layer)(torch.tensor(1.0), torch.tensor(2.0))
    torch.testing.assert_close(twin, single)
    (restored,) = pickle.loads(pickle.dumps(layer))(torch.tensor(1.0), torch.tensor(2.0))
    torch.testing.assert_close(restored, single)


def test_a_number_of_a_nonconvex_problem_is_trained() -> None:
    """The circle that a point has to stay out of is learned from where the point ends."""
    x, target, radius = cp.Variable(2), cp.Parameter(2), cp.Parameter(pos=True)
    x.value = np.array([2.0, 2.0])
    problem = cp.Problem(cp.Minimize(cp.sum_squares(x - target)), [cp.sum_squares(x) >= radius])
    layer = dcx.DeclarativeLayer(problem, [target, radius], [x])
    generator = torch.Generator().manual_seed(0)
    targets = torch.rand(8, 2, generator=generator, dtype=torch.float64) + 0.1
    (wanted,) = layer(targets, torch.tensor(4.0, dtype=torch.float64))
    log_radius = torch.zeros((), dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.Adam([log_radius], lr=0.1)
    for _ in range(60):
        optimizer.zero_grad()
        (found,) = layer(targets, log_radius.exp() + 2.0)
        (found - wanted.detach()).square().mean().backward()
        optimizer.step()
    assert float(log_radius.exp() + 2.0) == pytest.approx(4.0, abs=0.05)


def test_the_first_problem_of_cvxpys_tutorial_is_trained() -> None:
    """The largest eigenvalue as a nonlinear program, its matrix a parameter made by a network."""
    x, A = cp.Variable(3), cp.Parameter((3, 3), PSD=True)
    x.value = np.ones(3)
    problem = cp.Problem(cp.Maximize(cp.quad_form(x, A)), [cp.sum_squares(x) == 1])
    layer = dcx.DeclarativeLayer(problem, [A], [x])
    assert layer.spec.verdict is Verdict.SMOOTH
    torch.manual_seed(0)
    factors, inputs = torch.nn.Linear(4, 9).double(), torch.randn(6, 4, dtype=torch.float64)
    wanted = torch.nn.functional.normalize(inputs[:, :3].abs(), dim=1)

    def loss() -> torch.Tensor:
        B = factors(inputs).reshape(-1, 3, 3)
        matrices = B.mT @ B
        (found,) = layer(matrices)
        exact = torch.linalg.eigvalsh(matrices)[:, -1]
        torch.testing.assert_close(((matrices @ found[..., None])[..., 0] * found).sum(1), exact)
        return 1 - (found * wanted).sum(1).square().mean()

    optimizer, first = torch.optim.Adam(factors.parameters(), lr=0.05), float(loss().detach())
    for _ in range(60):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
    assert float(loss().detach()) < 0.3 * first


def test_many_gradients_at_once() -> None:
    """As one by one, also where an element has no feasible point."""
    problem, parameters, variables = rosenbrock()
    problem = cp.Problem(
        problem.objective, [*problem.constraints, variables[0] <= 1.2, variables[0] >= -1.2]
    )
    layer = dcx.DeclarativeLayer(problem, parameters, variables, on_failure="nan")
    a = torch.tensor([1.3, 1.5, 0.7], dtype=torch.float64, requires_grad=True)
    r = torch.tensor([1.8, 1.5, 0.5], dtype=torch.float64, requires_grad=True)
    (x,) = layer(a, r + torch.tensor([0.0, 0.0, 0.2], dtype=torch.float64))
    given = torch.eye(x.numel(), dtype=torch.float64).reshape(-1, *x.shape)
    together = torch.autograd.grad(x, (a, r), given, is_grads_batched=True, retain_graph=True)
    alone = [torch.autograd.grad(x, (a, r), one, retain_graph=True) for one in given]
    for found, expected in zip(together, zip(*alone, strict=True), strict=True):
        torch.testing.assert_close(found, torch.stack(expected))
    assert float(together[1].abs().max()) > 0.1

    lost = layer.solve(a, torch.tensor([1.5, 9.0, 1.0], dtype=torch.float64))
    assert lost.solved.tolist() == [True, False, True]
    (x,) = lost.variables
    (found,) = torch.autograd.grad(
        x[[0, 2]].flatten(), a, torch.eye(4, dtype=torch.float64), is_grads_batched=True
    )
    assert bool((found[:, 1] == 0).all())
    assert bool(torch.isfinite(found).all())
