"""Blocks of the lifted training problem are minimised exactly, and the objective never rises."""

import math

import cvxpy as cp
import pytest
import torch
from lifted_problems import ACTIVATIONS, PENALTIES, N, P, data, generator, setting, solved
from scipy.optimize import minimize

from declarative_cvx.errors import ParameterError, SpecificationError
from declarative_cvx.nonconvex.implicit.activations import (
    ReLU,
)
from declarative_cvx.nonconvex.implicit.training.blocks import minimise_block
from declarative_cvx.nonconvex.implicit.training.descent import (
    BlockCoordinateDescent,
    Continuation,
    Lifting,
)
from declarative_cvx.nonconvex.implicit.training.lifted import Variables
from declarative_cvx.nonconvex.implicit.training.penalty_terms import (
    L1,
    L1Ball,
    Ridge,
    RowBall,
    Zero,
)
from declarative_cvx.nonconvex.implicit.training.states import contraction_rate


def perturbed_is_higher(problem, at, change):
    """Whether the objective is lowest at 0 among random multiples of directions."""
    best = float(problem.value(at))
    for seed in range(20):
        for size in (1e-4, 1e-2, 1.0):
            tried = float(problem.value(change(at, size, generator(seed))))
            if tried < best - 1e-9 * (1 + abs(best)):
                return False
    return True


# ------------------------------------------------------------------------------------- states


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=lambda a: a.name)
@pytest.mark.parametrize("loss", ["squared", "cross_entropy"])
def test_p_step_satisfies_its_optimality_conditions(activation, loss):
    problem, at = setting(activation, loss)
    new, residual = solved("P", problem, at)
    assert residual < 1e-8
    p, w = new.p.clone().requires_grad_(), at.weights
    fit = problem.loss.value(problem.y, w.outputs_of(p, problem.u)).sum()
    smooth = fit + problem.mu / 2 * (p - at.x).square().sum()
    (slope,) = torch.autograd.grad(smooth, p)
    z = at.x @ w.A.T + w.offsets(problem.u)
    # slope + lambda (v - z) = 0 for a v with phi(v) = p: the inclusion, for ReLU at p = 0 as well.
    v = z - slope / problem.weight
    torch.testing.assert_close(activation(v), new.p, rtol=0, atol=1e-8)


def test_p_step_of_relu_keeps_p_nonnegative_and_is_what_a_quadratic_program_finds():
    problem, at = setting("relu")
    new, _ = solved("P", problem, at)
    w = at.weights
    z = (at.x @ w.A.T + w.offsets(problem.u)).numpy()
    p = cp.Variable(at.p.shape, nonneg=True)
    lam = problem.weight.numpy()
    fit = cp.sum_squares(
        p @ w.C.numpy().T + w.output_offsets(problem.u).numpy() - problem.y.numpy()
    )
    divergence = cp.sum(cp.multiply(lam, cp.sum(cp.square(p) / 2 - cp.multiply(p, z), axis=0)))
    near = problem.mu / 2 * cp.sum_squares(p - at.x.numpy())
    cp.Problem(cp.Minimize(fit / 2 + divergence + near)).solve(cp.CLARABEL)
    assert (new.p == 0).any()
    torch.testing.assert_close(new.p, torch.as_tensor(p.value), rtol=0, atol=1e-5)


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=lambda a: a.name)
def test_x_step_zeroes_its_gradient(activation):
    problem, at = setting(activation)
    new, residual = solved("X", problem, at)
    assert residual < 1e-8
    x, A = new.x, at.weights.A
    z = x @ A.T + at.weights.offsets(problem.u)
    gradient = (problem.weight * (activation(z) - at.p)) @ A + problem.mu * (x - at.p)
    assert gradient.abs().max() < 1e-7


def test_fixed_point_update_finds_the_minimum_of_x():
    problem, at = setting("relu", mu=3.0)
    assert contraction_rate(at.weights.A, ReLU(), problem.weight, problem.mu) < 1
    exact, _ = solved("X", problem, at)
    picard, residual = solved("X", problem, at, state_update="fixed_point", tol=1e-10)
    assert residual < 1e-9
    torch.testing.assert_close(picard.x, exact.x, rtol=0, atol=1e-7)


def test_fixed_point_update_is_refused_where_it_need_not_contract():
    problem, at = setting("relu", mu=0.01)
    with pytest.raises(SpecificationError, match="mu > lambda"):
        solved("X", problem, at, state_update="fixed_point")


def test_without_mu_the_state_step_ends_at_a_stationary_point():
    problem, at = setting("tanh", penalty=(RowBall(0.2), Ridge(0.1)), mu=None)
    new, residual = solved("X", problem, at)
    assert residual < 1e-8
    assert float(problem.value(new)) < float(problem.value(at))
    assert new.x is new.p
    state = new.p.clone().requires_grad_()
    value = problem.value(Variables(new.weights, state, state))
    (gradient,) = torch.autograd.grad(value, state)
    assert gradient.abs().max() < 1e-6


# ---------------------------------------------------------------------------------- parameters


def test_cd_step_with_ridge_is_ridge_regression():
    problem, at = setting(penalty=(Ridge(0.3, "CD"),))
    new, _ = solved("CD", problem, at)
    K = at.weights.regressors(at.p, problem.u)
    penalty = torch.diag(torch.tensor([0.3] * (N + P) + [0.0], dtype=torch.float64))
    expected = torch.linalg.solve(K.T @ K + penalty, K.T @ problem.y).T
    torch.testing.assert_close(new.weights.bottom, expected, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=lambda a: a.name)
def test_ab_step_with_ridge_is_what_a_general_minimiser_finds(activation):
    problem, at = setting(activation)
    new, residual = solved("AB", problem, at)
    assert residual < 1e-8

    def objective(flat):
        top = torch.as_tensor(flat).view(N, -1).requires_grad_()
        value = problem.value(at.with_weights(at.weights.with_top(top)))
        return value.item(), torch.autograd.grad(value, top)[0].flatten().numpy()

    found = minimize(
        objective, at.weights.top.flatten().numpy(), jac=True, method="BFGS",
        options={"gtol": 1e-9, "maxiter": 2000},
    )  # fmt: skip
    value = float(problem.value(new))
    assert value == pytest.approx(found.fun, rel=1e-8)
    assert value <= found.fun + 1e-9


@pytest.mark.parametrize("name", PENALTIES)
@pytest.mark.parametrize("loss", ["squared", "cross_entropy"])
def test_parameter_steps_are_minima_and_satisfy_the_constraints(name, loss):
    problem, at = setting("tanh", loss, PENALTIES[name])
    blocks = ["ABCD"] if problem.penalties.couples else ["AB", "CD"]
    for block in blocks:
        at, residual = solved(block, problem, at)
        assert residual < 1e-7, block
    assert math.isfinite(float(problem.value(at)))
    penalties = problem.penalties

    def change(v, size, random):
        matrix = v.weights.matrix
        step = size * torch.randn(matrix.shape, generator=random, dtype=matrix.dtype)
        tried = v.weights.with_matrix(matrix + step)
        tiny = matrix.new_full((len(matrix), 1), 1e-300)
        return v.with_weights(penalties.prox(tried, tiny))

    assert perturbed_is_higher(problem, at, change)


def test_ab_step_in_row_balls_is_what_cvxpy_finds():
    penalty = (RowBall(0.3), L1(0.5, "B"))
    problem, at = setting("relu", penalty=penalty, bias=False)
    new, residual = solved("AB", problem, at)
    assert residual < 1e-8
    A, B = cp.Variable((N, N)), cp.Variable((N, P))
    Z = at.x.numpy() @ A.T + problem.u.numpy() @ B.T
    row = cp.sum(cp.square(cp.pos(Z)) / 2 - cp.multiply(at.p.numpy(), Z), axis=0)
    objective = cp.sum(cp.multiply(problem.weight.numpy(), row)) + 0.5 * cp.sum(cp.abs(B))
    program = cp.Problem(cp.Minimize(objective), [cp.sum(cp.abs(A), axis=1) <= 0.3])
    program.solve(cp.CLARABEL)
    torch.testing.assert_close(new.weights.A, torch.as_tensor(A.value), rtol=0, atol=2e-4)
    torch.testing.assert_close(new.weights.B, torch.as_tensor(B.value), rtol=0, atol=2e-4)
    assert float(new.weights.A.abs().sum(1).max()) <= 0.3 + 1e-12


def test_conditional_gradients_come_near_the_exact_minimum():
    penalty = (RowBall(0.5), L1Ball(1.0, "B"), L1Ball(1.0, "C"), Zero("D"))
    problem, at = setting("relu", penalty=penalty, bias=False)
    for block in ("AB", "CD"):
        exact, _ = solved(block, problem, at)
        near, gap = solved(block, problem, at, weight_update="conditional_gradient")
        difference = float(problem.value(near) - problem.value(exact))
        smooth = abs(float(problem.value(exact))) + 100
        assert -1e-9 <= difference <= max(gap, 1e-6) * smooth
        assert difference < 1e-2 * float(problem.value(at) - problem.value(exact))


def test_conditional_gradients_are_refused_on_unbounded_sets():
    problem, at = setting("relu", penalty=(RowBall(0.5),))
    with pytest.raises(SpecificationError, match="bounded"):
        solved("AB", problem, at, weight_update="conditional_gradient")


@pytest.mark.parametrize("name", ["(5)", "group", "ridge"])
def test_gradient_steps_go_down_towards_the_minimum(name):
    problem, at = setting("relu", penalty=PENALTIES[name])
    exact, _ = solved("AB", problem, at)
    few, _ = solved("AB", problem, at, weight_update="gradient", gradient_steps=3)
    many, _ = solved("AB", problem, at, weight_update="gradient", gradient_steps=300)
    values = [float(problem.value(v)) for v in (at, few, many, exact)]
    assert values[0] > values[1] > values[2] >= values[3] - 1e-9
    assert values[2] - values[3] < 0.05 * (values[0] - values[3])


# -------------------------------------------------------------------------------------- descent


@pytest.mark.parametrize("name", PENALTIES)
@pytest.mark.parametrize("activation", ["relu", "tanh"])
@pytest.mark.parametrize("mu", [0.5, None])
def test_objective_never_rises(name, activation, mu):
    lifting = Lifting(activation, "squared", PENALTIES[name], 0.7, mu)
    found = BlockCoordinateDescent(sweeps=4, tol=0.0).fit(
        lifting, *data(), N, generator=generator()
    )
    history = found.history
    assert not history.rises
    for block in history.blocks:
        assert block.after <= block.before + 1e-9 * (1 + abs(block.before)), block
    assert history.objectives[-1] < 0.9 * history.objectives[0]
    assert sum(history.sweeps[-1].parts.values()) == pytest.approx(history.objectives[-1])


def test_a_rise_is_reported(monkeypatch):
    from declarative_cvx.nonconvex.implicit.training import descent
    from declarative_cvx.nonconvex.implicit.training.history import DescentWarning

    def worse(name, problem, at, method):
        new, found = minimise_block(name, problem, at, method)
        return (Variables(new.weights, new.x + 1, new.p), found) if name == "X" else (new, found)

    monkeypatch.setattr(descent, "minimise_block", worse)
    with pytest.warns(DescentWarning, match="Block X raised"):
        found = BlockCoordinateDescent(sweeps=1).fit(Lifting(), *data(), N, generator=generator())
    assert [block.name for block in found.history.rises] == ["X"]


def test_result_does_not_depend_on_the_dtype_of_the_data_and_leaves_it_alone():
    u, y = data()
    u32, y32 = u.float(), y.float()
    copies = u32.clone(), y32.clone()
    fit = BlockCoordinateDescent(sweeps=2).fit
    single = fit(Lifting(), u32, y32, N, generator=generator())
    double = fit(Lifting(), u32.double(), y32.double(), N, generator=generator())
    assert single.weights.A.dtype == torch.float64
    torch.testing.assert_close(single.weights.A, double.weights.A)
    assert torch.equal(u32, copies[0])
    assert torch.equal(y32, copies[1])


def test_continuation_grows_lambda_and_mu_up_to_their_limits():
    continuation = Continuation(lam_factor=3.0, lam_limit=5.0, mu_factor=2.0, mu_limit=4.0)
    descent = BlockCoordinateDescent(sweeps=5, tol=0.0, continuation=continuation)
    lam = torch.tensor([1.0, 0.5, 0.5, 0.5])
    found = descent.fit(Lifting(lam=lam, mu=0.5), *data(), N, generator=generator())
    torch.testing.assert_close(found.problem.weight, 5 * lam.double())
    assert found.problem.mu == 4.0
    assert not found.history.rises


def test_a_larger_lambda_ties_the_state_to_its_definition():
    def distance(lam):
        lifting = Lifting("tanh", lam=lam, mu=lam)
        found = BlockCoordinateDescent(sweeps=10).fit(lifting, *data(), N, generator=generator())
        at, problem = found.variables, found.problem
        z = at.x @ at.weights.A.T + at.weights.offsets(problem.u)
        return float((at.p - torch.tanh(z)).abs().max())

    assert distance(1e4) < 0.05 * distance(1.0)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda u, y: (u.index_fill(0, torch.tensor([3]), math.nan), y), r"u\[\(3, 0\)\] is nan"),
        (lambda u, y: (u, y[:-1]), "30 data points and y has 29"),
        (lambda u, y: (u[:, 0], y), "u must be a floating tensor"),
        (lambda u, y: (u, y.long()), "y must be a floating tensor"),
        (lambda u, y: (u[:0], y[:0]), "at least one"),
    ],
)
def test_bad_data_is_refused(change, match):
    with pytest.raises(ParameterError, match=match):
        BlockCoordinateDescent().fit(Lifting(), *change(*data()), N)


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"lam": 0.0}, "lam"),
        ({"lam": -1.0}, "lam"),
        ({"mu": 0.0}, "mu"),
        ({"mu": math.nan}, "mu"),
        ({"loss": "square"}, "Did you mean 'squared'"),
        ({"activation": "softmax"}, "potential"),
        ({"penalty": ("ridge",)}, "penalty"),
    ],
)
def test_bad_problems_are_refused(arguments, match):
    with pytest.raises(SpecificationError, match=match):
        Lifting(**arguments)


def test_targets_that_are_no_probabilities_are_refused():
    with pytest.raises(ParameterError, match=r"y\[0\]"):
        BlockCoordinateDescent().fit(Lifting(loss="cross_entropy"), *data(), N)
