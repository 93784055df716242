"""Variables that an equality sets are not solved for; answers, duals and reports are as before."""

import cvxpy as cp
import numpy as np
import pytest
import torch
from torch.func import jacfwd, jacrev, vmap

import declarative_cvx as dcx
from declarative_cvx.canonical import canonicalize


def normal(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def relu_problem(inputs, outputs):
    """ReLU as a projection; the matrix has a variable of its own, because W x is no DPP."""
    z, own = cp.Variable(outputs, name="z"), cp.Variable((outputs, inputs))
    W, b, x = cp.Parameter((outputs, inputs)), cp.Parameter(outputs), cp.Parameter(inputs)
    problem = cp.Problem(cp.Minimize(cp.sum_squares(z - own @ x - b)), [z >= 0, own == W])
    return problem, [W, b, x], [z]


def control_problem():
    """Two steps from a given state, which the objective couples with the next one."""
    states, force, start = cp.Variable((3, 2), name="X"), cp.Variable(2), cp.Parameter(2)
    S = np.array([[3.0, 1, 0.5, 0.2], [1, 2, 0.3, 0.1], [0.5, 0.3, 2, 0.4], [0.2, 0.1, 0.4, 1]])
    push = np.array([0.5, 1.0])
    A = np.array([[1.0, 0.3], [0.0, 1.0]])
    cost = cp.quad_form(cp.hstack([states[0], states[1]]), S) + cp.sum_squares(states[2])
    dynamics = [states[t + 1] == A @ states[t] + push * force[t] for t in range(2)]
    given = states[0] == start
    limits = [cp.abs(force) <= 0.6]
    return cp.Problem(
        cp.Minimize(cost + states[0] @ [1.0, 2.0]), [given, *dynamics, *limits]
    ), start


def fixed_of(problem, parameters):
    return canonicalize(problem, parameters).fixed


def test_matrix_of_parameters_is_not_solved_for():
    problem, parameters, _ = relu_problem(5, 4)
    fixed = fixed_of(problem, parameters)
    assert fixed.F.size == 20
    assert fixed.remaining.variables == problem.size_metrics.num_scalar_variables - 20 + 4


@pytest.mark.parametrize("shared", [False, True])
def test_relu_is_relu(shared):
    problem, parameters, variables = relu_problem(5, 4)
    layer = dcx.DeclarativeLayer(problem, parameters, variables)
    W, b, x = normal(*(() if shared else (6,)), 4, 5), normal(6, 4, seed=1), normal(6, 5, seed=2)
    leaves = [v.requires_grad_() for v in (W, b, x)]
    (z,) = layer(*leaves)
    expected = torch.relu((W @ x[:, :, None])[:, :, 0] + b)
    torch.testing.assert_close(z, expected, rtol=1e-12, atol=1e-12)
    weights = normal(6, 4, seed=3)
    for ours, theirs in zip(
        torch.autograd.grad((weights * z).sum(), leaves),
        torch.autograd.grad((weights * expected).sum(), leaves),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


def test_derivatives_of_second_order_and_through_transforms():
    problem, parameters, variables = relu_problem(3, 2)
    layer = dcx.DeclarativeLayer(problem, parameters, variables)
    W, b, x = normal(2, 3), normal(2, seed=1), normal(3, seed=2)
    leaves = [v.clone().requires_grad_() for v in (W, b, x)]
    assert torch.autograd.gradcheck(lambda *v: layer(*v)[0], leaves)
    assert torch.autograd.gradgradcheck(lambda *v: layer(*v)[0].square(), leaves)
    expected = jacrev(lambda x: torch.relu(W @ x + b))(x)
    torch.testing.assert_close(jacrev(lambda x: layer(W, b, x)[0])(x), expected)
    torch.testing.assert_close(jacfwd(lambda x: layer(W, b, x)[0])(x), expected)
    rows = normal(4, 3, seed=4)
    mapped = vmap(lambda x: layer(W, b, x)[0])(rows)
    torch.testing.assert_close(mapped, torch.relu(rows @ W.mT + b))


def test_values_duals_and_objective_are_those_of_cvxpy():
    problem, start = control_problem()
    layer = dcx.DeclarativeLayer(problem, [start], problem.variables())
    assert fixed_of(problem, [start]).F.size == 2
    at = torch.tensor([[1.0, -0.5], [0.2, 0.7]], dtype=torch.float64, requires_grad=True)
    solution = layer.solve(at)
    (slope,) = torch.autograd.grad(solution.value.sum(), at)
    for i in range(2):
        start.value = at[i].detach().numpy()
        problem.solve(solver=cp.CLARABEL, tol_gap_abs=1e-12, tol_gap_rel=1e-12, tol_feas=1e-12)
        assert solution.value[i].item() == pytest.approx(problem.value, abs=1e-8)
        for variable, found in zip(problem.variables(), solution.variables, strict=True):
            np.testing.assert_allclose(found[i].detach(), variable.value, atol=1e-6)
        for constraint in problem.constraints:
            (dual,) = constraint.dual_variables
            np.testing.assert_allclose(solution[dual][i].detach(), dual.value, atol=1e-5)
    (price,) = problem.constraints[0].dual_variables
    torch.testing.assert_close(slope, -solution[price])  # the envelope theorem
    torch.testing.assert_close(solution.variables[0][:, 0], at, rtol=0, atol=0)


def test_gradients_of_all_outputs_and_duals():
    problem, start = control_problem()
    duals = [constraint.dual_variables[0] for constraint in problem.constraints[:2]]
    layer = dcx.DeclarativeLayer(problem, [start], [*problem.variables(), *duals])
    at = torch.tensor([[1.0, -0.5], [0.2, 0.7]], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda v: torch.cat([o.flatten() for o in layer(v)]), at)
    assert layer.solve(at).derivative.regular.all()


def test_points_satisfy_the_conditions_of_the_whole_program():
    problem, start = control_problem()
    layer = dcx.DeclarativeLayer(problem, [start], problem.variables())
    at = normal(3, 2)
    cone = layer.solve(at).cone
    program, _ = canonicalize(problem, [start]).apply([at], [True], 3, at.device)
    slope = program.P_times(cone.x) + program.q + program.At_times(cone.y)
    assert slope.abs().max() < 1e-12
    assert (program.A_times(cone.x) + cone.s - program.b).abs().max() < 1e-12


def test_a_row_of_fixed_variables_alone_still_decides():
    x, y, p = cp.Variable(name="x"), cp.Variable(name="y"), cp.Parameter(name="p")
    problem = cp.Problem(cp.Minimize(cp.square(y - x)), [x == p, x <= 1, y >= 0])
    assert fixed_of(problem, [p]) is None
    layer = dcx.DeclarativeLayer(problem, [p], [x, y], on_failure="nan")
    solution = layer.solve(torch.tensor([0.5, 2.0]))
    assert [status.name for status in solution.status] == ["OPTIMAL", "INFEASIBLE"]


def test_a_variable_set_twice():
    x, y, p, q = cp.Variable(), cp.Variable(), cp.Parameter(), cp.Parameter()
    problem = cp.Problem(cp.Minimize(cp.square(y - x)), [x == p, x == q, y >= 0])
    layer = dcx.DeclarativeLayer(problem, [p, q], [y], on_failure="nan")
    solution = layer.solve(torch.tensor([1.0, 1.0]), torch.tensor([1.0, 2.0]))
    assert [status.name for status in solution.status] == ["OPTIMAL", "INFEASIBLE"]
    assert solution.variables[0][0].item() == pytest.approx(1.0)


def test_certificates_are_those_of_the_whole_program():
    x, y, p = cp.Variable(2), cp.Variable(2), cp.Parameter(2)
    problem = cp.Problem(cp.Minimize(cp.sum(y)), [x == p, y <= 3, y[0] + x[0] >= 5, y[1] >= x[1]])
    layer = dcx.DeclarativeLayer(problem, [p], [y, x], on_failure="nan")
    at = torch.tensor([[2.5, 0.0], [1.0, 0.0], [4.0, 4.0]], dtype=torch.float64)
    solution = layer.solve(at)
    names = [status.name for status in solution.status]
    assert names == ["OPTIMAL", "INFEASIBLE", "INFEASIBLE"]
    program, _ = canonicalize(problem, [p]).apply([at], [True], 3, at.device)
    ray = solution.cone.y[1:]
    assert (program.select(torch.tensor([1, 2])).At_times(ray)).abs().max() < 1e-9
    assert ((program.b[1:] * ray).sum(1) < 0).all()
    assert all(torch.isnan(v[1:]).all() for v in solution.variables)


def test_directions_of_unboundedness_do_not_move_what_is_fixed():
    x, y, p = cp.Variable(2), cp.Variable(2), cp.Parameter(2)
    problem = cp.Problem(cp.Minimize(cp.sum(y) + cp.sum_squares(x)), [x == p, y[0] >= x[0]])
    solution = dcx.DeclarativeLayer(problem, [p], [y, x]).solve(normal(2, 2))
    assert all(status.name == "UNBOUNDED" for status in solution.status)
    program, _ = canonicalize(problem, [p]).apply([normal(2, 2)], [True], 2, torch.device("cpu"))
    ray = solution.cone.x
    assert ((program.q * ray).sum(1) < 0).all()
    assert program.P_times(ray).abs().max() < 1e-9
    equal = slice(0, program.structure.cone.zero)
    assert program.A_times(ray)[:, equal].abs().max() < 1e-9


def test_unsolved_elements_get_zero_gradient():
    x, y, p, r = cp.Variable(), cp.Variable(), cp.Parameter(), cp.Parameter()
    problem = cp.Problem(cp.Minimize(cp.square(y - 2 * x)), [x == p, y <= r, y >= 1])
    layer = dcx.DeclarativeLayer(problem, [p, r], [y, x], on_failure="nan")
    at = torch.tensor([1.0, 1.0], requires_grad=True)
    limit = torch.tensor([3.0, 0.0], requires_grad=True)
    y_star, x_star = layer(at, limit)
    (y_star.nansum() + x_star.nansum()).backward()
    torch.testing.assert_close(at.grad, torch.tensor([3.0, 0.0]))
    torch.testing.assert_close(limit.grad, torch.tensor([0.0, 0.0]))


@pytest.mark.parametrize("factor", [2.0, 0.0])
def test_a_kink_that_only_the_fixed_value_crosses_is_reported(factor):
    z, own = cp.Variable(), cp.Variable()
    p, a = cp.Parameter(), cp.Parameter()
    problem = cp.Problem(cp.Minimize(cp.square(z - own * a)), [z >= 0, own == p])
    layer = dcx.DeclarativeLayer(problem, [p, a], [z], on_irregular="ignore")
    at = torch.tensor([1.0, 0.0, -1.0], dtype=torch.float64)
    found = layer.solve(at, torch.tensor(factor, dtype=torch.float64)).derivative
    # z = max(0, p a): on a kink where p a = 0.
    assert found.regular.tolist() == [factor != 0, False, factor != 0]


def test_warm_starts():
    problem, start = control_problem()
    layer = dcx.DeclarativeLayer(
        problem, [start], problem.variables(), solver="SCS", warm_start=True
    )
    at = normal(2, 2)
    first, second = layer.solve(at), layer.solve(at)
    assert max(second.iterations) < max(first.iterations)
    torch.testing.assert_close(second.variables[0], first.variables[0])
