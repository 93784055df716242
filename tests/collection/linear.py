"""Linear programs with a unique, nondegenerate vertex."""

from __future__ import annotations

import cvxpy as cp
import numpy as np
import torch
from torch import Tensor

from collection.oracles import Form, quadratic
from collection.problem import Built, Collector

PROBLEMS = Collector()
eye = torch.eye


def _polyhedron(seed: int, n: int, m: int, unit: float = 1.0) -> tuple[np.ndarray, ...]:
    """A bounded polyhedron around the origin and a direction."""
    rng = np.random.default_rng(seed)
    G = np.vstack([np.eye(n), -np.eye(n), rng.standard_normal((m - 2 * n, n))])
    return G, unit * rng.uniform(0.5, 1.5, m), rng.standard_normal(n)


@PROBLEMS.add("LP", _polyhedron(1, 5, 20), quadratic(lambda G, h, c: Form(q=c, G=G, h=h)))
def _linear_program_of_a_polyhedron() -> Built:
    x, G, h, c = cp.Variable(5), cp.Parameter((20, 5)), cp.Parameter(20), cp.Parameter(5)
    return cp.Problem(cp.Minimize(c @ x), [G @ x <= h]), [G, h, c], [x]


@PROBLEMS.add(
    "LP",
    _polyhedron(2, 6, 24),
    quadratic(lambda G, h, c: Form(q=c, G=G, h=h), lambda x, nu, lam: (x, lam)),
)
def _linear_program_with_multipliers() -> Built:
    x, G, h, c = cp.Variable(6), cp.Parameter((24, 6)), cp.Parameter(24), cp.Parameter(6)
    rows = G @ x <= h
    return cp.Problem(cp.Minimize(c @ x), [rows]), [G, h, c], [x, rows.dual_variables[0]]


@PROBLEMS.add("LP", _polyhedron(3, 60, 200), quadratic(lambda G, h, c: Form(q=c, G=G, h=h)))
def _linear_program_of_60_variables() -> Built:
    x, G, h, c = cp.Variable(60), cp.Parameter((200, 60)), cp.Parameter(200), cp.Parameter(60)
    return cp.Problem(cp.Minimize(c @ x), [G @ x <= h]), [G, h, c], [x]


def _basis_sample() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(4)
    sparse = np.zeros(30)
    sparse[[2, 11, 25]] = rng.choice([-1, 1], 3) * rng.uniform(0.5, 2.0, 3)
    A = rng.standard_normal((12, 30))
    return A, A @ sparse + 0.05 * rng.standard_normal(12)


def _basis_form(A: Tensor, b: Tensor) -> Form:
    n = A.shape[1]
    I = eye(n)  # noqa: E741
    q = torch.cat([torch.zeros(n), torch.ones(n)]).double()
    wide = torch.cat([A, torch.zeros_like(A)], 1)
    G = torch.cat([torch.cat([I, -I], 1), torch.cat([-I, -I], 1)]).double()
    return Form(q=q, A=wide, b=b, G=G, h=torch.zeros(2 * n))


@PROBLEMS.add("LP", _basis_sample(), quadratic(_basis_form, lambda x, nu, lam: (x[: len(x) // 2],)))
def _basis_pursuit() -> Built:
    x, A, b = cp.Variable(30), cp.Parameter((12, 30)), cp.Parameter(12)
    return cp.Problem(cp.Minimize(cp.norm1(x)), [A @ x == b]), [A, b], [x]


def _regression_sample(seed: int, m: int, n: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return rng.standard_normal((m, n)), rng.standard_normal(m)


def _chebyshev_form(A: Tensor, b: Tensor) -> Form:
    one = torch.ones(len(b), 1, dtype=A.dtype)
    q = torch.zeros(A.shape[1] + 1, dtype=A.dtype)
    q[-1] = 1
    G = torch.cat([torch.cat([A, -one], 1), torch.cat([-A, -one], 1)])
    return Form(q=q, G=G, h=torch.cat([b, -b]))


@PROBLEMS.add(
    "LP", _regression_sample(5, 15, 4), quadratic(_chebyshev_form, lambda x, nu, lam: (x[:-1],))
)
def _chebyshev_regression() -> Built:
    x, A, b = cp.Variable(4), cp.Parameter((15, 4)), cp.Parameter(15)
    return cp.Problem(cp.Minimize(cp.norm_inf(A @ x - b))), [A, b], [x]


def _quantile_form(A: Tensor, b: Tensor, tau: Tensor) -> Form:
    m, n = A.shape
    I = eye(m, dtype=A.dtype)  # noqa: E741
    one = torch.ones(m, dtype=A.dtype)
    q = torch.cat([torch.zeros(n, dtype=A.dtype), tau * one, (1 - tau) * one])
    G = torch.cat([torch.zeros(2 * m, n, dtype=A.dtype), -eye(2 * m, dtype=A.dtype)], 1)
    return Form(q=q, A=torch.cat([A, I, -I], 1), b=b, G=G, h=torch.zeros(2 * m))


@PROBLEMS.add(
    "LP",
    (*_regression_sample(6, 21, 3), 0.37),
    quadratic(_quantile_form, lambda x, nu, lam: (x[:3],)),
)
def _quantile_regression() -> Built:
    x, u, v = cp.Variable(3), cp.Variable(21, nonneg=True), cp.Variable(21, nonneg=True)
    A, b, tau = cp.Parameter((21, 3)), cp.Parameter(21), cp.Parameter(nonneg=True)
    loss = tau * cp.sum(u) + cp.sum(v) - tau * cp.sum(v)
    return cp.Problem(cp.Minimize(loss), [A @ x + u - v == b]), [A, b, tau], [x]


def _production_sample() -> tuple[np.ndarray, ...]:
    rng = np.random.default_rng(7)
    return rng.uniform(0.5, 2.0, (4, 8)), 1e3 * rng.uniform(1, 2, 4), 1e5 * rng.uniform(1, 2, 8)


def _production_form(A: Tensor, stock: Tensor, price: Tensor) -> Form:
    I = eye(8, dtype=A.dtype)  # noqa: E741
    return Form(q=-price, G=torch.cat([A, -I]), h=torch.cat([stock, torch.zeros(8)]))


@PROBLEMS.add(
    "LP",
    _production_sample(),
    quadratic(_production_form, lambda x, nu, lam: (x, lam[:4]), scales=1e3),
)
def _production_plan_in_prices_of_1e5() -> Built:
    x = cp.Variable(8, nonneg=True)
    A, stock, price = cp.Parameter((4, 8)), cp.Parameter(4), cp.Parameter(8)
    rows = A @ x <= stock
    problem = cp.Problem(cp.Maximize(price @ x), [rows])
    return problem, [A, stock, price], [x, rows.dual_variables[0]]


def _assignment_sample() -> tuple[np.ndarray, ...]:
    rng = np.random.default_rng(8)
    return rng.uniform(0, 1, (3, 4)), rng.uniform(1, 2, 3), 0.6 * rng.uniform(1, 1.5, 4)


def _transport_form(C: Tensor, a: Tensor, b: Tensor) -> Form:
    rows = torch.kron(eye(3), torch.ones(1, 4)).double()
    columns = torch.kron(torch.ones(1, 3), eye(4)).double()
    return Form(
        q=C.reshape(-1),
        G=torch.cat([rows, -columns, -eye(12, dtype=C.dtype)]),
        h=torch.cat([a, -b, torch.zeros(12)]),
    )


@PROBLEMS.add(
    "LP", _assignment_sample(), quadratic(_transport_form, lambda x, nu, lam: (x.reshape(3, 4),))
)
def _transport_from_supply_to_demand() -> Built:
    X = cp.Variable((3, 4), nonneg=True)
    C, a, b = cp.Parameter((3, 4)), cp.Parameter(3), cp.Parameter(4)
    constraints = [cp.sum(X, axis=1) <= a, cp.sum(X, axis=0) >= b]
    return cp.Problem(cp.Minimize(cp.sum(cp.multiply(C, X))), constraints), [C, a, b], [X]


def _cvar_sample() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(9)
    returns = 1e-3 + 1e-2 * rng.standard_normal((40, 5))
    return returns, returns.mean(0)


def _cvar_form(R: Tensor, mu: Tensor) -> Form:
    # unknowns: weights (5), threshold, excesses (40)
    T, n = R.shape
    zeros = torch.zeros
    q = torch.cat([-mu, torch.ones(1), torch.full((T,), 1 / (0.1 * T), dtype=R.dtype)])
    excess = torch.cat([-R, -torch.ones(T, 1), -eye(T)], 1)
    signs = torch.cat(
        [torch.cat([-eye(n), zeros(n, T + 1)], 1), torch.cat([zeros(T, n + 1), -eye(T)], 1)]
    )
    budget = torch.cat([torch.ones(1, n), zeros(1, T + 1)], 1).double()
    G = torch.cat([excess, signs.double()])
    return Form(q=q, A=budget, b=torch.ones(1), G=G, h=zeros(2 * T + n))


@PROBLEMS.add("LP", _cvar_sample(), quadratic(_cvar_form, lambda x, nu, lam: (x[:5],), scales=1e-2))
def _portfolio_of_least_expected_shortfall() -> Built:
    x, t, R, mu = cp.Variable(5, nonneg=True), cp.Variable(), cp.Parameter((40, 5)), cp.Parameter(5)
    loss = t + cp.sum(cp.pos(-R @ x - t)) / (0.1 * 40) - mu @ x
    return cp.Problem(cp.Minimize(loss), [cp.sum(x) == 1]), [R, mu], [x]
