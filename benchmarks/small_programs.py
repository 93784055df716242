"""Time of forward passes of small linear and quadratic programs, solver by solver.

    python benchmarks/small_programs.py

All solvers in one process on the same data, one call for a batch, with all checks; medians in
milliseconds, and how many elements were solved where it was not all of them.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import cvxpy as cp
import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

import declarative_cvx as dcx

SOLVERS = ("DualActiveSet", "Moreau", "Clarabel")
BATCHES = (1, 64)
Built = tuple[cp.Problem, list[cp.Parameter], list[cp.Variable]]


@dataclass(frozen=True)
class Family:
    """A problem whose parameters are drawn from the normal distribution."""

    name: str
    build: Callable[[], Built]


def linear(n: int, m: int) -> Family:
    """A linear program in a box, with m further rows."""

    def build() -> Built:
        x, c, A = cp.Variable(n), cp.Parameter(n), cp.Parameter((m, n))
        return cp.Problem(cp.Minimize(c @ x), [A @ x <= 1, x >= -10, x <= 10]), [c, A], [x]

    return Family(f"linear program, {n} x {m + 2 * n}", build)


def lasso(n: int, m: int) -> Family:
    """Least squares of m rows with an l1 penalty."""

    def build() -> Built:
        x, A, b = cp.Variable(n), cp.Parameter((m, n)), cp.Parameter(m)
        return cp.Problem(cp.Minimize(cp.sum_squares(A @ x - b) + cp.norm1(x))), [A, b], [x]

    return Family(f"lasso, {n} coefficients, {m} rows", build)


def portfolio(n: int) -> Family:
    """Return less risk by a factor model, on the simplex."""

    def build() -> Built:
        w, r = cp.Variable(n), cp.Parameter(n)
        factors = np.random.default_rng(0).normal(size=(n, n // 4))
        value = r @ w - cp.sum_squares(factors.T @ w)
        return cp.Problem(cp.Maximize(value), [cp.sum(w) == 1, w >= 0]), [r], [w]

    return Family(f"portfolio, {n} assets", build)


def support_vectors(n: int, m: int) -> Family:
    """A linear support vector machine of m points."""

    def build() -> Built:
        w, b, X = cp.Variable(n), cp.Variable(), cp.Parameter((m, n))
        labels = np.sign(np.random.default_rng(0).normal(size=m))
        loss = cp.sum(cp.pos(1 - cp.multiply(labels, X @ w + b)))
        return cp.Problem(cp.Minimize(loss + 0.1 * cp.sum_squares(w))), [X], [w]

    return Family(f"support vectors, {m} points", build)


def control(steps: int, states: int = 4, inputs: int = 2) -> Family:
    """Predictive control of a linear system with bounded inputs."""

    def build() -> Built:
        rng = np.random.default_rng(0)
        A = np.eye(states) + 0.1 * rng.normal(size=(states, states))
        B = rng.normal(size=(states, inputs))
        x, u = cp.Variable((steps + 1, states)), cp.Variable((steps, inputs))
        start = cp.Parameter(states)
        dynamics = [x[t + 1] == A @ x[t] + B @ u[t] for t in range(steps)]
        cost = cp.sum_squares(x[1:]) + 0.1 * cp.sum_squares(u)
        return (
            cp.Problem(cp.Minimize(cost), [x[0] == start, *dynamics, cp.abs(u) <= 0.5]),
            [start],
            [u],
        )

    return Family(f"predictive control, {steps} steps", build)


FAMILIES = (
    linear(10, 20),
    linear(40, 80),
    linear(100, 100),
    lasso(20, 30),
    lasso(40, 60),
    portfolio(20),
    portfolio(100),
    support_vectors(5, 50),
    control(5),
    control(15),
    control(30),
)


def measure(family: Family, solver: str, batch: int, repeats: int) -> str:
    """Median milliseconds of a call, and how many elements were solved if not all."""
    problem, parameters, variables = family.build()
    layer = dcx.DeclarativeLayer(problem, parameters, variables, solver=solver, on_failure="nan")
    generator = torch.Generator().manual_seed(0)
    values = [
        torch.randn(batch, *p.shape, dtype=torch.float64, generator=generator) for p in parameters
    ]
    solved, times = int(layer.solve(*values).solved.sum()), []
    for _ in range(repeats):
        began = time.perf_counter()
        layer.solve(*values)
        times.append(1e3 * (time.perf_counter() - began))
    text = f"{statistics.median(times):.1f}"
    return text if solved == batch else f"{text} ({solved} solved)"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=7)
    options = parser.parse_args()
    table = Table("problem", "batch", *SOLVERS)
    cases = [(family, batch) for family in FAMILIES for batch in BATCHES]
    for family, batch in tqdm(cases):
        found = [measure(family, solver, batch, options.repeats) for solver in SOLVERS]
        table.add_row(family.name, str(batch), *found)
    Console().print(table)


if __name__ == "__main__":
    main()
