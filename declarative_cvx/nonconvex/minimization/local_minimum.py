"""Minimise, polish, verify, and keep the best of several starts."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from declarative_cvx.nonconvex.minimization.active_set import ActiveSet, weakly_active
from declarative_cvx.nonconvex.minimization.attainment import NEAR, Attainment, attainment
from declarative_cvx.nonconvex.minimization.conjugate_gradients import is_large
from declarative_cvx.nonconvex.minimization.curvature import (
    descent_directions,
    downhill,
    tangent,
)
from declarative_cvx.nonconvex.minimization.evaluation import (
    Record,
    equality_count,
    values,
)
from declarative_cvx.nonconvex.minimization.external import External, InTurn, claimed
from declarative_cvx.nonconvex.minimization.higher_order import falling_directions
from declarative_cvx.nonconvex.minimization.infeasibility import (
    excess_of,
    infeasibility_slope,
    less_violated,
)
from declarative_cvx.nonconvex.minimization.kkt_residual import KKTPoint, KKTResiduals
from declarative_cvx.nonconvex.minimization.minimizer import Minimizer, MinimizerAnswer, bounds
from declarative_cvx.nonconvex.minimization.multipliers import with_multipliers
from declarative_cvx.nonconvex.minimization.polish import (
    ACCEPTED,
    Box,
    Candidate,
    look,
    look_without_hessian,
    polish,
    polish_without_hessian,
)
from declarative_cvx.nonconvex.minimization.program import NonlinearProgram
from declarative_cvx.nonconvex.minimization.sparsity_rule import entries, sparse_is_faster
from declarative_cvx.nonconvex.minimization.stationary_point import stationary_point
from declarative_cvx.status import Status

# Relative slacks of active constraints that answers of unknown accuracy may have.
_ACCURACIES = (1e-8, 1e-6, 1e-4, 1e-2)
# Violation, and slope of the violation, both relative, of a point that shows infeasibility.
_VIOLATED, _FLAT = 1e-6, 1e-4
# Objective that is low for sure, and decrease, relative to it, on the way to twice x that is one.
_LOW, _FALLING = -1e12, 1e-6
# Entries of Jacobians and Hessians that are worked on at once.
_AT_ONCE, _AT_ONCE_ELSEWHERE = 1_000_000, 500_000_000
# Times that a saddle point is left.
_ESCAPES = 4
# By how much, relatively, another start has to be better for the branch to be left.
_BETTER = 1e-7


@dataclass(frozen=True, eq=False)
class LocalMinimum(Record):
    """A verified point of every element.

    Attributes
    ----------
    point : KKTPoint
    active : ActiveSet
    value : Tensor, shape (batch,)
        Of the objective.
    residuals : KKTResiduals
    status, iterations : Tensor of int64, shape (batch,)
    weak : Tensor of bool, shape (batch,)
        Whether a constraint is active with a zero multiplier.
    degenerate : Tensor of bool, shape (batch,)
        Whether curvature vanishes there in a direction in which the minimum is isolated.
    source : Tensor of int64, shape (batch,)
        Who found it: 0 is the minimiser, 1 the first of its alternatives, ...
    """

    point: KKTPoint
    active: ActiveSet
    value: Tensor
    residuals: KKTResiduals
    status: Tensor
    iterations: Tensor
    weak: Tensor
    degenerate: Tensor
    source: Tensor


def local_minima(program: NonlinearProgram, start: Tensor, minimizer: Minimizer) -> LocalMinimum:
    """The best of the minima that are reached from the starts, shape (starts, batch, n).

    The first start's is kept unless another one is better by more than rounding; among elements
    without a verified answer it is the one with the smallest residual.
    """
    starts, batch, _ = start.shape
    program = replace(program, sparse=sparse_is_faster(program, starts * batch))
    index = torch.arange(batch, device=start.device).repeat(starts)
    repeated = program if starts == 1 else program.select(index)
    with torch.no_grad():
        found = _in_parts(repeated, start.flatten(0, 1), minimizer)
        if starts == 1:
            return found
        chosen = _choose(found, starts, batch) * batch + index[:batch]
        total = found.iterations.unflatten(0, (starts, batch)).sum(0)
        return replace(found.select(chosen), iterations=total)


def _choose(found: LocalMinimum, starts: int, batch: int) -> Tensor:
    """Which start each element's answer is taken from, shape (batch,)."""
    value, residual = found.value, found.residuals.worst
    solved = found.status == int(Status.OPTIMAL)
    unbounded = found.status == int(Status.UNBOUNDED)
    value = torch.where(unbounded, -torch.inf, torch.where(solved, value, torch.inf))
    value, residual = (v.unflatten(0, (starts, batch)) for v in (value, residual))
    best = value.amin(0)
    limit = torch.where(torch.isfinite(best), best + _BETTER * (1 + best.abs()), best)
    first = (value <= limit).int().argmax(0)
    return torch.where(torch.isposinf(best), residual.argmin(0), first)


def _in_parts(program: NonlinearProgram, start: Tensor, minimizer: Minimizer) -> LocalMinimum:
    """As many elements at once as fit a processor's cache."""
    limit = _AT_ONCE if start.device.type == "cpu" else _AT_ONCE_ELSEWHERE
    width = max(1, int(limit / entries(program)))
    parts = torch.arange(len(start), device=start.device).split(width)
    if len(parts) < 2:
        return _minimise(program, start, minimizer)
    first, *rest = (_minimise(program.select(at), start[at], minimizer) for at in parts)
    return first.joined(rest)


def _minimise(program: NonlinearProgram, start: Tensor, minimizer: Minimizer) -> LocalMinimum:
    """From one start; what fails is tried again in other ways."""
    first = minimizer.turns[0] if isinstance(minimizer, InTurn) else minimizer
    found = _attempt(program, start, first)
    settled = _settled(found, first)
    for number, other in enumerate(minimizer.alternatives(), 1):
        failed = torch.where(~settled)[0]
        if not len(failed):
            break
        old, new = found.select(failed), _attempt(program.select(failed), start[failed], other)
        new = replace(new, source=torch.full_like(new.source, number))
        total = old.iterations + new.iterations
        better = _settled(new, other)
        found = found.put(failed, replace(new.where(better, old), iterations=total))
        settled = settled.index_copy(0, failed, better)
    return found


def _settled(found: LocalMinimum, minimizer: Minimizer) -> Tensor:
    """Elements that nobody else is asked about, bool, shape (batch,).

    That no point nearby violates the constraints less does not show that there is none; what
    comes from elsewhere has a certificate.
    """
    final = (found.status == int(Status.OPTIMAL)) | (found.status == int(Status.UNBOUNDED))
    if isinstance(minimizer, External):
        final = final | (found.status == int(Status.INFEASIBLE))
    return final


def _attempt(program: NonlinearProgram, start: Tensor, minimizer: Minimizer) -> LocalMinimum:
    if isinstance(minimizer, External):
        return _as_given(program, start, minimizer.solve(program, start), minimizer.own)
    return _descend(program, start, minimizer)


def _as_given(
    program: NonlinearProgram, start: Tensor, answer: MinimizerAnswer, own: int | None
) -> LocalMinimum:
    """Somebody else's answer, sharpened and verified; no other point takes its place."""
    equalities, box, usable = equality_count(program), _box(program, start), claimed(answer)
    x = torch.where(usable[:, None], answer.x, start)
    if is_large(program):
        given = look_without_hessian(program, x, box)
        best, settled = polish_without_hessian(program, x, box)
    else:
        given = _with_best_multipliers(program, x, box, equalities)
        best, settled = polish(program, given.point, box, equalities)
    near = ((best.point.x - x).abs() <= NEAR * (1 + x.abs()))[:, :own].all(1)
    best, settled = best.where(near, given), settled & near
    reached = attainment(program, best, settled, box, equalities)
    good = (best.worst <= ACCEPTED) & reached.there
    status = torch.where(good, int(Status.OPTIMAL), int(Status.INACCURATE))
    saddles = _saddles(program, best, box, equalities, reached)[0]
    status = status.index_fill(0, saddles, int(Status.INACCURATE))
    status = torch.where(usable, status, answer.status)
    found = _assemble(best, status, answer.iterations, equalities, reached)
    unknown = torch.full_like(found.value, torch.nan)
    return replace(
        found,
        residuals=found.residuals.where(usable, KKTResiduals(unknown, unknown, unknown)),
    )


def _with_best_multipliers(
    program: NonlinearProgram, x: Tensor, box: Box | None, equalities: int
) -> Candidate:
    """A point as it is; which constraints are active is guessed from how accurate it may be."""
    guesses = (with_multipliers(program, x, box, equalities, near) for near in _ACCURACIES)
    first, *others = (look(program, guess, box, equalities) for guess in guesses)
    for other in others:
        first = first.better(other)
    return first


def _saddles(
    program: NonlinearProgram,
    best: Candidate,
    box: Box | None,
    equalities: int,
    reached: Attainment,
) -> tuple[Tensor, Tensor]:
    """Elements that can be improved in a direction without positive curvature, and directions."""
    if is_large(program):
        return downhill(program, best)
    left = tangent(best.at, best.point.x, best.found, equalities)
    elements, directions = descent_directions(best.at, best.found, equalities, left)
    steps = reached.direction * reached.degenerate[:, None]
    more, ways = falling_directions(program, best, box, left, steps)
    new = ~torch.isin(more, elements)
    return torch.cat([elements, more[new]]), torch.cat([directions, ways[new]])


def _box(program: NonlinearProgram, like: Tensor) -> Box | None:
    if program.lower is None and program.upper is None:
        return None
    return Box(*bounds(program, like))


def _descend(program: NonlinearProgram, start: Tensor, minimizer: Minimizer) -> LocalMinimum:
    """From one start; saddle points are left in a direction of negative curvature."""
    found, elements, directions = _one_round(program, start, minimizer)
    for _ in range(_ESCAPES):
        if not len(elements):
            return found
        part, old = program.select(elements), found.select(elements)
        fresh = _lower_side(part, old.point.x, directions)
        new, again, directions = _one_round(part, fresh, minimizer)
        better = _is_better(new, old)
        # A saddle point that could not be left is no answer.
        saddle = torch.where(old.status == int(Status.OPTIMAL), int(Status.INACCURATE), old.status)
        merged = new.where(better, replace(old, status=saddle))
        merged = replace(merged, iterations=old.iterations + new.iterations)
        found = found.put(elements, merged)
        left = better[again]
        elements, directions = elements[again[left]], directions[left]
    at = torch.full_like(found.status[elements], int(Status.INACCURATE))
    return replace(found, status=found.status.index_copy(0, elements, at))


def _is_better(new: LocalMinimum, old: LocalMinimum) -> Tensor:
    """Lower and not less feasible, or feasible where the other one was not, bool, (batch,)."""
    infeasible = old.status == int(Status.INFEASIBLE)
    solved = (new.status == int(Status.OPTIMAL)) | (new.status == int(Status.UNBOUNDED))
    less_violated = new.residuals.primal < 0.9 * old.residuals.primal
    lower = (new.value < old.value) | (new.status == int(Status.UNBOUNDED))
    feasible = new.residuals.primal <= old.residuals.primal.clamp(min=ACCEPTED)
    return torch.where(infeasible, solved | less_violated, lower & feasible)


def _lower_side(program: NonlinearProgram, x: Tensor, direction: Tensor) -> Tensor:
    """A point away from a saddle, on the side where the objective is lower."""
    size = (1 + x.abs()).amin(1, keepdim=True) / direction.abs().amax(1, keepdim=True)
    sides = [x + sign * 0.1 * size * direction for sign in (1, -1)]
    lower, upper = bounds(program, x)
    sides = [torch.minimum(torch.maximum(side, lower), upper) for side in sides]
    first, second = (values(program, side)[:, 0] for side in sides)
    return torch.where((second < first)[:, None], sides[1], sides[0])


def _one_round(
    program: NonlinearProgram, start: Tensor, minimizer: Minimizer
) -> tuple[LocalMinimum, Tensor, Tensor]:
    """Minimise, polish, verify; elements at saddle points, and directions that lead down."""
    equalities, box = equality_count(program), _box(program, start)
    if is_large(program):
        answer = minimizer.solve(program, start)
        best, settled = polish_without_hessian(program, answer.x, box)
        said, iterations = answer.status, answer.iterations
    else:
        best, settled, said, iterations = stationary_point(
            program, start, minimizer, box, equalities
        )
    reached = attainment(program, best, settled, box, equalities)
    elements, directions = _saddles(program, best, box, equalities, reached)
    pull = _pull(best, said, equalities)
    status = _verify(best, said, box, equalities, pull)
    astray = ~reached.there & (status == int(Status.OPTIMAL))
    status = torch.where(astray, int(Status.INACCURATE), status)
    solved = status[elements] == int(Status.OPTIMAL)
    elements, directions = elements[solved], directions[solved]
    stuck = torch.where(status == int(Status.INFEASIBLE))[0]
    if len(stuck):
        more, ways = _towards_feasibility(program, best, box, equalities, pull, stuck)
        elements, directions = torch.cat([elements, more]), torch.cat([directions, ways])
    return _assemble(best, status, iterations, equalities, reached), elements, directions


def _towards_feasibility(
    program: NonlinearProgram,
    best: Candidate,
    box: Box | None,
    equalities: int,
    pull: Tensor,
    stuck: Tensor,
) -> tuple[Tensor, Tensor]:
    """Those of the stuck elements whose violation is no minimum, and ways to make it smaller."""
    x = best.point.x[stuck]
    inside = torch.ones_like(x)
    if box is not None:
        size = 1e-7 * (1 + x.abs())
        inside = ((x - box.lower[stuck] > size) & (box.upper[stuck] - x > size)).to(x)
    excess = excess_of(best.at, equalities)[stuck]
    part, at = program.select(stuck), best.at.select(stuck)
    negative, ways = less_violated(part, x, at, pull[stuck], excess, inside)
    return stuck[negative], ways[negative]


def _assemble(
    best: Candidate, status: Tensor, iterations: Tensor, equalities: int, reached: Attainment
) -> LocalMinimum:
    active = ActiveSet.of(best.found, best.point.y.shape[1] - equalities)
    point = replace(
        best.point,
        y=torch.where(active.rows, best.point.y, 0.0),
        lower=torch.where(active.lower, best.point.lower, 0.0),
        upper=torch.where(active.upper, best.point.upper, 0.0),
    )
    return LocalMinimum(
        point, active, best.at.objective, best.found.residuals, status, iterations,
        weakly_active(best.found), reached.degenerate, torch.zeros_like(status),
    )  # fmt: skip


def _pull(best: Candidate, said: Tensor, equalities: int) -> Tensor:
    """Weighted violations: those of the minimiser's multipliers where it found no feasible point.

    Whatever the (positive) weights, a stationary point of the weighted violation shows that no
    constraint can be satisfied better without another one getting worse.
    """
    excess = excess_of(best.at, equalities)
    weighted = torch.where(best.point.y * excess > 0, best.point.y, 0.0)
    return torch.where((said == int(Status.INFEASIBLE))[:, None], weighted, excess)


def _falls(best: Candidate) -> Tensor:
    """Where a far point's objective does not just approach a limit, bool, shape (batch,)."""
    value = best.at.objective
    slope = -(best.point.x * best.at.gradient).sum(1)
    return (value < _LOW) | (slope > _FALLING * (1 + value.abs()))


def _verify(
    best: Candidate, said: Tensor, box: Box | None, equalities: int, pull: Tensor
) -> Tensor:
    """Statuses by the numbers; the minimiser's word counts only for why it stopped."""
    residuals, x = best.found.residuals, best.point.x
    excess = excess_of(best.at, equalities)
    infinite = torch.full_like(x, torch.inf)
    lower, upper = (-infinite, infinite) if box is None else (box.lower, box.upper)
    flat = infeasibility_slope(pull, excess, best.at.rows, x, lower, upper) <= _FLAT
    failed = (said == int(Status.ITERATION_LIMIT)) | (said == int(Status.NUMERICAL_ERROR))
    status = torch.where(failed, said, int(Status.INACCURATE))
    unbounded = (said == int(Status.UNBOUNDED)) & (residuals.primal <= _VIOLATED) & _falls(best)
    status = torch.where(unbounded, int(Status.UNBOUNDED), status)
    infeasible = (residuals.primal > _VIOLATED) & flat
    status = torch.where(infeasible, int(Status.INFEASIBLE), status)
    return torch.where(residuals.worst <= ACCEPTED, int(Status.OPTIMAL), status)
