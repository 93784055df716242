"""The Maros-Meszaros quadratic programs as layers: is any answer silently wrong?

    python benchmarks/maros_meszaros.py --data PATH

PATH holds the public test set as MATLAB files (P, q, r, A, l, u for minimise 1/2 x'P x + q'x + r
subject to l <= A x <= u, where the last rows of A are the identity: bounds). Linear cost and
right-hand sides are parameters; each instance is solved as a batch of itself and three perturbed
costs, at default settings. Every answer is judged by its optimality conditions in the units of the
file, computed here in NumPy from the file's data and the layer's outputs alone.

Instances with fewer than 1000 variables are taken: 70 of the set's 138, among them all 62 whose
variables and rows (without bounds) are 1000 at most.
"""

from __future__ import annotations

import argparse
import time
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import cvxpy as cp
import numpy as np
import scipy.io
import scipy.sparse as sp
import torch
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

import declarative_cvx as dcx

INFINITY = 1e20
# Largest relative violation of the optimality conditions of an answer that is called right.
RIGHT = 1e-6
PERTURBATIONS = 3


@dataclass(frozen=True)
class Instance:
    """Data of one file."""

    name: str
    P: sp.csc_matrix
    q: np.ndarray
    A: sp.csr_matrix
    lower: np.ndarray
    upper: np.ndarray

    @classmethod
    def read(cls, path: Path) -> Instance:
        data = scipy.io.loadmat(path)
        flat = {key: np.asarray(data[key], float).ravel() for key in ("q", "l", "u")}
        P, A = sp.csc_matrix(data["P"]).astype(float), sp.csr_matrix(data["A"]).astype(float)
        return cls(path.stem, P, flat["q"], A, flat["l"], flat["u"])

    @property
    def variables(self) -> int:
        return self.A.shape[1]

    @property
    def rows(self) -> int:
        """Rows that are not bounds."""
        return self.A.shape[0] - self.A.shape[1]

    def groups(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Rows that are equalities, that have an upper bound, that have a lower bound."""
        equal = self.lower == self.upper
        return equal, ~equal & (self.upper < INFINITY), ~equal & (self.lower > -INFINITY)


def build(instance: Instance) -> tuple[dcx.DeclarativeLayer, list[torch.Tensor], tuple]:
    """The layer, a batch of values, and the groups of rows whose duals follow x in its outputs."""
    n = instance.A.shape[1]
    x, q = cp.Variable(n), cp.Parameter(n)
    groups = instance.groups()
    bounds = (instance.upper, instance.upper, instance.lower)
    parameters, constraints = [q], []
    rng = np.random.default_rng(0)
    scale = np.abs(instance.q).max() or 1.0
    costs = [instance.q + 1e-2 * scale * k * rng.normal(size=n) for k in (0, 1, 1, 1)]
    values = [torch.tensor(np.stack(costs[: PERTURBATIONS + 1]))]
    used = []
    for kind, (rows, bound) in enumerate(zip(groups, bounds, strict=True)):
        if not rows.any():
            continue
        b = cp.Parameter(int(rows.sum()))
        left = instance.A[rows] @ x
        constraints.append([left == b, left <= b, left >= b][kind])
        parameters.append(b)
        values.append(torch.tensor(bound[rows]))
        used.append((kind, rows))
    objective = cp.quad_form(x, cp.psd_wrap(instance.P)) / 2 + q @ x
    problem = cp.Problem(cp.Minimize(objective), constraints)
    outputs = [x, *(constraint.dual_variables[0] for constraint in constraints)]
    layer = dcx.DeclarativeLayer(problem, parameters, outputs, on_failure="nan")
    return layer, values, tuple(used)


def violation(
    instance: Instance, used: tuple, q: np.ndarray, x: np.ndarray, duals: list[np.ndarray]
) -> float:
    """Largest violation of the optimality conditions, relative to the terms in each of them."""
    y = np.zeros(instance.A.shape[0])
    sign_error = 0.0
    for (kind, rows), dual in zip(used, duals, strict=True):
        y[rows] += -dual if kind == 2 else dual
        if kind:
            sign_error = max(sign_error, float(-dual.min()) / max(np.abs(dual).max(), 1.0))
    Ax, Px, Aty = instance.A @ x, instance.P @ x, instance.A.T @ y
    outside = np.maximum(Ax - instance.upper, instance.lower - Ax).clip(min=0).max(initial=0)
    finite = np.where(np.abs(instance.upper) < INFINITY, instance.upper, 0.0)
    sizes = [np.abs(Ax).max(initial=0), np.abs(finite).max(initial=0), 1.0]
    primal = outside / max(sizes)
    stationary = np.abs(Px + q + Aty).max() / max(
        np.abs(Px).max(), np.abs(q).max(), np.abs(Aty).max(), 1.0
    )
    by_bounds = np.where(
        y > 0, finite, np.where(np.abs(instance.lower) < INFINITY, instance.lower, 0.0)
    )
    value, dual_value = x @ Px / 2 + q @ x, -x @ Px / 2 - y @ by_bounds
    gap = abs(value - dual_value) / max(abs(value), abs(x @ Px), abs(q @ x), 1.0)
    return max(primal, stationary, gap, sign_error)


@dataclass(frozen=True)
class Row:
    """What happened to one instance: numbers of elements, and times in seconds."""

    name: str
    variables: int
    rows: int
    right: int = 0
    wrong: int = 0
    flags: tuple[str, ...] = ()
    worst: float = 0.0
    irregular: int = 0
    solvers: str = ""
    forward: float = 0.0
    backward: float = 0.0


def run(instance: Instance) -> Row:
    """What happens to a batch; an instance that is not convex is refused as a whole."""
    try:
        return _solved(instance)
    except dcx.SpecificationError:
        flags = ("not convex",) * (PERTURBATIONS + 1)
        return Row(instance.name, instance.variables, instance.rows, flags=flags)


def _solved(instance: Instance) -> Row:
    """Solve the batch, judge it, and differentiate it."""
    layer, values, used = build(instance)
    leaves = [value.requires_grad_() for value in values]
    began = time.perf_counter()
    solution = layer.solve(*leaves)
    forward = time.perf_counter() - began
    x, *duals = (output.detach().numpy() for output in solution.variables)
    costs = values[0].detach().numpy()
    right = wrong = 0
    flags: list[str] = []
    worst = 0.0
    for i, status in enumerate(solution.status):
        if not status.solved:
            flags.append(status.name.lower())
            continue
        found = violation(instance, used, costs[i], x[i], [dual[i] for dual in duals])
        worst = max(worst, found)
        right, wrong = (right + 1, wrong) if found <= RIGHT else (right, wrong + 1)
    began = time.perf_counter()
    if right:
        solution.variables[0].nansum().backward()
    backward = time.perf_counter() - began
    irregular = int((~solution.derivative.regular & solution.cone.solved).sum())
    names = ", ".join(dict.fromkeys(solution.backend))
    return Row(
        instance.name, instance.variables, instance.rows, right, wrong, tuple(flags), worst,
        irregular, names, forward, backward,
    )  # fmt: skip


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder of the .mat files")
    parser.add_argument("--variables", type=int, default=1000, help="only instances with fewer")
    parser.add_argument("--only", default="", help="instances whose names contain this")
    options = parser.parse_args(arguments)
    warnings.simplefilter("ignore")
    paths = sorted(path for path in options.data.glob("*.mat") if options.only in path.stem)
    instances = [Instance.read(path) for path in paths]
    chosen = [instance for instance in instances if instance.variables < options.variables]
    _show([run(instance) for instance in tqdm(chosen, leave=False)])


def _show(rows: list[Row]) -> None:
    table = Table(title="Maros-Meszaros problems as layers, batches of 4, default settings")
    for column in (
        "problem", "n", "m", "right", "flagged", "wrong", "largest violation", "irregular",
        "solver", "forward s", "backward s",
    ):  # fmt: skip
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(
            row.name, str(row.variables), str(row.rows), str(row.right), _counts(row.flags),
            f"[red]{row.wrong}" if row.wrong else "0", f"{row.worst:.0e}", str(row.irregular),
            row.solvers, f"{row.forward:.2f}", f"{row.backward:.2f}",
        )  # fmt: skip
    console = Console(width=150)
    console.print(table)
    right, wrong = sum(row.right for row in rows), sum(row.wrong for row in rows)
    flags = [flag for row in rows for flag in row.flags]
    minutes = sum(row.forward + row.backward for row in rows) / 60
    console.print(
        f"{len(rows)} problems, {right + wrong + len(flags)} elements: {right} right, "
        f"{len(flags)} flagged ({_counts(flags)}), {wrong} silently wrong (violation above "
        f"{RIGHT:.0e}). {minutes:.1f} minutes."
    )


def _counts(flags: Sequence[str]) -> str:
    return ", ".join(f"{count} {flag}" for flag, count in Counter(flags).items())


if __name__ == "__main__":
    main()
