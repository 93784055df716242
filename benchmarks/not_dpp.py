"""Convex problems that are not DPP: with and without what depends on parameters beforehand.

    python benchmarks/not_dpp.py [--batch 64] [--repeats 5]

Prints a table of medians of forward and backward pass together, in milliseconds. Without, every
element is a problem of its own for CVXPY, and the derivative that of a smooth nonlinear program.
"""

from __future__ import annotations

import argparse
import statistics
import time
import warnings
from collections.abc import Callable

import cvxpy as cp
import numpy as np
import torch
from torch import Tensor

import declarative_cvx as dcx
from declarative_cvx.conic_points import ConicSolver

Case = tuple[cp.Problem, list[cp.Parameter], list[cp.Variable], list[Tensor]]


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def risk_limit(batch: int, n: int = 20) -> Case:
    """Best return with x'Sx <= g^2."""
    x, m = cp.Variable(n), cp.Parameter(n)
    S, g = cp.Parameter((n, n), PSD=True), cp.Parameter(nonneg=True)
    constraints = [cp.quad_form(x, S) <= g * g, cp.sum(x) == 1, x >= 0]
    root = random(batch, n, n)
    covariance = root @ root.mT / n + 0.1 * torch.eye(n, dtype=torch.float64)
    values = [random(batch, n), covariance, 0.6 + random(batch).abs()]
    return cp.Problem(cp.Maximize(m @ x), constraints), [m, S, g], [x], values


def weighted_fit(batch: int, n: int = 20) -> Case:
    """Least p |Ax - b|^2 + p q |x|_1 + |x|^2 in a box."""
    x, A, b = cp.Variable(n), cp.Parameter((30, n)), cp.Parameter(30)
    p, q = cp.Parameter(nonneg=True), cp.Parameter(nonneg=True)
    objective = p * cp.sum_squares(A @ x - b) + p * q * cp.norm1(x) + cp.sum_squares(x)
    problem = cp.Problem(cp.Minimize(objective), [cp.norm_inf(x) <= 1])
    values = [random(batch, 30, n), random(batch, 30), *random(2, batch).abs()]
    return problem, [A, b, p, q], [x], values


def kink(batch: int, n: int = 20) -> Case:
    """Least |x - q p| + |x - 1|^2 / 10 with x >= 0, whose solution is often q p."""
    x, p, q = cp.Variable(n), cp.Parameter(n), cp.Parameter()
    objective = cp.norm(x - q * p) + 0.1 * cp.sum_squares(x - 1)
    values = [random(batch, n).abs() + 0.5, random(batch).abs() + 0.5]
    return cp.Problem(cp.Minimize(objective), [x >= 0]), [p, q], [x], values


def correlation(batch: int, n: int = 6) -> Case:
    """Nearest semidefinite matrix to q C with the diagonal p^2."""
    X, C = cp.Variable((n, n), PSD=True), cp.Parameter((n, n), symmetric=True)
    p, q = cp.Parameter(nonneg=True), cp.Parameter()
    problem = cp.Problem(cp.Minimize(cp.sum_squares(X - q * C)), [cp.diag(X) == p * p])
    half = random(batch, n, n)
    return problem, [C, p, q], [X], [half + half.mT, 0.5 + random(batch).abs(), random(batch)]


CASES: dict[str, Callable[[int], Case]] = {
    "limit on x'Px": risk_limit,
    "weights times a fit": weighted_fit,
    "norm with a kink": kink,
    "semidefinite, order 6": correlation,
}


def measure(case: Case, repeats: int, **options: object) -> tuple[float, int]:
    """Median of milliseconds after a first call, and how many elements are solved."""
    problem, parameters, variables, values = case
    layer = dcx.DeclarativeLayer(problem, parameters, variables, on_irregular="ignore", **options)
    inputs = [value.requires_grad_() for value in values]
    times = []
    for _ in range(repeats + 1):
        began = time.perf_counter()
        solution = layer.solve(*inputs)
        solution.variables[0].nansum().backward()
        times.append(1e3 * (time.perf_counter() - began))
    return statistics.median(times[1:]), int(solution.solved.sum())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5)
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    np.seterr(all="ignore")
    print(f"| batch of {given.batch} | beforehand | solved | one by one | solved | ratio |")
    print("| --- | --- | --- | --- | --- | --- |")
    for name, make in CASES.items():
        torch.manual_seed(0)
        case = make(given.batch)
        quick, solved = measure(case, given.repeats)
        slow, settled = measure(case, 1, solver=ConicSolver())
        print(
            f"| {name} | {quick:.0f} | {solved} | {slow:.0f} | {settled} | {slow / quick:.1f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
