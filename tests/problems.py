"""Problems with answers that are known without the library.

Every case draws its own parameter values, and most know their solution in closed form or by a
route that no cone solver takes part in (sorting, eigenvalues, enumeration of active sets,
Newton's method on an unconstrained function).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import cvxpy as cp
import numpy as np
from numpy.random import Generator

Built = tuple[cp.Problem, list[cp.Parameter], list[cp.Variable]]
Values = tuple[np.ndarray, ...]
ALL_KINDS = ("zero", "nonneg", "soc", "psd", "exp", "power")


@dataclass(frozen=True)
class Case:
    """A problem, values for its parameters, and what must come out.

    Attributes
    ----------
    name : str
    build : callable
        Returns a fresh (problem, parameters, variables).
    sample : callable
        From a random generator to values of the parameters. The differences of two samples stay
        within the parameters' attributes, so that they serve as directions.
    cones : frozenset of str
        Kinds of cone in the canonical form.
    answer : callable or None
        From parameter values to the value of every output.
    value : callable or None
        From parameter values to the optimal value.
    gp : bool
    regular : bool
        Whether the outputs are differentiable at the samples.
    unique_duals : bool
        Whether the dual variables of all constraints are unique.
    """

    name: str
    build: Callable[[], Built]
    sample: Callable[[Generator], Values]
    cones: frozenset[str]
    answer: Callable[..., tuple[Any, ...]] | None = None
    value: Callable[..., Any] | None = None
    gp: bool = False
    regular: bool = True
    unique_duals: bool = True

    @cached_property
    def values(self) -> Values:
        """Parameter values of one element."""
        return self.draw(0)

    def draw(self, seed: int) -> Values:
        """Parameter values of one element, others for every seed."""
        values = self.sample(np.random.default_rng([7, seed]))
        return tuple(np.asarray(value, dtype=float) for value in values)

    def draw_batch(self, size: int) -> Values:
        """Parameter values of several different elements, stacked."""
        return tuple(np.stack(column) for column in zip(*map(self.draw, range(size)), strict=True))

    def expected(self, values: Values | None = None) -> tuple[np.ndarray, ...]:
        """Values of the outputs, one array each."""
        values = self.values if values is None else values
        assert self.answer is not None
        return tuple(np.asarray(part, dtype=float) for part in self.answer(*values))

    def __str__(self) -> str:
        return self.name


CASES: list[Case] = []


def _case(
    cones: str, sample: Callable[[Generator], Values], **known: Any
) -> Callable[[Callable[[], Built]], Callable[[], Built]]:
    def register(build: Callable[[], Built]) -> Callable[[], Built]:
        name = build.__name__.strip("_")
        CASES.append(Case(name, build, sample, frozenset(cones.split()), **known))
        return build

    return register


# Oracles


def project_simplex(v: np.ndarray) -> np.ndarray:
    """Projection onto the probability simplex, by sorting."""
    ordered = np.sort(v)[::-1]
    excess = (np.cumsum(ordered) - 1) / np.arange(1, v.size + 1)
    count = np.nonzero(ordered > excess)[0][-1]
    return np.maximum(v - excess[count], 0)


def soft_threshold(v: np.ndarray, threshold: float) -> np.ndarray:
    return np.sign(v) * np.maximum(np.abs(v) - threshold, 0)


def shrink(v: np.ndarray, threshold: float) -> np.ndarray:
    """Proximal map of threshold * ||v||_2."""
    size = np.linalg.norm(v)
    return v * max(0.0, 1 - threshold / size)


def project_ball(v: np.ndarray, radius: float) -> np.ndarray:
    return v * min(1.0, radius / np.linalg.norm(v))


def positive_part(X: np.ndarray) -> np.ndarray:
    """Nearest positive semidefinite matrix to a symmetric one."""
    values, vectors = np.linalg.eigh(X)
    return (vectors * np.maximum(values, 0)) @ vectors.T


def smallest_eigenvector_product(C: np.ndarray) -> np.ndarray:
    vector = np.linalg.eigh(C)[1][:, 0]
    return np.outer(vector, vector)


def softmax(v: np.ndarray) -> np.ndarray:
    weights = np.exp(v - v.max())
    return weights / weights.sum()


def singular_value_threshold(X: np.ndarray, threshold: float) -> np.ndarray:
    U, sizes, V = np.linalg.svd(X, full_matrices=False)
    return (U * np.maximum(sizes - threshold, 0)) @ V


def solve_qp_by_enumeration(
    P: np.ndarray, q: np.ndarray, G: np.ndarray, h: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """X and multipliers of min 1/2 x'Px + q'x, Gx <= h: try every active set.

    P must be positive definite on the null space of the active rows.
    """
    n = q.size
    for size in range(min(n, h.size) + 1):
        for active in map(list, itertools.combinations(range(h.size), size)):
            kkt = np.block([[P, G[active].T], [G[active], np.zeros((size, size))]])
            if np.linalg.matrix_rank(kkt) < n + size:
                continue
            solution = np.linalg.solve(kkt, np.concatenate([-q, h[active]]))
            x, multipliers = solution[:n], np.zeros(h.size)
            multipliers[active] = solution[n:]
            if (G @ x <= h + 1e-10).all() and (multipliers >= -1e-10).all():
                return x, multipliers
    raise AssertionError("no active set satisfies the optimality conditions")


def minimise_by_newton(
    gradient: Callable[[np.ndarray], np.ndarray],
    hessian: Callable[[np.ndarray], np.ndarray],
    start: np.ndarray,
) -> np.ndarray:
    """Newton's method for a smooth, strongly convex function whose full steps converge."""
    x = start
    for _ in range(100):
        step = np.linalg.solve(hessian(x), gradient(x))
        x = x - step
        if np.abs(step).max() < 1e-14:
            break
    assert np.abs(gradient(x)).max() < 1e-11
    return x


# Linear and quadratic programs


def _vertex_sample(rng: Generator) -> Values:
    A = rng.standard_normal((3, 3)) + 3 * np.eye(3)
    return A, rng.standard_normal(3), -A.T @ rng.uniform(0.5, 1.5, 3)


@_case(
    "nonneg",
    _vertex_sample,
    answer=lambda A, b, c: (np.linalg.solve(A, b), np.linalg.solve(A.T, -c)),
    value=lambda A, b, c: c @ np.linalg.solve(A, b),
)
def _linear_program_vertex() -> Built:
    x, A, b, c = cp.Variable(3), cp.Parameter((3, 3)), cp.Parameter(3), cp.Parameter(3)
    constraint = A @ x <= b
    problem = cp.Problem(cp.Minimize(c @ x), [constraint])
    return problem, [A, b, c], [x, constraint.dual_variables[0]]


@_case(
    "zero nonneg",
    lambda rng: (rng.permutation(4) + rng.uniform(0, 0.3, 4),),
    answer=lambda r: (np.eye(4)[r.argmax()],),
    value=lambda r: r.max(),
)
def _best_asset_maximised() -> Built:
    x, r = cp.Variable(4, name="x"), cp.Parameter(4, name="r")
    return cp.Problem(cp.Maximize(r @ x), [cp.sum(x) == 1, x >= 0]), [r], [x]


def _equality_qp(A: np.ndarray, b: np.ndarray, c: np.ndarray) -> tuple[np.ndarray, ...]:
    multiplier = np.linalg.solve(A @ A.T, -(A @ c) - b)
    return -c - A.T @ multiplier, multiplier


@_case(
    "zero",
    lambda rng: (rng.standard_normal((2, 4)), rng.standard_normal(2), rng.standard_normal(4)),
    answer=_equality_qp,
)
def _equality_constrained_qp() -> Built:
    x, A, b, c = cp.Variable(4), cp.Parameter((2, 4)), cp.Parameter(2), cp.Parameter(4)
    constraint = A @ x == b
    problem = cp.Problem(cp.Minimize(cp.sum_squares(x) / 2 + c @ x), [constraint])
    return problem, [A, b, c], [x, constraint.dual_variables[0]]


def _psd_sample(rng: Generator, n: int) -> np.ndarray:
    factor = rng.standard_normal((n, n))
    return factor @ factor.T / n + np.eye(n)


@_case(
    "",
    lambda rng: (_psd_sample(rng, 3), rng.standard_normal(3)),
    answer=lambda P, q: (-np.linalg.solve(P, q) / 2,),
    value=lambda P, q: -q @ np.linalg.solve(P, q) / 4,
)
def _quadratic_form_of_psd_parameter() -> Built:
    x, P, q = cp.Variable(3), cp.Parameter((3, 3), PSD=True), cp.Parameter(3)
    return cp.Problem(cp.Minimize(cp.quad_form(x, P) + q @ x)), [P, q], [x]


_G = np.array([[1.0, 2.0, 0.0], [0.0, 1.0, -1.0], [-1.0, 0.0, 1.0], [1.0, 1.0, 1.0]])


@_case(
    "nonneg",
    lambda rng: (_psd_sample(rng, 3), 3 * rng.standard_normal(3), rng.uniform(0.2, 1.0, 4)),
    answer=lambda P, q, h: solve_qp_by_enumeration(2 * P, q, _G, h),
)
def _inequality_qp_with_psd_parameter() -> Built:
    x, P, q = cp.Variable(3), cp.Parameter((3, 3), PSD=True), cp.Parameter(3)
    h = cp.Parameter(4)
    constraint = h >= _G @ x
    problem = cp.Problem(cp.Minimize(cp.quad_form(x, P) + q @ x), [constraint])
    return problem, [P, q, h], [x, constraint.dual_variables[0]]


@_case(
    "zero",
    lambda rng: (rng.standard_normal((6, 3)), rng.standard_normal(6)),
    answer=lambda A, b: (np.linalg.lstsq(A, b)[0],),
    value=lambda A, b: np.linalg.lstsq(A, b)[1][0],
)
def _least_squares() -> Built:
    x, A, b = cp.Variable(3), cp.Parameter((6, 3)), cp.Parameter(6)
    return cp.Problem(cp.Minimize(cp.sum_squares(A @ x - b))), [A, b], [x]


_DESIGN = np.array([[1.0, 2.0], [0.5, -1.0], [3.0, 0.0], [-1.0, 1.0]])


@_case(
    "zero",
    lambda rng: (rng.standard_normal(4), rng.uniform(0.1, 2.0)),
    answer=lambda b, k: (np.linalg.solve(_DESIGN.T @ _DESIGN + k * np.eye(2), _DESIGN.T @ b),),
)
def _ridge_with_weight_parameter() -> Built:
    x, b, weight = cp.Variable(2), cp.Parameter(4), cp.Parameter(nonneg=True)
    loss = cp.sum_squares(_DESIGN @ x - b) + weight * cp.sum_squares(x)
    return cp.Problem(cp.Minimize(loss)), [b, weight], [x]


def _box_sample(rng: Generator) -> Values:
    return 2 * rng.standard_normal(4), rng.uniform(-1.5, -0.5, 4), rng.uniform(0.5, 1.5, 4)


def _project_box(v: np.ndarray, low: np.ndarray, high: np.ndarray) -> tuple[np.ndarray, ...]:
    return np.clip(v, low, high), np.maximum(low - v, 0), np.maximum(v - high, 0)


@_case("zero nonneg", _box_sample, answer=_project_box)
def _box_projection() -> Built:
    x, v, low, high = cp.Variable(4), cp.Parameter(4), cp.Parameter(4), cp.Parameter(4)
    above, below = x >= low, x <= high
    problem = cp.Problem(cp.Minimize(cp.sum_squares(x - v) / 2), [above, below])
    return problem, [v, low, high], [x, above.dual_variables[0], below.dual_variables[0]]


@_case("zero nonneg", _box_sample, answer=lambda *values: _project_box(*values)[:1])
def _box_projection_by_parametric_bounds() -> Built:
    v, low, high = cp.Parameter(4), cp.Parameter(4), cp.Parameter(4)
    x = cp.Variable(4, bounds=[low, high])
    return cp.Problem(cp.Minimize(cp.sum_squares(x - v))), [v, low, high], [x]


@_case(
    "zero nonneg",
    lambda rng: (2 * rng.standard_normal(5),),
    answer=lambda v: (np.clip(v, -0.5, 0.75),),
)
def _constant_bounds() -> Built:
    x, v = cp.Variable(5, bounds=[-0.5, 0.75]), cp.Parameter(5)
    return cp.Problem(cp.Minimize(cp.sum_squares(x - v))), [v], [x]


@_case(
    "zero nonneg",
    lambda rng: (rng.standard_normal(6),),
    answer=lambda v: (project_simplex(v),),
)
def _simplex_projection() -> Built:
    x, v = cp.Variable(6), cp.Parameter(6)
    problem = cp.Problem(cp.Minimize(cp.sum_squares(x - v)), [x >= 0, cp.sum(x) == 1])
    return problem, [v], [x]


@_case(
    "zero nonneg",
    lambda rng: (2 * rng.standard_normal(5), rng.uniform(0.3, 1.0)),
    answer=lambda v, weight: (soft_threshold(v, weight),),
)
def _soft_threshold() -> Built:
    x, v, weight = cp.Variable(5), cp.Parameter(5), cp.Parameter(nonneg=True)
    loss = cp.sum_squares(x - v) / 2 + weight * cp.norm1(x)
    return cp.Problem(cp.Minimize(loss)), [v, weight], [x]


_ORTHOGONAL = np.linalg.qr(np.random.default_rng(3).standard_normal((6, 3)))[0]


@_case(
    "zero nonneg",
    lambda rng: (3 * rng.standard_normal(6), rng.uniform(0.3, 1.0)),
    answer=lambda b, weight: (soft_threshold(_ORTHOGONAL.T @ b, weight),),
)
def _lasso_with_orthogonal_design() -> Built:
    x, b, weight = cp.Variable(3), cp.Parameter(6), cp.Parameter(nonneg=True)
    loss = cp.sum_squares(_ORTHOGONAL @ x - b) / 2 + weight * cp.norm1(x)
    return cp.Problem(cp.Minimize(loss)), [b, weight], [x]


@_case(
    "nonneg",
    lambda rng: (rng.standard_normal(5),),
    answer=lambda v: (np.median(v),),
    value=lambda v: np.abs(v - np.median(v)).sum(),
)
def _median_as_linear_program() -> Built:
    x, v = cp.Variable(), cp.Parameter(5)
    return cp.Problem(cp.Minimize(cp.norm1(x - v))), [v], [x]


@_case("zero", lambda rng: (rng.standard_normal(()),), answer=lambda a: (a, 2 * a))
def _scalars() -> Built:
    x, y, a = cp.Variable(), cp.Variable(), cp.Parameter()
    problem = cp.Problem(cp.Minimize(cp.square(x - a) + cp.square(y - x - a)))
    return problem, [a], [x, y]


_LEFT = np.array([[2.0, 1.0, 0.0], [0.0, 1.0, -1.0], [1.0, 0.0, 3.0]])


@_case(
    "zero",
    lambda rng: (rng.standard_normal((3, 2)),),
    answer=lambda B: (np.linalg.solve(_LEFT, B), np.linalg.solve(_LEFT, B).T),
)
def _matrices_and_their_entry_order() -> Built:
    X, Y, B = cp.Variable((3, 2)), cp.Variable((2, 3)), cp.Parameter((3, 2))
    loss = cp.sum_squares(_LEFT @ X - B) + cp.sum_squares(Y - X.T)
    return cp.Problem(cp.Minimize(loss)), [B], [X, Y]


@_case(
    "zero nonneg",
    lambda rng: (2 * rng.standard_normal((2, 3, 2)),),
    answer=lambda v: (np.minimum(v, 0.5),),
)
def _three_dimensional_variable() -> Built:
    X, v = cp.Variable((2, 3, 2)), cp.Parameter((2, 3, 2))
    return cp.Problem(cp.Minimize(cp.sum(cp.square(X - v))), [X <= 0.5]), [v], [X]


@_case("zero nonneg", lambda rng: (), answer=lambda: (np.array([1.0, 0.0]),), value=lambda: 4.0)
def _no_parameters() -> Built:
    x = cp.Variable(2)
    target = np.array([1.0, -2.0])
    return cp.Problem(cp.Minimize(cp.sum_squares(x - target)), [x >= 0]), [], [x]


@_case(
    "zero",
    lambda rng: (rng.standard_normal(2), rng.standard_normal(3)),
    answer=lambda a, v: (v,),
    value=lambda a, v: a.sum(),
)
def _parameter_that_does_not_reach_the_solution() -> Built:
    x, a, v = cp.Variable(3), cp.Parameter(2), cp.Parameter(3)
    return cp.Problem(cp.Minimize(cp.sum_squares(x - v) + cp.sum(a))), [a, v], [x]


@_case(
    "zero nonneg",
    lambda rng: (np.array([1.0, 2.0, -1.0]),),
    answer=lambda v: (np.array([0.0, 1.0, -1.0]),),
    regular=False,
)
def _weakly_active_inequality() -> Built:
    x, v = cp.Variable(3), cp.Parameter(3)
    target = v - np.array([1.0, 1.0, 0.0])
    return cp.Problem(cp.Minimize(cp.sum_squares(x - target)), [x[0] >= 0]), [v], [x]


# Attributes of variables and parameters


@_case(
    "zero nonneg",
    lambda rng: (2 * rng.standard_normal(3),),
    answer=lambda v: (np.maximum(v, 0), np.minimum(v, 0), np.maximum(v + 0.25, 0)),
)
def _signed_variables() -> Built:
    v = cp.Parameter(3)
    x, y, z = cp.Variable(3, nonneg=True), cp.Variable(3, nonpos=True), cp.Variable(3, pos=True)
    loss = cp.sum_squares(x - v) + cp.sum_squares(y - v) + cp.sum_squares(z - v - 0.25)
    return cp.Problem(cp.Minimize(loss)), [v], [x, y, z]


@_case(
    "zero",
    lambda rng: (rng.standard_normal((3, 3)),),
    answer=lambda C: ((C + C.T) / 2, np.diag(np.diag(C)), np.where(np.tri(3) == 0, C, 0)),
)
def _symmetric_diagonal_and_sparse_variables() -> Built:
    C = cp.Parameter((3, 3))
    X, D = cp.Variable((3, 3), symmetric=True), cp.Variable((3, 3), diag=True)
    S = cp.Variable((3, 3), sparsity=[(0, 0, 1), (1, 2, 2)])
    loss = cp.sum_squares(X - C) + cp.sum_squares(D - C) + cp.sum_squares(S - C)
    return cp.Problem(cp.Minimize(loss)), [C], [X, D, S]


def _attribute_sample(rng: Generator) -> Values:
    sparse = np.zeros((3, 3))
    sparse[[0, 2, 1], [2, 0, 1]] = rng.standard_normal(3)
    symmetric = rng.standard_normal((3, 3))
    return (
        symmetric + symmetric.T,
        np.diag(rng.uniform(1, 2, 3)),
        sparse,
        rng.uniform(0.5, 1.5, 3),
        rng.uniform(0.5, 1.5),
        -rng.uniform(0.5, 1.5, 3),
    )


@_case(
    "zero",
    _attribute_sample,
    answer=lambda S, D, T, weight, scale, shift: (
        (S + D + T) @ np.ones(3) + shift,
        1 / (weight + scale),
    ),
)
def _parameters_with_attributes() -> Built:
    S, D = cp.Parameter((3, 3), symmetric=True), cp.Parameter((3, 3), diag=True)
    T = cp.Parameter((3, 3), sparsity=[(0, 2, 1), (2, 0, 1)])
    weight, scale = cp.Parameter(3, nonneg=True), cp.Parameter(pos=True)
    shift = cp.Parameter(3, nonpos=True)
    x, y = cp.Variable(3), cp.Variable(3)
    loss = cp.sum_squares(x - (S + D + T) @ np.ones(3) - shift)
    loss += weight @ cp.square(y) + scale * cp.sum_squares(y) - 2 * cp.sum(y)
    return cp.Problem(cp.Minimize(loss)), [S, D, T, weight, scale, shift], [x, y]


# Second-order cones


@_case(
    "nonneg soc",
    lambda rng: (3 * rng.standard_normal(4), rng.uniform(0.5, 1.5)),
    answer=lambda v, r: (project_ball(v, r),),
)
def _ball_projection() -> Built:
    x, v, r = cp.Variable(4), cp.Parameter(4), cp.Parameter(nonneg=True)
    return cp.Problem(cp.Minimize(cp.norm(x - v)), [cp.norm(x) <= r]), [v, r], [x]


@_case(
    "zero nonneg soc",
    lambda rng: (3 * rng.standard_normal(4), rng.uniform(0.5, 1.5)),
    answer=lambda v, r: (project_ball(v, r),),
)
def _ball_projection_with_quadratic_objective() -> Built:
    x, v, r = cp.Variable(4), cp.Parameter(4), cp.Parameter(nonneg=True)
    return cp.Problem(cp.Minimize(cp.sum_squares(x - v)), [cp.norm(x) <= r]), [v, r], [x]


@_case(
    "soc",
    lambda rng: (rng.standard_normal(3), rng.uniform(0.5, 1.5)),
    answer=lambda c, r: (-r * c / np.linalg.norm(c), [np.linalg.norm(c)], c),
    value=lambda c, r: -r * np.linalg.norm(c),
)
def _linear_over_a_ball_with_dual() -> Built:
    x, c, r = cp.Variable(3), cp.Parameter(3), cp.Parameter(nonneg=True)
    ball = cp.SOC(r, x)
    return cp.Problem(cp.Minimize(c @ x), [ball]), [c, r], [x, *ball.dual_variables]


@_case(
    "zero nonneg soc",
    lambda rng: (2 * rng.standard_normal(6), rng.uniform(0.2, 0.5)),
    answer=lambda v, k: (np.concatenate([shrink(v[:1], k), shrink(v[1:3], k), shrink(v[3:], k)]),),
)
def _group_lasso_with_groups_of_several_sizes() -> Built:
    x, v, weight = cp.Variable(6), cp.Parameter(6), cp.Parameter(nonneg=True)
    groups = sum(cp.norm(x[part], 2) for part in (slice(0, 1), slice(1, 3), slice(3, 6)))
    return cp.Problem(cp.Minimize(cp.sum_squares(x - v) / 2 + weight * groups)), [v, weight], [x]


def _cubic_norm_maximiser(c: np.ndarray) -> tuple[np.ndarray]:
    scaled = np.sign(c) * np.sqrt(np.abs(c))
    return (scaled / (np.abs(scaled) ** 3).sum() ** (1 / 3),)


@_case(
    "zero nonneg power",
    lambda rng: (rng.choice([-1.0, 1.0], 3) * rng.uniform(0.5, 2.0, 3),),
    answer=_cubic_norm_maximiser,
    value=lambda c: (np.abs(c) ** 1.5).sum() ** (2 / 3),
)
def _linear_over_the_ball_of_the_3_norm() -> Built:
    x, c = cp.Variable(3), cp.Parameter(3)
    constraint = cp.pnorm(x, 3, approx=False) <= 1
    return cp.Problem(cp.Maximize(c @ x), [constraint]), [c], [x]


# Semidefinite cones


def _symmetric_sample(n: int) -> Callable[[Generator], Values]:
    def sample(rng: Generator) -> Values:
        matrix = rng.standard_normal((n, n))
        return ((matrix + matrix.T) / 2,)

    return sample


def _smallest_eigenvalue(n: int) -> Built:
    C, X = cp.Parameter((n, n), symmetric=True), cp.Variable((n, n), symmetric=True)
    problem = cp.Problem(cp.Minimize(cp.trace(C @ X)), [X >> 0, cp.trace(X) == 1])
    return problem, [C], [X, problem.constraints[0].dual_variables[0]]


def _eigenvalue_answer(C: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return smallest_eigenvector_product(C), C - np.linalg.eigvalsh(C)[0] * np.eye(len(C))


for _n in (2, 3, 5):

    def _build(n: int = _n) -> Built:
        return _smallest_eigenvalue(n)

    _build.__name__ = f"smallest_eigenvalue_of_order_{_n}"
    _case(
        "zero psd",
        _symmetric_sample(_n),
        answer=_eigenvalue_answer,
        value=lambda C: np.linalg.eigvalsh(C)[0],
    )(_build)


@_case(
    "zero psd",
    _symmetric_sample(4),
    answer=lambda C: (positive_part(C), positive_part(-C)),
    value=lambda C: (positive_part(-C) ** 2).sum() / 2,
)
def _nearest_psd_matrix_with_dual() -> Built:
    C, X = cp.Parameter((4, 4), symmetric=True), cp.Variable((4, 4), symmetric=True)
    psd = X >> 0
    problem = cp.Problem(cp.Minimize(cp.sum_squares(X - C) / 2), [psd])
    return problem, [C], [X, psd.dual_variables[0]]


@_case(
    "zero psd",
    lambda rng: (rng.standard_normal((3, 3)),),
    answer=lambda C: (positive_part((C + C.T) / 2), -positive_part(-(C + C.T) / 2)),
)
def _semidefinite_variables() -> Built:
    C = cp.Parameter((3, 3))
    X, Y = cp.Variable((3, 3), PSD=True), cp.Variable((3, 3), NSD=True)
    return cp.Problem(cp.Minimize(cp.sum_squares(X - C) + cp.sum_squares(Y - C))), [C], [X, Y]


@_case(
    "nonneg soc psd",
    _symmetric_sample(3),
    answer=lambda C: (positive_part(-C) / np.linalg.norm(positive_part(-C)),),
    value=lambda C: -np.linalg.norm(positive_part(-C)),
)
def _linear_over_psd_matrices_in_a_ball() -> Built:
    C, X = cp.Parameter((3, 3), symmetric=True), cp.Variable((3, 3), PSD=True)
    return cp.Problem(cp.Minimize(cp.trace(C @ X)), [cp.norm(X, "fro") <= 1]), [C], [X]


@_case(
    "zero psd",
    lambda rng: (2 * rng.standard_normal((3, 2)), rng.uniform(0.1, 0.4)),
    answer=lambda B, weight: (singular_value_threshold(B, weight),),
)
def _singular_value_threshold() -> Built:
    X, B, weight = cp.Variable((3, 2)), cp.Parameter((3, 2)), cp.Parameter(nonneg=True)
    loss = cp.sum_squares(X - B) / 2 + weight * cp.norm(X, "nuc")
    return cp.Problem(cp.Minimize(loss)), [B, weight], [X]


# Exponential cones


@_case(
    "zero exp",
    lambda rng: (2 * rng.standard_normal(5),),
    answer=lambda c: (softmax(c),),
    value=lambda c: np.log(np.exp(c).sum()),
)
def _softmax_as_entropy_maximisation() -> Built:
    x, c = cp.Variable(5), cp.Parameter(5)
    problem = cp.Problem(cp.Maximize(c @ x + cp.sum(cp.entr(x))), [cp.sum(x) == 1])
    return problem, [c], [x]


@_case(
    "zero nonneg exp",
    lambda rng: (softmax(rng.standard_normal(4)),),
    answer=lambda c: (np.log(c) - np.log(c).mean(),),
    value=lambda c: -(c @ np.log(c)),
)
def _log_sum_exp() -> Built:
    x, c = cp.Variable(4), cp.Parameter(4)
    return cp.Problem(cp.Minimize(cp.log_sum_exp(x) - c @ x), [cp.sum(x) == 0]), [c], [x]


def _logistic_regression_answer(A: np.ndarray, k: float) -> tuple[np.ndarray]:
    def slopes(x: np.ndarray) -> np.ndarray:
        return 1 / (1 + np.exp(-A @ x))

    return (
        minimise_by_newton(
            lambda x: A.T @ slopes(x) + 2 * k * x,
            lambda x: (A.T * (slopes(x) * (1 - slopes(x)))) @ A + 2 * k * np.eye(2),
            np.zeros(2),
        ),
    )


@_case(
    "nonneg exp",
    lambda rng: (rng.standard_normal((5, 2)), rng.uniform(0.3, 1.0)),
    answer=_logistic_regression_answer,
)
def _logistic_regression() -> Built:
    x, A, weight = cp.Variable(2), cp.Parameter((5, 2)), cp.Parameter(nonneg=True)
    loss = cp.sum(cp.logistic(A @ x)) + weight * cp.sum_squares(x)
    return cp.Problem(cp.Minimize(loss)), [A, weight], [x]


@_case(
    "exp",
    lambda rng: (rng.standard_normal(), rng.uniform(0.5, 2.0)),
    answer=lambda a, b: (b * np.exp(a / b), -np.exp(a / b), (a / b - 1) * np.exp(a / b), 1.0),
)
def _exponential_cone_with_duals() -> Built:
    z, a, b = cp.Variable(), cp.Parameter(), cp.Parameter(pos=True)
    cone = cp.ExpCone(a + 0 * z, b + 0 * z, z)
    return cp.Problem(cp.Minimize(z), [cone]), [a, b], [z, *cone.dual_variables]


@_case(
    "zero exp",
    lambda rng: (rng.uniform(0.5, 2.0, 4),),
    answer=lambda p: (p / p.sum(),),
    value=lambda p: -np.log(p.sum()) - 1 + p.sum(),
)
def _relative_entropy_projection() -> Built:
    x, p = cp.Variable(4), cp.Parameter(4, pos=True)
    return cp.Problem(cp.Minimize(cp.sum(cp.kl_div(x, p))), [cp.sum(x) == 1]), [p], [x]


@_case(
    "nonneg soc exp",
    lambda rng: (rng.uniform(0.5, 2.0, 3), rng.uniform(0.5, 2.0)),
    answer=lambda w, r: (r * np.sqrt(w / w.sum()),),
)
def _logarithms_over_a_ball() -> Built:
    x, w, r = cp.Variable(3), cp.Parameter(3, nonneg=True), cp.Parameter(nonneg=True)
    return cp.Problem(cp.Maximize(w @ cp.log(x)), [cp.norm(x) <= r]), [w, r], [x]


@_case(
    "psd exp",
    lambda rng: (_psd_sample(rng, 3),),
    answer=lambda S: (np.linalg.inv(S),),
    value=lambda S: -np.linalg.slogdet(S)[1] - 3,
)
def _inverse_as_log_determinant() -> Built:
    X, S = cp.Variable((3, 3), symmetric=True), cp.Parameter((3, 3), PSD=True)
    return cp.Problem(cp.Maximize(cp.log_det(X) - cp.trace(S @ X))), [S], [X]


# Power cones


def _budget_sample(rng: Generator) -> Values:
    return rng.uniform(0.5, 2.0), rng.uniform(0.5, 2.0), rng.uniform(1.0, 3.0)


def _budget_answer(p: float, q: float, b: float) -> tuple[float, ...]:
    x, y = 0.3 * b / p, 0.7 * b / q
    z = x**0.3 * y**0.7
    return x, y, z, z / b


@_case(
    "nonneg power", _budget_sample, answer=_budget_answer, value=lambda *v: _budget_answer(*v)[2]
)
def _weighted_geometric_mean_under_a_budget() -> Built:
    x, y, z = cp.Variable(), cp.Variable(), cp.Variable()
    p, q, b = cp.Parameter(pos=True), cp.Parameter(pos=True), cp.Parameter(pos=True)
    budget = p * x + q * y <= b
    problem = cp.Problem(cp.Maximize(z), [cp.PowCone3D(x, y, z, 0.3), budget])
    return problem, [p, q, b], [x, y, z, budget.dual_variables[0]]


_SHARES = np.array([0.2, 0.3, 0.5])


@_case(
    "nonneg power",
    lambda rng: (rng.uniform(0.5, 2.0, 3), rng.uniform(1.0, 3.0)),
    answer=lambda p, b: (_SHARES * b / p, np.prod((_SHARES * b / p) ** _SHARES)),
)
def _power_cone_of_several_dimensions() -> Built:
    w, z, p, b = cp.Variable(3), cp.Variable(), cp.Parameter(3, pos=True), cp.Parameter(pos=True)
    problem = cp.Problem(cp.Maximize(z), [cp.PowConeND(w, z, _SHARES), p @ w <= b])
    return problem, [p, b], [w, z]


@_case(
    "nonneg power",
    lambda rng: (rng.uniform(0.5, 3.0, 3),),
    answer=lambda c: ((c / 1.7) ** (1 / 0.7),),
)
def _power_of_variables() -> Built:
    x, c = cp.Variable(3), cp.Parameter(3)
    return cp.Problem(cp.Minimize(cp.sum(cp.power(x, 1.7, approx=False)) - c @ x)), [c], [x]


@_case(
    "nonneg soc power",
    lambda rng: (rng.uniform(0.5, 2.0),),
    answer=lambda r: (r * np.sqrt(0.3), r * np.sqrt(0.7)),
)
def _geometric_mean_over_a_ball() -> Built:
    x, y, z, r = cp.Variable(), cp.Variable(), cp.Variable(), cp.Parameter(nonneg=True)
    constraints = [cp.PowCone3D(x, y, z, 0.3), cp.norm(cp.hstack([x, y])) <= r]
    return cp.Problem(cp.Maximize(z), constraints), [r], [x, y]


@_case(
    "nonneg exp power",
    lambda rng: (rng.uniform(0.2, 0.8), rng.uniform(2.5, 4.0)),
    answer=lambda w, b: (
        w / (0.4**0.4 * 0.6**0.6),
        0.4 * (b - w / (0.4**0.4 * 0.6**0.6)),
        0.6 * (b - w / (0.4**0.4 * 0.6**0.6)),
    ),
)
def _logarithm_and_geometric_mean_share_a_budget() -> Built:
    t, x, y, z = (cp.Variable() for _ in range(4))
    w, b = cp.Parameter(nonneg=True), cp.Parameter(nonneg=True)
    constraints = [cp.PowCone3D(x, y, z, 0.4), t + x + y <= b]
    return cp.Problem(cp.Maximize(w * cp.log(t) + z), constraints), [w, b], [t, x, y]


@_case(
    "zero nonneg psd power",
    lambda rng: (rng.uniform(-0.3, 0.3), rng.uniform(1.0, 2.0)),
    answer=lambda c, b: (np.array([[0.4 * b, c], [c, 0.6 * b]]),),
)
def _geometric_mean_of_a_psd_diagonal() -> Built:
    X, z, c, b = cp.Variable((2, 2), PSD=True), cp.Variable(), cp.Parameter(), cp.Parameter()
    constraints = [cp.PowCone3D(X[0, 0], X[1, 1], z, 0.4), X[0, 1] == c, cp.trace(X) <= b]
    return cp.Problem(cp.Maximize(z), constraints), [c, b], [X]


# Geometric programs


@_case(
    "nonneg",
    lambda rng: (rng.uniform(0.5, 2.0), rng.uniform(0.5, 2.0), rng.uniform(0.5, 2.0)),
    answer=lambda a, b, c: (a * b, a * b * c),
    value=lambda a, b, c: 1 / (a * b * a * b * c),
    gp=True,
)
def _monomials() -> Built:
    x, y = cp.Variable(pos=True), cp.Variable(pos=True)
    a, b, c = (cp.Parameter(pos=True) for _ in range(3))
    problem = cp.Problem(cp.Minimize(1 / (x * y)), [x <= a * b, y / x <= c])
    return problem, [a, b, c], [x, y]


@_case(
    "nonneg exp",
    lambda rng: (rng.uniform(0.5, 2.0), rng.uniform(0.5, 2.0), rng.uniform(0.5, 2.0)),
    answer=lambda a, p, q: (np.sqrt(a * q / p), np.sqrt(a * p / q)),
    value=lambda a, p, q: 2 * np.sqrt(a * p * q),
    gp=True,
)
def _cheapest_rectangle_of_given_area() -> Built:
    x, y = cp.Variable(pos=True), cp.Variable(pos=True)
    a, p, q = (cp.Parameter(pos=True) for _ in range(3))
    return cp.Problem(cp.Minimize(p * x + q * y), [x * y >= a]), [a, p, q], [x, y]


@_case(
    "nonneg exp",
    lambda rng: (rng.uniform(0.5, 3.0, 3),),
    answer=lambda s: (1 / (3 * s),),
    value=lambda s: np.prod(1 / (3 * s)),
    gp=True,
)
def _largest_box_of_given_cost() -> Built:
    x, s = cp.Variable(3, pos=True), cp.Parameter(3, pos=True)
    return cp.Problem(cp.Maximize(cp.prod(x)), [s @ x <= 1]), [s], [x]


def case_named(name: str) -> Case:
    """The case of this name."""
    return next(case for case in CASES if case.name == name)
