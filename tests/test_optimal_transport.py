"""Entropic optimal transport: marginals to rounding at any epsilon, derivatives of the optimum."""

from __future__ import annotations

import math

import cvxpy as cp
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment, linprog
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from declarative_cvx.errors import ParameterError, SpecificationError
from declarative_cvx.nonconvex.kernels.optimal_transport import OptimalTransport, optimal_transport
from declarative_cvx.status import Status

FLOAT = torch.float64


def masses(*shape: int, dtype: torch.dtype = FLOAT) -> Tensor:
    mass = torch.rand(*shape, dtype=dtype)
    return mass / mass.sum(-1, keepdim=True)


def unrolled(cost: Tensor, a: Tensor, b: Tensor, epsilon: float, steps: int) -> Tensor:
    """Plain Sinkhorn in the log domain."""
    g = torch.zeros_like(b)
    for _ in range(steps):
        f = a.log() - torch.logsumexp(g[..., None, :] - cost / epsilon, -1)
        g = b.log() - torch.logsumexp(f[..., :, None] - cost / epsilon, -2)
    return torch.exp(f[..., :, None] + g[..., None, :] - cost / epsilon)


@pytest.mark.parametrize("epsilon", [1e-2, 0.3, 10.0])
def test_two_by_two_closed_form(epsilon: float) -> None:
    """With uniform masses P = [[p, q], [q, p]] / 2, p / q = exp(-(c11+c22-c12-c21) / 2 eps)."""
    torch.manual_seed(0)
    cost = torch.rand(2, 2, dtype=FLOAT)
    odds = (cost[0, 1] + cost[1, 0] - cost[0, 0] - cost[1, 1]) / (2 * epsilon)
    p = torch.sigmoid(odds) / 2
    expected = torch.stack([p, 0.5 - p, 0.5 - p, p]).reshape(2, 2)
    torch.testing.assert_close(
        optimal_transport(cost, epsilon=epsilon), expected, rtol=1e-12, atol=1e-15
    )


def test_large_epsilon_gives_the_product_of_the_marginals() -> None:
    torch.manual_seed(1)
    a, b = masses(5), masses(3, 4)
    plan = optimal_transport(torch.rand(5, 4, dtype=FLOAT), a, b, epsilon=1e9)
    torch.testing.assert_close(plan, a[:, None] * b[:, None, :], rtol=1e-8, atol=0)


def test_agrees_with_cvxpy() -> None:
    torch.manual_seed(2)
    cost, a, b, epsilon = torch.rand(4, 3, dtype=FLOAT), masses(4), masses(3), 0.2
    P = cp.Variable((4, 3))
    product = (a[:, None] * b).numpy()
    objective = cp.sum(cp.multiply(cost.numpy(), P)) + epsilon * cp.sum(cp.kl_div(P, product))
    constraints = [cp.sum(P, axis=1) == a.numpy(), cp.sum(P, axis=0) == b.numpy()]
    tight = {"tol_gap_abs": 1e-11, "tol_gap_rel": 1e-11, "tol_feas": 1e-11}
    optimum = cp.Problem(cp.Minimize(objective), constraints).solve(solver="CLARABEL", **tight)
    report = OptimalTransport(epsilon).solve(cost, a, b)
    torch.testing.assert_close(report.value, torch.tensor(P.value), rtol=1e-5, atol=1e-6)
    assert float(report.objective) == pytest.approx(optimum, rel=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("epsilon", [1e-1, 1e-2, 1e-3])
@pytest.mark.parametrize("kind", ["random", "distance", "distance_uniform"])
@pytest.mark.parametrize(("m", "n"), [(30, 50), (40, 40)])
def test_marginals_to_rounding(
    m: int, n: int, kind: str, epsilon: float, dtype: torch.dtype
) -> None:
    torch.manual_seed(3)
    x, y = torch.rand(3, m, 1, dtype=dtype), torch.rand(3, 1, n, dtype=dtype)
    cost = torch.rand(3, m, n, dtype=dtype) if kind == "random" else (x - y) ** 2
    a = b = None
    if kind != "distance_uniform":
        a, b = masses(3, m, dtype=dtype), masses(3, n, dtype=dtype)
    report = OptimalTransport(epsilon).solve(cost, a, b)
    assert report.value.dtype == dtype
    assert report.solved.all()
    assert report.residual.max() < 4 * torch.finfo(dtype).eps


def test_small_epsilon_gives_the_assignment() -> None:
    torch.manual_seed(4)
    cost = torch.rand(8, 8, dtype=FLOAT)
    rows, columns = linear_sum_assignment(cost.numpy())
    plan = optimal_transport(cost, epsilon=1e-5)
    expected = torch.zeros(8, 8, dtype=FLOAT)
    expected[rows, columns] = 1 / 8
    torch.testing.assert_close(plan, expected, rtol=0, atol=1e-9)


def test_small_epsilon_approaches_the_linear_program() -> None:
    torch.manual_seed(5)
    cost, a, b, epsilon = torch.rand(6, 9, dtype=FLOAT), masses(6), masses(9), 1e-4
    rows = torch.eye(6, dtype=FLOAT).repeat_interleave(9, 1)
    columns = torch.eye(9, dtype=FLOAT).repeat(1, 6)
    equal = torch.cat([rows, columns]).numpy(), torch.cat([a, b]).numpy()
    optimum = linprog(cost.flatten().numpy(), A_eq=equal[0], b_eq=equal[1]).fun
    value = float((optimal_transport(cost, a, b, epsilon) * cost).sum())
    assert optimum - 1e-12 <= value <= optimum + epsilon * math.log(54)


@pytest.mark.parametrize(("m", "n"), [(3, 4), (4, 3), (1, 3), (1, 1)])
def test_derivatives(m: int, n: int) -> None:
    torch.manual_seed(6)
    cost, a, b = torch.rand(2, m, n, dtype=FLOAT), masses(m), masses(2, n)
    epsilon = torch.tensor([0.1, 0.5], dtype=FLOAT)
    inputs = tuple(t.requires_grad_() for t in (cost, a, b, epsilon))
    assert gradcheck(optimal_transport, inputs)
    assert gradgradcheck(optimal_transport, inputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_derivative_matches_unrolled_iterations(dtype: torch.dtype) -> None:
    torch.manual_seed(7)
    cost, a, b, epsilon = torch.rand(2, 8, 6, dtype=FLOAT), masses(2, 8), masses(2, 6), 0.05
    weight = torch.randn(8, 6, dtype=FLOAT)
    cost.requires_grad_()
    reference = unrolled(cost, a, b, epsilon, 2000)
    (expected,) = torch.autograd.grad((reference * weight).sum(), cost)
    cast = cost.detach().to(dtype).requires_grad_()
    plan = optimal_transport(cast, a.to(dtype), b.to(dtype), epsilon)
    (grad,) = torch.autograd.grad((plan * weight.to(dtype)).sum(), cast)
    assert grad.dtype == dtype
    limit = 1e-10 if dtype == FLOAT else 1e-5
    assert (grad.double() - expected).norm() < limit * expected.norm()


def test_derivative_at_small_epsilon() -> None:
    """Central differences of the plan itself, where unrolled iterations would not converge."""
    torch.manual_seed(8)
    cost = (torch.rand(12, 1, dtype=FLOAT) - torch.rand(10, dtype=FLOAT)) ** 2
    a, b = masses(12), masses(10)
    weight, direction = torch.randn(12, 10, dtype=FLOAT), torch.randn(12, 10, dtype=FLOAT)

    def loss(cost: Tensor) -> Tensor:
        return (optimal_transport(cost, a, b, 1e-3) * weight).sum()

    (grad,) = torch.autograd.grad(loss(cost.requires_grad_()), cost)
    step = 1e-7
    with torch.no_grad():
        rise = loss(cost + step * direction) - loss(cost - step * direction)
    assert float((grad * direction).sum()) == pytest.approx(float(rise / (2 * step)), rel=1e-5)


def test_envelope_theorem() -> None:
    torch.manual_seed(9)
    cost = torch.rand(5, 4, dtype=FLOAT, requires_grad=True)
    report = OptimalTransport(0.1).solve(cost)
    (grad,) = torch.autograd.grad(report.objective, cost)
    torch.testing.assert_close(grad, report.value.detach(), rtol=1e-9, atol=1e-13)


def test_entries_without_mass() -> None:
    torch.manual_seed(10)
    cost = torch.rand(2, 4, 5, dtype=FLOAT, requires_grad=True)
    a, b = masses(4), masses(5)
    a[1], b[2:4] = 0.0, 0.0
    a, b = a / a.sum(), b / b.sum()
    report = OptimalTransport(0.05).solve(cost, a, b)
    rows, columns = a > 0, b > 0
    small = optimal_transport(cost[:, rows][:, :, columns], a[rows], b[columns], 0.05)
    assert (report.value[:, ~rows] == 0).all()
    torch.testing.assert_close(report.value[:, rows][:, :, columns], small, rtol=1e-9, atol=1e-12)
    assert report.solved.all()
    assert not report.regular.any()
    weight = torch.randn(4, 5, dtype=FLOAT)
    (grad,) = torch.autograd.grad((report.value * weight).sum(), cost, retain_graph=True)
    (expected,) = torch.autograd.grad((small * weight[rows][:, columns]).sum(), cost)
    torch.testing.assert_close(grad, expected, rtol=1e-8, atol=1e-11)


def test_a_constant_in_the_cost_changes_nothing() -> None:
    torch.manual_seed(11)
    cost = torch.randint(0, 64, (5, 6)).double() / 64
    a, b = masses(5), masses(6)
    expected = optimal_transport(cost, a, b, 1e-2)
    assert torch.equal(optimal_transport(cost + 2.0**20, a, b, 1e-2), expected)


def test_one_element_does_not_change_another() -> None:
    torch.manual_seed(12)
    cost = torch.rand(3, 6, 5, dtype=FLOAT)
    alone = OptimalTransport(1e-2).solve(cost)
    cost[1] *= 1e4
    together = OptimalTransport(1e-2).solve(cost)
    torch.testing.assert_close(together.value[[0, 2]], alone.value[[0, 2]], rtol=1e-12, atol=1e-16)


def test_iteration_limit_is_reported() -> None:
    torch.manual_seed(13)
    cost = torch.rand(2, 20, 20, dtype=FLOAT)
    cost[1] = 0.0
    report = OptimalTransport(1e-4, max_iterations=3).solve(cost)
    assert report.status.tolist() == [Status.ITERATION_LIMIT, Status.OPTIMAL]
    assert report.residual[0] > 1e-6


@given(
    m=st.integers(1, 5),
    n=st.integers(1, 5),
    shapes=st.sampled_from([((), (), (), ()), ((2,), (), (2,), ()), ((), (3, 1), (2,), (2,))]),
    seed=st.integers(0, 99),
)
@settings(deadline=None, max_examples=30)
def test_batch_dimensions_broadcast(m: int, n: int, shapes: tuple, seed: int) -> None:
    torch.manual_seed(seed)
    cost, a, b = torch.rand(*shapes[0], m, n), masses(*shapes[1], m), masses(*shapes[2], n)
    epsilon = 0.02 + torch.rand(shapes[3], dtype=FLOAT)
    plan = optimal_transport(cost, a, b, epsilon)
    batch = torch.broadcast_shapes(*shapes)
    assert plan.shape == (*batch, m, n)
    torch.testing.assert_close(plan.sum(-1), a.expand(*batch, m), rtol=0, atol=1e-14)
    torch.testing.assert_close(plan.sum(-2), b.expand(*batch, n), rtol=0, atol=1e-14)


def test_under_vmap() -> None:
    torch.manual_seed(14)
    cost, b = torch.rand(4, 3, 5, dtype=FLOAT), masses(4, 5)
    expected = optimal_transport(cost, None, b)
    mapped = torch.func.vmap(lambda cost, b: optimal_transport(cost, None, b))
    torch.testing.assert_close(mapped(cost, b), expected, rtol=1e-13, atol=0)
    grads = torch.func.vmap(torch.func.grad(lambda c: (optimal_transport(c) ** 2).sum()))(cost)
    inputs = cost.clone().requires_grad_()
    (grad,) = torch.autograd.grad((optimal_transport(inputs) ** 2).sum(), inputs)
    torch.testing.assert_close(grads, grad, rtol=1e-10, atol=1e-14)


def test_learned_epsilon() -> None:
    module = OptimalTransport(torch.nn.Parameter(torch.tensor(0.3)))
    module(torch.rand(3, 3)).square().sum().backward()
    (epsilon,) = module.parameters()
    assert epsilon.grad.isfinite()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"a": torch.tensor([0.5, 0.6])}, r"sum of a / sum of b is 1\.1; it must be 1: pass a / a"),
        ({"a": torch.tensor([1.5, -0.5])}, r"a\[1\] is -0\.5; it must be a finite nonnegative"),
        ({"a": torch.zeros(2), "b": torch.zeros(3)}, "the sum of a is 0; it must be positive"),
        ({"b": torch.ones(2) / 2}, r"b has shape \(2,\); expected \(\.\.\., 3\)"),
        ({"epsilon": 0.0}, "epsilon is 0; it must be a finite positive number"),
        ({"epsilon": torch.tensor([0.1, -1.0])}, r"epsilon\[1\] is -1"),
        ({"cost": torch.tensor([[0.0, torch.inf, 1.0]] * 2)}, r"cost\[0, 1\] is inf"),
        ({"cost": torch.ones(3)}, r"cost has shape \(3,\)"),
    ],
)
def test_bad_input_is_refused(change: dict, message: str) -> None:
    with pytest.raises(ParameterError, match=message):
        optimal_transport(**({"cost": torch.ones(2, 3)} | change))


def test_bad_limit_is_refused() -> None:
    with pytest.raises(SpecificationError, match="max_iterations is 0"):
        optimal_transport(torch.ones(2, 2), max_iterations=0)
