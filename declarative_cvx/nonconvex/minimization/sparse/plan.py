"""How the linear systems of a program are factorised, found once for all its batches."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator

import torch
from torch import Tensor

from declarative_cvx.nonconvex.minimization.sparse.elimination import Elimination
from declarative_cvx.nonconvex.minimization.sparse.factors import SparseFactors
from declarative_cvx.nonconvex.minimization.sparse.matrix import SparseMatrix, across
from declarative_cvx.nonconvex.minimization.sparse.ordering import Ordering, eliminate, neighbours
from declarative_cvx.nonconvex.minimization.sparse.pattern import Pattern
from declarative_cvx.nonconvex.minimization.sparse.sums import OnDevices, indices, summing

# Entries of rows above which they may be nodes of their own, and slacks of the degrees to try.
_WIDE = (math.inf, 24, 6)
_SLACKS = (1.0, 1.5, 2.0, 3.0)
# Products that cost as much as a round at a batch of 64 (measured).
_ROUND = 400
# Backward error, relative to the matrix, of factors without pivoting that are good.
_RELIABLE = 1e-9
# Share of a dense factorisation's products above which a sparse one is not looked for.
_SPARSE = 0.5


class Plan:
    """The matrices H + A'diag(w)A + diag(d), their pattern and their elimination.

    Rows of A with many entries would fill the matrix: they become nodes of their own, with the
    pivot -1 and the entries sqrt(w) A.

    Parameters
    ----------
    hessian, rows : Pattern
    elimination : Elimination
    wide : list of int
        Rows that are nodes.
    """

    def __init__(
        self, hessian: Pattern, rows: Pattern, ordering: Ordering, wide: list[int]
    ) -> None:
        self.hessian, self.rows, self.wide = hessian, rows, wide
        self.ordering = ordering
        self.elimination = Elimination(ordering)
        self.variables = hessian.shape[0]
        self._ready = OnDevices()

    @classmethod
    def of(cls, hessian: Pattern, rows: Pattern) -> Plan | None:
        """The cheapest of several; None if the matrices are nearly full."""
        n = hessian.shape[0]
        best: tuple[float, Ordering, list[int]] | None = None
        for wide in _choices(rows):
            graph = neighbours(n + len(wide), _links(hessian, rows, wide))
            for slack in _SLACKS:
                most = min(_SPARSE * n**3 / 6, math.inf if best is None else best[0])
                found = eliminate(graph, slack, most)
                cost = math.inf if found is None else found.products + _ROUND * len(found.rounds)
                if found is not None and (best is None or cost < best[0]):
                    best = cost, found, wide
        return None if best is None else cls(hessian, rows, *best[1:])

    def assemble(
        self,
        hessian: SparseMatrix | None,
        rows: SparseMatrix,
        weights: Tensor,  # (batch, r)
        diagonal: Tensor | None,  # (batch, n)
    ) -> Tensor:
        """The table (entries, batch) to be factorised."""
        A, w = rows.table, across(weights)
        device = A.device
        own = A.new_zeros(self.variables, A.shape[1]) if diagonal is None else across(diagonal)
        one, other, wide_entries, wide_rows, lower, sums, pivots = self._ready.get(
            ("assembly", hessian is None), device, lambda: self._assembly(hessian is None, device)
        )
        weighted = A * w.index_select(0, self.rows.index(0, device))
        parts = [own, weighted.index_select(0, one).mul_(A.index_select(0, other))]
        if len(wide_entries):
            roots = w.sqrt().index_select(0, wide_rows)
            parts.append(A.index_select(0, wide_entries).mul_(roots))
        if hessian is not None:
            parts.append(hessian.table.index_select(0, lower))
        table = torch.mm(sums, torch.cat(parts))
        return table.index_fill_(0, pivots, -1.0) if len(pivots) else table

    def _assembly(self, without_hessian: bool, device: torch.device) -> tuple[Tensor, ...]:
        """Indices of the entries that are multiplied, and where everything is added."""
        position, n = self.elimination.position, self.variables
        targets = [position(j, j) for j in range(n)]
        pairs = list(_pairs(self.rows, set(self.wide)))
        columns = [column for _, column in self.rows.places]
        targets += [position(columns[a], columns[b]) for a, b in pairs]
        node = {row: n + i for i, row in enumerate(self.wide)}
        wide = [i for i, (row, _) in enumerate(self.rows.places) if row in node]
        targets += [position(node[self.rows.places[i][0]], columns[i]) for i in wide]
        lower = [i for i, (row, column) in enumerate(self.hessian.places) if row >= column]
        if not without_hessian:
            targets += [position(*self.hessian.places[i]) for i in lower]
        lists = [
            [a for a, _ in pairs], [b for _, b in pairs], wide,
            [self.rows.places[i][0] for i in wide], lower,
        ]  # fmt: skip
        found = [indices(v, device) for v in lists]
        sums = summing(indices(targets, device), self.elimination.size)
        pivots = indices([position(v, v) for v in node.values()], device)
        return (*found, sums, pivots)

    def diagonal(self, device: torch.device) -> Tensor:
        """Rows of the table with the variables' diagonal entries."""
        position = self.elimination.position
        return self._ready.get(
            "diagonal", device,
            lambda: indices([position(j, j) for j in range(self.variables)], device),
        )  # fmt: skip

    def factors(self, table: Tensor) -> SparseFactors:
        """Of an assembled table, which is overwritten."""
        return SparseFactors.of(self.elimination, table)

    def definite(self, factors: SparseFactors) -> Tensor:
        """Whether the matrix (that without nodes for rows) is positive definite, (batch,)."""
        return factors.usable & (factors.negative == len(self.wide))

    def reliable(self, factors: SparseFactors, table: Tensor) -> Tensor:
        """Whether factors reproduce the table that they are of, bool, (batch,).

        Definite matrices need no pivoting; with nodes for rows, pivots may be too small for it.
        """
        if not self.wide:
            return factors.usable
        x = factors.solve(table.new_ones(table.shape[1], len(self.elimination.order)))
        error = (self._product(table, across(x)) - 1).abs().amax(0)
        size = 1 + table.abs().amax(0) * x.abs().amax(1)
        return factors.usable & (error <= _RELIABLE * size)

    def _product(self, table: Tensor, x: Tensor) -> Tensor:
        """Of the symmetric matrices with vectors x (nodes, batch)."""
        left, right, by_left, by_right = self._ready.get(
            "product", x.device, lambda: self._ends(x.device)
        )
        once = torch.where((left == right)[:, None], 0.0, table)
        by_rows = torch.mm(by_left, table * x.index_select(0, right))
        return by_rows + torch.mm(by_right, once * x.index_select(0, left))

    def _ends(self, device: torch.device) -> tuple[Tensor, ...]:
        nodes = len(self.elimination.order)
        left, right = (indices(v, device) for v in zip(*self.elimination.ends, strict=True))
        return left, right, summing(left, nodes), summing(right, nodes)


def _choices(rows: Pattern) -> list[list[int]]:
    """Rows that may be nodes of their own."""
    counts: dict[int, int] = defaultdict(int)
    for row, _ in rows.places:
        counts[row] += 1
    found: list[list[int]] = []
    for limit in _WIDE:
        wide = sorted(row for row, count in counts.items() if count > limit)
        if wide not in found:
            found.append(wide)
    return found


def _links(hessian: Pattern, rows: Pattern, wide: list[int]) -> Iterator[tuple[int, int]]:
    """Pairs of nodes with an entry between them."""
    yield from hessian.places
    node = {row: hessian.shape[0] + i for i, row in enumerate(wide)}
    columns = [column for _, column in rows.places]
    yield from ((columns[a], columns[b]) for a, b in _pairs(rows, set(wide)))
    yield from ((node[row], column) for row, column in rows.places if row in node)


def _pairs(rows: Pattern, without: set[int]) -> Iterator[tuple[int, int]]:
    """Pairs of entries (a, b), a >= b, of the same row, each once, but for some rows."""
    members: dict[int, list[int]] = defaultdict(list)
    for i, (row, _) in enumerate(rows.places):
        if row not in without:
            members[row].append(i)
    for found in members.values():
        for k, a in enumerate(found):
            yield from ((a, b) for b in found[: k + 1])
