"""Programs with exponentials, logarithms and entropies."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import cvxpy as cp
import numpy as np
import torch
from torch import Tensor

from collection.oracles import System, closed, stationary
from collection.problem import Built, Collector

PROBLEMS = Collector()


def _normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape)


def _uniform(seed: int, low: float, high: float, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).uniform(low, high, shape)


def smooth(
    group: str,
    values: Sequence,
    equations: Callable[..., Tensor],
    start: Callable[..., np.ndarray],
    outputs: Callable[..., tuple[Tensor, ...]] = lambda z, *_: (z,),
    *,
    into: Collector = PROBLEMS,
    positive: slice = slice(0),
    **known: object,
) -> Callable[[Callable[[], Built]], Callable[[], Built]]:
    """Add a problem whose solution satisfies equations without inequalities.

    `start` makes the unknowns from the variables' rough values; those named by `positive`, the
    multipliers of inequalities, must be positive.
    """

    def register(build: Callable[[], Built]) -> Callable[[], Built]:
        def setup(*given: np.ndarray) -> System:
            def holds(unknowns: np.ndarray) -> bool:
                return bool((unknowns[positive] > 1e-6).all())

            return System(start(*given[len(values) :]), equations, outputs, holds=holds)

        return into.add(group, values, stationary(setup, build), **known)(build)

    return register


# Probabilities


@PROBLEMS.add("exp", (5 * _normal(1, 20),), closed(lambda c: (torch.softmax(c, 0),)))
def _softmax_of_20_scores() -> Built:
    x, c = cp.Variable(20), cp.Parameter(20)
    problem = cp.Problem(cp.Maximize(c @ x + cp.sum(cp.entr(x))), [cp.sum(x) == 1])
    return problem, [c], [x]


def _capped(c: Tensor, cap: Tensor) -> tuple[Tensor]:
    full = torch.zeros(len(c), dtype=torch.bool)
    while True:
        free = torch.where(full, -torch.inf, c)
        x = torch.where(full, cap, (1 - cap[full].sum()) * torch.softmax(free, 0))
        over = (x > cap) & ~full
        if not over.any():
            return (x,)
        full = full | over


@PROBLEMS.add("exp", (2 * _normal(2, 8), _uniform(3, 0.2, 0.35, 8)), closed(_capped))
def _constrained_softmax() -> Built:
    x, c, cap = cp.Variable(8), cp.Parameter(8), cp.Parameter(8)
    loss = c @ x + cp.sum(cp.entr(x))
    return cp.Problem(cp.Maximize(loss), [cp.sum(x) == 1, x <= cap]), [c, cap], [x]


def _multilabel_start(x: np.ndarray) -> np.ndarray:
    return np.log(x / (1 - x))


@smooth(
    "exp",
    (2 * _normal(4, 9), 3.0),
    lambda z, c, k: torch.cat([(z - c)[1:] - (z - c)[:1], torch.sigmoid(z).sum()[None] - k]),
    _multilabel_start,
    lambda z, c, k: (torch.sigmoid(z),),
)
def _limited_multi_label_projection() -> Built:
    x, c, k = cp.Variable(9), cp.Parameter(9), cp.Parameter()
    loss = -c @ x - cp.sum(cp.entr(x)) - cp.sum(cp.entr(1 - x))
    return cp.Problem(cp.Minimize(loss), [cp.sum(x) == k]), [c, k], [x]


def _log_odds(c: Tensor) -> tuple[Tensor]:
    logs = torch.log(c - (c.sum() - 1) / len(c))
    return (logs - logs.mean(),)


_shares = _uniform(5, 0.5, 2.0, 6)


@PROBLEMS.add("exp", (_shares / _shares.sum(),), closed(_log_odds))
def _log_sum_exp_on_a_plane() -> Built:
    x, c = cp.Variable(6), cp.Parameter(6)
    return cp.Problem(cp.Minimize(cp.log_sum_exp(x) - c @ x), [cp.sum(x) == 0]), [c], [x]


def _moments(z: Tensor, A: Tensor, b: Tensor) -> Tensor:
    x = torch.exp(A.T @ z[:2] + z[2])
    return torch.cat([A @ x - b, x.sum()[None] - 1])


_MOMENTS = _normal(6, 2, 10)


@smooth(
    "exp",
    (_MOMENTS, _MOMENTS @ np.full(10, 0.1) + 0.2),
    _moments,
    lambda x: np.linalg.lstsq(np.vstack([_MOMENTS, np.ones(10)]).T, np.log(x))[0],
    lambda z, A, b: (torch.exp(A.T @ z[:2] + z[2]),),
)
def _largest_entropy_with_given_moments() -> Built:
    x, A, b = cp.Variable(10), cp.Parameter((2, 10)), cp.Parameter(2)
    constraints = [A @ x == b, cp.sum(x) == 1]
    return cp.Problem(cp.Maximize(cp.sum(cp.entr(x))), constraints), [A, b], [x]


# Transport


def _plan(z: Tensor, C: Tensor, eps: Tensor | float, m: int) -> Tensor:
    columns = torch.cat([z[m:], torch.zeros(1, dtype=z.dtype)])
    return torch.exp((z[:m, None] + columns - C) / eps)


_SUPPLY, _DEMAND = np.array([0.5, 0.2, 0.3]), np.array([0.1, 0.4, 0.25, 0.25])


def _plan_start(eps: float, C: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    def start(X: np.ndarray) -> np.ndarray:
        scores = eps * np.log(X) + C
        return np.concatenate([scores[:, -1], (scores - scores[:, -1:]).mean(0)[:-1]])

    return start


@smooth(
    "exp",
    (_uniform(7, 0, 1, 3, 4), 0.2),
    lambda z, C, eps: torch.cat(
        [
            _plan(z, C, eps, 3).sum(1) - torch.tensor(_SUPPLY),
            (_plan(z, C, eps, 3).sum(0) - torch.tensor(_DEMAND))[:-1],
        ]
    ),
    _plan_start(0.2, _uniform(7, 0, 1, 3, 4)),
    lambda z, C, eps: (_plan(z, C, eps, 3),),
)
def _entropic_transport_with_dependent_marginals() -> Built:
    X, C, eps = cp.Variable((3, 4)), cp.Parameter((3, 4)), cp.Parameter(nonneg=True)
    loss = cp.sum(cp.multiply(C, X)) - eps * cp.sum(cp.entr(X))
    sums = [cp.sum(X, axis=1) == _SUPPLY, cp.sum(X, axis=0) == _DEMAND]
    return cp.Problem(cp.Minimize(loss), sums), [C, eps], [X]


@smooth(
    "exp",
    (_uniform(8, 0, 1, 5, 5), _uniform(9, 0.1, 0.3, 5), _uniform(10, 0.1, 0.2, 4)),
    lambda z, C, a, b: torch.cat(
        [
            _plan(z, C, 0.1, 5).sum(1) - a,
            _plan(z, C, 0.1, 5).sum(0)[:-1] - b,
        ]
    ),
    _plan_start(0.1, _uniform(8, 0, 1, 5, 5)),
    lambda z, C, a, b: (_plan(z, C, 0.1, 5),),
)
def _entropic_transport_between_parametric_marginals() -> Built:
    X, C, a, b = cp.Variable((5, 5)), cp.Parameter((5, 5)), cp.Parameter(5), cp.Parameter(4)
    loss = cp.sum(cp.multiply(C, X)) - 0.1 * cp.sum(cp.entr(X))
    sums = [cp.sum(X, axis=1) == a, cp.sum(X, axis=0)[:4] == b]
    return cp.Problem(cp.Minimize(loss), sums), [C, a, b], [X]


# Regression


def _labelled(seed: int, m: int, n: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    A = rng.standard_normal((m, n))
    signs = np.sign(A[:, 0] - A[:, 1] + rng.standard_normal(m))
    return signs[:, None] * A


@smooth(
    "exp",
    (_labelled(11, 30, 5), 0.5),
    lambda x, A, k: 2 * k * x - A.T @ torch.sigmoid(-A @ x),
    lambda x: x,
)
def _logistic_regression_with_squared_penalty() -> Built:
    x, A, k = cp.Variable(5), cp.Parameter((30, 5)), cp.Parameter(nonneg=True)
    loss = cp.sum(cp.logistic(-A @ x)) + k * cp.sum_squares(x)
    return cp.Problem(cp.Minimize(loss)), [A, k], [x]


def _sparse_logistic() -> Built:
    x, A, k = cp.Variable(6), cp.Parameter((25, 6)), cp.Parameter(nonneg=True)
    loss = cp.sum(cp.logistic(-A @ x)) + k * cp.norm1(x)
    return cp.Problem(cp.Minimize(loss)), [A, k], [x]


def _sparse_logistic_system(A: np.ndarray, k: np.ndarray, x: np.ndarray) -> System:
    on = np.where(np.abs(x) > 1e-5)[0]
    sign = torch.tensor(np.sign(x[on]))

    def slope(z: Tensor, A: Tensor, k: Tensor) -> Tensor:
        return k * sign - A[:, on].T @ torch.sigmoid(-A[:, on] @ z)

    def outputs(z: Tensor, *_: Tensor) -> tuple[Tensor]:
        return (torch.zeros(6, dtype=z.dtype).index_copy(0, torch.tensor(on), z),)

    def holds(z: np.ndarray) -> bool:
        pull = A.T @ (1 / (1 + np.exp(A[:, on] @ z)))
        return bool((np.abs(np.delete(pull, on)) < k - 1e-6).all() and len(on) < 6)

    return System(x[on], slope, outputs, holds=holds)


PROBLEMS.add(
    "exp",
    (_labelled(12, 25, 6), 2.0),
    stationary(_sparse_logistic_system, _sparse_logistic),
    name="logistic_regression_with_absolute_penalty",
)(_sparse_logistic)


@smooth(
    "exp",
    (_normal(13, 20, 3), np.random.default_rng(14).poisson(2.0, 20), 0.3),
    lambda x, A, counts, k: A.T @ (torch.exp(A @ x) - counts) + 2 * k * x,
    lambda x: x,
)
def _poisson_regression() -> Built:
    x, A, counts = cp.Variable(3), cp.Parameter((20, 3)), cp.Parameter(20)
    k, rate = cp.Parameter(nonneg=True), cp.Variable(20)
    loss = cp.sum(cp.exp(rate)) - counts @ rate + k * cp.sum_squares(x)
    return cp.Problem(cp.Minimize(loss), [rate == A @ x]), [A, counts, k], [x]


# Logarithms


def _centre(z: Tensor, A: Tensor, b: Tensor, c: Tensor) -> Tensor:
    return torch.cat([c - 1 / z[:8] + A.T @ z[8:], A @ z[:8] - b])


_ROWS = _normal(15, 3, 8)
_COSTS = _uniform(16, 0.5, 2.0, 8)


@smooth(
    "exp",
    (_ROWS, _ROWS @ np.ones(8), _COSTS),
    _centre,
    lambda x: np.concatenate([x, np.linalg.lstsq(_ROWS.T, 1 / x - _COSTS)[0]]),
    lambda z, *_: (z[:8],),
)
def _linear_loss_with_logarithmic_penalty() -> Built:
    x, A, b, c = cp.Variable(8), cp.Parameter((3, 8)), cp.Parameter(3), cp.Parameter(8)
    loss = c @ x - cp.sum(cp.log(x))
    return cp.Problem(cp.Minimize(loss), [A @ x == b]), [A, b, c], [x]


def _fill(noise: Tensor, power: Tensor) -> tuple[Tensor]:
    ordered = torch.sort(noise).values
    levels = (power + torch.cumsum(ordered, 0)) / torch.arange(1, len(noise) + 1)
    return (torch.clamp(levels[int((levels > ordered).sum()) - 1] - noise, min=0),)


@PROBLEMS.add("exp", (_uniform(17, 0.2, 2.0, 8), 2.0), closed(_fill))
def _water_filling() -> Built:
    x, noise, power = cp.Variable(8, nonneg=True), cp.Parameter(8), cp.Parameter()
    loss = cp.sum(cp.log(noise + x))
    return cp.Problem(cp.Maximize(loss), [cp.sum(x) == power]), [noise, power], [x]


def _betting() -> Built:
    x, R = cp.Variable(4, nonneg=True), cp.Parameter((12, 4))
    return cp.Problem(cp.Maximize(cp.sum(cp.log(R @ x)) / 12), [cp.sum(x) == 1]), [R], [x]


def _betting_system(R: np.ndarray, x: np.ndarray) -> System:
    on = np.where(x > 1e-5)[0]

    def equations(z: Tensor, R: Tensor) -> Tensor:
        pull = (R[:, on] / (R[:, on] @ z)[:, None]).mean(0)
        return pull - 1  # the multiplier of the budget

    def outputs(z: Tensor, R: Tensor) -> tuple[Tensor]:
        return (torch.zeros(4, dtype=z.dtype).index_copy(0, torch.tensor(on), z),)

    def holds(z: np.ndarray) -> bool:
        pull = (R / (R[:, on] @ z)[:, None]).mean(0)
        return bool((np.delete(pull, on) < 1 - 1e-6).all())

    return System(x[on], equations, outputs, holds=holds)


PROBLEMS.add(
    "exp",
    (_uniform(18, 0.6, 1.6, 12, 4),),
    stationary(_betting_system, _betting),
    name="growth_optimal_betting",
)(_betting)


# Exponential and other cones together


@smooth(
    "mixed",
    (_normal(19, 5), 0.1),
    lambda x, c, k: torch.softmax(x - c, 0) - 0.2 + k * x / x.norm(),
    lambda x: x,
)
def _log_sum_exp_with_norm() -> Built:
    x, c, k = cp.Variable(5), cp.Parameter(5), cp.Parameter(nonneg=True)
    loss = cp.log_sum_exp(x - c) - cp.sum(x) / 5 + k * cp.norm(x)
    return cp.Problem(cp.Minimize(loss)), [c, k], [x]
