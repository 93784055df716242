"""Quadratic programs."""

from __future__ import annotations

import cvxpy as cp
import numpy as np
import scipy.sparse as sp
import torch
from torch import Tensor

from collection.oracles import Form, closed, quadratic
from collection.problem import Built, Collector

PROBLEMS = Collector()
DOUBLE = torch.float64


def eye(n: int) -> Tensor:
    return torch.eye(n, dtype=DOUBLE)


def zeros(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=DOUBLE)


def ones(*shape: int) -> Tensor:
    return torch.ones(shape, dtype=DOUBLE)


def grid(rows: list[list[Tensor]]) -> Tensor:
    """A matrix of blocks."""
    return torch.cat([torch.cat(row, 1) for row in rows])


def _covariance(rng: np.random.Generator, n: int) -> np.ndarray:
    factor = rng.standard_normal((n, 2 * n))
    return factor @ factor.T / (2 * n) + 0.1 * np.eye(n)


# Dense, with as many inequalities as variables


def _dense(n: int, *, data_too: bool) -> None:
    rng = np.random.default_rng(n)
    P, G = _covariance(rng, n), rng.standard_normal((n, n)) / np.sqrt(n)
    q, h = rng.standard_normal(n), rng.uniform(0.1, 1.0, n)
    half = np.linalg.cholesky(P).T

    if data_too:

        def build() -> Built:
            x, S = cp.Variable(n), cp.Parameter((n, n))
            g, f, k = cp.Parameter((n, n)), cp.Parameter(n), cp.Parameter(n)
            problem = cp.Problem(cp.Minimize(cp.sum_squares(S @ x) / 2 + f @ x), [g @ x <= k])
            return problem, [S, g, f, k], [x]

        oracle = quadratic(lambda S, g, f, k: Form(P=S.T @ S, q=f, G=g, h=k))
        PROBLEMS.add("QP", (half, G, q, h), oracle, name=f"dense_qp_{n}_all_data")(build)
        return

    def build() -> Built:
        x, f, k = cp.Variable(n), cp.Parameter(n), cp.Parameter(n)
        loss = cp.quad_form(x, cp.psd_wrap(P)) / 2 + f @ x
        return cp.Problem(cp.Minimize(loss), [G @ x <= k]), [f, k], [x]

    oracle = quadratic(lambda f, k: Form(P=torch.tensor(P), q=f, G=torch.tensor(G), h=k))
    PROBLEMS.add("QP", (q, h), oracle, name=f"dense_qp_{n}", slow=n > 100)(build)


for _n in (24, 50):
    _dense(_n, data_too=True)
for _n in (24, 50, 100, 300):
    _dense(_n, data_too=False)


def _sparse(n: int) -> None:
    rng = np.random.default_rng(n)
    band = sp.diags([np.full(n - 1, -1.0), np.full(n, 2.5), np.full(n - 1, -1.0)], [-1, 0, 1])
    rows = sp.random(n // 2, n, 3 / n, random_state=rng, data_rvs=rng.standard_normal)
    G = sp.csr_matrix(sp.vstack([rows, sp.eye(n, format="csr")[::2]]))
    q, h = rng.standard_normal(n), rng.uniform(0.1, 0.6, G.shape[0])

    def build() -> Built:
        x, f, k = cp.Variable(n), cp.Parameter(n), cp.Parameter(G.shape[0])
        loss = cp.quad_form(x, cp.psd_wrap(band)) / 2 + f @ x
        return cp.Problem(cp.Minimize(loss), [G @ x <= k]), [f, k], [x]

    def form(f: Tensor, k: Tensor) -> Form:
        return Form(P=torch.tensor(band.toarray()), q=f, G=torch.tensor(G.toarray()), h=k)

    PROBLEMS.add("QP", (q, h), quadratic(form), name=f"sparse_qp_{n}", slow=True)(build)


for _n in (500, 2000):
    _sparse(_n)


# Regression


def _design(seed: int, m: int, n: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    truth = np.where(rng.random(n) < 0.4, rng.standard_normal(n), 0)
    A = rng.standard_normal((m, n))
    return A, A @ truth + 0.3 * rng.standard_normal(m)


def _elastic_form(A: Tensor, b: Tensor, k: Tensor, r: Tensor) -> Form:
    n = A.shape[1]
    P = torch.block_diag(A.T @ A + r * eye(n), zeros(n, n))
    G = grid([[eye(n), -eye(n)], [-eye(n), -eye(n)]])
    return Form(P=P, q=torch.cat([-A.T @ b, k * ones(n)]), G=G, h=zeros(2 * n))


def _lasso_form(A: Tensor, b: Tensor, k: Tensor) -> Form:
    return _elastic_form(A, b, k, zeros())


def _first_half(x: Tensor, nu: Tensor, lam: Tensor) -> tuple[Tensor]:
    return (x[: len(x) // 2],)


@PROBLEMS.add("QP", (*_design(1, 20, 8), 2.0), quadratic(_lasso_form, _first_half))
def _lasso() -> Built:
    x, A, b, k = cp.Variable(8), cp.Parameter((20, 8)), cp.Parameter(20), cp.Parameter(nonneg=True)
    return cp.Problem(cp.Minimize(cp.sum_squares(A @ x - b) / 2 + k * cp.norm1(x))), [A, b, k], [x]


@PROBLEMS.add("QP", (*_design(2, 12, 30), 1.5), quadratic(_lasso_form, _first_half))
def _lasso_with_more_columns_than_rows() -> Built:
    x, A, b = cp.Variable(30), cp.Parameter((12, 30)), cp.Parameter(12)
    k = cp.Parameter(nonneg=True)
    return cp.Problem(cp.Minimize(cp.sum_squares(A @ x - b) / 2 + k * cp.norm1(x))), [A, b, k], [x]


@PROBLEMS.add("QP", (*_design(3, 20, 8), 1.0, 0.5), quadratic(_elastic_form, _first_half))
def _elastic_net() -> Built:
    x, A, b = cp.Variable(8), cp.Parameter((20, 8)), cp.Parameter(20)
    k, r = cp.Parameter(nonneg=True), cp.Parameter(nonneg=True)
    loss = cp.sum_squares(A @ x - b) / 2 + k * cp.norm1(x) + r * cp.sum_squares(x) / 2
    return cp.Problem(cp.Minimize(loss)), [A, b, k, r], [x]


@PROBLEMS.add(
    "QP",
    _design(4, 15, 6),
    quadratic(lambda A, b: Form(P=A.T @ A, q=-A.T @ b, G=-eye(6), h=zeros(6))),
)
def _nonnegative_least_squares() -> Built:
    x, A, b = cp.Variable(6, nonneg=True), cp.Parameter((15, 6)), cp.Parameter(15)
    return cp.Problem(cp.Minimize(cp.sum_squares(A @ x - b))), [A, b], [x]


def _huber_form(A: Tensor, b: Tensor) -> Form:
    # unknowns: x (4), smooth part u (25), size t of the rest A x - b - u
    m, n = A.shape
    P = torch.block_diag(zeros(n, n), eye(m), zeros(m, m))
    G = grid([[A, -eye(m), -eye(m)], [-A, eye(m), -eye(m)]])
    return Form(P=P, q=torch.cat([zeros(n + m), 0.4 * ones(m)]), G=G, h=torch.cat([b, -b]))


@PROBLEMS.add("QP", _design(5, 25, 4), quadratic(_huber_form, lambda x, nu, lam: (x[:4],)))
def _huber_regression() -> Built:
    x, A, b = cp.Variable(4), cp.Parameter((25, 4)), cp.Parameter(25)
    return cp.Problem(cp.Minimize(cp.sum(cp.huber(A @ x - b, 0.4)) / 2)), [A, b], [x]


def _hinge_sample() -> tuple[np.ndarray, float]:
    rng = np.random.default_rng(6)
    signs = rng.choice([-1.0, 1.0], 20)
    return signs[:, None] * (rng.standard_normal((20, 3)) + 0.7 * signs[:, None]), 0.8


def _hinge_form(A: Tensor, k: Tensor) -> Form:
    m, n = A.shape
    P = torch.block_diag(k * eye(n), zeros(m, m))
    G = grid([[-A, -eye(m)], [zeros(m, n), -eye(m)]])
    return Form(P=P, q=torch.cat([zeros(n), ones(m)]), G=G, h=torch.cat([-ones(m), zeros(m)]))


@PROBLEMS.add("QP", _hinge_sample(), quadratic(_hinge_form, lambda x, nu, lam: (x[:3],)))
def _support_vector_machine() -> Built:
    x, A, k = cp.Variable(3), cp.Parameter((20, 3)), cp.Parameter(nonneg=True)
    loss = cp.sum(cp.pos(1 - A @ x)) + k * cp.sum_squares(x) / 2
    return cp.Problem(cp.Minimize(loss)), [A, k], [x]


def _steps_sample() -> tuple[np.ndarray, float]:
    rng = np.random.default_rng(7)
    return np.repeat([1.0, -0.5, 2.0, 0.3], 10) + 0.2 * rng.standard_normal(40), 0.5


def _variation_form(v: Tensor, k: Tensor) -> Form:
    n = len(v)
    D = eye(n)[1:] - eye(n)[:-1]
    P = torch.block_diag(eye(n), zeros(n - 1, n - 1))
    G = grid([[D, -eye(n - 1)], [-D, -eye(n - 1)]])
    return Form(P=P, q=torch.cat([-v, k * ones(n - 1)]), G=G, h=zeros(2 * n - 2))


@PROBLEMS.add("QP", _steps_sample(), quadratic(_variation_form, lambda x, nu, lam: (x[:40],)))
def _total_variation() -> Built:
    x, v, k = cp.Variable(40), cp.Parameter(40), cp.Parameter(nonneg=True)
    return cp.Problem(cp.Minimize(cp.sum_squares(x - v) / 2 + k * cp.tv(x))), [v, k], [x]


def _isotonic_form(v: Tensor) -> Form:
    D = eye(15)[1:] - eye(15)[:-1]
    return Form(P=eye(15), q=-v, G=-D, h=zeros(14))


@PROBLEMS.add(
    "QP",
    (np.linspace(0, 1, 15) + 0.4 * np.random.default_rng(8).standard_normal(15),),
    quadratic(_isotonic_form),
)
def _isotonic_regression() -> Built:
    x, v = cp.Variable(15), cp.Parameter(15)
    return cp.Problem(cp.Minimize(cp.sum_squares(x - v)), [cp.diff(x) >= 0]), [v], [x]


def sparsemax(v: Tensor) -> tuple[Tensor]:
    """Projection onto the probability simplex, by sorting."""
    ordered = torch.sort(v, descending=True).values
    excess = (torch.cumsum(ordered, 0) - 1) / torch.arange(1, len(v) + 1)
    count = int((ordered > excess).sum())
    return (torch.clamp(v - excess[count - 1], min=0),)


@PROBLEMS.add("QP", (np.random.default_rng(9).standard_normal(10),), closed(sparsemax))
def _sparsemax() -> Built:
    x, v = cp.Variable(10), cp.Parameter(10)
    loss = cp.sum_squares(x) / 2 - v @ x
    return cp.Problem(cp.Minimize(loss), [x >= 0, cp.sum(x) == 1]), [v], [x]


def _sparsemax_again() -> Built:
    return _sparsemax()


PROBLEMS.add(
    "QP",
    (np.random.default_rng(9).standard_normal(10),),
    closed(sparsemax),
    name="sparsemax_with_upstream_gradients_of_1e-12",
    scale=1e-12,
)(_sparsemax_again)


# Finance and control


def _portfolio_sample() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(10)
    return 1e-3 * rng.standard_normal(10), 1e-2 * np.linalg.cholesky(_covariance(rng, 10)).T


def _portfolio_form(mu: Tensor, F: Tensor) -> Form:
    return Form(P=10 * F.T @ F, q=-mu, A=ones(1, 10), b=ones(1), G=-eye(10), h=zeros(10))


@PROBLEMS.add("QP", _portfolio_sample(), quadratic(_portfolio_form))
def _portfolio_in_daily_units() -> Built:
    x, mu, F = cp.Variable(10, nonneg=True), cp.Parameter(10), cp.Parameter((10, 10))
    loss = 5 * cp.sum_squares(F @ x) - mu @ x
    return cp.Problem(cp.Minimize(loss), [cp.sum(x) == 1]), [mu, F], [x]


def _market_sample() -> tuple[np.ndarray, ...]:
    rng = np.random.default_rng(11)
    return 1e5 * rng.uniform(1, 2, 6), 1e2 * rng.uniform(1, 2, 6), 2e3 * rng.uniform(0.3, 0.5, 1)


def _market_form(price: Tensor, slope: Tensor, demand: Tensor) -> Form:
    return Form(P=torch.diag(slope), q=price, A=ones(1, 6), b=demand, G=-eye(6), h=zeros(6))


@PROBLEMS.add(
    "QP",
    _market_sample(),
    quadratic(_market_form, lambda x, nu, lam: (x, nu), scales=1e2),
)
def _market_clearing_in_prices_of_1e5() -> Built:
    x, price = cp.Variable(6, nonneg=True), cp.Parameter(6)
    slope, demand = cp.Parameter(6, nonneg=True), cp.Parameter(1)
    met = cp.reshape(cp.sum(x), (1,), order="F") == demand
    problem = cp.Problem(cp.Minimize(price @ x + slope @ cp.square(x) / 2), [met])
    return problem, [price, slope, demand], [x, met.dual_variables[0]]


_STEPS = 8
_DYNAMICS = np.array([[1.0, 0.3], [0.0, 0.95]])
_INPUT = np.array([[0.05], [0.3]])


def _control_form(start: Tensor, limit: Tensor) -> Form:
    # unknowns: states x_1..x_T (2 each), inputs u_0..u_{T-1}, slacks (2 each state)
    T = _STEPS
    F, B = torch.tensor(_DYNAMICS), torch.tensor(_INPUT)
    shift = torch.diag(ones(T - 1), -1)
    A = torch.cat(
        [eye(2 * T) - torch.kron(shift, F), -torch.kron(eye(T), B), zeros(2 * T, 2 * T)], 1
    )
    b = torch.cat([F @ start, zeros(2 * T - 2)])
    P = torch.block_diag(eye(2 * T), 0.2 * eye(T), 0.1 * eye(2 * T))
    q = torch.cat([zeros(3 * T), 20 * ones(2 * T)])
    wide = zeros(2 * T, T)
    G = grid(
        [
            [eye(2 * T), wide, -eye(2 * T)],
            [-eye(2 * T), wide, -eye(2 * T)],
            [zeros(T, 2 * T), eye(T), zeros(T, 2 * T)],
            [zeros(T, 2 * T), -eye(T), zeros(T, 2 * T)],
            [zeros(2 * T, 2 * T), wide, -eye(2 * T)],
        ]
    )
    h = torch.cat([limit.repeat(2 * T), ones(2 * T), zeros(2 * T)])
    return Form(P=P, q=q, A=A, b=b, G=G, h=h)


def _inputs(x: Tensor, nu: Tensor, lam: Tensor) -> tuple[Tensor, ...]:
    T = _STEPS
    return x[: 2 * T].reshape(T, 2).T, x[2 * T : 3 * T]


@PROBLEMS.add("QP", ([2.0, -0.4], [1.2, 0.7]), quadratic(_control_form, _inputs))
def _predictive_control_with_soft_limits() -> Built:
    T = _STEPS
    X, u, S = cp.Variable((2, T)), cp.Variable(T), cp.Variable((2, T), nonneg=True)
    start, limit = cp.Parameter(2), cp.Parameter(2)
    constraints, state = [cp.abs(u) <= 1], start
    for t in range(T):
        constraints += [X[:, t] == _DYNAMICS @ state + _INPUT[:, 0] * u[t]]
        constraints += [cp.abs(X[:, t]) <= limit + S[:, t]]
        state = X[:, t]
    loss = cp.sum_squares(X) + 0.2 * cp.sum_squares(u) + 0.1 * cp.sum_squares(S)
    return cp.Problem(cp.Minimize(loss / 2 + 20 * cp.sum(S)), constraints), [start, limit], [X, u]


# Dependent and redundant rows


def _dependent_form(A: Tensor, b: Tensor, v: Tensor) -> Form:
    return Form(P=eye(6), q=-v, A=A, b=b, G=-eye(6), h=zeros(6))


@PROBLEMS.add(
    "QP",
    (
        np.random.default_rng(12).uniform(0, 1, (2, 6)),
        np.array([1.0, 1.2]),
        np.random.default_rng(13).standard_normal(6),
    ),
    quadratic(_dependent_form),
)
def _dependent_equalities() -> Built:
    x, A, b, v = cp.Variable(6), cp.Parameter((2, 6)), cp.Parameter(2), cp.Parameter(6)
    sums = np.array([[1.0, 1.0], [2.0, -3.0]])
    constraints = [A @ x == b, sums @ A @ x == sums @ b, x >= 0]
    return cp.Problem(cp.Minimize(cp.sum_squares(x - v)), constraints), [A, b, v], [x]


@PROBLEMS.add(
    "QP",
    (
        np.random.default_rng(14).standard_normal((5, 4)),
        np.random.default_rng(15).uniform(0.1, 0.4, 5),
        3 * np.random.default_rng(16).standard_normal(4),
    ),
    quadratic(lambda G, h, v: Form(P=eye(4), q=-v, G=G, h=h)),
)
def _redundant_inequalities() -> Built:
    x, G, h, v = cp.Variable(4), cp.Parameter((5, 4)), cp.Parameter(5), cp.Parameter(4)
    constraints = [G @ x <= h, 2 * (G @ x) <= 2 * h, cp.sum(G @ x) <= cp.sum(h) + 1]
    return cp.Problem(cp.Minimize(cp.sum_squares(x - v)), constraints), [G, h, v], [x]
