"""Sparse matrices of a batch."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from declarative_cvx.nonconvex.minimization.records import Record
from declarative_cvx.nonconvex.minimization.sparse.pattern import Pattern


@dataclass(frozen=True, eq=False)
class SparseMatrix(Record):
    """A matrix for each element, with one pattern.

    Attributes
    ----------
    values : Tensor, shape (batch, entries)
        Best with the batch innermost in memory, which is how they are worked on.
    pattern : Pattern
    """

    values: Tensor
    pattern: Pattern

    @property
    def shape(self) -> tuple[int, int, int]:
        return len(self.values), *self.pattern.shape

    @property
    def table(self) -> Tensor:
        """Entries, shape (entries, batch)."""
        return across(self.values)

    def along(self, x: Tensor) -> Tensor:
        """Products with vectors x, (batch, columns): (batch, rows)."""
        return self._product(x, 0)

    def mix(self, weights: Tensor) -> Tensor:
        """Sums of rows with weights, (batch, rows): (batch, columns)."""
        return self._product(weights, 1)

    def _product(self, x: Tensor, axis: int) -> Tensor:
        other = self.pattern.index(1 - axis, x.device)
        terms = across(x).index_select(0, other).mul_(self.table)
        return self.pattern.total(terms, axis).t()

    def abs(self) -> SparseMatrix:
        return replace(self, values=self.values.abs())

    def scaled(self, rows: Tensor | None = None, columns: Tensor | None = None) -> SparseMatrix:
        """Rows and columns times factors, (batch, rows) and (batch, columns)."""
        table = self.table
        for axis, factors in ((0, rows), (1, columns)):
            if factors is not None:
                index = self.pattern.index(axis, table.device)
                table = across(factors.to(table)).index_select(0, index).mul_(table)
        return replace(self, values=table.t())

    def largest(self, axis: int) -> Tensor:
        """Largest absolute value of each row (axis 0) or column (axis 1), (batch, rows)."""
        return self.pattern.largest(self.table.abs(), axis).t()

    def norms(self) -> Tensor:
        """Euclidean norms of the rows, (batch, rows)."""
        return self.pattern.total(self.table.square(), 0).sqrt().t()

    def first(self) -> Tensor:
        """Row 0, shape (batch, columns)."""
        count = self.pattern.first
        out = self.values.new_zeros(self.pattern.shape[1], len(self.values))
        index = self.pattern.index(1, out.device)[:count]
        return out.index_copy_(0, index, self.table[:count]).t()

    def rest(self) -> SparseMatrix:
        """All rows but the first."""
        return SparseMatrix(self.table[self.pattern.first :].t(), self.pattern.rest)

    def dense(self) -> Tensor:
        """Shape (batch, rows, columns)."""
        _, rows, columns = self.shape
        out = self.values.new_zeros(len(self.values), rows * columns)
        device = out.device
        places = self.pattern.index(0, device) * columns + self.pattern.index(1, device)
        return out.index_copy_(1, places, self.values).view(len(self.values), rows, columns)


def across(values: Tensor) -> Tensor:
    """The transpose, contiguous: from (batch, numbers) to (numbers, batch)."""
    return values.t().contiguous()


def joined(*parts: Tensor) -> Tensor:
    """Beside each other, (batch, numbers) each, the batch innermost in memory."""
    return torch.cat([part.t() for part in parts]).t()
