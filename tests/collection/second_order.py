"""Second-order cone programs."""

from __future__ import annotations

import cvxpy as cp
import numpy as np
import torch
from torch import Tensor

from collection.oracles import System, closed, stationary
from collection.problem import Built, Collector

PROBLEMS = Collector()


def _regression(seed: int, m: int, n: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    A = rng.standard_normal((m, n))
    return A, A @ rng.standard_normal(n) + 0.5 * rng.standard_normal(m)


# Sums of norms, none of which vanishes at the solution


def _robust() -> Built:
    x, A, b = cp.Variable(4), cp.Parameter((12, 4)), cp.Parameter(12)
    radius = cp.Parameter(nonneg=True)
    loss = cp.norm(A @ x - b) + radius * cp.norm(x)
    return cp.Problem(cp.Minimize(loss)), [A, b, radius], [x]


def _robust_system(A: np.ndarray, b: np.ndarray, radius: np.ndarray, x: np.ndarray) -> System:
    def slope(x: Tensor, A: Tensor, b: Tensor, radius: Tensor) -> Tensor:
        r = A @ x - b
        return A.T @ r / r.norm() + radius * x / x.norm()

    return System(x, slope, lambda x, *_: (x,))


PROBLEMS.add(
    "SOCP",
    (*_regression(1, 12, 4), 0.7),
    stationary(_robust_system, _robust),
    name="robust_least_squares",
)(_robust)


def _facility() -> Built:
    x, sites, weight = cp.Variable(2), cp.Parameter((7, 2)), cp.Parameter(7, nonneg=True)
    away = cp.Variable(7)
    rows = [cp.norm(x - sites[i]) <= away[i] for i in range(7)]
    return cp.Problem(cp.Minimize(weight @ away), rows), [sites, weight], [x]


def _facility_system(sites: np.ndarray, weight: np.ndarray, x: np.ndarray) -> System:
    def slope(x: Tensor, sites: Tensor, weight: Tensor) -> Tensor:
        away = x - sites
        return (weight[:, None] * away / away.norm(dim=1, keepdim=True)).sum(0)

    return System(x, slope, lambda x, *_: (x,))


_rng = np.random.default_rng(2)
PROBLEMS.add(
    "SOCP",
    (_rng.standard_normal((7, 2)), _rng.uniform(0.5, 1.5, 7)),
    stationary(_facility_system, _facility),
    name="geometric_median",
)(_facility)


def _root_lasso() -> Built:
    x, A, b, k = cp.Variable(6), cp.Parameter((15, 6)), cp.Parameter(15), cp.Parameter(nonneg=True)
    return cp.Problem(cp.Minimize(cp.norm(A @ x - b) + k * cp.norm1(x))), [A, b, k], [x]


def _root_lasso_system(A: np.ndarray, b: np.ndarray, k: np.ndarray, x: np.ndarray) -> System:
    on = np.where(np.abs(x) > 1e-6)[0]
    off = np.setdiff1d(np.arange(6), on)
    sign = torch.tensor(np.sign(x[on]))

    def slope(z: Tensor, A: Tensor, b: Tensor, k: Tensor) -> Tensor:
        r = A[:, on] @ z - b
        return A[:, on].T @ r / r.norm() + k * sign

    def outputs(z: Tensor, *_: Tensor) -> tuple[Tensor]:
        return (torch.zeros(6, dtype=z.dtype).index_copy(0, torch.tensor(on), z),)

    def holds(z: np.ndarray) -> bool:
        r = A[:, on] @ z - b
        inside = np.abs(A[:, off].T @ r / np.linalg.norm(r)) < k - 1e-6
        return bool(inside.all() and (np.sign(z) == sign.numpy()).all())

    return System(x[on], slope, outputs, holds=holds)


def _sparse_regression() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(3)
    A = rng.standard_normal((15, 6))
    return A, A @ np.array([1.0, 0, 0, -2.0, 0, 0.5]) + 0.5 * rng.standard_normal(15)


PROBLEMS.add(
    "SOCP",
    (*_sparse_regression(), 1.3),
    stationary(_root_lasso_system, _root_lasso),
    name="square_root_lasso",
)(_root_lasso)


# Active cones


def _ellipsoid(c: Tensor, F: Tensor, g: Tensor) -> tuple[Tensor]:
    direction = torch.linalg.solve(F @ F.T, c)
    size = torch.sqrt(c @ direction)
    return (-direction / size - torch.linalg.solve(F.T, g),)


_rng = np.random.default_rng(4)


@PROBLEMS.add(
    "SOCP",
    (
        _rng.standard_normal(4),
        _rng.standard_normal((4, 4)) + 3 * np.eye(4),
        _rng.standard_normal(4),
    ),
    closed(_ellipsoid),
)
def _linear_over_an_ellipsoid() -> Built:
    x, c, F, g = cp.Variable(4), cp.Parameter(4), cp.Parameter((4, 4)), cp.Parameter(4)
    return cp.Problem(cp.Minimize(c @ x), [cp.norm(F.T @ x + g) <= 1]), [c, F, g], [x]


def _frontier(mu: Tensor, F: Tensor, limit: Tensor) -> tuple[Tensor]:
    C = F.T @ F
    one = torch.ones_like(mu)
    a, b = torch.linalg.solve(C, mu), torch.linalg.solve(C, one)
    least = b / (one @ b)
    tilt = a - b * (one @ a) / (one @ b)
    spare = limit**2 - least @ C @ least
    return (least + tilt * torch.sqrt(spare / (tilt @ C @ tilt)),)


_rng = np.random.default_rng(5)


@PROBLEMS.add(
    "SOCP",
    (1e-3 * _rng.standard_normal(6), 1e-2 * (_rng.standard_normal((6, 6)) + np.eye(6)), 0.015),
    closed(_frontier),
)
def _portfolio_of_limited_risk_in_daily_units() -> Built:
    x, mu, F, limit = cp.Variable(6), cp.Parameter(6), cp.Parameter((6, 6)), cp.Parameter()
    constraints = [cp.norm(F @ x) <= limit, cp.sum(x) == 1]
    return cp.Problem(cp.Maximize(mu @ x), constraints), [mu, F, limit], [x]


def _robust_program() -> Built:
    x, A, b, c = cp.Variable(3), cp.Parameter((6, 3)), cp.Parameter(6), cp.Parameter(3)
    size = cp.Parameter(6, nonneg=True)
    rows = [A[i] @ x + size[i] * cp.norm(x) <= b[i] for i in range(6)]
    return cp.Problem(cp.Minimize(c @ x), rows), [A, b, c, size], [x]


def _robust_program_system(
    A: np.ndarray, b: np.ndarray, c: np.ndarray, size: np.ndarray, x: np.ndarray
) -> System:
    slack = b - A @ x - size * np.linalg.norm(x)
    active = np.where(slack < 1e-6)[0]
    normals = A[active] + np.outer(size[active], x / np.linalg.norm(x))
    start = np.concatenate([x, np.linalg.lstsq(normals.T, -c)[0]])

    def equations(z: Tensor, A: Tensor, b: Tensor, c: Tensor, size: Tensor) -> Tensor:
        x, lam = z[:3], z[3:]
        normals = A[active] + size[active, None] * x / x.norm()
        return torch.cat([c + normals.T @ lam, A[active] @ x + size[active] * x.norm() - b[active]])

    def holds(z: np.ndarray) -> bool:
        rest = np.setdiff1d(np.arange(6), active)
        spare = b - A @ z[:3] - size * np.linalg.norm(z[:3])
        return bool((z[3:] > 1e-6).all() and (spare[rest] > 1e-6).all())

    return System(start, equations, lambda z, *_: (z[:3],), holds=holds)


_rng = np.random.default_rng(6)
_rows = np.vstack([_rng.standard_normal((3, 3)), np.zeros((3, 3))])
_rows[3:] = -_rows[:3] + 0.3 * _rng.standard_normal((3, 3))
PROBLEMS.add(
    "SOCP",
    (_rows, _rng.uniform(0.5, 1.5, 6), _rng.standard_normal(3), _rng.uniform(0.1, 0.3, 6)),
    stationary(_robust_program_system, _robust_program),
    name="robust_linear_program",
)(_robust_program)


def _group_lasso() -> Built:
    x, A, b = cp.Variable(9), cp.Parameter((15, 9)), cp.Parameter(15)
    k = cp.Parameter(nonneg=True)
    groups = sum(cp.norm(x[3 * i : 3 * i + 3]) for i in range(3))
    return cp.Problem(cp.Minimize(cp.sum_squares(A @ x - b) / 2 + k * groups)), [A, b, k], [x]


def _group_lasso_system(A: np.ndarray, b: np.ndarray, k: np.ndarray, x: np.ndarray) -> System:
    parts = x.reshape(3, 3)
    groups = np.where(np.linalg.norm(parts, axis=1) > 1e-6)[0]
    on = (3 * groups[:, None] + np.arange(3)).ravel()

    def slope(z: Tensor, A: Tensor, b: Tensor, k: Tensor) -> Tensor:
        unit = z.reshape(-1, 3) / z.reshape(-1, 3).norm(dim=1, keepdim=True)
        return A[:, on].T @ (A[:, on] @ z - b) + k * unit.reshape(-1)

    def outputs(z: Tensor, *_: Tensor) -> tuple[Tensor]:
        return (torch.zeros(9, dtype=z.dtype).index_copy(0, torch.tensor(on), z),)

    def holds(z: np.ndarray) -> bool:
        pull = np.linalg.norm((A.T @ (A[:, on] @ z - b)).reshape(3, 3), axis=1)
        return bool((np.delete(pull, groups) < k - 1e-6).all())

    return System(x[on], slope, outputs, holds=holds)


def _group_sample() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(7)
    A = rng.standard_normal((15, 9))
    return A, A[:, :3] @ np.array([1.0, -1.0, 0.5]) + A[:, 6:] @ np.array([0.3, 1.0, 0.0])


PROBLEMS.add(
    "SOCP",
    (*_group_sample(), 2.0),
    stationary(_group_lasso_system, _group_lasso),
    name="group_lasso",
)(_group_lasso)
