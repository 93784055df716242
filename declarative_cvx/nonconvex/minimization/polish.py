"""Newton's method on the optimality conditions, down to rounding."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from declarative_cvx.nonconvex.minimization.active_set import ActiveSet
from declarative_cvx.nonconvex.minimization.conjugate_gradients import conjugate_gradients
from declarative_cvx.nonconvex.minimization.evaluation import (
    Evaluation,
    Record,
    along,
    evaluate,
    hessian_product,
    mix,
)
from declarative_cvx.nonconvex.minimization.kkt_residual import (
    KKTPoint,
    Violations,
    stationarity,
    violations,
)
from declarative_cvx.nonconvex.minimization.program import NonlinearProgram

_STEPS = 8
# Relative residual up to which an answer is one.
ACCEPTED = 1e-7
# Residual that counts as rounding.
_ROUNDING = 1e-13


@dataclass(frozen=True, eq=False)
class Candidate(Record):
    """A point, the program there, and how well it satisfies the optimality conditions."""

    point: KKTPoint
    at: Evaluation
    found: Violations

    @property
    def worst(self) -> Tensor:
        """The largest residual, shape (batch,); infinite where the objective is not finite."""
        finite = torch.isfinite(self.at.objective)
        return torch.where(finite, self.found.residuals.worst, torch.inf)

    def better(self, other: Candidate) -> Candidate:
        """Element by element the one with the smaller residual, this one where they tie."""
        return self.where(self.worst <= other.worst, other)


@dataclass(frozen=True, eq=False)
class Box(Record):
    """Bounds of every element, infinite where there are none, shape (batch, n)."""

    lower: Tensor
    upper: Tensor


def look(program: NonlinearProgram, point: KKTPoint, box: Box | None, equalities: int) -> Candidate:
    """Evaluate the program at a point, and judge it."""
    weights = torch.cat([torch.ones_like(point.x[:, :1]), point.y], 1)
    return judge(evaluate(program, point.x, weights), point, box, equalities)


def judge(
    at: Evaluation,
    point: KKTPoint,
    box: Box | None,
    equalities: int,
    bend: Tensor | None = None,
) -> Candidate:
    lower, upper = (None, None) if box is None else (box.lower, box.upper)
    return Candidate(point, at, violations(at, point, lower, upper, equalities, bend))


def polish(
    program: NonlinearProgram, point: KKTPoint, box: Box | None, equalities: int
) -> Candidate:
    """Semismooth Newton steps from a point near a solution; the best of all points met.

    Elements that do not get near one this way stay where they are.

    Each step takes as active the inequalities and bounds whose multiplier is above their slack,
    and solves their equations, of least norm where they depend on each other. So a constraint that
    was misjudged changes sides in the next step.
    """
    best = first = candidate = look(program, point, box, equalities)
    for _ in range(_STEPS):
        if bool((best.worst <= _ROUNDING).all()):
            break
        candidate = _newton(program, candidate, box, equalities)
        improved = candidate.worst < best.worst
        best = candidate.better(best)
        if not bool(improved.any()):
            break
    return best.where(best.worst <= ACCEPTED, first)


def _newton(
    program: NonlinearProgram, old: Candidate, box: Box | None, equalities: int
) -> Candidate:
    point, at, n = old.point, old.at, old.point.x.shape[1]
    active = ActiveSet.of(old.found, point.y.shape[1] - equalities)
    jump = torch.zeros_like(point.x)
    if box is not None:
        jump = torch.where(active.lower, box.lower - point.x, jump)
        jump = torch.where(active.upper, box.upper - point.x, jump)
    y = torch.where(active.rows, point.y, 0.0)
    gradient = at.gradient + mix(y, at.rows)
    gradient = gradient + along(at.hessian, jump)
    constraints = at.constraints + along(at.rows, jump)
    rhs = -torch.cat([gradient * active.free, constraints * active.rows], 1)
    step = active.solve(at, rhs[:, :, None])[0][:, :, 0]
    x, y = point.x + jump + step[:, :n], y + step[:, n:]
    if box is not None:  # exactly
        x = torch.where(active.lower, box.lower, torch.where(active.upper, box.upper, x))
    zero = torch.zeros_like(x)
    weights = torch.cat([torch.ones_like(x[:, :1]), y], 1)
    new = evaluate(program, x, weights)
    slope = stationarity(new, KKTPoint(x, y, zero, zero))
    lower, upper = torch.where(active.lower, slope, zero), torch.where(active.upper, -slope, zero)
    return judge(new, KKTPoint(x, y, lower, upper), box, equalities)


# --- many variables, bounds only -----------------------------------------------------------------


def look_without_hessian(program: NonlinearProgram, x: Tensor, box: Box | None) -> Candidate:
    """As `look`, for a program without rows, by products with the Hessian."""
    at = evaluate(program, x)
    zero, none = torch.zeros_like(x), x.new_zeros(len(x), 0)
    lower, upper = zero, zero
    if box is not None:
        lower = torch.where(x <= box.lower, at.gradient, zero).clamp(min=0.0)
        upper = torch.where(x >= box.upper, -at.gradient, zero).clamp(min=0.0)
    signs = 1.0 - 2.0 * (torch.arange(x.shape[1], device=x.device) % 2)
    bend = hessian_product(program, x, none)((1 + x.abs()) * signs).abs()
    point = KKTPoint(x, none, lower, upper)
    return judge(at, point, box, 0, bend)


def polish_without_hessian(program: NonlinearProgram, x: Tensor, box: Box | None) -> Candidate:
    """Newton steps by conjugate gradients in the variables at no bound."""
    best = first = candidate = look_without_hessian(program, x, box)
    none = x.new_zeros(len(x), 0)
    for _ in range(_STEPS):
        if bool((best.worst <= _ROUNDING).all()):
            break
        free = ActiveSet.of(candidate.found, 0).free.to(x)
        product = hessian_product(program, candidate.point.x, none)
        rhs = -candidate.at.gradient * free
        x = candidate.point.x + conjugate_gradients(product, rhs, free).solution
        if box is not None:
            x = torch.minimum(torch.maximum(x, box.lower), box.upper)
        candidate = look_without_hessian(program, x, box)
        improved = candidate.worst < best.worst
        best = candidate.better(best)
        if not bool(improved.any()):
            break
    return best.where(best.worst <= ACCEPTED, first)
