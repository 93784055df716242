"""What zeros of A make of ``x = phi(x A' + c)``: a finite computation."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# Layers up to which plain iteration, which ends after so many steps, is used.
LAYERS = 32
# States that are substituted one by one before the others hear of them.
BLOCK = 64


@dataclass(frozen=True)
class Structure:
    """The structure of M in ``x = phi(x M + c)``.

    Attributes
    ----------
    triangular : {0, 1, -1}
        1 for upper, -1 for lower triangular M that is to be solved by substitution.
    depth : int
        Steps after which plain iteration ends, as in a network of so many layers; 0 if unknown.
    norm : {1, 2, inf}, or None
        One in which x -> phi(x A' + c) is known to contract.
    """

    triangular: int = 0
    depth: int = 0
    norm: float | None = None

    def transposed(self) -> Structure:
        dual = None if self.norm is None else 1 / (1 - 1 / self.norm) if self.norm > 1 else math.inf
        return Structure(-self.triangular, self.depth, dual)


NONE = Structure()


def structure_of(M: Tensor, groups: Sequence[int], homogeneous: bool) -> Structure:
    """Find out.

    Parameters
    ----------
    M : Tensor, shape (n, n)
    groups : sequence of int
        Sizes of the runs of states that phi maps together.
    homogeneous : bool
        Whether phi is componentwise and positively homogeneous: then triangular M with a diagonal
        (less than 1) can be solved by substitution (IDL Sec. 2).
    """
    M = M.detach()
    if M.shape[0] == 0:
        return NONE
    diagonal = bool(M.diagonal().any())
    if not diagonal:
        depth = _depth(M, groups)
        if depth:
            return Structure(depth=depth)
    if len(groups) < M.shape[0] or (diagonal and not homogeneous):
        return NONE
    for sign, corner in ((1, M[1:, 0]), (-1, M[:-1, -1])):
        if not bool(corner.any()) and not bool((M.tril(-1) if sign > 0 else M.triu(1)).any()):
            return Structure(triangular=sign if _solvable(M) else 0)
    return NONE


def _solvable(M: Tensor) -> bool:
    return bool((M.diagonal() < 1).all())


def _depth(M: Tensor, groups: Sequence[int]) -> int:
    """Length of the longest path in the graph of M, plus 1; 0 if more than `LAYERS`."""
    sizes = torch.as_tensor(groups, device=M.device)
    group = torch.repeat_interleave(torch.arange(len(groups), device=M.device), sizes)
    edges = (M.mT != 0).to(torch.float32)  # of i to those that it depends on
    reached = edges.new_ones(len(M))
    for step in range(1, LAYERS + 1):
        reached = ((edges @ reached) > 0).to(torch.float32)
        if len(groups) < len(M):
            reached = reached.new_zeros(len(groups)).index_add(0, group, reached)[group]
        if not bool(reached.any()):
            return step
        if step == 1 and bool(reached.all()):
            return 0
    return 0


def substitute(
    M: Tensor, c: Tensor, structure: Structure, entry: Callable[[int, Tensor], Tensor]
) -> Tensor:
    """Solve for one state after the other.

    Parameters
    ----------
    M : Tensor, shape (n, n)
        Triangular.
    c : Tensor, shape (batch, n)
    structure : Structure
    entry : callable
        From the index i of a state, and c_i + sum of x_j M_ji over the other states, (batch,), to
        x_i.

    Returns
    -------
    Tensor, shape (batch, n)
    """
    n, known = len(M), c.clone()
    x = torch.zeros_like(c)
    order = range(n) if structure.triangular > 0 else range(n - 1, -1, -1)
    for first in range(0, n, BLOCK):
        block = order[first : first + BLOCK]
        low, high = min(block), max(block) + 1
        for i in block:
            own = x[:, low:high] @ M[low:high, i]
            x[:, i] = entry(i, known[:, i] + own)
        rest = slice(high, n) if structure.triangular > 0 else slice(0, low)
        known[:, rest] += x[:, low:high] @ M[low:high, rest]
    return x
