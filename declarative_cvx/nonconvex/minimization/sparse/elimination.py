"""What a factorisation L D L' of a sparse symmetric pattern does, found once for all batches."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from declarative_cvx.nonconvex.minimization.sparse.ordering import Ordering
from declarative_cvx.nonconvex.minimization.sparse.sums import OnDevices, indices, summing

# Triples (target, left, right): the entry in row target loses the product of two others.
Products = list[tuple[int, int, int]]


@dataclass(frozen=True)
class Gathered:
    """Products of rows of two tables, summed."""

    left: Tensor
    right: Tensor
    sums: Tensor

    @classmethod
    def of(cls, products: Products, start: int, count: int, device: torch.device) -> Gathered:
        """Targets are counted from start on."""
        targets, left, right = (indices(v, device) for v in zip(*sorted(products), strict=True))
        return cls(left, right, summing(targets - start, count))

    def __call__(self, left: Tensor, right: Tensor) -> Tensor:
        """Sums of products of rows of two tables (rows, batch)."""
        terms = left.index_select(0, self.left).mul_(right.index_select(0, self.right))
        return torch.mm(self.sums, terms)


@dataclass(frozen=True)
class Round:
    """The columns that are eliminated at once: their diagonal entries, then the others.

    Attributes
    ----------
    start, stop : int
        Their entries' rows in the table.
    first, last : int
        The nodes, in order of their elimination.
    update : Gathered or None
        What earlier columns take away from their entries.
    owner : Tensor
        Of each entry below the diagonal its diagonal entry.
    forward : Gathered or None
        Of the entries left of the diagonal, and of the solution so far.
    below : Tensor
        Of each entry below the diagonal its row's node.
    backward : Tensor
        Sums over each column.
    """

    start: int
    stop: int
    first: int
    last: int
    update: Gathered | None
    owner: Tensor
    forward: Gathered | None
    below: Tensor
    backward: Tensor


@dataclass(frozen=True)
class Rest:
    """The nodes that are left, as a dense matrix."""

    start: int
    first: int
    order: int
    update: Gathered | None
    forward: Gathered | None
    whole: Tensor  # (order^2,): entries of the symmetric matrix


@dataclass(frozen=True)
class Schedule:
    """Everything a device needs; nodes are counted in the order of their elimination."""

    rounds: list[Round]
    rest: Rest
    order: Tensor  # the nodes' own numbers
    back: Tensor  # places of the nodes
    diagonal: Tensor  # entries, of the rounds' nodes in order


class Elimination:
    """Positions of the entries of L in a table, and the steps that compute them.

    Parameters
    ----------
    ordering : Ordering

    Attributes
    ----------
    size : int
        Number of rows of the table.
    order : list of int
        The nodes as they are eliminated.
    rounds : int
    """

    def __init__(self, ordering: Ordering) -> None:
        self._ordering = ordering
        self.order = [node for members in ordering.rounds for node, _ in members] + ordering.rest
        self.rounds = len(ordering.rounds)
        self._place = {node: place for place, node in enumerate(self.order)}
        self._positions: dict[tuple[int, int], int] = {}
        self._starts: list[tuple[int, int]] = []  # of entries and nodes, round by round
        self._number_entries()
        self.size = len(self._positions)
        self._updates, self._forward = self._products()
        self._ready = OnDevices()

    def position(self, i: int, j: int) -> int:
        """Row of the table of the entry between two nodes."""
        return self._positions[self._key(i, j)]

    @property
    def ends(self) -> list[tuple[int, int]]:
        """The two nodes of every entry."""
        return list(self._positions)

    def schedule(self, device: torch.device) -> Schedule:
        return self._ready.get("schedule", device, lambda: self._schedule(device))

    def _key(self, i: int, j: int) -> tuple[int, int]:
        return (i, j) if self._place[i] <= self._place[j] else (j, i)

    def _add(self, *key: int) -> None:
        self._positions[key[0], key[1]] = len(self._positions)

    def _number_entries(self) -> None:
        nodes = 0
        for members in self._ordering.rounds:
            self._starts.append((len(self._positions), nodes))
            for node, _ in members:
                self._add(node, node)
            for node, below in members:
                for other in below:
                    self._add(node, other)
            nodes += len(members)
        self._starts.append((len(self._positions), nodes))
        rest = self._ordering.rest
        for i, node in enumerate(rest):
            for other in rest[i:]:
                self._add(node, other)

    def _products(self) -> tuple[dict[int, Products], dict[int, Products]]:
        """What every round needs of those before it, for its entries and for its nodes."""
        round_of = {n: r for r, members in enumerate(self._ordering.rounds) for n, _ in members}
        updates: dict[int, Products] = defaultdict(list)
        forward: dict[int, Products] = defaultdict(list)
        last = len(self._ordering.rounds)
        for members in self._ordering.rounds:
            for node, below in members:
                entries = [(self._positions[node, other], other) for other in below]
                for at, i in entries:
                    later = round_of.get(i, last)
                    forward[later].append((self._place[i], at, self._place[node]))
                    for and_at, j in entries:
                        if self._place[j] >= self._place[i]:
                            updates[later].append((self._positions[i, j], and_at, at))
        return updates, forward

    def _schedule(self, device: torch.device) -> Schedule:
        rounds = [self._round(r, members, device)
                  for r, members in enumerate(self._ordering.rounds)]  # fmt: skip
        diagonal = [self._positions[n, n] for n in self.order[: self._starts[-1][1]]]
        back = sorted(range(len(self.order)), key=self.order.__getitem__)
        order, places, entries = (indices(v, device) for v in (self.order, back, diagonal))
        return Schedule(rounds, self._rest(device), order, places, entries)

    def _gathered(
        self, products: Products, start: int, count: int, device: torch.device
    ) -> Gathered | None:
        return Gathered.of(products, start, count, device) if products else None

    def _round(
        self, number: int, members: Sequence[tuple[int, list[int]]], device: torch.device
    ) -> Round:
        (start, first), (stop, last) = self._starts[number : number + 2]
        pairs = [(i, other) for i, (_, below) in enumerate(members) for other in below]
        owner = indices([i for i, _ in pairs], device)
        below = indices([self._place[other] for _, other in pairs], device)
        return Round(
            start, stop, first, last,
            self._gathered(self._updates[number], start, stop - start, device), owner,
            self._gathered(self._forward[number], first, last - first, device), below,
            summing(owner, last - first),
        )  # fmt: skip

    def _rest(self, device: torch.device) -> Rest:
        (start, first), number, nodes = self._starts[-1], self.rounds, self._ordering.rest
        whole = indices([self.position(i, j) - start for i in nodes for j in nodes], device)
        return Rest(
            start, first, len(nodes),
            self._gathered(self._updates[number], start, self.size - start, device),
            self._gathered(self._forward[number], first, len(nodes), device), whole,
        )  # fmt: skip
