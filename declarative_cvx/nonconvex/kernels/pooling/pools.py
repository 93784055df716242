"""Many pools of numbers, as the methods that minimise over them see them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

# Entries worked on at a time: on a CPU the temporaries of a block stay in its cache. For points in
# space these are few, and products of matrices do the work.
_BLOCK = {"cpu": {2: 1 << 17, 3: 1 << 19}}
_LARGE_BLOCK = 1 << 25
_SAMPLE = 64


@dataclass(frozen=True)
class Pools:
    """Pools of points on a line, in units of alpha from a centre of each pool's own.

    Attributes
    ----------
    points : Tensor, shape (batch, n)
    weights : Tensor, shape (batch, n), or None
        The largest of each pool is 1. None stands for equal ones.
    """

    points: Tensor
    weights: Tensor | None

    def total(self, terms: Tensor) -> Tensor:  # (batch, n) -> (batch,)
        """Weighted sum of one term for each point."""
        return self.weighted(terms).sum(-1)

    def weighted(self, terms: Tensor) -> Tensor:
        """Terms (batch, n) times the weights."""
        return terms if self.weights is None else terms * self.weights

    @property
    def mass(self) -> Tensor:
        """Sum of the weights, shape (batch,)."""
        if self.weights is None:
            return self.points.new_full(self.points.shape[:1], self.points.shape[1])
        return self.weights.sum(-1)

    def rows(self, index: Tensor) -> Pools:
        """The pools at some indices."""
        return Pools(self.points[index], None if self.weights is None else self.weights[index])

    def double(self) -> Pools:
        return Pools(self.points.double(), None if self.weights is None else self.weights.double())


@dataclass(frozen=True)
class Minimum:
    """Minimisers of pools.

    Attributes
    ----------
    point : Tensor, shape (batch,) or (batch, d)
    gap : Tensor, shape (batch,)
        Certified bound on how far the sum is above its minimum, for each unit of weight (the
        largest weight of a pool counting as 1) and in units of the penalty's own; NaN if there is
        none.
    unique : Tensor of bool, shape (batch,)
        Whether no other point was found to be as good.
    """

    point: Tensor
    gap: Tensor
    unique: Tensor


def blocks(x: Tensor, rows: int | None = None) -> Iterator[slice]:
    """Slices over the rows of x, or over so many of its kind, to be done one after the other."""
    entries = _BLOCK.get(x.device.type, {}).get(x.dim(), _LARGE_BLOCK)
    step = max(1, entries // max(1, x[:1].numel()))
    count = x.shape[0] if rows is None else rows
    for start in range(0, max(1, count), step):
        yield slice(start, start + step)


def centre(x: Tensor) -> Tensor:  # (batch, n) -> (batch,)
    """A number in the midst of each pool: the median of a few of its points."""
    stride = max(1, x.shape[-1] // _SAMPLE)
    sample = ascending(x[:, ::stride])
    return sample[:, (sample.shape[-1] - 1) // 2]


def in_units(x: Tensor, alpha: Tensor, weights: Tensor | None, origin: Tensor) -> Pools:
    """The points of x (batch, n) in units of alpha (batch,) from origin (batch,)."""
    points = (x - origin.unsqueeze(-1)) / alpha.unsqueeze(-1)
    if weights is not None:
        weights = weights / weights.amax(-1, keepdim=True)
    return Pools(points, weights)


def ascending(x: Tensor) -> Tensor:
    """The entries sorted along the last dimension."""
    if x.device.type == "cpu":
        # NumPy sorts with vector instructions, a good ten times as fast as torch does.
        return torch.from_numpy(np.sort(x.numpy(), axis=-1))
    return x.sort(dim=-1).values


def ascending_order(x: Tensor) -> Tensor:
    """Indices that sort x along its last dimension."""
    if x.device.type == "cpu":
        return torch.from_numpy(np.argsort(x.numpy(), axis=-1))
    return x.argsort(dim=-1)


@dataclass(frozen=True)
class Quality:
    """How good minimisers are; every tensor is (batch,).

    Attributes
    ----------
    objective : Tensor
    residual : Tensor
        Slope of the sum of penalties, relative to the sum of weights and of the terms' slopes.
    rounding : Tensor
        What rounding alone may make of the residual.
    smooth : Tensor of bool
        Whether the sum is twice differentiable there, with a curvature that is not zero.
    """

    objective: Tensor
    residual: Tensor
    rounding: Tensor
    smooth: Tensor


def joined(parts: Iterable[Quality]) -> Quality:
    """The qualities of consecutive blocks as one."""
    fields = zip(*((q.objective, q.residual, q.rounding, q.smooth) for q in parts), strict=True)
    return Quality(*(torch.cat(field) for field in fields))
