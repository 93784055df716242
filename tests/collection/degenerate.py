"""Problems without a derivative: kinks, and solutions that are not unique."""

from __future__ import annotations

import cvxpy as cp
import numpy as np
import torch
from torch import Tensor

from collection.oracles import kink
from collection.problem import Built, Collector, Values

PROBLEMS = Collector()


def _kinked(group_values, one, other):
    return PROBLEMS.add("degenerate", group_values, kink(one, other), regular=False)


def _least(v: Tensor, active: int) -> Tensor:
    """Nonnegative part whose entry 0, which is zero, belongs to a side."""
    return torch.cat([v[:1] * (1 - active), torch.clamp(v[1:], min=0)])


@_kinked(([0.0, 1.0, -2.0],), lambda v: (_least(v, 0),), lambda v: (_least(v, 1),))
def _inequality_with_zero_multiplier() -> Built:
    x, v = cp.Variable(3), cp.Parameter(3)
    return cp.Problem(cp.Minimize(cp.sum_squares(x - v)), [x >= 0]), [v], [x]


@_kinked(
    ([1.0, 3.0, 0.2], 1.0),
    lambda v, k: (torch.stack([v[0] - k, v[1] - k, 0 * v[2]]),),
    lambda v, k: (torch.stack([0 * v[0], v[1] - k, 0 * v[2]]),),
)
def _soft_threshold_at_its_kink() -> Built:
    x, v, k = cp.Variable(3), cp.Parameter(3), cp.Parameter(nonneg=True)
    return cp.Problem(cp.Minimize(cp.sum_squares(x - v) / 2 + k * cp.norm1(x))), [v, k], [x]


def _support(count: int):
    def answer(v: Tensor) -> tuple[Tensor]:
        part = v[:count] - (v[:count].sum() - 1) / count
        return (torch.cat([part, torch.zeros(len(v) - count, dtype=v.dtype)]),)

    return answer


@_kinked(([1.0, 0.5, 0.25, -1.0],), _support(2), _support(3))
def _sparsemax_with_an_entry_at_the_threshold() -> Built:
    x, v = cp.Variable(4), cp.Parameter(4)
    loss = cp.sum_squares(x) / 2 - v @ x
    return cp.Problem(cp.Minimize(loss), [x >= 0, cp.sum(x) == 1]), [v], [x]


@_kinked(([3.0, 4.0], 5.0), lambda v, r: (v + 0 * r,), lambda v, r: (r * v / v.norm(),))
def _ball_projection_from_its_surface() -> Built:
    x, v, r = cp.Variable(2), cp.Parameter(2), cp.Parameter(nonneg=True)
    return cp.Problem(cp.Minimize(cp.sum_squares(x - v)), [cp.norm(x) <= r]), [v, r], [x]


@_kinked(
    ([3.0, 4.0], 5.0),
    lambda v, k: (0 * v * k,),
    lambda v, k: (v * (1 - k / v.norm()),),
)
def _shrinkage_to_exactly_zero() -> Built:
    x, v, k = cp.Variable(2), cp.Parameter(2), cp.Parameter(nonneg=True)
    return cp.Problem(cp.Minimize(cp.sum_squares(x - v) / 2 + k * cp.norm(x))), [v, k], [x]


def _without(count: int):
    """Semidefinite part of a diagonal matrix (1, 0, -2), by its first eigenvectors."""

    def answer(C: Tensor) -> tuple[Tensor]:
        values, vectors = torch.linalg.eigh((C + C.T) / 2)
        keep = torch.arange(3) >= 3 - count
        return ((vectors * (values * keep)) @ vectors.T,)

    return answer


@_kinked((np.diag([1.0, 0.0, -2.0]),), _without(1), _without(2))
def _semidefinite_projection_of_a_singular_matrix() -> Built:
    X, C = cp.Variable((3, 3), PSD=True), cp.Parameter((3, 3), symmetric=True)
    return cp.Problem(cp.Minimize(cp.sum_squares(X - C))), [C], [X]


_NORMALS = np.array([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])


def _corner(rows: list[int]):
    return lambda h: (torch.linalg.solve(torch.tensor(_NORMALS[rows]), h[rows]),)


@_kinked(([1.0, 1.0, 2.0],), _corner([0, 1]), _corner([0, 2]))
def _vertex_where_three_edges_meet() -> Built:
    x, h = cp.Variable(2), cp.Parameter(3)
    return cp.Problem(cp.Maximize(2 * x[0] + x[1]), [_NORMALS @ x <= h]), [h], [x]


@_kinked(
    ([1.0, 2.0, 2.5],),
    lambda v: (torch.stack([v[0], v[1]]),),
    lambda v: (torch.stack([v[0], v[2] - 0.5]),),
)
def _two_equal_bounds_of_different_parameters() -> Built:
    x, v = cp.Variable(2), cp.Parameter(3)
    rows = [x[0] <= v[0], x[1] <= v[1], x[1] <= v[2] - 0.5]
    return cp.Problem(cp.Maximize(cp.sum(x)), rows), [v], [x]


# Not unique: any solution will do, and no gradient is right


def _ties(values: Values, outputs: Values) -> float:
    (r,), (x,) = values, outputs
    return max(abs(r @ x - r.max()), abs(x.sum() - 1), -x.min())


@PROBLEMS.add("degenerate", ([1.0, 2.0, 2.0],), regular=False, suboptimality=_ties)
def _two_best_assets() -> Built:
    x, r = cp.Variable(3), cp.Parameter(3)
    return cp.Problem(cp.Maximize(r @ x), [x >= 0, cp.sum(x) == 1]), [r], [x]


def _eigenspace(values: Values, outputs: Values) -> float:
    (C,), (X,) = values, outputs
    least = np.linalg.eigvalsh(C)[0]
    return max(abs((C * X).sum() - least), abs(np.trace(X) - 1), -np.linalg.eigvalsh(X)[0])


@PROBLEMS.add("degenerate", (np.diag([-1.0, -1.0, 2.0]),), regular=False, suboptimality=_eigenspace)
def _double_smallest_eigenvalue() -> Built:
    X, C = cp.Variable((3, 3), symmetric=True), cp.Parameter((3, 3), symmetric=True)
    problem = cp.Problem(cp.Minimize(cp.trace(C @ X)), [X >> 0, cp.trace(X) == 1])
    return problem, [C], [X]


def _even_median(values: Values, outputs: Values) -> float:
    (v,), (x,) = values, outputs
    middle = np.sort(v)[1:3]
    return float(max(middle[0] - x, x - middle[1], 0.0))


@PROBLEMS.add("degenerate", ([0.0, 1.0, 2.0, 4.0],), regular=False, suboptimality=_even_median)
def _median_of_an_even_number() -> Built:
    x, v = cp.Variable(), cp.Parameter(4)
    return cp.Problem(cp.Minimize(cp.norm1(x - v))), [v], [x]
