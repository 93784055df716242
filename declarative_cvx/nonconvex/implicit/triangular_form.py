"""The finest block triangular form of a sparse matrix under permutations of its states."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from graphlib import TopologicalSorter

import numpy as np
import scipy.sparse
from scipy.sparse.csgraph import connected_components


@dataclass(frozen=True, eq=False)
class TriangularForm:
    """States in an order in which A is block lower triangular.

    Attributes
    ----------
    blocks : tuple of integer arrays
        The states of each diagonal block, ascending. A block depends on those before it only.
    coupled : tuple of bool
        Whether the states of a block depend on each other through A.
    """

    blocks: tuple[np.ndarray, ...]
    coupled: tuple[bool, ...]

    @property
    def order(self) -> np.ndarray:
        """All states: A[order][:, order] is block lower triangular."""
        return np.concatenate([np.empty(0, dtype=np.int64), *self.blocks])


def triangular_form(A: scipy.sparse.csr_array, groups: Sequence[int]) -> TriangularForm:
    """Strongly connected components of the graph of A, in topological order (IDL Theorem 1).

    Parameters
    ----------
    A : scipy.sparse.csr_array, shape (n, n)
        Without stored zeros.
    groups : sequence of int
        Sizes of the runs of states that an activation maps together; they stay in one block.
    """
    count, label = connected_components(A + _cycles(groups), directed=True, connection="strong")
    rows, columns = A.nonzero()
    needs: dict[int, set[int]] = {block: set() for block in range(count)}
    inner = set()
    for block, needed in zip(label[rows].tolist(), label[columns].tolist(), strict=True):
        if block == needed:
            inner.add(block)
        else:
            needs[block].add(needed)
    found = list(TopologicalSorter(needs).static_order())
    members = np.split(np.argsort(label, kind="stable"), np.cumsum(np.bincount(label))[:-1])
    return TriangularForm(
        tuple(members[block] for block in found), tuple(block in inner for block in found)
    )


def _cycles(groups: Sequence[int]) -> scipy.sparse.csr_array:
    """A graph in which the states of each group form a cycle."""
    n = sum(groups)
    starts = itertools.accumulate(groups, initial=0)
    following = np.arange(1, n + 1)
    for start, size in zip(starts, groups, strict=False):
        following[start + size - 1] = start
    return scipy.sparse.csr_array((np.ones(n), (np.arange(n), following)), shape=(n, n))
