"""Time of forward and backward passes of implicit models, against torchidl and torchdeq.

    pip install torchidl torchdeq rich tqdm && python benchmarks/implicit.py

x = relu(A x + B u) is solved and differentiated by A, B and u. Every library is given the loosest
tolerance with which states and gradients are right to 1e-6 of the largest, or, where it does not
get there, that of the smallest error, all in one process on the same data. Random A are easy at any
norm; nonnegative ones converge at the rate ||A||_inf = kappa.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from tqdm import tqdm

from declarative_cvx.nonconvex.implicit.equilibrium import solve_equilibrium

FEATURES, ACCURACY, STEPS = 10, 1e-6, 2500
SLOW = 20.0  # seconds of a pass from which no tighter tolerance is tried
Solver = Callable[[Tensor, Tensor, Tensor, float], Tensor]  # of A, B, u and a tolerance


@dataclass(frozen=True)
class Case:
    """A model and a batch of inputs."""

    kind: str
    n: int
    batch: int
    kappa: float
    dtype: torch.dtype

    def values(self) -> tuple[Tensor, Tensor, Tensor]:
        """A, B and u, in float64."""
        generator = torch.Generator().manual_seed(0)
        shapes = ((self.n, self.n), (self.n, FEATURES), (self.batch, FEATURES))
        A, B, u = (torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes)
        A = A.abs() if self.kind == "nonnegative" else A
        return self.kappa * A / A.abs().sum(1, keepdim=True), B, u

    def weights(self) -> Tensor:
        """Upstream gradient."""
        count = torch.arange(self.batch * self.n, dtype=torch.float64)
        return torch.cos(count).reshape(self.batch, self.n)

    def __str__(self) -> str:
        return f"{self.kind} {self.kappa}, n {self.n}, batch {self.batch}, {str(self.dtype)[6:]}"


def ours(A: Tensor, B: Tensor, u: Tensor, tol: float) -> Tensor:
    """This library."""
    return solve_equilibrium(A, u @ B.mT, "relu", tol=tol, max_iters=STEPS).x


def torchidl(A: Tensor, B: Tensor, u: Tensor, tol: float) -> Tensor:
    """Its function without its projection, which is another one (a scale factor)."""
    from torchidl.implicit_function import ImplicitFunction

    ImplicitFunction.set_parameters(mitr=STEPS, grad_mitr=STEPS, tol=tol, grad_tol=tol)
    start = torch.zeros(len(A), len(u), dtype=A.dtype, device=A.device)
    return ImplicitFunction.apply(A, B, start, u.mT).mT


def torchdeq(solver: str) -> Solver:
    """Implicit differentiation with one of its solvers."""

    def solve(A: Tensor, B: Tensor, u: Tensor, tol: float) -> Tensor:
        from torchdeq import get_deq

        deq = get_deq(
            ift=True, f_solver=solver, b_solver=solver, f_max_iter=STEPS, b_max_iter=STEPS,
            f_tol=tol, b_tol=tol, f_stop_mode="rel", b_stop_mode="rel",
        )  # fmt: skip
        drive = u @ B.mT
        outputs, _ = deq(lambda x: torch.relu(x @ A.mT + drive), torch.zeros_like(drive))
        return outputs[-1]

    return solve


LIBRARIES: dict[str, Solver] = {
    "declarative_cvx": ours,
    "torchidl": torchidl,
    "torchdeq (Picard)": torchdeq("fixed_point_iter"),
    "torchdeq (Anderson)": torchdeq("anderson"),
}


@dataclass(frozen=True)
class Measured:
    """A library on a case: seconds, and error relative to the largest state or gradient."""

    forward: float
    backward: float
    error: float

    @property
    def total(self) -> float:
        return self.forward + self.backward

    @property
    def is_accurate(self) -> bool:
        return self.error <= ACCURACY

    def __str__(self) -> str:
        times = f"{self.forward * 1e3:.1f} + {self.backward * 1e3:.1f}"
        return times if self.is_accurate else f"[dim]{times} ({self.error:.0e})[/dim]"


def pass_over(case: Case, solver: Solver, tol: float) -> tuple[float, float, list[Tensor]]:
    """Seconds forward and backward; the states and the gradients."""
    leaves = [value.to(case.dtype).requires_grad_() for value in case.values()]
    weights = case.weights().to(case.dtype)
    began = time.perf_counter()
    x = solver(*leaves, tol)
    between = time.perf_counter()
    gradients = torch.autograd.grad(x, leaves, weights)
    return between - began, time.perf_counter() - between, [x.detach(), *gradients]


def error(found: list[Tensor], truth: list[Tensor]) -> float:
    """Largest difference relative to the largest entry of each."""
    pairs = zip(found, truth, strict=True)
    return max(float((a.double() - b).abs().max() / b.abs().max()) for a, b in pairs)


def measure(case: Case, solver: Solver, truth: list[Tensor], seconds: float) -> Measured:
    """Time at the loosest tolerance that is tight enough, or at the most accurate one."""
    best: tuple[float, float, tuple[float, float]] | None = None
    for k in range(5):  # the error is the residual over 1 - kappa
        tol = ACCURACY * (1 - case.kappa) * 10.0 ** (2 - k)
        *times, found = pass_over(case, solver, tol)
        reached = error(found, truth)
        if best is None or reached < best[0] / 2:
            best = reached, tol, (times[0], times[1])
        if reached <= ACCURACY or sum(times) > SLOW:
            break
    assert best is not None
    reached, tol, once = best
    times = [once]
    if sum(once) < SLOW / 10:
        times = [pass_over(case, solver, tol)[:2] for _ in range(3)]
    while len(times) < 200 and sum(map(sum, times)) < seconds:
        times.append(pass_over(case, solver, tol)[:2])
    forward, backward = (statistics.median(column) for column in zip(*times, strict=True))
    return Measured(forward, backward, reached)


def true_solution(case: Case) -> list[Tensor]:
    """In float64, to a residual of 1e-13."""
    A, B, u = (value.requires_grad_() for value in case.values())
    found = solve_equilibrium(A, u @ B.mT, "relu", tol=1e-13, method="anderson").require_solved()
    gradients = torch.autograd.grad(found.x, (A, B, u), case.weights())
    return [found.x.detach(), *gradients]


def cases(quick: bool) -> Iterator[Case]:
    sizes = [(100, 64), (500, 64)] if quick else [(100, 64), (100, 512), (500, 64), (500, 512)]
    kappas = (0.5, 0.99) if quick else (0.5, 0.95, 0.99)
    kinds, dtypes = ("random", "nonnegative"), (torch.float64, torch.float32)
    for dtype, kind, (n, batch), kappa in itertools.product(dtypes, kinds, sizes, kappas):
        yield Case(kind, n, batch, kappa, dtype)


def row_of(case: Case, names: list[str], seconds: float) -> list[str]:
    """The times of each library, and how many times faster ours is than the fastest other."""
    truth = true_solution(case)
    measured = [measure(case, LIBRARIES[name], truth, seconds) for name in names]
    mine, *others = measured
    accurate = [m for m in others if m.is_accurate or not mine.is_accurate]
    fastest = min(m.total for m in accurate or others)
    note = "" if accurate else " (none accurate)"
    return [str(case), *map(str, measured), f"{fastest / mine.total:.1f}{note}"]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=0.5, help="time spent on each median")
    parser.add_argument("--quick", action="store_true", help="a third of the cases")
    options = parser.parse_args(arguments)
    warnings.simplefilter("ignore")
    missing = [p for p in ("torchidl", "torchdeq") if importlib.util.find_spec(p) is None]
    if missing:
        sys.exit(f"Not installed: pip install {' '.join(missing)}")
    names = list(LIBRARIES)
    table = Table(title="milliseconds forward + backward (medians); in brackets what error is left")
    for column in ("case", *names, "ratio"):
        table.add_column(column, justify="right")
    for case in tqdm(list(cases(options.quick)), leave=False):
        table.add_row(*row_of(case, names, options.seconds))
    console = Console(width=170)
    console.print(table)
    console.print(
        "ratio: how many times faster declarative_cvx is than the fastest of the others that is "
        f"right to {ACCURACY:.0e}. torch threads: {torch.get_num_threads()}."
    )


if __name__ == "__main__":
    main()
