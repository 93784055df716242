"""Interior-point steps that finish what solvers of linear and quadratic programs leave.

Newton's method on the optimality conditions (`declarative_cvx.refinement`) has to know which
inequalities are active. Where solutions are not unique or constraints depend on each other, what a
solver leaves does not always tell, and a Newton step leads away. A few more steps of Mehrotra's
predictor-corrector method ("On the implementation of a primal-dual interior point method", 1992)
need not know it: they approach the solutions with s and y positive, and show on the way which of
each pair tends to zero. Systems are regularised (Friedlander and Orban, "A primal-dual regularized
interior-point method for convex quadratic programs", 2012) and corrected.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from declarative_cvx.least_squares import Factors
from declarative_cvx.program import ConeProgram, Point, Structure
from declarative_cvx.residuals import Residuals, conditions, residuals
from declarative_cvx.sparsity import image

MAX_STEPS = 12
# Programs whose systems are of a larger order are left as they come, and so are points with larger
# residuals than this.
LARGEST_ORDER = 2000
NEAR = 1e-3
# Residual of a complementary point up to which it is taken though others are nearer.
COMPLEMENTARY = 1e-10
# Residual at rounding level; steps without a gain by this factor end the search.
ROUNDING = 1e-15
GAIN = 0.5
PATIENCE = 3
# Diagonal that is added to systems of size one, and corrections of their solutions.
REGULARISATION = 1e-14
CORRECTIONS = 2
# Least entries of s and y to begin with, in units of the largest.
LEAST = 1e-12
# Share of the way to the boundary that is kept back, at least and at most.
BACK = (1e-4, 1e-2)


def takes_interior_steps(structure: Structure) -> bool:
    """Whether programs are polyhedral, with inequalities, and not too large for dense systems."""
    cone = structure.cone
    polyhedral = cone.kinds <= {"zero", "nonneg"} and cone.nonneg > 0
    return polyhedral and structure.variables + cone.zero <= LARGEST_ORDER


def interior_steps(program: ConeProgram, point: Point) -> tuple[Point, Residuals]:
    """Better points, element by element; those that came where there are none.

    Parameters
    ----------
    program : ConeProgram
        In units of size one, all cones polyhedral, with inequalities.
    point : (x, y, s)
        Finite.

    Returns
    -------
    (x, y, s)
        With s'y = 0 wherever such a point satisfies the other conditions well enough.
    Residuals
        Of these points.
    """
    at = _Iterate.of(program, point)
    inside = _Best.of(program, point)
    complementary = inside
    idle = torch.zeros_like(inside.found.worst)
    for _ in range(MAX_STEPS):
        known, before, at = inside.found.worst, at, at.step(program)
        inside = inside.or_better(program, at.point)
        for active in (at.by_rate(before), at.by_size()):
            complementary = complementary.or_better(program, at.complementary(active))
        idle = torch.where(inside.found.worst < GAIN * known, 0, idle + 1)
        if bool(((idle >= PATIENCE) | (inside.found.worst <= ROUNDING)).all()):
            break
    worst = complementary.found.worst
    taken = (worst <= COMPLEMENTARY) | (worst <= inside.found.worst)
    best = complementary.where(taken, inside)
    return best.point, best.found


@dataclass(frozen=True)
class _Best:
    """The best points so far and their residuals."""

    point: Point
    found: Residuals

    @classmethod
    def of(cls, program: ConeProgram, point: Point) -> _Best:
        return cls(point, residuals(program, *point))

    def or_better(self, program: ConeProgram, point: Point) -> _Best:
        other = _Best.of(program, point)
        return other.where(other.found.worst < self.found.worst, self)

    def where(self, chosen: Tensor, other: _Best) -> _Best:
        pairs = zip(self.point, other.point, strict=True)
        x, y, s = (torch.where(chosen[:, None], mine, its) for mine, its in pairs)
        return _Best((x, y, s), self.found.where(chosen, other.found))


@dataclass(frozen=True)
class _Iterate:
    """Points of a batch inside the cones.

    Attributes
    ----------
    x : Tensor, shape (batch, n)
    free : Tensor, shape (batch, equalities)
        Multipliers of the equalities.
    y, s : Tensor, shape (batch, inequalities)
        Positive.
    """

    x: Tensor
    free: Tensor
    y: Tensor
    s: Tensor

    @classmethod
    def of(cls, program: ConeProgram, point: Point) -> _Iterate:
        x, y, s = point
        rows = program.structure.cone.zero
        least = LEAST * y.abs().amax(1, keepdim=True), LEAST * s.abs().amax(1, keepdim=True)
        tiny = torch.finfo(x.dtype).tiny
        inner = (v[:, rows:].clamp(min=0) for v in (y, s))
        y_inner, s_inner = (v + size.clamp(min=tiny) for v, size in zip(inner, least, strict=True))
        return cls(x, y[:, :rows], y_inner, s_inner)

    @property
    def point(self) -> Point:
        zero = torch.zeros_like(self.free)
        return self.x, torch.cat([self.free, self.y], 1), torch.cat([zero, self.s], 1)

    def by_size(self) -> Tensor:
        """Inequalities whose y is the larger one, each in units of the largest."""
        largest_y, largest_s = (v.amax(1, keepdim=True) for v in (self.y, self.s))
        return self.y * largest_s > self.s * largest_y

    def by_rate(self, before: _Iterate) -> Tensor:
        """Inequalities whose s falls faster than y (Tapia's indicators)."""
        return self.y * before.s > self.s * before.y

    def complementary(self, active: Tensor) -> Point:
        """The point with s = 0 where an inequality is active and y = 0 elsewhere."""
        y, s = self.y.masked_fill(~active, 0.0), self.s.masked_fill(active, 0.0)
        return replace(self, y=y, s=s).point

    def step(self, program: ConeProgram) -> _Iterate:
        """The next iterate: a step towards the solution, corrected for its curvature."""
        system = _System.of(program, self)
        errors = conditions(program, *self.point)
        direction = system.solve(*errors, self.s)
        share = self._longest(direction)
        product = self.y * self.s
        left = (self.y + share * direction.y) * (self.s + share * direction.s)
        ratio = left.mean(1, keepdim=True) / product.mean(1, keepdim=True)
        target = ratio**3 * product.mean(1, keepdim=True) - direction.y * direction.s
        direction = system.solve(*errors, self.s - target / self.y)
        share = ((1 - (0.1 * ratio).clamp(*BACK)) * self._longest(direction)).clamp(max=1.0)
        return _Iterate(
            self.x + share * direction.x,
            self.free + share * direction.free,
            self.y + share * direction.y,
            self.s + share * direction.s,
        )

    def _longest(self, direction: _Iterate) -> Tensor:
        """Share of a direction, at most 1, up to which y and s are not negative, (batch, 1)."""
        change = torch.cat([direction.y / self.y, direction.s / self.s], 1)
        return 1 / (-change).amax(1, keepdim=True).clamp(min=1.0)


@dataclass(frozen=True)
class _System:
    """The equations of a step, reduced to x and the multipliers of equalities.

    Attributes
    ----------
    inner : Tensor, shape (batch or 1, inequalities, n)
        Rows of the inequalities.
    weights : Tensor, shape (batch, inequalities)
        y / s.
    sizes : Tensor, shape (batch, n + equalities)
        Factors that bring the matrix to size one.
    """

    program: ConeProgram
    inner: Tensor
    weights: Tensor
    sizes: Tensor
    factors: Factors

    @classmethod
    def of(cls, program: ConeProgram, at: _Iterate) -> _System:
        rows, n = program.structure.cone.zero, at.x.shape[1]
        outer, inner = program.dense_A[:, :rows], program.dense_A[:, rows:]
        weights = at.y / at.s
        curvature = program.dense_P + _squares(program.structure, inner, weights)
        sizes = _unit(curvature.diagonal(dim1=1, dim2=2).sqrt())
        outer = outer * sizes[:, None, :]
        row_sizes = _unit(torch.linalg.vector_norm(outer, dim=2))
        matrix = at.x.new_zeros((len(weights), n + rows, n + rows))
        matrix[:, :n, :n] = sizes[:, :, None] * curvature * sizes[:, None, :]
        matrix[:, n:, :n] = outer * row_sizes[:, :, None]
        matrix[:, :n, n:] = matrix[:, n:, :n].mT
        diagonal = matrix.diagonal(dim1=1, dim2=2)
        diagonal[:, :n] += REGULARISATION
        diagonal[:, n:] -= REGULARISATION
        factors = Factors.of(matrix)
        return cls(program, inner, weights, torch.cat([sizes, row_sizes], 1), factors)

    def solve(self, dual: Tensor, primal: Tensor, removed: Tensor) -> _Iterate:
        """The direction that takes away errors of the conditions, and `removed` from s + s/y dy."""
        rows = self.program.structure.cone.zero
        want = -dual, -primal[:, :rows], removed - primal[:, rows:]
        x, free, y = self._reduced(*want)
        for _ in range(CORRECTIONS):
            products = self._times(x, free, y)
            left = (w - product for w, product in zip(want, products, strict=True))
            change = self._reduced(*left)
            x, free, y = (v + dv for v, dv in zip((x, free, y), change, strict=True))
        return _Iterate(x, free, y, -removed - y / self.weights)

    def _times(self, x: Tensor, free: Tensor, y: Tensor) -> Point:
        """P x + A'y, rows of equalities times x, and rows of inequalities times x - s/y y."""
        rows = self.program.structure.cone.zero
        both = torch.cat([free, y], 1)
        Ax = self.program.A_times(x)
        dual = self.program.P_times(x) + self.program.At_times(both)
        return dual, Ax[:, :rows], Ax[:, rows:] - y / self.weights

    def _reduced(self, dual: Tensor, outer: Tensor, inner: Tensor) -> Point:
        top = dual + image(self.inner.mT, self.weights * inner)
        rhs = torch.cat([top, outer], 1) * self.sizes
        found = self.factors.solve(rhs[:, :, None])[:, :, 0] * self.sizes
        x, free = found[:, : dual.shape[1]], found[:, dual.shape[1] :]
        return x, free, self.weights * (image(self.inner, x) - inner)


def _squares(structure: Structure, inner: Tensor, weights: Tensor) -> Tensor:
    """A'W A of the inequalities, shape (batch, n, n); bounds are on its diagonal only."""
    first = structure.cone.zero
    entries = np.bincount(structure.A.rows, minlength=structure.rows)[first:]
    several = torch.as_tensor(np.flatnonzero(entries > 1), device=inner.device)
    bounds = torch.as_tensor(np.flatnonzero(entries == 1), device=inner.device)
    rows = inner[:, several]
    out = rows.mT @ (weights[:, several, None] * rows)
    diagonal = (weights[:, bounds, None] * inner[:, bounds].square()).sum(1)
    out.diagonal(dim1=1, dim2=2).add_(diagonal)
    return out


def _unit(sizes: Tensor) -> Tensor:
    """One over sizes that are positive, one elsewhere."""
    return torch.where(sizes > 0, 1 / sizes, 1.0)
