"""Linear systems of small dense programs with linear cones, by compiled code.

The method is described in compiled/system.h.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from declarative_cvx.compiled import is_available

# Variables and columns of right-hand sides up to which it is faster than LAPACK (measured), and
# multiplications, over a batch, that are worth another thread.
LARGEST, COLUMNS = 200, 16
WORTH_A_THREAD = 100_000


class Solver(Protocol):
    """What solves with J and its transpose."""

    @property
    def free(self) -> Tensor: ...

    @property
    def doubtful(self) -> Tensor: ...

    def solve(self, rhs: Tensor, transpose: bool) -> Tensor: ...


def suits(P: Tensor, A: Tensor) -> bool:
    """Whether `CompiledSystems` takes systems with these matrices."""
    host = P.device.type == "cpu" and P.dtype == A.dtype == torch.float64
    return host and 0 < A.shape[2] <= LARGEST and A.shape[1] <= 2 * LARGEST and is_available()


@dataclass(frozen=True)
class CompiledSystems:
    """J = [[P, A'(D - I)], [A, D]] of a batch, for diagonal D of ones and zeros.

    Nothing is factorised beforehand: what has to be is smaller than what would have to be kept.

    Attributes
    ----------
    P : Tensor, shape (batch or 1, n, n)
    A : Tensor, shape (batch or 1, m, n)
    diagonal : Tensor, shape (batch, m)
        Of D.
    otherwise : callable
        From the numbers of elements to what solves those of them that are singular, or nearly,
        or have many right-hand sides.
    """

    P: Tensor
    A: Tensor
    diagonal: Tensor
    otherwise: Callable[[Tensor], Solver]

    @cached_property
    def free(self) -> Tensor:
        """Variables that no optimality condition contains, bool, shape (batch, n)."""
        empty = self.P.diagonal(dim1=1, dim2=2) == 0  # P is semidefinite: so is the row
        empty = empty.expand(len(self.diagonal), -1)
        if not bool(empty.any()):
            return empty
        kept = (self.diagonal == 0)[:, :, None] & (self.A != 0)
        return empty & ~kept.any(1)

    @property
    def doubtful(self) -> Tensor:
        """Which matrices may be singular but for rounding, of those that were met."""
        none = self.diagonal.new_zeros(len(self.diagonal), dtype=torch.bool)
        known = self.__dict__.get("_known")
        return none if known is None else none.index_copy(0, known[0], known[1].doubtful)

    def solve(self, rhs: Tensor, transpose: bool) -> Tensor:
        """Solutions for rhs (batch, n + m, columns); NaN or meaningless for singular matrices."""
        from declarative_cvx.compiled._programs import solve_systems

        batch, m = self.diagonal.shape
        n, columns = self.P.shape[1], rhs.shape[2]
        if columns > COLUMNS:
            return self._others(torch.arange(batch, device=self.P.device)).solve(rhs, transpose)
        solution, failed = np.empty(rhs.shape), np.zeros(batch, dtype=bool)
        worth = 1 + batch * n * n * (n + m) // WORTH_A_THREAD
        solve_systems(
            batch,
            n,
            m,
            columns,
            transpose,
            min(torch.get_num_threads(), max(batch, 1), worth),
            _array(self.P),
            _array(self.A),
            _array(self.diagonal),
            _array(rhs),
            solution,
            failed,
        )
        w = torch.from_numpy(solution)
        if failed.any():
            at = torch.from_numpy(np.flatnonzero(failed))
            w = w.index_copy(0, at, self._others(at).solve(rhs[at], transpose))
        return w

    def _others(self, at: Tensor) -> Solver:
        """What solves the elements that are not solved here, factorised once."""
        known = self.__dict__.get("_known")
        if known is None or not torch.equal(known[0], at):
            known = self.__dict__["_known"] = (at, self.otherwise(at))
        return known[1]


def _array(v: Tensor) -> np.ndarray:
    return np.ascontiguousarray(v.detach().numpy())
