"""Time of forward and backward passes of smooth nonconvex layers, against a loop over IPOPT.

    pip install -e '.[bench]' && pip install cyipopt && python benchmarks/nonconvex.py

The reference solves the same CVXPY problems one by one, ``problem.solve(nlp=True, solver=IPOPT)``,
from the same starting point, and differentiates nothing; it is timed on some elements of a batch.
Both run in one process; times are medians; the ratio is what carries over to other machines.
Without IPOPT only this library is measured. ``--scaling`` shows times against the size of the batch
and the number of variables instead.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeVar

import cvxpy as cp
import numpy as np
import torch
from nonconvex_problems import (
    CASES,
    Arrays,
    Case,
    circle_packing,
    ellipsoid_projection,
    hock_schittkowski_71,
    path_planning,
    rosenbrock,
)
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

import declarative_cvx as dcx

Answer = TypeVar("Answer")
BATCHES = (1, 64, 1024)
SCALING_BATCHES = (1, 4, 16, 64, 256, 1024, 4096)
SCALING_SIZES = (10, 30, 100, 300, 1000)
AGREE = 1e-6
ADVICE = (
    "IPOPT is not installed, so nothing is compared. To have it: pip install cyipopt (where no "
    "wheel fits, with Debian's coinor-libipopt-dev, or against the library in the casadi wheel)."
)


# --- measurements --------------------------------------------------------------------------------


def measure(work: Callable[[], Answer], seconds: float) -> tuple[float, Answer]:
    """Median time of a call, of about so many seconds, and an answer.

    The first call does not count, unless it takes that long itself.
    """
    times: list[float] = []
    while not times or (sum(times[1:]) < seconds > times[0] and len(times) < 50):
        began = time.perf_counter()
        answer = work()
        times.append(time.perf_counter() - began)
    return statistics.median(times[1:] or times), answer


@dataclass(frozen=True)
class Pass:
    """What a layer says to a batch: objective values, statuses, gradients of a fixed loss."""

    values: np.ndarray
    solved: np.ndarray
    gradients: list[torch.Tensor]


def pass_over(layer: dcx.DeclarativeLayer, values: Arrays) -> Pass:
    """One forward and backward pass."""
    leaves = [torch.tensor(value, requires_grad=True) for value in values]
    solution = layer.solve(*leaves)
    loss_of(solution, len(values[0])).sum().backward()
    solved = np.array([status is dcx.Status.OPTIMAL for status in solution.status])
    return Pass(solution.value.detach().numpy(), solved, [leaf.grad for leaf in leaves])


def loss_of(solution: dcx.Solution, batch: int) -> torch.Tensor:
    """A weighted sum of the solution's entries for each element."""
    flat = torch.cat([v.reshape(batch, -1) for v in solution.variables], 1)
    flat = torch.where(torch.isnan(flat), 0.0, flat)
    return (torch.cos(torch.arange(flat.shape[1], dtype=flat.dtype)) * flat).sum(1)


def gradient_error(layer: dcx.DeclarativeLayer, values: Arrays, found: Pass) -> float:
    """Median difference from central differences along a direction, relative to its terms."""
    rng, count = np.random.default_rng(0), min(len(values[0]), 16)
    steps = [np.abs(v).mean() * rng.uniform(-1, 1, v.shape)[:count] for v in values]

    def loss(width: float) -> np.ndarray:
        moved = [torch.tensor(v[:count] + width * d) for v, d in zip(values, steps, strict=True)]
        return loss_of(layer.solve(*moved), count).detach().numpy()

    width = 1e-4
    slope = (8 * (loss(width) - loss(-width)) - loss(2 * width) + loss(-2 * width)) / (12 * width)
    terms = [
        (g[:count].numpy() * d).reshape(count, -1)
        for g, d in zip(found.gradients, steps, strict=True)
    ]
    flat = np.concatenate(terms, 1)
    error = np.abs(flat.sum(1) - slope) / np.maximum(np.abs(flat).sum(1), 1e-12)
    return float(np.median(error[found.solved[:count]]))


class Reference:
    """A loop over IPOPT."""

    def __init__(self, case: Case) -> None:
        self.problem, self.parameters, self.variables = case.build()
        self.starts = [np.array(variable.value) for variable in self.variables]

    def solve(self, values: Arrays) -> np.ndarray:
        """Optimal values, NaN where it failed."""
        return np.array([self._solve_one(one) for one in zip(*values, strict=True)])

    def _solve_one(self, values: tuple[np.ndarray, ...]) -> float:
        for leaf, value in zip(self.parameters, values, strict=True):
            leaf.value = value
        for variable, value in zip(self.variables, self.starts, strict=True):
            variable.value = value
        try:
            self.problem.solve(nlp=True, solver=cp.IPOPT, print_level=0)
        except cp.error.SolverError:
            return math.nan
        return float(self.problem.value) if self.problem.status == "optimal" else math.nan


def agreement(found: Pass, reference: np.ndarray) -> str:
    """How many solutions have the same value, a better and a worse one; failures of both.

    This library's failures are those of the whole batch.
    """
    count = len(reference)
    values, solved = found.values[:count], found.solved[:count]
    both = solved & np.isfinite(reference)
    gap = (values - reference) / (1 + np.abs(reference))
    same, lower = (np.abs(gap) <= AGREE) & both, (gap < -AGREE) & both
    higher = both & ~same & ~lower
    failed = f"{(~found.solved).sum()}/{(~np.isfinite(reference)).sum()}"
    return f"{same.sum()} = {lower.sum()} < {higher.sum()} >, failed {failed}"


# --- tables --------------------------------------------------------------------------------------


def rows_of(
    case: Case, seconds: float, elements: int, with_reference: bool
) -> Iterator[tuple[int, float, list[str]]]:
    """Batch size, ratio (NaN without a reference) and cells of the table's rows."""
    layer = dcx.DeclarativeLayer(*case.build())
    reference = Reference(case) if with_reference else None
    for batch in BATCHES:
        values = case.batch(batch)
        pass_over(layer, [value[:1] for value in values])
        ours, found = measure(lambda values=values: pass_over(layer, values), seconds)
        cells = [f"{case.name} ({case.size})", str(batch), f"{1e3 * ours:.1f}"]
        ratio = math.nan
        if reference is not None:
            part = [value[:elements] for value in values]
            once, values_there = measure(lambda part=part: reference.solve(part), seconds)
            theirs = once * batch / len(part[0])
            ratio = theirs / ours
            cells += [
                f"{1e3 * theirs:.1f}",
                f"{ratio:.2f}",
                agreement(found, values_there),
            ]
        yield batch, ratio, [*cells, f"{gradient_error(layer, values, found):.0e}"]


def compare(cases: list[Case], seconds: float, elements: int) -> None:
    """The table of all problems, and geometric means of the ratios."""
    with_reference = "IPOPT" in cp.installed_solvers()
    table = Table(title="forward and backward, float64, milliseconds (medians)")
    columns = ["problem (variables)", "batch", "declarative_cvx"]
    columns += ["IPOPT loop", "ratio", "values"] if with_reference else []
    for column in [*columns, "gradient"]:
        table.add_column(column, justify="right")
    ratios: dict[int, list[float]] = {batch: [] for batch in BATCHES}
    for case in tqdm(cases, leave=False):
        for batch, ratio, cells in rows_of(case, seconds, elements, with_reference):
            ratios[batch].append(ratio)
            table.add_row(*cells)
    console = Console(width=130)
    console.print(table)
    if not with_reference:
        return console.print(ADVICE)
    for batch, found in ratios.items():
        mean = math.exp(sum(map(math.log, found)) / len(found))
        console.print(f"batch {batch}: geometric mean of the ratios {mean:.2f}")
    console.print(
        "ratio: how many times faster declarative_cvx is, gradients included, than the loop, "
        f"which is timed on {elements} elements. values: equal, better, worse than the loop's; "
        "failures of both. gradient: relative difference from central differences. "
        f"torch threads: {torch.get_num_threads()}."
    )


def show_scaling(seconds: float) -> None:
    """Times against the size of the batch, and against the number of variables."""
    by_batch = Table(title="forward and backward against the batch, milliseconds")
    for column in ("problem (variables)", *map(str, SCALING_BATCHES)):
        by_batch.add_column(column, justify="right")
    for case in tqdm([hock_schittkowski_71(), circle_packing(6), path_planning(20)], leave=False):
        layer = dcx.DeclarativeLayer(*case.build())
        by_batch.add_row(
            f"{case.name} ({case.size})",
            *(time_of(layer, case, batch, seconds) for batch in SCALING_BATCHES),
        )
    by_size = Table(title="forward and backward against the number of variables, batch 8, ms")
    for column in ("problem", *map(str, SCALING_SIZES)):
        by_size.add_column(column, justify="right")
    families = {"Rosenbrock chain": rosenbrock, "ellipsoid projection": ellipsoid_projection}
    families["path planning"] = lambda n: path_planning(n // 2)
    for name, family in families.items():
        cells = []
        for n in tqdm(SCALING_SIZES, leave=False):
            case = family(n)
            cells.append(time_of(dcx.DeclarativeLayer(*case.build()), case, 8, seconds))
        by_size.add_row(name, *cells)
    console = Console(width=130)
    console.print(by_batch, by_size)


def time_of(layer: dcx.DeclarativeLayer, case: Case, batch: int, seconds: float) -> str:
    values = case.batch(batch)
    pass_over(layer, [value[:1] for value in values])
    return f"{1e3 * measure(lambda: pass_over(layer, values), seconds)[0]:.1f}"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=1.0, help="time spent on each median")
    parser.add_argument("--elements", type=int, default=16, help="elements the loop is timed on")
    parser.add_argument("--only", default="", help="measure problems with this in their names")
    parser.add_argument("--scaling", action="store_true", help="show the scaling tables instead")
    options = parser.parse_args(arguments)
    warnings.simplefilter("ignore")
    if options.scaling:
        return show_scaling(options.seconds)
    cases = [case for case in CASES if options.only.lower() in case.name.lower()]
    compare(cases, options.seconds, options.elements)


if __name__ == "__main__":
    main()
