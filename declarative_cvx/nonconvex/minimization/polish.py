"""Newton's method on the optimality conditions, down to rounding."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from declarative_cvx.nonconvex.minimization.active_set import ActiveSet
from declarative_cvx.nonconvex.minimization.conjugate_gradients import conjugate_gradients, is_large
from declarative_cvx.nonconvex.minimization.evaluation import (
    Evaluation,
    evaluate,
    hessian_product,
)
from declarative_cvx.nonconvex.minimization.kkt_residual import (
    KKTPoint,
    Violations,
    slope_terms,
    stationarity,
    violations,
)
from declarative_cvx.nonconvex.minimization.matrices import (
    absolute,
    along,
    column_largest,
    mix,
    row_largest,
    scale,
)
from declarative_cvx.nonconvex.minimization.program import NonlinearProgram
from declarative_cvx.nonconvex.minimization.records import Record

# Steps, and those after which only what is not accepted yet goes on, with steps that each are
# shorter than the last one by some share: on the way to a minimum without curvature, not to one at
# infinity.
_STEPS, _FIRST, _SHORTER = 40, 8, 0.9
# Relative residual up to which an answer is one.
ACCEPTED = 1e-7
# Residual that counts as rounding.
_ROUNDING = 1e-13
# Share of the steepest variable's slope that rounding is of, in the others, at least.
_NOISE = 1e-12
# Relative length of a Newton step that counts as none; of one after which quadratic convergence,
# where residuals shrink by this share or more, leaves none.
_REST, _SHORT, _FAST = 1e-9, 1e-6, 1e-2


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
) -> tuple[Candidate, Tensor]:
    """Semismooth Newton steps from a point near a solution; the best of all points met.

    Elements that do not get near one this way stay where they are.

    Each step takes as active the inequalities and bounds whose multiplier is above their slack,
    and solves their equations, of least norm where they depend on each other. So a constraint that
    was misjudged changes sides in the next step.

    Returns
    -------
    Candidate
    settled : Tensor of bool, shape (batch,)
        Whether Newton's method has come to rest there, quadratically: that residuals are small
        does not show it where curvature is small as well.
    """
    return _sharpened(look(program, point, box, equalities), newton_steps(program, box, equalities))


def _sharpened(
    first: Candidate, step: Callable[[Candidate], Candidate]
) -> tuple[Candidate, Tensor]:
    best = candidate = first
    settled = torch.zeros_like(first.worst, dtype=torch.bool)
    at_best, move = ~settled, torch.zeros_like(first.worst)
    for number in range(_STEPS):
        old, candidate, last = candidate, step(candidate), move
        move = relative_move(old, candidate).abs().amax(1)
        improved = candidate.worst < best.worst
        improved |= (candidate.worst <= _ROUNDING) & (move > _REST)
        if number >= _FIRST:
            improved &= (best.worst > ACCEPTED) & (move <= _SHORTER * last)
        fast = (move <= _SHORT) & (candidate.worst <= _FAST * old.worst)
        resting = settled | (at_best & (move <= _REST) & (number < _FIRST))
        best, settled = candidate.where(improved, best), torch.where(improved, fast, resting)
        at_best = improved
        if bool((~improved | ((best.worst <= _ROUNDING) & settled)).all()):
            break
    accepted = best.worst <= ACCEPTED
    return best.where(accepted, first), settled & accepted


def relative_move(old: Candidate, new: Candidate) -> Tensor:
    """How far each variable has moved, relative to its size or one, shape (batch, n)."""
    return (new.point.x - old.point.x) / (1 + old.point.x.abs())


def newton_steps(
    program: NonlinearProgram, box: Box | None, equalities: int
) -> Callable[[Candidate], Candidate]:
    """The map from a candidate to the one that a Newton step leads to."""
    if is_large(program):
        return lambda old: _newton_without_hessian(program, old, box)
    return lambda old: _newton(program, old, box, equalities)


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
    step = _solved(active, at, rhs)
    x, y = point.x + jump + step[:, :n], y + step[:, n:]
    if box is not None:  # exactly
        x = torch.where(active.lower, box.lower, torch.where(active.upper, box.upper, x))
    zero = torch.zeros_like(x)
    weights = torch.cat([torch.ones_like(x[:, :1]), y], 1)
    new = evaluate(program, x, weights)
    slope = stationarity(new, KKTPoint(x, y, zero, zero))
    lower, upper = torch.where(active.lower, slope, zero), torch.where(active.upper, -slope, zero)
    return judge(new, KKTPoint(x, y, lower, upper), box, equalities)


def _solved(active: ActiveSet, at: Evaluation, rhs: Tensor) -> Tensor:
    """Solve with the active set's matrix, rhs and result (batch, n + k + l).

    In units in which the entries of every variable and row are about one: curvature may be tiny
    in some of them, and is not to be taken for none.
    """
    kept = scale(absolute(at.rows), active.rows, active.free)
    sizes = row_largest(at.hessian) * active.free
    sizes = torch.maximum(sizes, column_largest(kept)) if kept.shape[1] else sizes
    x_units = _inverse(sizes).sqrt()
    row_units = _inverse(row_largest(scale(kept, columns=x_units)))
    rows = torch.cat([x_units.new_ones(len(x_units), 1), row_units], 1)
    scaled = replace(
        at,
        hessian=scale(at.hessian, x_units, x_units),
        jacobian=scale(at.jacobian, rows, x_units),
    )
    units = torch.cat([x_units, row_units], 1)
    return units * active.solve(scaled, (units * rhs)[:, :, None])[0][:, :, 0]


def _inverse(sizes: Tensor) -> Tensor:
    """Inverses of sizes (batch, m); the largest stands for those that are zero."""
    if not sizes.shape[1]:
        return sizes
    largest = sizes.amax(1, keepdim=True)
    sizes = torch.where(sizes > 0, sizes, torch.where(largest > 0, largest, 1.0))
    return 1 / sizes


def rounding_move(
    program: NonlinearProgram, at: Candidate, box: Box | None, equalities: int
) -> Tensor:
    """Relative length of the step that rounding of the optimality conditions makes, (batch,)."""
    point, x = at.point, at.point.x
    eps = torch.finfo(x.dtype).eps
    active = ActiveSet.of(at.found, point.y.shape[1] - equalities)
    if is_large(program):
        slope = eps * slope_terms(at.at, point, floor=_NOISE) * active.free
        product = hessian_product(program, x, point.y)
        step = conjugate_gradients(product, slope, active.free.to(x)).solution
    else:
        rows = along(absolute(at.at.rows), 1 + x.abs())
        slope = slope_terms(at.at, point, floor=_NOISE)
        rhs = torch.cat([slope * active.free, rows * active.rows], 1)
        step = _solved(active, at.at, eps * rhs)[:, : x.shape[1]]
    return torch.nan_to_num(step.abs() / (1 + x.abs()), nan=torch.inf).amax(1)


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


def polish_without_hessian(
    program: NonlinearProgram, x: Tensor, box: Box | None
) -> tuple[Candidate, Tensor]:
    """As `polish`: Newton steps by conjugate gradients in the variables at no bound."""
    return _sharpened(look_without_hessian(program, x, box), newton_steps(program, box, 0))


def _newton_without_hessian(
    program: NonlinearProgram, old: Candidate, box: Box | None
) -> Candidate:
    x = old.point.x
    free = ActiveSet.of(old.found, 0).free.to(x)
    product = hessian_product(program, x, x.new_zeros(len(x), 0))
    x = x + conjugate_gradients(product, -old.at.gradient * free, free).solution
    if box is not None:
        x = torch.minimum(torch.maximum(x, box.lower), box.upper)
    return look_without_hessian(program, x, box)
