"""Factorisations L D L' of sparse symmetric matrices, all elements of a batch at once."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from declarative_cvx.nonconvex.minimization.records import Record
from declarative_cvx.nonconvex.minimization.sparse.elimination import Elimination, Gathered, Rest
from declarative_cvx.nonconvex.minimization.sparse.matrix import across


@dataclass(frozen=True, eq=False)
class SparseFactors(Record):
    """L D L' without pivoting, the last nodes as one dense block with pivoting.

    Attributes
    ----------
    lower : Tensor, shape (batch, entries)
        L below the diagonal, the inverse of D on it.
    block : Tensor, shape (batch, order, order)
    pivots : Tensor, shape (batch, order)
    negative : Tensor of int64, shape (batch,)
        Number of negative eigenvalues.
    usable : Tensor of bool, shape (batch,)
        Whether no pivot was zero and everything stayed finite.
    elimination : Elimination
    """

    lower: Tensor
    block: Tensor
    pivots: Tensor
    negative: Tensor
    usable: Tensor
    elimination: Elimination

    @classmethod
    def of(cls, elimination: Elimination, table: Tensor) -> SparseFactors:
        """Factorise in place, table (entries, batch) in the order of the elimination."""
        schedule = elimination.schedule(table.device)
        lower = torch.empty_like(table)
        for part in schedule.rounds:
            rows = table.narrow(0, part.start, part.stop - part.start)
            if part.update is not None:
                rows.sub_(part.update(table, lower))
            count = part.last - part.first
            inverse = lower.narrow(0, part.start, count)
            torch.reciprocal(rows[:count], out=inverse)
            torch.mul(
                rows[count:],
                inverse.index_select(0, part.owner),
                out=lower.narrow(0, part.start + count, len(rows) - count),
            )
        inverses = lower.index_select(0, schedule.diagonal)
        usable = torch.isfinite(inverses).all(0) & (inverses != 0).all(0)
        block, pivots, more, good = _block(schedule.rest, table, lower)
        negative = (inverses < 0).sum(0) + more
        return cls(lower.t(), block, pivots, negative, usable & good, elimination)

    def solve(self, rhs: Tensor) -> Tensor:
        """Solutions for right-hand sides (batch, numbers), zero at any further nodes."""
        schedule, lower = self.elimination.schedule(rhs.device), across(self.lower)
        given, missing = rhs.shape[1], len(self.elimination.order) - rhs.shape[1]
        whole = torch.nn.functional.pad(rhs.t(), (0, 0, 0, missing)) if missing else across(rhs)
        w = whole.index_select(0, schedule.order)
        for part in schedule.rounds:
            _subtract(w, part.forward, lower, part.first, part.last)
        rest = schedule.rest
        _subtract(w, rest.forward, lower, rest.first, len(w))
        w[: rest.first] *= lower.index_select(0, schedule.diagonal)
        if rest.order:
            w[rest.first :] = self._solve_block(w[rest.first :].t()).t()
        for part in reversed(schedule.rounds):
            if len(part.below):
                count = part.last - part.first
                entries = lower.narrow(0, part.start + count, len(part.below))
                terms = w.index_select(0, part.below).mul_(entries)
                w.narrow(0, part.first, count).sub_(torch.mm(part.backward, terms))
        return w.index_select(0, schedule.back)[:given].t()

    def _solve_block(self, rhs: Tensor) -> Tensor:
        return torch.linalg.ldl_solve(self.block, self.pivots, rhs[:, :, None])[:, :, 0]


def _subtract(w: Tensor, gathered: Gathered | None, lower: Tensor, first: int, last: int) -> None:
    if gathered is not None:
        w.narrow(0, first, last - first).sub_(gathered(lower, w))


def _block(rest: Rest, table: Tensor, lower: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Factors of what is left, its negative eigenvalues, and whether it is finite and regular."""
    batch, k = table.shape[1], rest.order
    entries = table[rest.start :]
    if rest.update is not None:
        entries = entries - rest.update(table, lower)
    matrix = entries.index_select(0, rest.whole).t().reshape(batch, k, k)
    good = torch.isfinite(matrix).flatten(1).all(1)
    matrix = torch.where(good[:, None, None], matrix, 1.0)
    if not k:
        none = torch.zeros(batch, dtype=torch.int64, device=table.device)
        return matrix, matrix.new_zeros(batch, 0), none, good
    block, pivots, info = torch.linalg.ldl_factor_ex(matrix)
    single = (block.diagonal(dim1=1, dim2=2) < 0) & (pivots > 0)
    # Pivots of order two, which are marked twice, have one eigenvalue of either sign.
    negative = single.sum(1) + (pivots < 0).sum(1) // 2
    return block, pivots, negative, good & (info == 0)
