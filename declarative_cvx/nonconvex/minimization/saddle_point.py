"""Sparse systems [[H, A'], [A, 0]] of free variables and active rows, by a definite matrix.

With [[H, A'], [A, -d]] in their place, d small, everything comes from the factors of the condensed
matrix H + A'A / d, which is positive definite at strict minima, whatever the order of its pivots;
refinement with the systems as they are, the proximal method of multipliers, takes d away again.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from declarative_cvx.nonconvex.minimization.matrices import Matrix, along, mix
from declarative_cvx.nonconvex.minimization.records import Record
from declarative_cvx.nonconvex.minimization.sparse.factors import SparseFactors
from declarative_cvx.nonconvex.minimization.sparse.matrix import SparseMatrix
from declarative_cvx.nonconvex.minimization.sparse.plan import Plan

# The number d, rows and variables being scaled to one.
_SMALL = 1e-10
# Corrections, and the relative residual from which on there are no more.
_CORRECTIONS, _ROUNDING = 5, 1e-15
# Units of variables without curvature, relative to the largest.
_FLAT = 1e-4
# Steps of inverse iteration, which find the norm of the inverse.
_PROBES = 3


@dataclass(frozen=True, eq=False)
class SaddlePoint(Record):
    """A system of every element, scaled, and factors of its condensed matrix.

    Attributes
    ----------
    hessian : SparseMatrix or None
        None: the identity. It and the rows are zero where something takes no part.
    rows : SparseMatrix
    variables, multipliers : Tensor, shapes (batch, n) and (batch, r)
        Units, zero of what takes no part.
    factors : SparseFactors
    """

    hessian: SparseMatrix | None
    rows: SparseMatrix
    variables: Tensor
    multipliers: Tensor
    factors: SparseFactors

    @classmethod
    def of(
        cls,
        plan: Plan,
        hessian: Matrix | None,
        rows: Matrix,
        free: Tensor,  # (batch, n)
        active: Tensor,  # (batch, r)
    ) -> SaddlePoint:
        """The system of variables that are free and rows that are active."""
        assert isinstance(rows, SparseMatrix)
        assert hessian is None or isinstance(hessian, SparseMatrix)
        free, active = free.to(rows.values), active.to(rows.values)
        units = free if hessian is None else free * _units(hessian)
        rows = rows.scaled(active, units)
        sizes = rows.largest(0)
        multipliers = active / torch.where(sizes > 0, sizes, 1.0)
        rows = rows.scaled(multipliers)
        diagonal = torch.ones_like(free) if hessian is None else 1 - free
        hessian = None if hessian is None else hessian.scaled(units, units)
        weights = torch.full_like(active, 1 / _SMALL)
        table = plan.assemble(hessian, rows, weights, diagonal)
        return cls(hessian, rows, units, multipliers, plan.factors(table))

    def solve(self, rhs: Tensor) -> tuple[Tensor, Tensor]:
        """Solutions for rhs (batch, n + r), and their residuals relative to it, (batch,)."""
        scaled = rhs * self._units
        size = rhs.abs().amax(1).clamp(min=torch.finfo(rhs.dtype).tiny)
        w, rest, residual = torch.zeros_like(rhs), scaled, torch.full_like(size, torch.inf)
        for _ in range(_CORRECTIONS):
            new = w + self._regularised(rest)
            rest = scaled - self._product(new)
            found = torch.nan_to_num(self._original(rest) / size, nan=torch.inf)
            better = found < residual
            w = torch.where(better[:, None], new, w)
            residual = torch.where(better, found, residual)
            if w.device.type == "cpu" and bool((~better | (residual <= _ROUNDING)).all()):
                break
        return w * self._units, residual

    def inverse_norm(self) -> Tensor:
        """How large the inverse is, in units of the largest it can be, (batch,).

        Near one where the system is singular, also where the right-hand side does not show it.
        """
        units = self._units
        # In no direction of note; random numbers may not be drawn where gradients are batched.
        index = torch.arange(1, units.shape[1] + 1, dtype=units.dtype, device=units.device)
        w = torch.sin(index**2) * (units > 0)
        for _ in range(_PROBES):
            w = w / torch.linalg.vector_norm(w, dim=1, keepdim=True)
            w = self._regularised(w)
        found = _SMALL * torch.linalg.vector_norm(w, dim=1)
        return torch.nan_to_num(found, nan=torch.inf)

    @property
    def _units(self) -> Tensor:
        return torch.cat([self.variables, self.multipliers], 1)

    def _original(self, residual: Tensor) -> Tensor:
        """The largest entry of a residual in the units of the right-hand side."""
        units = self._units
        return torch.where(units > 0, residual / units, 0.0).abs().amax(1)

    def _product(self, w: Tensor) -> Tensor:
        v, q = w.split([self.variables.shape[1], self.multipliers.shape[1]], 1)
        bent = v if self.hessian is None else along(self.hessian, v)
        return torch.cat([bent + mix(q, self.rows), along(self.rows, v)], 1)

    def _regularised(self, rhs: Tensor) -> Tensor:
        """Solutions with -d in place of the zero block."""
        a, b = rhs.split([self.variables.shape[1], self.multipliers.shape[1]], 1)
        v = self.factors.solve(a + mix(b, self.rows) / _SMALL)
        return torch.cat([v, (along(self.rows, v) - b) / _SMALL], 1)


def _units(hessian: SparseMatrix) -> Tensor:
    """Units of the variables in which the Hessian has the size one, (batch, n)."""
    sizes = hessian.largest(0)
    most = sizes.amax(1, keepdim=True)
    return torch.where(most > 0, torch.maximum(sizes, _FLAT * most), 1.0).rsqrt()
