"""Time, accuracy and memory of robust pooling, against the reference implementation `ddn`.

    pip install -e '.[bench]' && python benchmarks/pooling.py --ddn CHECKOUT

Both run in one process on the same data; times are medians of a forward and a backward pass; the
ratio of the two is what carries over to other machines. Whether a pool is at its global minimum is
checked on some pools by a dense search in float64. Without ``--ddn`` only this library is measured.
The vectors of shape (batch, d, n) are n points of R^d in each pool, as in `ddn`.
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import resource
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from tqdm import tqdm

from declarative_cvx.nonconvex.kernels.pooling import robust_pool
from declarative_cvx.penalties import PENALTIES

Work = Callable[[Tensor], Tensor]
ALPHA = 1.0
CHECKED = 64
# The penalties by their names here, in ddn's robustpool and in its robust_vec_pool.
NAMES = {
    "pseudo_huber": ("PseudoHuber", "PseudoHuber"),
    "huber": ("Huber", "Huber"),
    "welsch": ("Welsch", "Welsch"),
    "truncated_quadratic": ("TruncatedQuadratic", "TruncQuad"),
}
SHAPES = [(24, 64, 2048), (24, 1024, 256), (64, 32, 256)]
VECTORS = {(64, 32, 256)}


@dataclass(frozen=True)
class Data:
    """Inliers about alpha away from a centre of each pool's own, and what spoils them."""

    name: str
    outliers: float = 0.0
    cluster: float = 0.0

    def sample(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Points along the last dimension; those of vectors are outliers as a whole."""
        random = torch.Generator().manual_seed(0)
        one = (shape[0], 1, shape[2]) if shape in VECTORS else shape

        def uniform(*size: int) -> Tensor:
            return torch.rand(*size, generator=random, dtype=torch.float64)

        width = ALPHA / math.sqrt(shape[1]) if shape in VECTORS else ALPHA
        x = torch.randn(*shape, generator=random, dtype=torch.float64) * width
        x += torch.randn(*shape[:-1], 1, generator=random, dtype=torch.float64) * ALPHA
        x = torch.where(uniform(*one) < self.outliers, ALPHA * (20 * uniform(*shape) - 10), x)
        return torch.where(uniform(*one) < self.cluster, x + 6 * ALPHA, x).to(dtype)


DATA = [
    Data("clean"),
    Data("20 % outliers", outliers=0.2),
    Data("50 % outliers", outliers=0.5),
    Data("40 % cluster", cluster=0.4),
]


def timed_pass(work: Work, x: Tensor) -> tuple[float, Tensor, Tensor]:
    """Seconds, the pooled values and the gradient of their sum with fixed weights."""
    leaf = x.clone().requires_grad_()
    began = time.perf_counter()
    y = work(leaf)
    torch.autograd.backward(y, _cotangent(y))
    return time.perf_counter() - began, y.detach(), leaf.grad


def _cotangent(y: Tensor) -> Tensor:
    return torch.cos(torch.arange(y.numel(), dtype=y.dtype)).reshape(y.shape)


def measure(work: Work, x: Tensor, seconds: float) -> tuple[float, Tensor, Tensor]:
    """As `timed_pass`, with the median time of about so many seconds, of one pass at least."""
    first, y, gradient = timed_pass(work, x)
    times: list[float] = []
    while sum(times) + first < seconds and len(times) < 20:
        times.append(timed_pass(work, x)[0])
    return statistics.median(times or [first]), y, gradient


def dense_search(name: str, x: Tensor) -> Tensor:
    """The global minimisers of pools (batch, n), by grids ever finer around the best point."""
    penalty = PENALTIES[name]
    best = x.mean(-1)

    def value(u: Tensor) -> Tensor:
        return penalty.value(u.unsqueeze(-1) - x.unsqueeze(1), ALPHA).sum(-1)

    width = float((x.amax(-1) - x.amin(-1)).max()) / 2
    best, count = (x.amax(-1) + x.amin(-1)) / 2, math.ceil(width / 0.02)
    for _ in range(12):
        grid = best.unsqueeze(-1) + torch.linspace(-width, width, 2 * count + 1, dtype=x.dtype)
        best = grid.gather(-1, value(grid).argmin(-1, keepdim=True)).squeeze(-1)
        width, count = 2 * width / count, 10
    return best


def share_global(name: str, x: Tensor, y: Tensor) -> float:
    """Share of pools (batch, n) whose value at y is the least that there is."""
    penalty = PENALTIES[name]
    points = x.flatten(0, -2)[:: max(1, x[..., 0].numel() // CHECKED)].double()
    found = y.flatten()[:: max(1, y.numel() // CHECKED)].double()
    least, reached = (
        penalty.value(u.unsqueeze(-1) - points, ALPHA).sum(-1)
        for u in (dense_search(name, points), found)
    )
    # Of the sum's size; float32 itself costs less than that.
    return float((reached <= least + 1e-6 * (least + 1)).double().mean())


def gradient_error(name: str, x: Tensor, y: Tensor, gradient: Tensor) -> float:
    """Largest error of a gradient, relative to its largest entry, by the formula in float64.

    It is that at the pool's own minimum: whether it is the global one is another question.
    """
    penalty, x64 = PENALTIES[name], x.double()
    u = y.double().unsqueeze(-1)
    for _ in range(3):
        bend = penalty.curvature(u - x64, ALPHA).sum(-1, keepdim=True)
        u = u - penalty.slope(u - x64, ALPHA).sum(-1, keepdim=True) / bend
    weight = penalty.curvature(u - x64, ALPHA)
    exact = _cotangent(y).double().unsqueeze(-1) * weight / weight.sum(-1, keepdim=True)
    error = (gradient - exact).abs().amax(-1) / exact.abs().amax(-1)
    return float(error.nan_to_num(torch.inf).max())


def ours(name: str, vectors: bool) -> Work:
    point_dim = 1 if vectors else None
    return lambda x: robust_pool(x, name, ALPHA, point_dim=point_dim)


def theirs(name: str, vectors: bool) -> Work:
    from ddn.pytorch import robust_vec_pool, robustpool

    if vectors:
        penalty = getattr(robust_vec_pool, NAMES[name][1])
        return lambda x: robust_vec_pool.RobustVectorPool2dFcn.apply(x, penalty, ALPHA)
    penalty, alpha = getattr(robustpool, NAMES[name][0]), torch.tensor([ALPHA])
    return lambda x: robustpool.RobustGlobalPool2dFn.apply(x.unsqueeze(-2), penalty, alpha)


@dataclass(frozen=True)
class Case:
    shape: tuple[int, ...]
    dtype: torch.dtype
    data: Data
    name: str

    def row(self, peer: bool, seconds: float) -> tuple[list[str], float]:
        """A row of the table, and how many times faster this library is."""
        x, vectors = self.data.sample(self.shape, self.dtype), self.shape in VECTORS
        spent, *result = measure(ours(self.name, vectors), x, seconds)
        kind = str(self.dtype).removeprefix("torch.")
        row = [str(self.shape), kind, self.data.name, self.name, f"{spent * 1e3:.0f}"]
        row += self._quality(x, *result)
        if not peer:
            return row, math.nan
        try:
            other, *result = measure(theirs(self.name, vectors), x, seconds)
        except RuntimeError as failure:
            return [*row, type(failure).__name__], math.nan
        row += [f"{other * 1e3:.0f}", f"{other / spent:.1f}", *self._quality(x, *result)]
        return row, other / spent

    def _quality(self, x: Tensor, y: Tensor, gradient: Tensor) -> list[str]:
        if self.shape in VECTORS:
            value = PENALTIES[self.name].value((y.unsqueeze(-1) - x).norm(dim=1), ALPHA).sum(-1)
            return [f"{float(value.double().mean()):.4f}", ""]
        error = gradient_error(self.name, x, y, gradient)
        return [f"{share_global(self.name, x, y):.0%}", f"{error:.0e}"]


def plain_times(seconds: float) -> str:
    """Time of a mean and a maximum of the same data."""
    parts = []
    for shape in SHAPES[:2]:
        x = DATA[0].sample(shape, torch.float32)
        mean = measure(lambda x: x.mean(-1), x, seconds)[0]
        largest = measure(lambda x: x.amax(-1), x, seconds)[0]
        parts.append(f"{shape}: mean {mean * 1e3:.0f} ms, max {largest * 1e3:.0f} ms")
    return "; ".join(parts)


def peak_memory(arguments: tuple[str, bool]) -> float:
    """Peak memory of a forward and backward pass over the state before, relative to the data."""
    name, peer = arguments
    work = (theirs if peer else ours)(name, False)
    timed_pass(work, DATA[0].sample((2, 4, 256), torch.float32))
    x = DATA[1].sample(SHAPES[1], torch.float32)
    leaf = x.requires_grad_()
    _forget_peak()
    before = _peak()
    y = work(leaf)
    torch.autograd.backward(y, _cotangent(y))
    return (_peak() - before) / (x.numel() * x.element_size())


def _forget_peak() -> None:
    """Let the kernel count the peak from here (Linux)."""
    Path("/proc/self/clear_refs").write_text("5")


def _peak() -> float:
    """Peak of the memory in use, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    found = [line.split()[1] for line in lines if line.startswith("VmHWM")]
    return int(found[0]) * 1024 if found else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def memory_table(peer: bool) -> Table:
    """Each measurement in a process of its own."""
    table = Table(title=f"peak memory over the data's own {SHAPES[1]} float32, in their size")
    for column in ["penalty", "declarative_cvx", *(["ddn"] if peer else [])]:
        table.add_column(column, justify="right")
    context = multiprocessing.get_context("spawn")
    for name in NAMES:
        cells = []
        for which in [False, True][: 1 + peer]:
            with context.Pool(1, initializer=_with_path, initargs=(sys.path,)) as pool:
                cells.append(f"{pool.apply(peak_memory, ((name, which),)):.1f}")
        table.add_row(name, *cells)
    return table


def _with_path(path: list[str]) -> None:
    sys.path[:] = path


def cases(quick: bool) -> list[Case]:
    dtypes = [torch.float32] if quick else [torch.float32, torch.float64]
    data = DATA[1:] if quick else DATA
    return [
        Case(shape, dtype, kind, name)
        for shape in (SHAPES[1:] if quick else SHAPES)
        for dtype in dtypes
        for kind in data
        for name in NAMES
    ]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ddn", type=Path, help="checkout of Gould's ddn")
    parser.add_argument("--seconds", type=float, default=2.0, help="time spent on each median")
    parser.add_argument("--quick", action="store_true", help="only some of the cases")
    parser.add_argument("--no-memory", action="store_true", help="leave the memory out")
    options = parser.parse_args(arguments)
    peer = options.ddn is not None
    if peer:
        sys.path.insert(0, str(options.ddn))
    table = Table(title="robust pooling, forward and backward, milliseconds (medians)")
    warnings.simplefilter("ignore")
    columns = ["shape", "dtype", "data", "penalty", "declarative_cvx", "global", "grad. error"]
    for column in [*columns, *(["ddn", "ratio", "global", "grad. error"] if peer else [])]:
        table.add_column(column, justify="right")
    ratios = []
    for case in tqdm(cases(options.quick), leave=False):
        row, ratio = case.row(peer, options.seconds)
        table.add_row(*row)
        ratios.append(ratio)
    console = Console(width=150)
    console.print(table)
    console.print(f"float32, {plain_times(options.seconds)}.")
    known = [ratio for ratio in ratios if ratio == ratio]
    if known:
        mean = math.exp(statistics.fmean(math.log(ratio) for ratio in known))
        console.print(f"ratio: geometric mean {mean:.1f}, least {min(known):.1f}.")
    console.print(
        f"global: share of {CHECKED} pools at the least value of a dense search; for vectors the "
        f"mean objective instead. torch threads: {torch.get_num_threads()}."
    )
    if not options.no_memory:
        console.print(memory_table(peer))


if __name__ == "__main__":
    main()
