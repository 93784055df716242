"""Linear systems of small programs with any cones, by compiled code (compiled/cone_systems.h)."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, cached_property

import numpy as np
import torch
from torch import Tensor

from declarative_cvx.compiled_systems import Solver
from declarative_cvx.cones import ConeDerivative

MODULE = "declarative_cvx.compiled._cone_systems"
# Variables, rows and columns of right-hand sides up to which it is faster than LAPACK (measured).
VARIABLES, ROWS, COLUMNS = 64, 128, 16
# Squares of orders, summed over a batch, that are worth another thread: a millisecond. (Threads
# that wait for work take cores from those of solvers, or wait for cores that others have taken.)
WORTH_A_THREAD = 500_000


@cache
def is_available() -> bool:
    """Whether it was compiled when the package was installed."""
    return importlib.util.find_spec(MODULE) is not None


def suits(P: Tensor, A: Tensor, projection: ConeDerivative) -> bool:
    """Whether `CompiledConeSystems` takes systems with these matrices."""
    host = P.device.type == "cpu" and P.dtype == A.dtype == torch.float64
    small = 0 < A.shape[2] <= VARIABLES and A.shape[1] <= ROWS
    return host and small and projection.is_constant and is_available()


@dataclass(frozen=True)
class CompiledConeSystems:
    """J of a batch, for any DΠ that is given by its eigenvectors.

    Nothing is kept but the matrices: to factorise them again costs less than the memory of factors.

    Attributes
    ----------
    P : Tensor, shape (batch or 1, n, n)
    A : Tensor, shape (batch or 1, m, n)
    projection : ConeDerivative
    otherwise : callable
        Gives what solves systems with many right-hand sides.
    """

    P: Tensor
    A: Tensor
    projection: ConeDerivative
    otherwise: Callable[[], Solver]

    @cached_property
    def _parts(self) -> tuple[tuple[np.ndarray, np.ndarray, np.ndarray], ...]:
        return tuple(
            (_array(rows), _array(part.vectors), _array(part.values))  # type: ignore[union-attr, arg-type]
            for rows, part in self.projection.parts
        )

    @cached_property
    def _known(self) -> tuple[Tensor, Tensor]:
        """Free variables, and doubtful matrices."""
        batch, m = self.projection.diagonal.shape
        nothing = self.P.new_zeros((batch, self.P.shape[1] + m, 1))
        return self._solved(nothing, False)[1:]

    @property
    def free(self) -> Tensor:
        """Variables that no optimality condition contains, bool, shape (batch, n)."""
        return self._known[0]

    @property
    def doubtful(self) -> Tensor:
        """Which matrices may be singular but for rounding, bool, shape (batch,)."""
        return self._known[1]

    def solve(self, rhs: Tensor, transpose: bool) -> Tensor:
        """Solutions for rhs (batch, n + m, columns); NaN or meaningless for singular matrices."""
        if rhs.shape[2] > COLUMNS:
            return self._others.solve(rhs, transpose)
        solution, *known = self._solved(rhs, transpose)
        self.__dict__.setdefault("_known", known)
        return solution

    @cached_property
    def _others(self) -> Solver:
        return self.otherwise()

    def _solved(self, rhs: Tensor, transpose: bool) -> tuple[Tensor, Tensor, Tensor]:
        from declarative_cvx.compiled._cone_systems import solve

        (batch, m), n = self.projection.diagonal.shape, self.P.shape[1]
        solution = rhs.new_empty(rhs.shape)
        free = rhs.new_empty((batch, n), dtype=torch.bool)
        doubtful = rhs.new_empty(batch, dtype=torch.bool)
        worth = 1 + batch * (n + m) ** 2 // WORTH_A_THREAD
        solve(
            batch,
            n,
            m,
            rhs.shape[2],
            transpose,
            min(torch.get_num_threads(), max(batch, 1), worth),
            _array(self.P),
            _array(self.A),
            _array(self.projection.diagonal),
            self._parts,
            _array(rhs),
            solution.numpy(),
            free.numpy(),
            doubtful.numpy(),
        )
        return solution, free, doubtful


def _array(v: Tensor) -> np.ndarray:
    return v.detach().contiguous().numpy()
