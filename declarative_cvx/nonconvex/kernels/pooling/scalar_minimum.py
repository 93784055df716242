"""The global minimum of a sum of penalties of distances on a line, for many pools at once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from declarative_cvx.nonconvex.kernels.pooling.branch_and_bound import Intervals, Search
from declarative_cvx.nonconvex.kernels.pooling.lattice import Cells, Lattice
from declarative_cvx.nonconvex.kernels.pooling.pools import Minimum, Pools, blocks, centre, in_units
from declarative_cvx.nonconvex.kernels.pooling.safeguarded_newton import polish
from declarative_cvx.nonconvex.kernels.pooling.window import huber, truncated_quadratic
from declarative_cvx.penalties import Huber, Penalty, Quadratic, TruncatedQuadratic


def scalar_minimum(
    penalty: Penalty,
    x: Tensor,  # (batch, n)
    alpha: Tensor,  # (batch,)
    weights: Tensor | None,  # (batch, n)
) -> Minimum:
    """Minimise sum_i w_i phi(u - x_i; alpha) over u in each pool, whatever the others hold."""
    origin = centre(x)
    method = _method(penalty, x.device)

    def pools(rows: slice | Tensor) -> Pools:
        chosen = None if weights is None else weights[rows]
        return in_units(x[rows], alpha[rows], chosen, origin[rows])

    found = [method(pools(rows)) for rows in blocks(x)]
    point = torch.cat([local.point for local in found])
    unique = torch.cat([local.unique for local in found])
    gap = torch.zeros_like(point)
    rest = _joined(found)
    if rest is not None and rest.pool.numel():
        chosen, rest = _renumbered(rest)
        search = Search(penalty, pools(chosen).double(), point[chosen].double())
        search.run(rest)
        point = point.index_copy(0, chosen, search.point.to(point.dtype))
        gap = gap.index_copy(0, chosen, search.gap.to(gap.dtype))
        unique = unique.index_copy(0, chosen, search.unique)
    return Minimum(origin + alpha * point, gap, unique)


@dataclass(frozen=True)
class _Found:
    """Minima of a block of pools, and intervals where better ones may be."""

    point: Tensor
    unique: Tensor
    open: Intervals | None = None


def _method(penalty: Penalty, device: torch.device) -> Callable[[Pools], _Found]:
    """How to minimise this penalty over a block of pools."""
    if type(penalty) in _EXACT:
        exact = _EXACT[type(penalty)]
        return lambda pools: _Found(*exact(pools))
    if penalty.convex:
        return lambda pools: _convex(penalty, pools)
    lattice = Lattice(penalty, device)
    return lambda pools: _searched(penalty, lattice, pools)


def _mean(pools: Pools) -> tuple[Tensor, Tensor]:
    mean = pools.total(pools.points) / pools.mass
    return mean, torch.ones_like(mean, dtype=torch.bool)


def _convex(penalty: Penalty, pools: Pools) -> _Found:
    first, last = pools.points.amin(-1), pools.points.amax(-1)
    point = polish(penalty, pools, torch.zeros_like(first), first, last)
    return _Found(point, torch.ones_like(point, dtype=torch.bool))


def _searched(penalty: Penalty, lattice: Lattice, pools: Pools) -> _Found:
    cells = lattice.cells(pools)
    start = cells.lowest().to(pools.points.dtype)
    point = polish(penalty, pools, start, start - cells.width, start + cells.width)
    value = pools.total(penalty.rho(point.unsqueeze(-1) - pools.points))
    # At an end of its interval, Newton's method has found no stationary point.
    stationary = (point - start).abs() < 0.999 * cells.width
    left = _left(cells, pools, cells.open(point, value, stationary))
    return _Found(point, torch.ones_like(stationary), left)


def _left(cells: Cells, pools: Pools, open: Tensor) -> Intervals:
    """The open cells (batch, cells), the outermost extended to the ends of the data."""
    pool, cell = open.nonzero().unbind(-1)
    low = cells.origin[pool] + cell * cells.width
    high = low + cells.width
    first, last = pools.points.amin(-1)[pool].float(), pools.points.amax(-1)[pool].float()
    low = torch.where(cell == 0, low.minimum(first), low)
    high = torch.where(cell == cells.least.shape[-1] - 1, high.maximum(last), high)
    return Intervals(pool, low.double(), high.double())


def _joined(found: list[_Found]) -> Intervals | None:
    """The open intervals of all blocks, their pools numbered through."""
    parts, offset = [], 0
    for local in found:
        if local.open is None:
            return None
        parts.append((local.open.pool + offset, local.open.low, local.open.high))
        offset += local.point.numel()
    return Intervals(*(torch.cat(field) for field in zip(*parts, strict=True)))


def _renumbered(intervals: Intervals) -> tuple[Tensor, Intervals]:
    """The pools that intervals are of, and the intervals of those alone."""
    chosen, pool = intervals.pool.unique(return_inverse=True)
    return chosen, Intervals(pool, intervals.low, intervals.high)


_EXACT: dict[type[Penalty], Callable[[Pools], tuple[Tensor, Tensor]]] = {
    Quadratic: _mean,
    Huber: huber,
    TruncatedQuadratic: truncated_quadratic,
}
