"""Semidefinite programs."""

from __future__ import annotations

import cvxpy as cp
import numpy as np
import torch
from torch import Tensor

from collection.oracles import System, closed, stationary
from collection.problem import Built, Collector

PROBLEMS = Collector()


def _symmetric(seed: int, n: int) -> np.ndarray:
    matrix = np.random.default_rng(seed).standard_normal((n, n))
    return (matrix + matrix.T) / 2


def _factor(X: np.ndarray) -> np.ndarray:
    """V with X = V V' and as many columns as X has eigenvalues that are not small."""
    values, vectors = np.linalg.eigh(X)
    large = values > 1e-5 * values[-1]
    return vectors[:, large] * np.sqrt(values[large])


def _positive_part(C: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(C)
    return (vectors * torch.clamp(values, min=0)) @ vectors.T


# Nearest correlation matrix: X is the positive part of C + diag(y)


def _correlation() -> Built:
    X, C = cp.Variable((5, 5), symmetric=True), cp.Parameter((5, 5), symmetric=True)
    problem = cp.Problem(cp.Minimize(cp.sum_squares(X - C) / 2), [X >> 0, cp.diag(X) == 1])
    return problem, [C], [X]


def _correlation_system(C: np.ndarray, X: np.ndarray) -> System:
    # where X is singular, its diagonal part y follows from X (X - C - diag(y)) = 0 by rows
    values, vectors = np.linalg.eigh(X)
    on = vectors[:, values > 1e-5]
    # on' (X - C) = on' diag(y), least squares over y
    y = np.array([(on[i] @ (on.T @ (X - C))[:, i]) / (on[i] @ on[i]) for i in range(5)])

    def equations(y: Tensor, C: Tensor) -> Tensor:
        return torch.diag(_positive_part(C + torch.diag(y))) - 1

    return System(y, equations, lambda y, C: (_positive_part(C + torch.diag(y)),))


PROBLEMS.add(
    "SDP",
    (_symmetric(1, 5) + 0.5 * np.eye(5),),
    stationary(_correlation_system, _correlation),
    name="nearest_correlation_matrix",
)(_correlation)


# X = V V': the freedom to rotate V does not reach X


def _cut(n: int, seed: int) -> None:
    """Add a relaxation of order n."""

    def build() -> Built:
        X, C = cp.Variable((n, n), symmetric=True), cp.Parameter((n, n), symmetric=True)
        problem = cp.Problem(cp.Maximize(cp.trace(C @ X)), [X >> 0, cp.diag(X) == 1])
        return problem, [C], [X]

    def setup(C: np.ndarray, X: np.ndarray) -> System:
        V = _factor(X)

        def split(z: Tensor) -> tuple[Tensor, Tensor]:
            return z[: V.size].reshape(V.shape), z[V.size :]

        def equations(z: Tensor, C: Tensor) -> Tensor:
            V, y = split(z)
            C = (C + C.T) / 2
            return torch.cat([((torch.diag(y) - C) @ V).reshape(-1), (V**2).sum(1) - 1])

        def outputs(z: Tensor, C: Tensor) -> tuple[Tensor]:
            V = split(z)[0]
            return (V @ V.T,)

        def holds(z: np.ndarray) -> bool:
            slack = np.linalg.eigvalsh(np.diag(z[V.size :]) - C)
            rank = V.shape[1]
            return bool(slack[rank] > 1e-6 and abs(slack[rank - 1]) < 1e-10)

        start = np.concatenate([V.ravel(), np.diag(C @ X)])
        return System(start, equations, outputs, gauge=True, holds=holds)

    PROBLEMS.add(
        "SDP", (_symmetric(seed, n),), stationary(setup, build), name=f"maximum_cut_relaxation_{n}"
    )(build)


_cut(4, 2)
_cut(8, 3)
_cut(20, 4)


def _spread() -> Built:
    x, t = cp.Variable(3), cp.Variable()
    parts = [cp.Parameter((4, 4), symmetric=True) for _ in range(4)]
    matrix = parts[0] + sum(x[i] * parts[i + 1] for i in range(3))
    return cp.Problem(cp.Minimize(t), [matrix << t * np.eye(4)]), parts, [x, t]


def _spread_system(*given: np.ndarray) -> System:
    *matrices, x, t = given
    A = matrices[0] + np.tensordot(x, matrices[1:], 1)
    values, vectors = np.linalg.eigh(A)
    V = vectors[:, values > t - 1e-5]
    rank = V.shape[1]
    # multiplier V S V' with trace one, orthogonal to the A_i
    basis = [np.outer(V[:, i], V[:, j]) for i in range(rank) for j in range(rank)]
    rows = np.array([[np.trace(M @ B) for B in basis] for M in (np.eye(4), *matrices[1:])])
    S = np.linalg.lstsq(rows, np.eye(4)[0])[0].reshape(rank, rank)
    W = V @ np.linalg.cholesky((S + S.T) / 2)

    def split(z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return z[: W.size].reshape(W.shape), z[W.size : -1], z[-1]

    def equations(z: Tensor, *matrices: Tensor) -> Tensor:
        W, x, t = split(z)
        A, *parts = ((M + M.T) / 2 for M in matrices)
        gap = t * torch.eye(4, dtype=z.dtype) - A - sum(x[i] * M for i, M in enumerate(parts))
        sums = [(W * (M @ W)).sum() for M in parts]
        return torch.cat([(gap @ W).reshape(-1), (W * W).sum()[None] - 1, torch.stack(sums)])

    def holds(z: np.ndarray) -> bool:
        top = np.linalg.eigvalsh(matrices[0] + np.tensordot(z[W.size : -1], matrices[1:], 1))
        return bool(top[-1] < z[-1] + 1e-10 and top[-rank - 1] < z[-1] - 1e-6)

    start = np.concatenate([W.ravel(), x, [t]])
    return System(start, equations, lambda z, *_: split(z)[1:], gauge=True, holds=holds)


PROBLEMS.add(
    "SDP",
    tuple(_symmetric(10 + i, 4) for i in range(4)),
    stationary(_spread_system, _spread),
    name="smallest_largest_eigenvalue",
)(_spread)


# Nuclear norm: X = U V', with U = Y V and V = Y' U for a multiplier Y on the known entries


_rng = np.random.default_rng(3)
_KNOWN = _rng.random((5, 4)) < 0.6
_FULL = np.outer(_rng.standard_normal(5), _rng.standard_normal(4))
_FULL = _FULL + 0.3 * _rng.standard_normal((5, 4))


def _completion() -> Built:
    X, M = cp.Variable((5, 4)), cp.Parameter(int(_KNOWN.sum()))
    rows, cols = np.where(_KNOWN)
    return cp.Problem(cp.Minimize(cp.normNuc(X)), [X[rows, cols] == M]), [M], [X]


def _completion_system(M: np.ndarray, X: np.ndarray) -> System:
    rows, cols = np.where(_KNOWN)
    left, sizes, right = np.linalg.svd(X, full_matrices=False)
    rank = int((sizes > 1e-5 * sizes[0]).sum())
    U, V = left[:, :rank] * np.sqrt(sizes[:rank]), right[:rank].T * np.sqrt(sizes[:rank])

    def spread(y: Tensor) -> Tensor:
        index = torch.tensor(rows * 4 + cols)
        return torch.zeros(20, dtype=y.dtype).index_copy(0, index, y).reshape(5, 4)

    def split(z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        U, V = z[: 5 * rank].reshape(5, rank), z[5 * rank : 9 * rank].reshape(4, rank)
        return U, V, z[9 * rank :]

    def equations(z: Tensor, M: Tensor) -> Tensor:
        U, V, y = split(z)
        Y = spread(y)
        misfit = (U @ V.T)[rows, cols] - M
        return torch.cat([(U - Y @ V).reshape(-1), (V - Y.T @ U).reshape(-1), misfit])

    # multiplier nearest to the solver's conditions
    first = torch.func.jacrev(
        lambda y: torch.cat(
            [
                (spread(y) @ torch.tensor(V)).reshape(-1),
                (spread(y).T @ torch.tensor(U)).reshape(-1),
            ]
        )
    )(torch.zeros(len(rows), dtype=torch.float64)).numpy()
    y = np.linalg.lstsq(first, np.concatenate([U.ravel(), V.ravel()]))[0]

    def outputs(z: Tensor, M: Tensor) -> tuple[Tensor]:
        U, V, _ = split(z)
        return (U @ V.T,)

    def holds(z: np.ndarray) -> bool:
        Y = spread(torch.tensor(z[9 * rank :])).numpy()
        sizes = np.linalg.svd(Y, compute_uv=False)
        return bool(sizes[0] < 1 + 1e-10 and sizes[rank] < 1 - 1e-6)

    start = np.concatenate([U.ravel(), V.ravel(), y])
    return System(start, equations, outputs, gauge=True, holds=holds)


PROBLEMS.add(
    "SDP",
    (_FULL[_KNOWN],),
    stationary(_completion_system, _completion),
    name="matrix_completion",
)(_completion)


# Determinants


def _covariance_sample(seed: int, n: int) -> np.ndarray:
    draws = np.random.default_rng(seed).standard_normal((3 * n, n))
    return draws.T @ draws / (3 * n)


def _inverse(S: Tensor, k: Tensor) -> tuple[Tensor]:
    return (torch.linalg.inv((S + S.T) / 2 + k * torch.eye(4, dtype=S.dtype)),)


@PROBLEMS.add("mixed", (_covariance_sample(22, 4), 0.2), closed(_inverse))
def _log_determinant_with_trace_penalty() -> Built:
    X, S = cp.Variable((4, 4), PSD=True), cp.Parameter((4, 4), symmetric=True)
    k = cp.Parameter(nonneg=True)
    loss = cp.trace(S @ X) + k * cp.trace(X) - cp.log_det(X)
    return cp.Problem(cp.Minimize(loss)), [S, k], [X]


def _graph() -> Built:
    X, S = cp.Variable((4, 4), symmetric=True), cp.Parameter((4, 4), symmetric=True)
    k = cp.Parameter(nonneg=True)
    off = 1 - np.eye(4)
    loss = cp.trace(S @ X) - cp.log_det(X) + k * cp.sum(cp.abs(cp.multiply(off, X)))
    return cp.Problem(cp.Minimize(loss)), [S, k], [X]


def _graph_system(S: np.ndarray, k: np.ndarray, X: np.ndarray) -> System:
    rows, cols = np.where(np.tril(np.abs(X) > 1e-6))
    sign = torch.tensor(np.sign(X[rows, cols]) * (rows != cols))

    def matrix(z: Tensor) -> Tensor:
        lower = torch.zeros(16, dtype=z.dtype)
        lower = lower.index_copy(0, torch.tensor(rows * 4 + cols), z).reshape(4, 4)
        return lower + lower.T - torch.diag(torch.diag(lower))

    def equations(z: Tensor, S: Tensor, k: Tensor) -> Tensor:
        slope = (S + S.T) / 2 - torch.linalg.inv(matrix(z))
        return slope[rows, cols] + k * sign

    def holds(z: np.ndarray) -> bool:
        slope = np.abs(S - np.linalg.inv(matrix(torch.tensor(z)).numpy()))
        zero = np.ones((4, 4), dtype=bool)
        zero[rows, cols] = zero[cols, rows] = False
        return bool((slope[zero] < k - 1e-6).all())

    return System(X[rows, cols], equations, lambda z, *_: (matrix(z),), holds=holds)


PROBLEMS.add(
    "mixed",
    (_covariance_sample(23, 4), 0.15),
    stationary(_graph_system, _graph),
    name="graphical_lasso",
)(_graph)


def _design() -> Built:
    w, V = cp.Variable(6, nonneg=True), cp.Parameter((6, 3))
    root = np.random.default_rng(24).standard_normal((6, 3))
    information = sum(w[i] * np.outer(root[i], root[i]) for i in range(6))
    loss = -cp.log_det(information) + cp.sum(cp.multiply(V @ np.ones(3), w))
    return cp.Problem(cp.Minimize(loss), [cp.sum(w) == 1]), [V], [w]


def _design_system(V: np.ndarray, w: np.ndarray) -> System:
    root = torch.tensor(np.random.default_rng(24).standard_normal((6, 3)))
    on = np.where(w > 1e-6)[0]

    def slope(w: Tensor, V: Tensor) -> Tensor:
        inverse = torch.linalg.inv((root * w[:, None]).T @ root)
        return V.sum(1) - ((root @ inverse) * root).sum(1)

    def full(z: Tensor) -> Tensor:
        return torch.zeros(6, dtype=z.dtype).index_copy(0, torch.tensor(on), z[:-1])

    def equations(z: Tensor, V: Tensor) -> Tensor:
        return torch.cat([slope(full(z), V)[on] + z[-1], z[:-1].sum()[None] - 1])

    def holds(z: np.ndarray) -> bool:
        pull = slope(full(torch.tensor(z)), torch.tensor(V)).numpy() + z[-1]
        return bool((np.delete(pull, on) > 1e-6).all() and (z[:-1] > 0).all())

    level = -slope(torch.tensor(w), torch.tensor(V)).numpy()[on].mean()
    return System(np.append(w[on], level), equations, lambda z, V: (full(z),), holds=holds)


PROBLEMS.add(
    "mixed",
    (0.3 * np.random.default_rng(25).standard_normal((6, 3)),),
    stationary(_design_system, _design),
    name="optimal_design_of_experiments",
)(_design)
