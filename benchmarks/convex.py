"""Time of forward and backward passes of convex layers, against cvxpylayers.

    pip install -e '.[bench]' && python benchmarks/convex.py

Both libraries run in one process on the same data; times are medians; the ratio of the two is what
carries over to other machines. ``--construction`` measures building the layers only, ``--memory``
peak memory instead, ``--tolerances`` what a looser inner solve costs and gains.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import resource
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import cvxpy as cp
import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

import declarative_cvx as dcx

Tensors = list[torch.Tensor]
Built = tuple[cp.Problem, list[cp.Parameter], list[cp.Variable]]
PEERS = {"Moreau": "MOREAU", "default": None}


@dataclass(frozen=True)
class Case:
    """A layer to time: a problem and a batch of values for its parameters."""

    name: str
    build: Callable[[], Built]
    values: Callable[[], Tensors]


def _normal(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, dtype=torch.float64, generator=generator)


def quadratic(batch: int, n: int, m: int) -> Case:
    """Minimise 0.5 ||Q x||^2 + q'x subject to G x <= h, all four parameters."""

    def build() -> Built:
        x = cp.Variable(n)
        Q, q = cp.Parameter((n, n)), cp.Parameter(n)
        G, h = cp.Parameter((m, n)), cp.Parameter(m)
        objective = cp.Minimize(0.5 * cp.sum_squares(Q @ x) + q @ x)
        return cp.Problem(objective, [G @ x <= h]), [Q, q, G, h], [x]

    def values() -> Tensors:
        h = _normal(batch, m, seed=3).abs() + 0.1
        return [_normal(batch, n, n), _normal(batch, n, seed=1), _normal(batch, m, n, seed=2), h]

    return Case(f"QP ({batch}, {n}, {m})", build, values)


def second_order(batch: int, n: int) -> Case:
    """Minimise c'x over a ball and three norm constraints."""

    def build() -> Built:
        x, c, r = cp.Variable(n), cp.Parameter(n), cp.Parameter(3, nonneg=True)
        rng = np.random.default_rng(0)
        cones = [cp.norm(rng.normal(size=(6, n)) @ x + 0.1 * k) <= r[k] for k in range(3)]
        return cp.Problem(cp.Minimize(c @ x), [*cones, cp.norm(x) <= 1]), [c, r], [x]

    return Case(
        f"SOCP ({batch}, {n})",
        build,
        lambda: [_normal(batch, n), _normal(batch, 3, seed=1).abs() + 1.0],
    )


def entropy(batch: int, n: int) -> Case:
    """Minimise c'x + sum x log x over the simplex, with a budget."""

    def build() -> Built:
        x, c = cp.Variable(n), cp.Parameter(n)
        budget = np.linspace(0, 1, n)
        constraints = [cp.sum(x) == 1, budget @ x <= 0.4]
        return cp.Problem(cp.Minimize(c @ x - cp.sum(cp.entr(x))), constraints), [c], [x]

    return Case(f"exp cone ({batch}, {n})", build, lambda: [_normal(batch, n)])


def semidefinite(batch: int, k: int) -> Case:
    """Nearest correlation matrix of order k."""

    def build() -> Built:
        X, C = cp.Variable((k, k), PSD=True), cp.Parameter((k, k))
        problem = cp.Problem(cp.Minimize(cp.sum_squares(X - C)), [cp.diag(X) == 1])
        return problem, [C], [X]

    def values() -> Tensors:
        C = _normal(batch, k, k)
        return [(C + C.mT) / 2]

    return Case(f"SDP ({batch}, order {k})", build, values)


CASES = [
    *(quadratic(*size) for size in [(1, 10, 10), (128, 10, 10), (128, 24, 14)]),
    *(quadratic(*size) for size in [(64, 50, 50), (16, 100, 100), (1024, 10, 10)]),
    second_order(32, 20),
    entropy(32, 20),
    semidefinite(32, 6),
]


def median_time(work: Callable[[], object], seconds: float) -> float:
    """Median time of a call in seconds, over at least three calls and about `seconds`."""
    work()
    times: list[float] = []
    while len(times) < 3 or (sum(times) < seconds and len(times) < 200):
        began = time.perf_counter()
        work()
        times.append(time.perf_counter() - began)
    return statistics.median(times)


def pass_over(layer: torch.nn.Module, values: Tensors) -> Tensors:
    """One forward and backward pass of a fixed linear loss; the outputs and the gradients."""
    leaves = [value.clone().requires_grad_() for value in values]
    (output,) = layer(*leaves)
    weights = torch.cos(torch.arange(output.numel(), dtype=output.dtype)).reshape(output.shape)
    (weights * output).sum().backward()
    return [output.detach(), *(leaf.grad for leaf in leaves)]


def ours(built: Built) -> torch.nn.Module:
    """This library's layer."""
    return dcx.DeclarativeLayer(*built)


def theirs(built: Built, solver: str | None) -> torch.nn.Module:
    """The other library's layer."""
    from cvxpylayers.torch import CvxpyLayer

    problem, parameters, variables = built
    return CvxpyLayer(problem, parameters=parameters, variables=variables, solver=solver)


MAKERS = {name: partial(theirs, solver=solver) for name, solver in PEERS.items()}


class _Nothing(torch.autograd.Function):
    """Outputs and gradients of the right shapes, and no work."""

    @staticmethod
    def forward(ctx: Any, *values: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        ctx.save_for_backward(*values)
        return torch.zeros_like(values[1])

    @staticmethod
    def backward(ctx: Any, _: torch.Tensor) -> tuple[torch.Tensor, ...]:  # type: ignore[override]
        return tuple(torch.zeros_like(value) for value in ctx.saved_tensors)


class Nothing(torch.nn.Module):
    """What any layer with the parameters of `quadratic` costs in torch."""

    def forward(self, *values: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (_Nothing.apply(*values),)


def floor(seconds: float) -> float:
    """Time of a pass over one element of the first row that computes nothing."""
    values = CASES[0].values()
    return median_time(lambda: pass_over(Nothing(), values), seconds)


def compare(case: Case, seconds: float) -> list[str]:
    """A row of the table."""
    values, layer = case.values(), ours(case.build())
    time_taken = median_time(lambda: pass_over(layer, values), seconds)
    reference = pass_over(layer, values)
    row = [case.name, f"{time_taken * 1e3:.{2 if time_taken < 1e-3 else 1}f}"]
    for make in MAKERS.values():
        row += _peer_cells(case, make, values, time_taken, reference, seconds)
    return row


def _peer_cells(
    case: Case,
    make: Callable[[Built], torch.nn.Module],
    values: Tensors,
    ours: float,
    reference: Tensors,
    seconds: float,
) -> list[str]:
    try:
        layer = make(case.build())
        theirs = median_time(lambda: pass_over(layer, values), seconds)
        error = _difference(pass_over(layer, values), reference)
    except Exception as failure:
        return [type(failure).__name__, "", ""]
    return [f"{theirs * 1e3:.1f}", f"{theirs / ours:.1f}", f"{error:.0e}"]


def _difference(found: Tensors, reference: Tensors) -> float:
    """Largest difference of outputs and gradients, relative to the largest entry of each."""
    pairs = zip(found, reference, strict=True)
    return max(float((a - b).abs().max() / b.abs().max().clamp(min=1e-9)) for a, b in pairs)


def measure_construction(repetitions: int) -> None:
    """Times of building a layer, and of building it and a first pass over one element."""
    table = Table(title="construction (and with a first pass over one element), ms (medians)")
    table.add_column("layer (batch, n, m)", justify="right")
    table.add_column("declarative_cvx", justify="right")
    for peer in PEERS:
        table.add_column(f"cvxpylayers {peer}", justify="right")
        table.add_column("ratio", justify="right")
    for case in tqdm(CASES, leave=False):
        mine, *others = _construction(case, [ours, *MAKERS.values()], repetitions)
        row = [case.name, "{:.1f} ({:.1f})".format(*(1e3 * mine))]
        for taken in others:
            row.append("{:.1f} ({:.1f})".format(*(1e3 * taken)))
            row.append("{:.1f} ({:.1f})".format(*(taken / mine)))
        table.add_row(*row)
    Console(width=130).print(table)


def _construction(
    case: Case, makers: list[Callable[[Built], torch.nn.Module]], repetitions: int
) -> np.ndarray:
    """Seconds of building, and with a first pass, by library: medians of alternate turns.

    Every time of a new problem: CVXPY keeps with a problem what it has found out about it.
    """
    values = [value[:1] for value in case.values()]
    times = np.full((repetitions + 1, len(makers), 2), np.nan)  # the first turn does not count
    for turn in times:
        for taken, make in zip(turn, makers, strict=True):
            built = case.build()
            gc.collect()
            gc.disable()
            with suppress(Exception):  # of a library that cannot build or solve it: NaN
                began = time.perf_counter()
                layer = make(built)
                taken[0] = time.perf_counter() - began
                pass_over(layer, values)
                taken[1] = time.perf_counter() - began
            gc.enable()
    return np.median(times[1:], 0)


def measure_memory() -> None:
    """Peak memory of a forward and backward pass of 256 QPs with n = m = 100, against the data."""
    case = quadratic(256, 100, 100)
    values = case.values()
    layer = dcx.DeclarativeLayer(*case.build())
    pass_over(layer, [value[:2] for value in values])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    pass_over(layer, values)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    data = sum(value.numel() for value in values) * 8
    matrices = 256 * 200**2 * 8
    print(
        f"256 QPs with n = m = 100: peak {peak / 1024:.0f} MiB over the state before; problem data "
        f"{data / 2**20:.0f} MiB, KKT matrices of order 200 {matrices / 2**20:.0f} MiB; "
        f"ratio {peak * 1024 / (data + matrices):.1f}"
    )


SOLVERS = (dcx.Moreau(method="interior_point"), dcx.Clarabel(), dcx.SCS())
TOLERANCES = (1e-2, 1e-4, 1e-6, 1e-8, 1e-10)


def measure_tolerances(seconds: float) -> None:
    """Times with solvers stopping early or late, and the difference that makes to the result."""
    table = Table(title="forward and backward by tolerance of the inner solve, ms (difference)")
    for column in ("layer", "solver", *(f"{tol:.0e}" for tol in TOLERANCES)):
        table.add_column(column, justify="right")
    cases = [second_order(32, 20), entropy(32, 20), semidefinite(32, 6), quadratic(64, 24, 14)]
    for case in tqdm(cases, leave=False):
        values = case.values()
        reference = pass_over(dcx.DeclarativeLayer(*case.build()), values)
        for solver in SOLVERS:
            row = [case.name, solver.name]
            for tol in TOLERANCES:
                layer = dcx.DeclarativeLayer(*case.build(), solver=replace(solver, tol=tol))
                taken = median_time(partial(pass_over, layer, values), seconds)
                error = _difference(pass_over(layer, values), reference)
                row.append(f"{taken * 1e3:.0f} ({error:.0e})")
            table.add_row(*row)
    Console(width=130).print(table)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=2.0, help="time spent on each median")
    parser.add_argument("--repetitions", type=int, default=15, help="constructions of each layer")
    parser.add_argument("--construction", action="store_true", help="measure construction only")
    parser.add_argument("--memory", action="store_true", help="measure peak memory instead")
    parser.add_argument("--tolerances", action="store_true", help="measure looser inner solves")
    options = parser.parse_args(arguments)
    warnings.simplefilter("ignore")
    if options.memory:
        return measure_memory()
    if options.tolerances:
        return measure_tolerances(options.seconds / 4)
    if importlib.util.find_spec("cvxpylayers") is None:
        sys.exit("cvxpylayers is not installed: pip install -e '.[bench]'")
    if options.construction:
        return measure_construction(options.repetitions)
    table = Table(title="forward and backward, float64, milliseconds (medians)")
    columns = ["layer (batch, n, m)", "declarative_cvx"]
    for peer in PEERS:
        columns += [f"cvxpylayers {peer}", "ratio", "its error"]
    for column in columns:
        table.add_column(column, justify="right")
    for case in tqdm(CASES, leave=False):
        table.add_row(*compare(case, options.seconds))
    console = Console(width=150)
    console.print(table)
    console.print(
        "ratio: how many times faster declarative_cvx is. error: largest relative difference of "
        f"solutions and gradients from its. torch threads: {torch.get_num_threads()}. A layer that "
        f"computes nothing takes {floor(options.seconds) * 1e3:.2f} ms in the first row."
    )
    measure_construction(options.repetitions)


if __name__ == "__main__":
    main()
