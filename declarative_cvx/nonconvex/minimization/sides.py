"""Bounds as constraints of their own: one for each side of a variable that has one."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from declarative_cvx.nonconvex.minimization.minimizer import bounds
from declarative_cvx.nonconvex.minimization.program import NonlinearProgram
from declarative_cvx.nonconvex.minimization.records import Record

# By how much bounds are widened, so that fixed variables have an inside.
_WIDER = 1e-9
# Where bounds of elements stand that have none, if others have one there.
_NOWHERE = 1e20


@dataclass(frozen=True, eq=False)
class _Columns:
    """Which variables are bounded, lower bounds first, the same for all elements."""

    index: Tensor  # (sides,)
    sign: Tensor  # (sides,): 1 for lower, -1 for upper bounds
    variables: int

    @cached_property
    def rows(self) -> Tensor:
        """Jacobian of the distances, shape (sides, n)."""
        out = self.sign.new_zeros(len(self.index), self.variables)
        return out.scatter_(1, self.index[:, None], self.sign[:, None])


@dataclass(frozen=True, eq=False)
class Sides(Record):
    """Bounds of a batch.

    Attributes
    ----------
    edge : Tensor, shape (batch, sides)
        Bounds, slightly widened; upper ones with the opposite sign.
    columns : _Columns
    """

    edge: Tensor
    columns: _Columns

    @classmethod
    def of(cls, program: NonlinearProgram, x: Tensor) -> Sides:
        """Those that are finite for any element."""
        lower, upper = bounds(program, x)
        both = torch.cat([lower, -upper], 1)
        index = torch.where(torch.isfinite(both).any(0))[0]
        n = x.shape[1]
        sign = torch.where(index < n, 1.0, -1.0).to(x)
        edge = both[:, index]
        edge = (edge - _WIDER * (1 + edge.abs())).clamp(min=-_NOWHERE)
        return cls(edge, _Columns(index % n, sign, n))

    @property
    def count(self) -> int:
        return self.edge.shape[1]

    def gaps(self, x: Tensor) -> Tensor:
        """Distances of x from its bounds, (batch, sides)."""
        return x.index_select(1, self.columns.index) * self.columns.sign - self.edge

    def moves(self, dx: Tensor) -> Tensor:
        """Changes of the distances."""
        return dx.index_select(1, self.columns.index) * self.columns.sign

    def pull(self, values: Tensor) -> Tensor:
        """The gradient of the distances times values, (batch, sides) to (batch, n)."""
        return values @ self.columns.rows

    def spread(self, values: Tensor) -> Tensor:
        """Sums of the values of a variable's sides, (batch, sides) to (batch, n)."""
        return values @ self.columns.rows.abs()

    def split(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """Values of lower and upper bounds, each (batch, n), zero where there are none."""
        at_lower = self.columns.sign > 0
        return self.pull(values * at_lower), -self.pull(values * ~at_lower)
