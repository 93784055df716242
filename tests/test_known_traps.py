"""Faults of solvers, of CVXPY's interfaces and of other layers, one test for each."""

from __future__ import annotations

from typing import Any

import cvxpy as cp
import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose
from problems import (
    case_named,
    positive_part,
    smallest_eigenvector_product,
    solve_qp_by_enumeration,
)

from declarative_cvx import DIFFCP, BackendError, DeclarativeLayer, Moreau, Solution, Status
from declarative_cvx.backends import installed

SOLVERS = sorted(installed())


def double(value: Any, **options: Any) -> torch.Tensor:
    return torch.tensor(np.asarray(value, dtype=float), **options)


# Constraints directly on a variable, which some interfaces keep apart from A and then forget


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("written", ["constraint", "attribute"])
def test_sign_of_a_variable_is_kept(solver: str, written: str) -> None:
    x, v = cp.Variable(4, nonneg=written == "attribute"), cp.Parameter(4)
    constraints = [x >= 0] if written == "constraint" else []
    problem = cp.Problem(cp.Minimize(cp.sum_squares(x - v)), constraints)
    (out,) = DeclarativeLayer(problem, [v], [x], solver=solver)(double([1.0, -2.0, 0.5, -0.1]))
    assert_allclose(out.numpy(), [1.0, 0.0, 0.5, 0.0], atol=1e-6)


@pytest.mark.parametrize("solver", SOLVERS)
def test_cone_of_a_variable_is_kept(solver: str) -> None:
    if solver in ("OSQP", "DualActiveSet"):
        pytest.skip("no second-order cone")
    x, v = cp.Variable(3), cp.Parameter(3)
    problem = cp.Problem(cp.Minimize(cp.sum_squares(x - v)), [cp.SOC(x[0], x[1:])])
    (out,) = DeclarativeLayer(problem, [v], [x], solver=solver)(double([0.0, 3.0, 4.0]))
    assert_allclose(out.numpy(), [2.5, 1.5, 2.0], atol=2.5e-6)


# Moreau's active-set method can end in failure with x = 0


def _random_degenerate_qp(seed: int) -> tuple[np.ndarray, ...]:
    """P of rank 2, with q in general position; the orthant and a budget bound it."""
    rng = np.random.default_rng(seed)
    factor = rng.standard_normal((2, 4)) * 10.0 ** rng.uniform(-3, 1)
    return factor, rng.standard_normal(4), rng.uniform(0.5, 2.0, 4)


@pytest.mark.parametrize("options", [{}, {"method": "active_set"}, {"max_iters": 2}])
def test_moreau_never_passes_a_wrong_answer_as_optimal(options: dict[str, Any]) -> None:
    x, factor, q, high = cp.Variable(4), cp.Parameter((2, 4)), cp.Parameter(4), cp.Parameter(4)
    problem = cp.Problem(cp.Minimize(cp.sum_squares(factor @ x) / 2 + q @ x), [x >= -1, x <= high])
    layer = DeclarativeLayer(problem, [factor, q, high], [x], solver=Moreau(**options))
    columns = zip(*(_random_degenerate_qp(seed) for seed in range(30)), strict=True)
    data = [np.stack(column) for column in columns]
    solution = layer.solve(*map(double, data))
    optimal = [status is Status.OPTIMAL for status in solution.status]
    if "max_iters" not in options:
        assert sum(optimal) >= 25
    for i in np.nonzero(optimal)[0]:
        F, q_i, high_i = (values[i] for values in data)
        G, h = np.vstack([-np.eye(4), np.eye(4)]), np.concatenate([np.ones(4), high_i])
        expected, _ = solve_qp_by_enumeration(F.T @ F, q_i, G, h)
        assert_allclose(solution.variables[0][i].numpy(), expected, atol=2e-6)
    for i in np.nonzero(~np.array(optimal))[0]:
        assert torch.isnan(solution.variables[0][i]).all()


@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e4])
def test_moreau_does_not_return_zero_for_a_badly_scaled_qp(scale: float) -> None:
    x, weight, q = cp.Variable(3), cp.Parameter(3, nonneg=True), cp.Parameter(3)
    loss = cp.sum(cp.multiply(weight, cp.square(x))) / 2 + q @ x
    layer = DeclarativeLayer(
        cp.Problem(cp.Minimize(loss), [cp.sum(x) == 1, x >= 0]), [weight, q], [x], solver="Moreau"
    )
    weights, slopes = scale * np.array([1e-6, 1.0, 1e2]), scale * np.array([0.5, -0.5, 0.1])
    solution = layer.solve(double(weights), double(slopes))
    # Support {1, 2}: x_1 - 0.5 = 100 x_2 + 0.1 with x_1 + x_2 = 1. The first variable would cost
    # 0.5, more than their common marginal cost of 0.496.
    expected = np.array([0.0, 100.6, 0.4]) / 101
    assert solution.status == (Status.OPTIMAL,)
    assert_allclose(solution.variables[0].numpy(), expected, atol=1e-6)


# diffcp with Clarabel permutes the duals of semidefinite cones of order 4 and more


def _eigenvalue_problem(n: int) -> tuple[cp.Problem, cp.Parameter, cp.Variable, cp.Variable]:
    C, X = cp.Parameter((n, n), symmetric=True), cp.Variable((n, n), symmetric=True)
    psd = X >> 0
    problem = cp.Problem(cp.Minimize(cp.trace(C @ X)), [psd, cp.trace(X) == 1])
    return problem, C, X, psd.dual_variables[0]


def _symmetric(n: int, seed: int = 1) -> np.ndarray:
    matrix = np.random.default_rng(seed).standard_normal((n, n))
    return matrix + matrix.T


@pytest.mark.parametrize("n", [4, 5])
def test_diffcp_with_clarabel_is_refused_for_large_semidefinite_cones(n: int) -> None:
    problem, C, X, _ = _eigenvalue_problem(n)
    with pytest.raises(BackendError, match=r"order 4.*SCS"):
        DeclarativeLayer(problem, [C], [X], solver=DIFFCP(solve_method="Clarabel"))


@pytest.mark.parametrize(
    ("n", "method"), [(2, "Clarabel"), (3, "Clarabel"), (3, "SCS"), (4, "SCS"), (5, "SCS")]
)
def test_diffcp_has_the_right_duals_where_it_is_allowed(n: int, method: str) -> None:
    problem, C, X, dual = _eigenvalue_problem(n)
    layer = DeclarativeLayer(problem, [C], [X, dual], solver=DIFFCP(solve_method=method))
    matrix = _symmetric(n)
    x, y = layer(double(matrix))
    assert_allclose(x.numpy(), smallest_eigenvector_product(matrix), atol=1e-6)
    expected = matrix - np.linalg.eigvalsh(matrix)[0] * np.eye(n)
    assert_allclose(y.numpy(), expected, atol=1e-6 * np.abs(expected).max())


def test_entries_of_a_large_semidefinite_cone_keep_their_places_in_every_solver() -> None:
    matrix = _symmetric(5, seed=2)
    C, X = cp.Parameter((5, 5), symmetric=True), cp.Variable((5, 5), symmetric=True)
    psd = X >> 0
    problem = cp.Problem(cp.Minimize(cp.sum_squares(X - C) / 2), [psd])
    for solver in ("Moreau", "Clarabel", "SCS", "diffcp"):
        layer = DeclarativeLayer(problem, [C], [X, psd.dual_variables[0]], solver=solver)
        x, y = layer(double(matrix))
        assert_allclose(x.numpy(), positive_part(matrix), atol=1e-5)
        assert_allclose(y.numpy(), positive_part(-matrix), atol=1e-5)


# diffcp takes upstream gradients near 1e-9 for zero


@pytest.mark.parametrize("derivative", ["implicit", "diffcp"])
@pytest.mark.parametrize("scale", [1e-12, 1e-9, 1e12])
@pytest.mark.parametrize(
    "name",
    ["inequality_qp_with_psd_parameter", "ball_projection", "smallest_eigenvalue_of_order_3"],
)
def test_gradient_is_linear_in_the_upstream_gradient(
    name: str, derivative: str, scale: float
) -> None:
    case = case_named(name)
    layer = DeclarativeLayer(*case.build(), derivative=derivative)
    grads = []
    for factor in (1.0, scale):
        inputs = [double(value, requires_grad=True) for value in case.values]
        outputs = layer(*inputs)
        weights = [
            torch.linspace(-1, 2, out.numel()).double().reshape(out.shape) for out in outputs
        ]
        torch.autograd.backward(outputs, [factor * weight for weight in weights])
        grads.append([tensor.grad for tensor in inputs])
    size = max(float(plain.abs().max()) for plain in grads[0])
    assert size > 0.1
    for plain, scaled in zip(*grads, strict=True):
        torch.testing.assert_close(scaled / scale, plain, rtol=0, atol=1e-8 * size)


@pytest.mark.parametrize("derivative", ["implicit", "diffcp"])
def test_small_and_large_upstream_gradients_in_one_batch_do_not_mix(derivative: str) -> None:
    case = case_named("ball_projection")
    layer = DeclarativeLayer(*case.build(), derivative=derivative)
    v, r = (double(value, requires_grad=True) for value in case.draw_batch(3))
    (x,) = layer(v, r)
    (even,) = torch.autograd.grad(x.sum(), v, retain_graph=True)
    scales = double([1e-12, 1.0, 1e9])[:, None]
    (uneven,) = torch.autograd.grad((scales * x).sum(), v)
    torch.testing.assert_close(uneven / scales, even, rtol=1e-8, atol=1e-8)


# diffcp's batch calls hide the status


@pytest.mark.parametrize("method", ["SCS", "Clarabel"])
def test_status_is_visible_through_diffcp(method: str) -> None:
    x, low, slope = cp.Variable(), cp.Parameter(), cp.Parameter()
    problem = cp.Problem(cp.Minimize(slope * x), [x >= low, cp.abs(x) <= 1])
    free = cp.Problem(cp.Minimize(slope * x), [x >= low])
    solver = DIFFCP(solve_method=method)
    lows, slopes = double([0.0, 2.0, -0.5]), double([1.0, 1.0, 1.0])
    layer = DeclarativeLayer(problem, [low, slope], [x], solver=solver, on_failure="nan")
    solution = layer.solve(lows, slopes)
    assert solution.status == (Status.OPTIMAL, Status.INFEASIBLE, Status.OPTIMAL)
    assert_allclose(solution.variables[0].numpy(), [0.0, np.nan, -0.5], atol=1e-6)
    layer = DeclarativeLayer(free, [low, slope], [x], solver=solver, on_failure="nan")
    solution = layer.solve(lows, double([1.0, -1.0, 2.0]))
    assert solution.status == (Status.OPTIMAL, Status.UNBOUNDED, Status.OPTIMAL)
    assert_allclose(solution.variables[0].numpy(), [0.0, np.nan, -0.5], atol=1e-6)


def test_diffcp_with_ecos_which_hides_certificates_certifies_nothing() -> None:
    x, low = cp.Variable(), cp.Parameter()
    problem = cp.Problem(cp.Minimize(x), [x >= low, x <= 1])
    solver = DIFFCP(solve_method="ECOS")
    layer = DeclarativeLayer(problem, [low], [x], solver=solver, on_failure="nan")
    solution = layer.solve(double([0.0, 2.0, -0.5]))
    assert solution.status == (Status.OPTIMAL, Status.NUMERICAL_ERROR, Status.OPTIMAL)
    assert "infeasible" in solution.cone.attempts[0].said[1].lower()


# First-order solvers at default tolerances have no correct digit in small units


def _portfolio_data() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(4)
    factor = rng.standard_normal((4, 4))
    return 1e-3 * rng.standard_normal(4), 1e-4 * (factor @ factor.T / 4 + 0.2 * np.eye(4))


def _portfolio_answer(returns: np.ndarray, covariance: np.ndarray) -> np.ndarray:
    """Min 1/2 x'(2S)x - r'x, x >= 0, sum x = 1 in units of one, by enumerating the supports."""
    n, unit = returns.size, np.abs(covariance).max()
    H, r = 40 * covariance / unit, returns / unit
    for mask in range(1, 2**n):
        on = [i for i in range(n) if mask >> i & 1]
        k = len(on)
        kkt = np.block([[H[np.ix_(on, on)], np.ones((k, 1))], [np.ones((1, k)), np.zeros((1, 1))]])
        found = np.linalg.solve(kkt, np.append(r[on], 1.0))
        x = np.zeros(n)
        x[on] = found[:k]
        reduced = H @ x - r + found[k]
        if (x >= 0).all() and (reduced >= -1e-12).all():
            return x
    raise AssertionError("no support satisfies the optimality conditions")


def _portfolio(solver: str) -> tuple[Solution, np.ndarray]:
    returns, covariance = _portfolio_data()
    x, r, S = cp.Variable(4), cp.Parameter(4), cp.Parameter((4, 4), PSD=True)
    problem = cp.Problem(cp.Maximize(r @ x - 20 * cp.quad_form(x, S)), [cp.sum(x) == 1, x >= 0])
    layer = DeclarativeLayer(problem, [r, S], [x], solver=solver)
    return layer.solve(double(returns), double(covariance)), _portfolio_answer(returns, covariance)


@pytest.mark.parametrize("solver", [*SOLVERS, "auto"])
def test_portfolio_in_small_units_is_solved_to_six_digits(solver: str) -> None:
    solution, expected = _portfolio(solver)
    assert solution.status == (Status.OPTIMAL,)
    assert np.count_nonzero(expected) >= 2  # not a vertex: the covariances matter
    assert_allclose(solution.variables[0].numpy(), expected, atol=1e-6 * expected.max())


@pytest.mark.parametrize("solver", [*SOLVERS, "auto"])
@pytest.mark.parametrize("unit", [1e-8, 1e8])
def test_unit_of_the_objective_does_not_matter(solver: str, unit: float) -> None:
    x, v, scale = cp.Variable(3), cp.Parameter(3), cp.Parameter(nonneg=True)
    weighted = cp.Problem(cp.Minimize(scale * cp.sum_squares(x) - v @ x), [cp.sum(x) == 1, x >= -1])
    layer = DeclarativeLayer(weighted, [v, scale], [x], solver=solver)
    values = unit * np.array([1.0, -4.0, 3.0])
    (out,) = layer(double(values), double(unit))
    # x = (v - nu) / 2 off the bound, where the second is; the budget then gives nu = 0.
    expected = np.array([0.5, -1.0, 1.5])
    assert_allclose(out.numpy(), expected, atol=1e-6)


@pytest.mark.parametrize("solver", ["auto", "Clarabel", "SCS"])
def test_zeros_that_come_as_rounding_do_not_set_the_units(solver: str) -> None:
    """Sparse data out of an earlier computation, whose zeros are 1e-27."""
    rng = np.random.default_rng(0)
    exact = np.where(rng.random((8, 6)) < 0.7, 0.0, rng.normal(size=(8, 6)))
    rough = exact + np.where(exact == 0, 1e-27 * rng.normal(size=exact.shape), 0.0)
    x, A, b = cp.Variable(6), cp.Parameter((8, 6)), cp.Parameter(8)
    objective = cp.Minimize(cp.norm1(A @ x - b) + 0.1 * cp.sum(x))
    layer = DeclarativeLayer(cp.Problem(objective, [x >= 0, x <= 1]), [A, b], [x], solver=solver)
    values = double([exact, rough]), double(np.arange(8.0))
    solution = layer.solve(*values)
    assert solution.status == (Status.OPTIMAL,) * 2
    assert_allclose(*solution.value.detach().numpy(), rtol=1e-12)
