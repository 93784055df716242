"""Time of forward and backward passes of implicit models, against torchidl and torchdeq.

    pip install torchidl torchdeq tqdm && python benchmarks/implicit.py

x = relu(A x + B u) is solved and differentiated by A, B and u. Every library is given the loosest
tolerance (of half powers of ten) with which states and gradients are right to 1e-6 of the largest,
or, where it does not get there, that of the smallest error, all in one process on the same data.
What is right is known from direct solves that use no library. Random A are easy at any norm;
nonnegative ones converge at the rate ||A||_inf = kappa.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import itertools
import math
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from declarative_cvx.nonconvex.implicit.equilibrium import solve_equilibrium

FEATURES, ACCURACY = 10, 1e-6
STEPS = (50, 2500)  # torchdeq takes longer the more it may take; the first that are enough
SLOW = 20.0  # seconds of a pass from which no tighter tolerance is tried
Solver = Callable[[Tensor, Tensor, Tensor, float, int], Tensor]  # of A, B, u, tolerance, steps


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
        return f"{self.kind} {self.kappa}, {str(self.dtype)[6:]}, n {self.n}, batch {self.batch}"


def ours(A: Tensor, B: Tensor, u: Tensor, tol: float, steps: int) -> Tensor:
    """This library."""
    return solve_equilibrium(A, u @ B.mT, "relu", tol=tol, max_iters=steps).x


def torchidl(A: Tensor, B: Tensor, u: Tensor, tol: float, steps: int) -> Tensor:
    """Its function without its projection, which is another one (a scale factor)."""
    from torchidl.implicit_function import ImplicitFunction

    ImplicitFunction.set_parameters(mitr=steps, grad_mitr=steps, tol=tol, grad_tol=tol)
    start = torch.zeros(len(A), len(u), dtype=A.dtype, device=A.device)
    return ImplicitFunction.apply(A, B, start, u.mT).mT


def torchdeq(solver: str) -> Solver:
    """Implicit differentiation with one of its solvers."""

    @functools.cache  # building one is no part of a pass
    def layer(tol: float, steps: int) -> Any:
        from torchdeq import get_deq

        return get_deq(
            ift=True, f_solver=solver, b_solver=solver, f_max_iter=steps, b_max_iter=steps,
            f_tol=tol, b_tol=tol, f_stop_mode="rel", b_stop_mode="rel",
        )  # fmt: skip

    def solve(A: Tensor, B: Tensor, u: Tensor, tol: float, steps: int) -> Tensor:
        drive = u @ B.mT
        start = torch.zeros_like(drive)
        outputs, _ = layer(tol, steps)(lambda x: torch.relu(x @ A.mT + drive), start)
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
        return times if self.is_accurate else f"{times} ({self.error:.0e})"


def pass_over(
    case: Case, solver: Solver, tol: float, steps: int
) -> tuple[float, float, list[Tensor]]:
    """Seconds forward and backward; the states and the gradients."""
    leaves = [value.to(case.dtype).requires_grad_() for value in case.values()]
    weights = case.weights().to(case.dtype)
    began = time.perf_counter()
    x = solver(*leaves, tol, steps)
    between = time.perf_counter()
    gradients = torch.autograd.grad(x, leaves, weights)
    return between - began, time.perf_counter() - between, [x.detach(), *gradients]


def error(found: list[Tensor], truth: list[Tensor]) -> float:
    """Largest difference relative to the largest entry of each."""
    pairs = zip(found, truth, strict=True)
    return max(float((a.double() - b).abs().max() / b.abs().max()) for a, b in pairs)


def measure(case: Case, solver: Solver, truth: list[Tensor], seconds: float) -> Measured:
    """Time at the loosest tolerance that is tight enough, or at the most accurate one."""
    best = tuned(case, solver, truth, STEPS[0])
    if best.error > ACCURACY:
        best = tuned(case, solver, truth, STEPS[1])
    times = [best.times]
    if sum(best.times) < SLOW / 10:
        times = [pass_over(case, solver, *best.setting)[:2] for _ in range(3)]
    while len(times) < 400 and sum(map(sum, times)) < seconds:
        times.append(pass_over(case, solver, *best.setting)[:2])
    forward, backward = (statistics.median(column) for column in zip(*times, strict=True))
    return Measured(forward, backward, best.error)


@dataclass(frozen=True)
class Tried:
    """A pass with a setting: its error and its seconds forward and backward."""

    setting: tuple[float, int]
    error: float
    times: tuple[float, float]


def tuned(case: Case, solver: Solver, truth: list[Tensor], steps: int) -> Tried:
    """The loosest tolerance that is tight enough."""

    def tried(tol: float) -> Tried:
        *times, found = pass_over(case, solver, tol, steps)
        return Tried((tol, steps), error(found, truth), (times[0], times[1]))

    last = best = tried(100 * ACCURACY * (1 - case.kappa))  # the error is residual / (1 - kappa)
    looser = math.inf  # the tightest tolerance that was not enough
    for _ in range(4):
        if not ACCURACY < last.error < math.inf or sum(last.times) > SLOW:
            break
        looser = last.setting[0]
        halves = min(4, math.ceil(2 * math.log10(last.error / ACCURACY)))
        last = tried(looser * 10.0 ** (-halves / 2))
        best = last if last.error < best.error else best
    while best.error <= ACCURACY and best.setting[0] * 3.5 < looser:
        last = tried(best.setting[0] * math.sqrt(10))
        if last.error > ACCURACY:
            break
        best = last
    return best


def true_solution(case: Case) -> list[Tensor]:
    """In float64, by direct solves with the pattern of positive states, which is verified."""
    A, B, u = case.values()
    c, identity = u @ B.mT, torch.eye(case.n, dtype=A.dtype)
    pattern = solve_equilibrium(A, c, "relu", tol=1e-13, method="anderson").x > 0
    x, v = torch.empty_like(c), torch.empty_like(c)
    for i, (row, on, weight) in enumerate(zip(c, pattern, case.weights(), strict=True)):
        factors = torch.linalg.lu_factor(identity - on[:, None] * A)
        x[i] = torch.linalg.lu_solve(*factors, (on * row)[:, None])[:, 0]
        w = torch.linalg.lu_solve(*factors, weight[:, None], adjoint=True)[:, 0]
        v[i] = on * w
    assert bool(((x @ A.mT + c > 0) == pattern).all()), "the pattern of positive states"
    return [x, v.mT @ x, v.mT @ u, v @ B]


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
    parser.add_argument("--only", default="", help="cases whose names contain this text")
    parser.add_argument("--without", default="nothing", help="libraries whose names contain this")
    options = parser.parse_args(arguments)
    warnings.simplefilter("ignore")
    missing = [p for p in ("torchidl", "torchdeq") if importlib.util.find_spec(p) is None]
    if missing:
        sys.exit(f"Not installed: pip install {' '.join(missing)}")
    names = [name for name in LIBRARIES if options.without not in name]
    print("Milliseconds forward + backward (medians); in brackets what error is left.\n")
    print("| case |", " | ".join([*names, "ratio"]), "|\n|", " --- |" * (len(names) + 2))
    for case in tqdm([case for case in cases(options.quick) if options.only in str(case)]):
        tqdm.write(f"| {' | '.join(row_of(case, names, options.seconds))} |")
        sys.stdout.flush()
    print(
        "\nratio: how many times faster declarative_cvx is than the fastest of the others that is "
        f"right to {ACCURACY:.0e}. torch threads: {torch.get_num_threads()}."
    )


if __name__ == "__main__":
    main()
