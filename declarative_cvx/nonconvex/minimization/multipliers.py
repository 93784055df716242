"""Multipliers of a point that comes without any."""

from __future__ import annotations

import torch
from torch import Tensor

from declarative_cvx.nonconvex.minimization.active_set import ActiveSet
from declarative_cvx.nonconvex.minimization.evaluation import Evaluation, evaluate, mix
from declarative_cvx.nonconvex.minimization.kkt_residual import KKTPoint, violations
from declarative_cvx.nonconvex.minimization.polish import Box
from declarative_cvx.nonconvex.minimization.program import NonlinearProgram

# Relative slack up to which a constraint is taken for active.
_NEAR = 1e-2
# Share of their size that is added to the squared rows, for those that depend on each other.
_REGULAR = 1e-12


def with_multipliers(
    program: NonlinearProgram, x: Tensor, box: Box | None, equalities: int
) -> KKTPoint:
    """X and the multipliers that satisfy stationarity best (DDN eq. 25).

    Constraints and bounds that hold nearly with equality are candidates; those whose multipliers
    come out with the wrong sign get zero.
    """
    at = evaluate(program, x)
    zero = torch.zeros_like(x)
    lower, upper = (None, None) if box is None else (box.lower, box.upper)
    blank = KKTPoint(x, torch.zeros_like(at.constraints), zero, zero)
    found = violations(at, blank, lower, upper, equalities)
    near = ActiveSet.where_marked(found, found.slack <= _NEAR, at.constraints.shape[1] - equalities)
    y = least_squares_multipliers(at, near)
    y = torch.cat([y[:, :equalities], y[:, equalities:].clamp(min=0.0)], 1)
    slope = at.gradient + mix(y, at.rows)
    low = torch.where(near.lower, slope, zero).clamp(min=0.0)
    high = torch.where(near.upper, -slope, zero).clamp(min=0.0)
    return KKTPoint(x, y, low, high)


def least_squares_multipliers(at: Evaluation, active: ActiveSet) -> Tensor:
    """Of the active rows, stationarity in the free variables least violated: (batch, k + l)."""
    if not at.rows.shape[1]:
        return at.constraints
    kept = active.rows.to(at.rows)
    rows = at.rows * active.free[:, None] * kept[:, :, None]
    size = torch.linalg.vector_norm(rows, dim=2)
    size = torch.where(size > 0, size, 1.0)
    rows = rows / size[:, :, None]
    normal = rows @ rows.mT
    normal.diagonal(dim1=1, dim2=2).add_(1 - kept + _REGULAR)
    rhs = -(rows @ at.gradient[:, :, None])
    found = torch.linalg.solve_ex(normal, rhs)[0][:, :, 0]
    return torch.nan_to_num(found / size, 0.0, 0.0, 0.0)
