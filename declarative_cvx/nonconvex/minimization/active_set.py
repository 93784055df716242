"""The optimality conditions with the active inequalities as equations, and their linear systems."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from declarative_cvx.least_squares import FACTORED, Factors, least_norm
from declarative_cvx.nonconvex.minimization.evaluation import Evaluation
from declarative_cvx.nonconvex.minimization.kkt_residual import Violations
from declarative_cvx.nonconvex.minimization.matrices import full
from declarative_cvx.nonconvex.minimization.records import Record
from declarative_cvx.nonconvex.minimization.saddle_point import SaddlePoint

# Slack and multiplier, relative to their scales, below which an active constraint is a weak one.
WEAK = 1e-8
# Ratio of pivots that is rounding, so that the matrix may be singular.
_PIVOT = 1e-14
# Share of rows and variables that take part, above which the others are not left out.
_WORTHWHILE = 0.8
# Residual up to which sparse factors are trusted, and the norm of the inverse, relative to that of
# a singular one.
_SOLVED_SPARSELY, _REGULAR = 1e-11, 0.1
# Entries of full matrices, in place of sparse ones, at once.
_AT_ONCE = 4_000_000
# Residual up to which the answer of a nearly singular factorisation counts.
_SOLVED = 1e-6
# Length of a solution, in units of the right-hand side and the matrix, above which it is made of
# what is rounding in the matrix.
MEANINGFUL = 0.1 / torch.finfo(torch.float64).eps


@dataclass(frozen=True, eq=False)
class ActiveSet(Record):
    """What holds with equality at a solution.

    Attributes
    ----------
    rows : Tensor of bool, shape (batch, k + l)
        Constraints; equalities always.
    lower, upper : Tensor of bool, shape (batch, n)
        Bounds.
    """

    rows: Tensor
    lower: Tensor
    upper: Tensor

    @property
    def free(self) -> Tensor:
        """Variables at no bound, bool, shape (batch, n)."""
        return ~(self.lower | self.upper)

    @classmethod
    def of(cls, found: Violations, inequalities: int) -> ActiveSet:
        """Inequalities and bounds whose multiplier is above their slack, each in its own units."""
        return cls.where_marked(found, found.active, inequalities)

    @classmethod
    def where_marked(cls, found: Violations, marked: Tensor, inequalities: int) -> ActiveSet:
        """From marks for inequalities, lower and upper bounds, (batch, l + 2n) or (batch, l)."""
        always = torch.ones_like(found.equality, dtype=torch.bool)
        q, n = inequalities, found.stationarity.shape[1]
        rows = torch.cat([always, marked[:, :q]], 1)
        if marked.shape[1] == q:
            none = torch.zeros_like(found.stationarity, dtype=torch.bool)
            return cls(rows, none, none)
        lower, upper = marked[:, q : q + n], marked[:, q + n :]
        return cls(rows, lower, upper & ~lower)

    def matrix(self, at: Evaluation) -> Tensor:
        """[[H, A'], [A, 0]] of free variables and active rows, shape (batch, n + r, n + r).

        The rest of it is the identity.
        """
        n, r = at.hessian.shape[1], at.rows.shape[1]
        kept = torch.cat([self.free, self.rows], 1).to(at.values)
        out = kept.new_zeros(len(kept), n + r, n + r)
        rows = full(at.rows)
        out[:, :n, :n] = full(at.hessian)
        out[:, n:, :n] = rows
        out[:, :n, n:] = rows.mT
        out *= kept[:, :, None] * kept[:, None]
        out.diagonal(dim1=1, dim2=2).add_(1 - kept)
        return out

    def solve(
        self, at: Evaluation, rhs: Tensor, longest: float = math.inf
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Solve with `matrix`; arguments and results as of `solve_symmetric`.

        The right-hand side is zero where the matrix is the identity, which is left out. Elements
        that sparse factors do not solve well, or whose matrix may be singular, get full ones.
        """
        if at.plan is None:
            return self._solve_full(at, rhs, longest)
        system = SaddlePoint.of(at.plan, at.hessian, at.rows, self.free, self.rows)
        pairs = [system.solve(column) for column in rhs.unbind(2)]
        w, residual = (torch.stack(v, -1) for v in zip(*pairs, strict=True))
        good = (residual <= _SOLVED_SPARSELY).all(1) & (system.inverse_norm() <= _REGULAR)
        singular = torch.zeros_like(good)
        others = torch.where(~good)[0]
        for part in others.split(max(1, _AT_ONCE // rhs.shape[1] ** 2)) if len(others) else ():
            found = self.select(part)._solve_full(at.select(part), rhs[part], longest)
            w, residual, singular = (
                whole.index_copy(0, part, new)
                for whole, new in zip((w, residual, singular), found, strict=True)
            )
        return w, residual, singular

    def _solve_full(
        self, at: Evaluation, rhs: Tensor, longest: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        matrix, kept = self.matrix(at), torch.cat([self.free, self.rows], 1)
        count = max(1, int(kept.sum(1).max()))
        if count > _WORTHWHILE * kept.shape[1]:
            return solve_symmetric(matrix, rhs, longest)
        order = kept.to(torch.int8).argsort(dim=1, descending=True, stable=True)[:, :count]
        small = matrix.gather(1, order[:, :, None].expand(-1, -1, matrix.shape[2]))
        small = small.gather(2, order[:, None].expand(-1, count, -1))
        places = order[:, :, None].expand(-1, -1, rhs.shape[2])
        found, residual, singular = solve_symmetric(small, rhs.gather(1, places), longest)
        return torch.zeros_like(rhs).scatter_(1, places, found), residual, singular


def weakly_active(found: Violations) -> Tensor:
    """Elements with a constraint that is active with a zero multiplier, bool, shape (batch,)."""
    return (torch.maximum(found.slack.abs(), found.multiplier.abs()) <= WEAK).any(1)


def solve_symmetric(
    matrix: Tensor, rhs: Tensor, longest: float = math.inf
) -> tuple[Tensor, Tensor, Tensor]:
    """Solve for every element, whether or not its matrix is singular.

    Parameters
    ----------
    matrix : Tensor, shape (batch, m, m)
    rhs : Tensor, shape (batch, m, columns)
    longest : float
        Length, in units of the right-hand side and the matrix, of solutions with a singular matrix
        that count.

    Returns
    -------
    solution : Tensor, shape (batch, m, columns)
        Of least norm where there are many, the least-squares one where there is none.
    residual : Tensor, shape (batch, columns)
        Largest error, relative to the right-hand side.
    singular : Tensor of bool, shape (batch,)
    """
    unit = rhs.abs().amax(1, keepdim=True)
    scaled = rhs / torch.where(unit > 0, unit, 1.0)
    factors = Factors.of(matrix.clone())
    w = factors.solve(scaled)
    correction = factors.solve(scaled - matrix @ w)
    w = torch.where(torch.isfinite(correction), w + correction, w)
    residual = (scaled - matrix @ w).abs().amax(1)
    pivots = factors.factors.diagonal(dim1=1, dim2=2).abs()
    singular = ~(pivots.amin(1) > _PIVOT * pivots.amax(1)) | ~(residual <= FACTORED).all(1)
    at = torch.where(singular)[0]
    if len(at):
        least = least_norm(matrix[at], scaled[at])
        found = (matrix[at] @ least - scaled[at]).abs().amax(1)
        # One that solves the system is kept, unless it is too long, if the other one does not.
        length = w[at].abs().amax(1) * matrix[at].abs().amax((1, 2))[:, None]
        kept = (residual[at] <= _SOLVED) & (found > residual[at].clamp(min=FACTORED))
        kept &= length <= longest
        w = w.index_copy(0, at, torch.where(kept[:, None], w[at], least))
        residual = residual.index_copy(0, at, torch.where(kept, residual[at], found))
    return w * unit, residual, singular
