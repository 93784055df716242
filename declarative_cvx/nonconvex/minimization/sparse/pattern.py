"""Where the entries of a batch of sparse matrices are."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor

from declarative_cvx.nonconvex.minimization.sparse.sums import OnDevices, indices, summing


class Pattern:
    """Rows and columns of the entries, in order of the rows, then of the columns.

    Parameters
    ----------
    places : sequence of (int, int)
    shape : (int, int)
    """

    def __init__(self, places: Sequence[tuple[int, int]], shape: tuple[int, int]) -> None:
        self.places = list(places)
        self.shape = shape
        self._ready = OnDevices()

    @cached_property
    def first(self) -> int:
        """Number of entries in row 0."""
        return sum(row == 0 for row, _ in self.places)

    @cached_property
    def rest(self) -> Pattern:
        """All rows but the first."""
        places = [(row - 1, column) for row, column in self.places if row]
        return Pattern(places, (self.shape[0] - 1, self.shape[1]))

    def index(self, axis: int, device: torch.device) -> Tensor:
        """Rows (axis 0) or columns (axis 1) of the entries."""
        return self._ready.get(
            ("index", axis), device, lambda: indices([p[axis] for p in self.places], device)
        )

    def total(self, table: Tensor, axis: int) -> Tensor:
        """Sums of entries (entries, batch) that are in one row (axis 0) or column (axis 1)."""
        device, count = table.device, self.shape[axis]
        matrix = self._ready.get(
            ("total", axis), device, lambda: summing(self.index(axis, device), count)
        )
        return torch.mm(matrix, table)

    def largest(self, table: Tensor, axis: int) -> Tensor:
        """Largest of nonnegative entries of one row or column, zero where there are none."""
        out = table.new_zeros(self.shape[axis], table.shape[1])
        groups = self._ready.get(("groups", axis), table.device, lambda: self._groups(axis, table))
        for where, members in groups:
            found = table.index_select(0, members.flatten())
            out.index_copy_(0, where, found.view(*members.shape, -1).amax(1))
        return out

    def _groups(self, axis: int, table: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Rows of similar numbers of entries, and these, repeated where a row has fewer."""
        entries: dict[int, list[int]] = defaultdict(list)
        for i, place in enumerate(self.places):
            entries[place[axis]].append(i)
        similar: dict[int, list[int]] = defaultdict(list)
        for line, found in entries.items():
            similar[len(found).bit_length()].append(line)
        groups = []
        for lines in similar.values():
            width = max(len(entries[line]) for line in lines)
            members = [(entries[line] * width)[:width] for line in lines]
            padded = torch.tensor(members, dtype=torch.int64, device=table.device)
            groups.append((indices(lines, table.device), padded))
        return groups
