"""Which dimensions of a tensor are pooled, and the tensor laid out accordingly."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from declarative_cvx.errors import ParameterError, SpecificationError


@dataclass(frozen=True)
class PoolLayout:
    """Dimensions of a tensor of some shape; all are counted from the front.

    Attributes
    ----------
    shape : tuple of int
    kept, pooled : tuple of int
    point : tuple of int
        The dimension of a point's coordinates, if there is one.
    """

    shape: tuple[int, ...]
    kept: tuple[int, ...]
    pooled: tuple[int, ...]
    point: tuple[int, ...]

    @classmethod
    def of(cls, x: Tensor, dim: int | tuple[int, ...], point_dim: int | None) -> PoolLayout:
        """Refuses dimensions that x does not have, twice the same one, and empty pools."""
        pooled = _from_the_front("dim", dim, x)
        point = () if point_dim is None else _from_the_front("point_dim", point_dim, x)
        if len({*pooled, *point}) < len(pooled) + len(point):
            raise SpecificationError(
                f"dim={dim} and point_dim={point_dim} name a dimension of x more than once."
            )
        for d in (*pooled, *point):
            if x.shape[d] == 0:
                raise ParameterError(
                    f"x of shape {tuple(x.shape)} is empty in dimension {d}, over which it is "
                    "pooled: there is no minimum. Leave empty pools out."
                )
        kept = tuple(d for d in range(x.dim()) if d not in {*pooled, *point})
        return cls(tuple(x.shape), kept, pooled, point)

    @property
    def batch(self) -> tuple[int, ...]:
        return tuple(self.shape[d] for d in self.kept)

    @property
    def one_per_point(self) -> tuple[int, ...]:
        """The shape of x with one entry for each point."""
        return tuple(1 if d in self.point else size for d, size in enumerate(self.shape))

    def result_shape(self, keepdim: bool) -> tuple[int, ...]:
        """The shape of the result with one entry for each pool."""
        gone = {} if keepdim else {*self.pooled}
        return tuple(
            1 if d in {*self.pooled, *self.point} else size
            for d, size in enumerate(self.shape)
            if d not in gone
        )

    def flatten(self, x: Tensor) -> Tensor:
        """The data as (*batch, n), or (*batch, n, d) where there are points."""
        moved = x.permute(*self.kept, *self.pooled, *self.point)
        tail = tuple(x.shape[d] for d in self.point)
        return moved.reshape(*self.batch, math.prod(self.shape[d] for d in self.pooled), *tail)

    def flatten_weights(self, weights: Tensor) -> Tensor:
        """Weights, one for each point, as (*batch, n)."""
        whole = self.flatten(weights.expand(self.one_per_point))
        return whole.squeeze(-1) if self.point else whole

    def restore(self, y: Tensor, keepdim: bool) -> Tensor:
        """A result (*batch,) or (*batch, d), its dimensions in the order of x's."""
        if self.point:
            place = sum(d < self.point[0] for d in self.kept)
            y = y.movedim(-1, place)
        for d in sorted(self.pooled) if keepdim else ():
            y = y.unsqueeze(d)
        return y

    def index(self, flat: tuple[int, ...]) -> tuple[int, ...]:
        """The index into x of an entry of what `flatten` returns."""
        flat = flat[-(len(self.kept) + 1 + len(self.point)) :]  # without what vmap adds
        batch, rest = flat[: len(self.kept)], flat[len(self.kept) :]
        sizes = torch.Size(self.shape[d] for d in self.pooled)
        within = torch.unravel_index(torch.tensor(rest[0]), sizes)
        index = dict(zip(self.kept, batch, strict=True))
        index |= {d: int(i) for d, i in zip(self.pooled, within, strict=True)}
        index |= dict(zip(self.point, rest[1:], strict=True))
        return tuple(index[d] for d in sorted(index))

    def point_index(self, flat: tuple[int, ...]) -> tuple[int, ...]:
        """The index into x, less the coordinate, of an entry that there is for each point."""
        whole = self.index((*flat, 0) if self.point else flat)
        return tuple(i for d, i in enumerate(whole) if d not in self.point)

    def batch_index(self, flat: tuple[int, ...]) -> tuple[int, ...]:
        """The index of a pool among the kept dimensions."""
        return flat[len(flat) - len(self.kept) :]


def _from_the_front(name: str, dim: int | tuple[int, ...], x: Tensor) -> tuple[int, ...]:
    dims = (dim,) if isinstance(dim, int) else tuple(dim)
    rank = x.dim()
    if not dims:
        raise SpecificationError(f"{name} is empty: name at least one dimension to pool over.")
    for d in dims:
        if not isinstance(d, int) or not -rank <= d < rank:
            raise SpecificationError(
                f"{name}={dim} is not of x, which has {rank} dimensions; "
                f"expected integers from {-rank} to {rank - 1}."
            )
    return tuple(d % rank for d in dims)


def check_numbers(
    layout: PoolLayout,
    x: Tensor,  # (*batch, n, *point)
    alpha: Tensor,  # (*batch,)
    weights: Tensor | None,  # (*batch, n)
) -> None:
    """Refuse data that are not finite, scales that are not positive and useless weights."""
    if not bool(x.sum().isfinite()):
        _refuse("x", ~x.isfinite(), x, layout.index, "data must be finite; mask such entries.")
    bad = ~((alpha > 0) & (alpha < torch.inf))
    expected = "alpha must be positive and finite; make it so, for example by softplus."
    _refuse("alpha", bad, alpha, layout.batch_index, expected)
    if weights is None:
        return
    lowest, total = weights.amin(-1), weights.amax(-1)
    if not bool(((lowest >= 0) & (total < torch.inf)).all()):
        bad = ~((weights >= 0) & (weights < torch.inf))
        _refuse(
            "weights", bad, weights, layout.point_index, "weights must be nonnegative and finite."
        )
    expected = "the largest weight of a pool must be positive; leave empty pools out."
    _refuse("weights.amax", total == 0, total, layout.batch_index, expected)


def _refuse(
    name: str,
    bad: Tensor,
    values: Tensor,
    index: Callable[[tuple[int, ...]], tuple[int, ...]],
    expected: str,
) -> None:
    """Raise an error that names the first bad value, if there is one."""
    if not bool(bad.any()):
        return
    flat = tuple(bad.nonzero()[0].tolist())
    place = ", ".join(str(i) for i in index(flat))
    raise ParameterError(
        f"{name}[{place}] is {float(values[flat])}, one of {int(bad.sum())} such values: {expected}"
    )
