"""Multipliers of a point that comes without any."""

from __future__ import annotations

import torch
from torch import Tensor

from declarative_cvx.nonconvex.minimization.active_set import ActiveSet
from declarative_cvx.nonconvex.minimization.evaluation import Evaluation, evaluate
from declarative_cvx.nonconvex.minimization.kkt_residual import KKTPoint, stationarity, violations
from declarative_cvx.nonconvex.minimization.matrices import along, full, mix
from declarative_cvx.nonconvex.minimization.polish import Box
from declarative_cvx.nonconvex.minimization.program import NonlinearProgram
from declarative_cvx.nonconvex.minimization.saddle_point import SaddlePoint
from declarative_cvx.nonconvex.minimization.sparse.plan import Plan

# Relative slack up to which a constraint is taken for active.
_NEAR = 1e-2
# Times that the set of constraints with multipliers is changed.
_EXCHANGES = 8
# Share of their size that is added to the squared rows, for those that depend on each other.
_REGULAR = 1e-12


def with_multipliers(
    program: NonlinearProgram, x: Tensor, box: Box | None, equalities: int, near: float = _NEAR
) -> KKTPoint:
    """X and the multipliers that satisfy stationarity best (DDN eq. 25).

    Constraints and bounds that hold nearly with equality, up to a relative slack, are candidates.
    Among all multipliers of the right signs those of least squares are looked for by exchanging
    whole sets of candidates (Portugal, Judice and Vicente 1994), a few times.
    """
    at = evaluate(program, x)
    zero = torch.zeros_like(x)
    lower, upper = (None, None) if box is None else (box.lower, box.upper)
    blank = KKTPoint(x, torch.zeros_like(at.constraints), zero, zero)
    found = violations(at, blank, lower, upper, equalities)
    candidates = ActiveSet.where_marked(
        found, found.slack <= near, at.constraints.shape[1] - equalities
    )
    active, best = candidates, None
    for _ in range(_EXCHANGES):
        y = least_squares_multipliers(at, active)
        guess = _signed(at, x, y, candidates, equalities)
        best = guess if best is None else _better(at, guess, best)
        new = _exchanged(at, y, active, candidates, equalities)
        if all(bool((getattr(new, n) == getattr(active, n)).all()) for n in ("rows", "free")):
            break
        active = new
    assert best is not None
    return best


def _signed(
    at: Evaluation, x: Tensor, y: Tensor, candidates: ActiveSet, equalities: int
) -> KKTPoint:
    """Multipliers of rows with wrong signs set to zero, those of bounds from what is left."""
    y = torch.cat([y[:, :equalities], y[:, equalities:].clamp(min=0.0)], 1)
    slope = at.gradient + mix(y, at.rows)
    low = torch.where(candidates.lower, slope, 0.0).clamp(min=0.0)
    high = torch.where(candidates.upper, -slope, 0.0).clamp(min=0.0)
    return KKTPoint(x, y, low, high)


def _better(at: Evaluation, one: KKTPoint, other: KKTPoint) -> KKTPoint:
    """Element by element the one that violates stationarity less, the other where they tie."""
    sizes = [torch.linalg.vector_norm(stationarity(at, point), dim=1) for point in (one, other)]
    return one.where(sizes[0] < sizes[1], other)


def _exchanged(
    at: Evaluation, y: Tensor, active: ActiveSet, candidates: ActiveSet, equalities: int
) -> ActiveSet:
    """Candidates with wrong signs leave the set, those that would help enter it."""
    slope = at.gradient + mix(y, at.rows)
    pull = along(at.rows, slope * active.free)
    rows = candidates.rows & torch.where(active.rows, y > 0, pull < 0)
    rows[:, :equalities] = True
    return ActiveSet(rows, candidates.lower & (slope > 0), candidates.upper & (slope < 0))


def least_squares_multipliers(at: Evaluation, active: ActiveSet) -> Tensor:
    """Of the active rows, stationarity in the free variables least violated: (batch, k + l)."""
    if not at.rows.shape[1]:
        return at.constraints
    if at.plan is not None:
        return _sparsely(at, at.plan, active)
    kept = active.rows.to(at.values)
    rows = full(at.rows) * active.free[:, None] * kept[:, :, None]
    size = torch.linalg.vector_norm(rows, dim=2)
    size = torch.where(size > 0, size, 1.0)
    rows = rows / size[:, :, None]
    normal = rows @ rows.mT
    normal.diagonal(dim1=1, dim2=2).add_(1 - kept + _REGULAR)
    rhs = -(rows @ at.gradient[:, :, None])
    found = torch.linalg.solve_ex(normal, rhs)[0][:, :, 0]
    return torch.nan_to_num(found / size, 0.0, 0.0, 0.0)


def _sparsely(at: Evaluation, plan: Plan, active: ActiveSet) -> Tensor:
    """By the system that has the identity for a Hessian."""
    system = SaddlePoint.of(plan, None, at.rows, active.free, active.rows)
    slope = at.gradient * active.free
    found = system.solve(torch.cat([-slope, torch.zeros_like(at.constraints)], 1))[0]
    return torch.nan_to_num(found[:, slope.shape[1] :], 0.0, 0.0, 0.0)
