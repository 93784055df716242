"""Programs with powers and geometric means."""

from __future__ import annotations

import cvxpy as cp
import numpy as np
import torch
from torch import Tensor

from collection.exponential import smooth
from collection.oracles import closed
from collection.problem import Built, Collector

PROBLEMS = Collector()


def _regression(seed: int, m: int, n: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return rng.standard_normal((m, n)), rng.standard_normal(m)


def _slope(p: float):
    def slope(x: Tensor, A: Tensor, b: Tensor) -> Tensor:
        r = A @ x - b
        return A.T @ (torch.sign(r) * torch.abs(r) ** (p - 1))

    return slope


for _p, _name in ((3.0, "3"), (1.5, "three_halves")):

    def _build(p: float = _p) -> Built:
        x, A, b = cp.Variable(3), cp.Parameter((10, 3)), cp.Parameter(10)
        away = cp.Variable(10)
        rows = [cp.abs(A @ x - b) <= away]
        loss = cp.sum(cp.power(away, p, approx=False))
        return cp.Problem(cp.Minimize(loss), rows), [A, b], [x]

    smooth(
        "power",
        _regression(1, 10, 3),
        _slope(_p),
        lambda x: x,
        name=f"regression_with_power_{_name}",
        into=PROBLEMS,
    )(_build)


@PROBLEMS.add(
    "power",
    (np.random.default_rng(3).uniform(0.5, 2.0, 5), 4.0),
    closed(lambda w, b: (b * torch.sqrt(w) / torch.sqrt(w).sum(),)),
)
def _reciprocals_under_a_budget() -> Built:
    x, w, b = cp.Variable(5), cp.Parameter(5, nonneg=True), cp.Parameter()
    loss = w @ cp.power(x, -1, approx=False)
    return cp.Problem(cp.Minimize(loss), [cp.sum(x) == b]), [w, b], [x]


@PROBLEMS.add(
    "power",
    (np.random.default_rng(4).uniform(0.5, 2.0, 4), 4.0),
    closed(lambda p, b: (b * torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64) / p,)),
)
def _geometric_mean_under_a_budget() -> Built:
    x, p, b = cp.Variable(4), cp.Parameter(4, nonneg=True), cp.Parameter()
    mean = cp.geo_mean(x, [1, 2, 3, 4], approx=False)
    return cp.Problem(cp.Maximize(mean), [p @ x <= b]), [p, b], [x]


_SHARES = torch.tensor([0.2, 0.3, 0.5], dtype=torch.float64)


def _two_budgets(z: Tensor, p: Tensor, r: Tensor, b: Tensor) -> Tensor:
    x, lam = z[:3], z[3:]
    return torch.cat(
        [_SHARES / x - lam[0] * p - lam[1] * r, (p @ x - b[0])[None], (r @ x - b[1])[None]]
    )


def _two_budgets_start(x: np.ndarray, z: np.ndarray) -> np.ndarray:
    p, r = _BUDGETS[:2]
    lam = np.linalg.lstsq(np.stack([p, r], 1), np.array([0.2, 0.3, 0.5]) / x)[0]
    assert (lam > 1e-6).all()
    return np.concatenate([x, lam])


_BUDGETS = (np.array([1.0, 2.0, 0.5]), np.array([1.5, 0.4, 2.0]), np.array([2.0, 2.2]))


@smooth(
    "power",
    _BUDGETS,
    _two_budgets,
    _two_budgets_start,
    lambda z, p, r, b: (z[:3], torch.prod(z[:3] ** _SHARES)),
    into=PROBLEMS,
    positive=slice(3, 5),
)
def _production_under_two_budgets() -> Built:
    x, z = cp.Variable(3), cp.Variable()
    p, r, b = cp.Parameter(3), cp.Parameter(3), cp.Parameter(2)
    rows = [cp.PowConeND(x, z, np.array([0.2, 0.3, 0.5])), p @ x <= b[0], r @ x <= b[1]]
    return cp.Problem(cp.Maximize(z), rows), [p, r, b], [x, z]


def _share_norm(v: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    size = v.norm()
    return c ** (1 / 0.7), v * torch.clamp(1 - 1 / size, min=0)


@PROBLEMS.add("mixed", (np.array([2.0, -1.0, 0.5]), 1.3), closed(_share_norm))
def _power_and_norm() -> Built:
    t, u, v, c = cp.Variable(), cp.Variable(3), cp.Parameter(3), cp.Parameter()
    loss = cp.power(t, 1.7, approx=False) / 1.7 - c * t + cp.sum_squares(u - v) / 2 + cp.norm(u)
    return cp.Problem(cp.Minimize(loss)), [v, c], [t, u]


def _every_cone(z: Tensor, w: Tensor, v: Tensor, budget: Tensor) -> Tensor:
    a, d, u, price = z[0], z[1], z[2:4], z[4]
    size = u.norm()
    return torch.cat(
        [
            torch.stack([w[0] / a + 1 / a**2 - price, w[1] / torch.sqrt(d) / 2 - price]),
            u - v + price * u / size,
            (a + d + size - budget)[None],
        ]
    )


def _every_output(z: Tensor, *_: Tensor) -> tuple[Tensor, ...]:
    one = torch.ones((), dtype=z.dtype)
    return z[0], z[1], z[2:4], torch.stack([z[0], one, one, 1 / z[0]]).reshape(2, 2)


@smooth(
    "mixed",
    (np.array([0.7, 1.1]), np.array([1.5, -2.0]), 3.0),
    _every_cone,
    lambda a, d, u, X: np.concatenate([[a, d], u, [1.1 / np.sqrt(d) / 2]]),
    _every_output,
    into=PROBLEMS,
    positive=slice(4, 5),
)
def _all_cones_at_once() -> Built:
    a, d, u, X = cp.Variable(), cp.Variable(), cp.Variable(2), cp.Variable((2, 2), symmetric=True)
    w, v, budget = cp.Parameter(2, nonneg=True), cp.Parameter(2), cp.Parameter()
    # the least last entry with which X is semidefinite is 1 / a
    rows = [a + d + cp.norm(u) <= budget, X >> 0, X[0, 0] == a, X[0, 1] == 1]
    gain = w[0] * cp.log(a) + w[1] * cp.power(d, 0.5, approx=False) - X[1, 1]
    problem = cp.Problem(cp.Maximize(gain - cp.sum_squares(u - v) / 2), rows)
    return problem, [w, v, budget], [a, d, u, X]
