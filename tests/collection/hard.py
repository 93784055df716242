"""Larger, badly scaled and nearly degenerate problems."""

from __future__ import annotations

import cvxpy as cp
import numpy as np
import torch
from torch import Tensor

from collection.exponential import smooth
from collection.oracles import Form, closed, quadratic
from collection.problem import Built, Collector
from collection.quadratic import eye, grid, ones, zeros

PROBLEMS = Collector()


# Nearly weakly active: margins of 1e-5


@PROBLEMS.add("QP", ([1e-5, 1.0, -1e-5, -2.0],), closed(lambda v: (torch.clamp(v, min=0),)))
def _multipliers_and_slacks_of_1e_5() -> Built:
    x, v = cp.Variable(4), cp.Parameter(4)
    return cp.Problem(cp.Minimize(cp.sum_squares(x - v)), [x >= 0]), [v], [x]


@PROBLEMS.add(
    "SDP",
    (np.diag([1.0, 1e-4, -1e-4, -2.0]),),
    closed(lambda C: (_semidefinite_part(C),)),
)
def _semidefinite_projection_with_eigenvalues_of_1e_4() -> Built:
    X, C = cp.Variable((4, 4), PSD=True), cp.Parameter((4, 4), symmetric=True)
    return cp.Problem(cp.Minimize(cp.sum_squares(X - C))), [C], [X]


def _semidefinite_part(C: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh((C + C.T) / 2)
    return (vectors * torch.clamp(values, min=0)) @ vectors.T


# Units


_rng = np.random.default_rng(1)
_UNITS = 10.0 ** np.array([-4, -2, 0, 2, 4])
_RATES = _rng.standard_normal((5, 5)) + 3 * np.eye(5)


@PROBLEMS.add(
    "LP",
    (_RATES / _UNITS[:, None], _rng.uniform(1, 2, 5) / _UNITS, -_RATES.sum(0)),
    closed(lambda A, b, c: (torch.linalg.solve(A, b),)),
)
def _vertex_of_rows_in_units_from_1e_4_to_1e4() -> Built:
    x, A, b, c = cp.Variable(5), cp.Parameter((5, 5)), cp.Parameter(5), cp.Parameter(5)
    return cp.Problem(cp.Minimize(c @ x), [A @ x <= b]), [A, b, c], [x]


@PROBLEMS.add(
    "QP",
    (_UNITS, np.array([-1e-4, 1e-2, -3.0, -2e2, 5e3])),
    closed(lambda d, q: (torch.clamp(-q / d, min=0),)),
)
def _curvatures_from_1e_4_to_1e4() -> Built:
    x, d, q = cp.Variable(5, nonneg=True), cp.Parameter(5, nonneg=True), cp.Parameter(5)
    return cp.Problem(cp.Minimize(d @ cp.square(x) / 2 + q @ x)), [d, q], [x]


def _assets(n: int, factors: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(2)
    exposure = 1e-2 * rng.standard_normal((factors, n))
    return 1e-3 * rng.standard_normal(n), exposure, 1e-2 * rng.uniform(0.5, 1.5, n)


def _factor_form(mu: Tensor, F: Tensor, noise: Tensor) -> Form:
    n = len(mu)
    P = 10 * (F.T @ F + torch.diag(noise**2))
    return Form(P=P, q=-mu, A=ones(1, n), b=ones(1), G=-eye(n), h=zeros(n))


@PROBLEMS.add("QP", _assets(80, 5), quadratic(_factor_form))
def _portfolio_of_80_assets_with_factors() -> Built:
    x, mu = cp.Variable(80, nonneg=True), cp.Parameter(80)
    F, noise = cp.Parameter((5, 80)), cp.Parameter(80)
    risk = cp.sum_squares(F @ x) + cp.sum_squares(cp.multiply(noise, x))
    return cp.Problem(cp.Minimize(5 * risk - mu @ x), [cp.sum(x) == 1]), [mu, F, noise], [x]


# Larger


def _wide_lasso() -> tuple[np.ndarray, np.ndarray, float]:
    rng = np.random.default_rng(3)
    A = rng.standard_normal((60, 100))
    return A, A[:, :6] @ rng.standard_normal(6) + 0.1 * rng.standard_normal(60), 5.0


def _lasso_form(A: Tensor, b: Tensor, k: Tensor) -> Form:
    n = A.shape[1]
    G = grid([[eye(n), -eye(n)], [-eye(n), -eye(n)]])
    P = torch.block_diag(A.T @ A, zeros(n, n))
    return Form(P=P, q=torch.cat([-A.T @ b, k * ones(n)]), G=G, h=zeros(2 * n))


@PROBLEMS.add("QP", _wide_lasso(), quadratic(_lasso_form, lambda x, nu, lam: (x[:100],)))
def _lasso_with_100_columns() -> Built:
    x, A, b = cp.Variable(100), cp.Parameter((60, 100)), cp.Parameter(60)
    k = cp.Parameter(nonneg=True)
    loss = cp.sum_squares(A @ x - b) / 2 + k * cp.norm1(x)
    return cp.Problem(cp.Minimize(loss)), [A, b, k], [x]


@PROBLEMS.add(
    "exp",
    (10 * np.random.default_rng(4).standard_normal(60),),
    closed(lambda c: (torch.softmax(c, 0),)),
)
def _softmax_with_probabilities_down_to_1e_20() -> Built:
    x, c = cp.Variable(60), cp.Parameter(60)
    problem = cp.Problem(cp.Maximize(c @ x + cp.sum(cp.entr(x))), [cp.sum(x) == 1])
    return problem, [c], [x]


@smooth(
    "exp",
    (np.random.default_rng(5).standard_normal((150, 15)), 1.0),
    lambda x, A, k: 2 * k * x - A.T @ torch.sigmoid(-A @ x),
    lambda x: x,
    into=PROBLEMS,
)
def _logistic_regression_with_150_rows() -> Built:
    x, A, k = cp.Variable(15), cp.Parameter((150, 15)), cp.Parameter(nonneg=True)
    loss = cp.sum(cp.logistic(-A @ x)) + k * cp.sum_squares(x)
    return cp.Problem(cp.Minimize(loss)), [A, k], [x]


_COST = np.random.default_rng(6).uniform(0, 1, (8, 8))
_EPS = 0.03


def _sharp_plan(z: Tensor, C: Tensor) -> Tensor:
    columns = torch.cat([z[8:], torch.zeros(1, dtype=z.dtype)])
    return torch.exp((z[:8, None] + columns - C) / _EPS)


def _sharp_start(X: np.ndarray) -> np.ndarray:
    """Sinkhorn's iteration, whatever the solver found."""
    kernel, u, v = np.exp(-_COST / _EPS), np.ones(8), np.ones(8)
    for _ in range(20000):
        u = 0.125 / (kernel @ v)
        v = 0.125 / (kernel.T @ u)
    logs = _EPS * np.log(np.concatenate([u * v[-1], v[:-1] / v[-1]]))
    return logs


@smooth(
    "exp",
    (_COST,),
    lambda z, C: torch.cat(
        [_sharp_plan(z, C).sum(1) - 0.125, _sharp_plan(z, C).sum(0)[:-1] - 0.125]
    ),
    _sharp_start,
    lambda z, C: (_sharp_plan(z, C),),
    into=PROBLEMS,
)
def _entropic_transport_with_little_entropy() -> Built:
    X, C = cp.Variable((8, 8)), cp.Parameter((8, 8))
    loss = cp.sum(cp.multiply(C, X)) - _EPS * cp.sum(cp.entr(X))
    sums = [cp.sum(X, axis=1) == 0.125, cp.sum(X, axis=0) == 0.125]
    return cp.Problem(cp.Minimize(loss), sums), [C], [X]


def _tenth_power(x: Tensor, A: Tensor, b: Tensor) -> Tensor:
    return A.T @ (A @ x - b) ** 9


for _seed, _name in ((7, "regression_with_power_10"), (24, "regression_with_power_10_again")):
    # The multipliers, residuals to the power nine, span 14 orders of magnitude.
    _rng = np.random.default_rng(_seed)

    @smooth(
        "power",
        (_rng.standard_normal((12, 3)), _rng.standard_normal(12)),
        _tenth_power,
        lambda x: x,
        into=PROBLEMS,
        name=_name,
    )
    def _regression_with_power_10() -> Built:
        x, A, b, away = cp.Variable(3), cp.Parameter((12, 3)), cp.Parameter(12), cp.Variable(12)
        loss = cp.sum(cp.power(away, 10, approx=False))
        return cp.Problem(cp.Minimize(loss), [cp.abs(A @ x - b) <= away]), [A, b], [x]
