"""Time and memory of projections, against Gould's ddn and torch.nn.functional.normalize.

    pip install -e '.[bench]' && python benchmarks/projections.py --ddn PATH

PATH is a checkout of https://github.com/anucvml/ddn; without it only our own times are shown. All
libraries run in one process on the same data; times are medians of a forward and a backward pass;
the ratio is what carries over to other machines. The radius is two thirds of the median norm, as in
the experiments of the paper, and a small one.
"""

from __future__ import annotations

import argparse
import itertools
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType

import torch
from convex import median_time
from rich.console import Console
from rich.table import Table
from torch import Tensor
from tqdm import tqdm

from declarative_cvx.nonconvex.kernels.projection import project

SHAPES = [(1024, 1000), (256, 10000)]
DTYPES = [torch.float32, torch.float64]
COLUMNS = ["shape", "dtype", "set", "radius", "forward", "backward", "both", "memory"]
PEER_COLUMNS = ["ddn", "its memory", "ratio", "difference"]

Map = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Case:
    """A set, its name in ddn, and whether the radius is the paper's or a small one."""

    onto: str
    p: float | None
    peer: str
    small: bool

    def radius(self, x: Tensor) -> float:
        """Small: so that few entries are left (p = 1), or nearly all are clipped (p = inf)."""
        norms = torch.linalg.vector_norm(x, 1 if self.p is None else self.p, -1)
        return float(norms.median()) * (1e-3 if self.small else 2 / 3)

    @property
    def name(self) -> str:
        return self.onto if self.p is None else f"L{self.p} {self.onto}"


CASES = [
    *(
        Case(onto, p, f"L{str(p).capitalize()}{onto.capitalize()}", small)
        for p in (1, 2, math.inf)
        for onto in ("sphere", "ball")
        for small in (False, True)
    ),
    *(Case("simplex", None, "Simplex", small) for small in (False, True)),
]


def normal(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=dtype)


def compare(case: Case, x: Tensor, g: Tensor, peer: ModuleType | None, seconds: float) -> list[str]:
    """A row of the table."""
    radius = case.radius(x)
    ours, times = run(lambda leaf: project(leaf, case.onto, case.p, radius), x, g, seconds)
    row = [case.name, f"{radius:.3g}", *cells(times)]
    if peer is not None:
        bound, method = torch.tensor([radius], dtype=x.dtype), getattr(peer, case.peer)
        theirs, peer_times = run(
            lambda leaf: peer.EuclideanProjectionFn.apply(leaf, method, bound), x, g, seconds
        )
        pairs = zip(theirs, ours, strict=True)
        off = max(float((a - b).abs().max() / b.abs().max()) for a, b in pairs)
        ratio = f"{peer_times[2] / times[2]:.1f}"
        row += [f"{peer_times[2]:.1f}", f"{peer_times[3]:.0f}", ratio, f"{off:.0e}"]
    return row


def run(
    function: Map, x: Tensor, g: Tensor, seconds: float
) -> tuple[tuple[Tensor, Tensor], tuple[float, float, float, float]]:
    """The result and its gradient; times of forward, backward, both in ms, and memory in MiB."""
    leaf = x.clone().requires_grad_()
    y = function(leaf)

    def both() -> Tensor:
        return torch.autograd.grad(function(leaf), leaf, g)[0]

    def backward() -> Tensor:
        return torch.autograd.grad(y, leaf, g, retain_graph=True)[0]

    works = (lambda: function(leaf), backward, both)
    times = [1e3 * median_time(work, seconds) for work in works]
    return (y.detach(), both()), (*times, peak_memory(both) / 2**20)


def peak_memory(work: Callable[[], object]) -> int:
    """Bytes of tensors that a call holds at most, over those that were there before."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        work()
    events = profile.profiler.kineto_results.events()
    changes = [event.nbytes() for event in events if event.name() == "[memory]"]
    return max(itertools.accumulate(changes), default=0)


def cells(times: tuple[float, float, float, float]) -> list[str]:
    return [*(f"{time:.1f}" for time in times[:3]), f"{times[3]:.0f}"]


def peer_module(path: str | None) -> ModuleType | None:
    """Ddn's projections, from a checkout."""
    if path is None:
        return None
    sys.path.insert(0, path)
    from ddn.pytorch import projections

    return projections


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ddn", metavar="PATH", help="checkout of ddn to compare with")
    parser.add_argument("--seconds", type=float, default=0.3, help="time spent on each median")
    options = parser.parse_args(arguments)
    peer = peer_module(options.ddn)
    table = Table(title="forward and backward, milliseconds (medians); peak memory, MiB")
    for column in COLUMNS + (PEER_COLUMNS if peer else []):
        table.add_column(column, justify="right", no_wrap=True)
    jobs = [(shape, dtype) for shape in SHAPES for dtype in DTYPES]
    for shape, dtype in tqdm(jobs, leave=False):
        x, g = normal(shape, dtype, 0), normal(shape, dtype, 1)
        start = ["{} x {}".format(*shape), str(dtype).removeprefix("torch.")]
        for case in tqdm(CASES, leave=False):
            table.add_row(*start, *compare(case, x, g, peer, options.seconds))
        _, times = run(
            lambda leaf: torch.nn.functional.normalize(leaf, dim=-1), x, g, options.seconds
        )
        table.add_row(*start, "F.normalize", "1", *cells(times), end_section=True)
    console = Console(width=130)
    console.print(table)
    console.print(
        "ratio: how many times faster than ddn. difference: largest relative difference of its "
        "results and gradients from ours. memory: at the highest point of a forward and backward "
        f"pass, over that before it. torch threads: {torch.get_num_threads()}."
    )


if __name__ == "__main__":
    main()
