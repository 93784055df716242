"""Least squares, transport, eigenvectors, total variation, tridiagonal systems: time and error.

    python benchmarks/kernels.py [--ddn PATH]

Each kernel, forward and backward, against what one would write without it and, where a checkout
of Gould's reference implementation is given, against that. Errors are those of the answer and of
its gradient, relative, with the best answer in float64 as the truth.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from tqdm import tqdm

from declarative_cvx.nonconvex.kernels.eigen import symmetric_eigen
from declarative_cvx.nonconvex.kernels.optimal_transport import optimal_transport
from declarative_cvx.nonconvex.kernels.total_variation import total_variation_1d
from declarative_cvx.nonconvex.kernels.tridiagonal import tridiagonal_solve
from declarative_cvx.nonconvex.kernels.weighted_least_squares import weighted_least_squares

Function = Callable[..., Tensor]
REPEATS = 5


@dataclass(frozen=True)
class Case:
    """One problem; the first method is the library's, and its answer in float64 the truth."""

    name: str
    inputs: tuple[Tensor, ...]
    methods: dict[str, Function]


@dataclass(frozen=True)
class Run:
    """One method, forward and backward."""

    value: Tensor
    gradients: tuple[Tensor, ...]
    forward: float
    backward: float


def run(method: Function, inputs: tuple[Tensor, ...]) -> Run:
    """Best times of several, in milliseconds, for a fixed random upstream gradient."""
    times = []
    for _ in range(REPEATS):
        leaves = [t.clone().requires_grad_() for t in inputs]
        begin = time.perf_counter()
        value = method(*leaves)
        middle = time.perf_counter()
        upstream = torch.sin(torch.arange(value.numel(), dtype=value.dtype)).view_as(value)
        gradients = torch.autograd.grad(value, leaves, upstream)
        times.append((middle - begin, time.perf_counter() - middle))
    forward, backward = (1e3 * min(column) for column in zip(*times, strict=True))
    return Run(value.detach(), gradients, forward, backward)


def least_squares(ddn: bool) -> Iterator[Case]:
    def ours(A: Tensor, b: Tensor, w: Tensor) -> Tensor:
        return weighted_least_squares(A, b, w, 1e-3)

    def normal_equations(A: Tensor, b: Tensor, w: Tensor) -> Tensor:
        H = A.mT @ (w[..., None] * A) + 1e-3 * torch.eye(A.shape[-1], dtype=A.dtype)
        return torch.linalg.solve(H, A.mT @ (w * b)[..., None])[..., 0]

    methods = {"declarative_cvx": ours, "normal equations, autograd": normal_equations}
    if ddn:
        from ddn.pytorch.leastsquares import WeightedLeastSquaresFcn

        def reference(A: Tensor, b: Tensor, w: Tensor) -> Tensor:
            rows = A.mT, b[:, None], w[:, None], 1e-3, True, False
            return WeightedLeastSquaresFcn.apply(*rows)[0]

        methods["ddn"] = reference
    for batch, m, n, exponent in ((256, 128, 16, 0), (256, 128, 16, 4), (4, 1000, 200, 2)):
        A = torch.randn(batch, m, n, dtype=torch.float64)
        A = A * torch.logspace(0, exponent, n, dtype=A.dtype)
        data = A, torch.randn(batch, m, dtype=A.dtype), torch.rand(batch, m, dtype=A.dtype)
        name = f"least squares ({batch}, {m}, {n}), condition 1e{exponent}"
        yield Case(name, data, methods)


def eigenvectors(ddn: bool) -> Iterator[Case]:
    methods: dict[str, Function] = {
        "declarative_cvx": lambda A: (v := symmetric_eigen(A)[1][..., -3:]) @ v.mT,
        "torch.linalg.eigh": lambda A: (v := torch.linalg.eigh(A)[1][..., -3:]) @ v.mT,
    }
    if ddn:
        from ddn.pytorch.eigen_decomposition import EigenDecompositionFcn

        methods["ddn"] = lambda A: (v := EigenDecompositionFcn.apply(A, 3)) @ v.mT
    A = torch.randn(256, 16, 16, dtype=torch.float64)
    yield Case("top 3 eigenvectors (256, 16)", (A + A.mT,), methods)
    Q = torch.linalg.qr(A).Q
    values = torch.tensor([*range(12), 20.0, 30.0, 30.0, 30.0], dtype=A.dtype)
    repeated = (Q * values) @ Q.mT
    yield Case("the same, eigenvalues repeat", ((repeated + repeated.mT) / 2,), methods)


def transport(ddn: bool) -> Iterator[Case]:
    def unrolled(epsilon: float) -> Function:
        def iterate(cost: Tensor) -> Tensor:
            kernel, g = -cost / epsilon, torch.zeros_like(cost[..., 0, :])
            for _ in range(200):
                f = -torch.logsumexp(g[..., None, :] + kernel, -1) - math.log(cost.shape[-2])
                g = -torch.logsumexp(f[..., :, None] + kernel, -2) - math.log(cost.shape[-1])
            return torch.exp(f[..., :, None] + g[..., None, :] + kernel)

        return iterate

    def reference(epsilon: float) -> Function:
        from ddn.pytorch.optimal_transport import OptimalTransportFcn

        return lambda cost: OptimalTransportFcn.apply(cost, None, None, 1 / epsilon)

    for epsilon in (0.1, 0.01, 0.001):
        methods: dict[str, Function] = {
            "declarative_cvx": lambda cost, epsilon=epsilon: optimal_transport(
                cost, epsilon=epsilon
            ),
            "200 Sinkhorn steps, autograd": unrolled(epsilon),
        }
        if ddn:
            methods["ddn"] = reference(epsilon)
        x, y = (torch.rand(16, 64, 1, dtype=torch.float64) for _ in range(2))
        yield Case(f"transport (16, 64, 64), epsilon {epsilon}", ((x - y.mT) ** 2,), methods)


def total_variation(ddn: bool) -> Iterator[Case]:
    def accelerated_dual(y: Tensor) -> Tensor:
        z = v = torch.zeros_like(y[..., 1:])
        for step in range(500):
            x = y + torch.nn.functional.pad(v, (0, 1)) - torch.nn.functional.pad(v, (1, 0))
            new = (v + x.diff(dim=-1) / 4).clamp(-0.5, 0.5)
            z, v = new, new + step / (step + 3) * (new - z)
        return y + torch.nn.functional.pad(z, (0, 1)) - torch.nn.functional.pad(z, (1, 0))

    methods: dict[str, Function] = {
        "declarative_cvx": lambda y: total_variation_1d(y, 0.5),
        "500 dual steps, autograd": accelerated_dual,
    }
    y = (torch.arange(1000) // 97 % 5).double() + torch.randn(64, 1000, dtype=torch.float64) / 5
    yield Case("total variation (64, 1000)", (y,), methods)
    alone = {"declarative_cvx": methods["declarative_cvx"]}
    yield Case("total variation (1, 100000)", (torch.randn(1, 100_000).double(),), alone)


def tridiagonal(ddn: bool) -> Iterator[Case]:
    def dense(lower: Tensor, diagonal: Tensor, upper: Tensor, rhs: Tensor) -> Tensor:
        T = torch.diag_embed(diagonal) + torch.diag_embed(lower, -1) + torch.diag_embed(upper, 1)
        return torch.linalg.solve(T, rhs)

    def thomas(lower: Tensor, diagonal: Tensor, upper: Tensor, rhs: Tensor) -> Tensor:
        pivots, right = [diagonal[..., 0]], [rhs[..., 0]]
        for i in range(1, diagonal.shape[-1]):
            factor = lower[..., i - 1] / pivots[-1]
            pivots.append(diagonal[..., i] - factor * upper[..., i - 1])
            right.append(rhs[..., i] - factor * right[-1])
        x = [right[-1] / pivots[-1]]
        for i in reversed(range(diagonal.shape[-1] - 1)):
            x.append((right[i] - upper[..., i] * x[-1]) / pivots[i])
        return torch.stack(x[::-1], -1)

    for batch, n, methods in (
        (16, 300, {"dense solve": dense, "elimination, autograd": thomas}),
        (1024, 300, {"elimination, autograd": thomas}),
    ):
        lower, upper, diagonal, rhs = (
            torch.randn(batch, size, dtype=torch.float64) for size in (n - 1, n - 1, n, n)
        )
        bands = lower, 4 + diagonal.abs(), upper
        all_methods = {"declarative_cvx": tridiagonal_solve, **methods}
        yield Case(f"tridiagonal ({batch}, {n})", (*bands, rhs), all_methods)


def relative(found: Tensor, truth: Tensor) -> float:
    return float((found.double() - truth).norm() / truth.norm())


def add_rows(table: Table, case: Case) -> None:
    truth = run(next(iter(case.methods.values())), case.inputs)
    for dtype in (torch.float64, torch.float32):
        cast = tuple(t.to(dtype) for t in case.inputs)
        for name, method in case.methods.items():
            found = run(method, cast)
            gradient = max(map(relative, found.gradients, truth.gradients))
            errors = relative(found.value, truth.value), gradient
            cells = f"{found.forward:.2f}", f"{found.backward:.2f}", *(f"{e:.0e}" for e in errors)
            table.add_row(case.name, str(dtype).removeprefix("torch."), name, *cells)
    table.add_section()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ddn", type=Path, help="checkout of Gould's reference implementation")
    path = parser.parse_args().ddn
    if path:
        sys.path.insert(0, str(path))
    warnings.filterwarnings("ignore", category=UserWarning)
    torch.manual_seed(0)
    table = Table(title=f"{torch.get_num_threads()} threads, torch {torch.__version__}")
    for heading in ("problem", "dtype", "method", "forward ms", "backward ms", "error", "gradient"):
        table.add_column(heading)
    families = (least_squares, eigenvectors, transport, total_variation, tridiagonal)
    for case in tqdm([case for family in families for case in family(bool(path))], disable=None):
        add_rows(table, case)
    Console(width=150).print(table)


if __name__ == "__main__":
    main()
