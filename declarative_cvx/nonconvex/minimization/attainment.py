"""Whether Newton's method comes to rest at a point: is it a minimum, or on the way to none?"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor

from declarative_cvx.nonconvex.minimization.conjugate_gradients import is_large
from declarative_cvx.nonconvex.minimization.evaluation import Record, hessian_product
from declarative_cvx.nonconvex.minimization.matrices import along
from declarative_cvx.nonconvex.minimization.polish import (
    ACCEPTED,
    Box,
    Candidate,
    newton_steps,
    relative_move,
    rounding_move,
)
from declarative_cvx.nonconvex.minimization.program import NonlinearProgram

# Share of a Newton step that the next one has where curvature vanishes with the slope: 1/2 at a
# cubic, 2/3 at a quartic point, 1 and more where the minimum is at infinity.
_SLOW, _ENDLESS = 0.2, 0.95
# Steps, relatively, that are too short to say anything, and multiples of what rounding makes.
_SHORT, _NOISE = 1e-7, 100.0
# Share of the curvature along a short Newton step that changes with it where there is none at the
# solution: 5/9 of it at a quartic one, next to nothing at others.
_BENT = 0.2
# How far, relatively, a Newton step may lead from an answer.
NEAR = 1e-2


@dataclass(frozen=True, eq=False)
class Attainment(Record):
    """What Newton steps from a point say about it.

    Attributes
    ----------
    there : Tensor of bool, shape (batch,)
        Whether the first step is short, and steps become shorter: otherwise the minimum is
        elsewhere, or the objective only falls towards a limit that it does not attain.
    degenerate : Tensor of bool, shape (batch,)
        Steps become shorter by a constant factor, or curvature along them does, which shows
        where rounding hides the former: it vanishes at the solution.
    direction : Tensor, shape (batch, n)
        Of the steps.
    """

    there: Tensor
    degenerate: Tensor
    direction: Tensor

    @classmethod
    def unquestioned(cls, best: Candidate) -> Attainment:
        no = torch.zeros_like(best.worst, dtype=torch.bool)
        return cls(~no, no, torch.zeros_like(best.point.x))


def attainment(
    program: NonlinearProgram, best: Candidate, settled: Tensor, box: Box | None, equalities: int
) -> Attainment:
    """Of the points that satisfy the optimality conditions, and are not known to be at rest."""
    known = Attainment.unquestioned(best)
    doubtful = torch.where((best.worst <= ACCEPTED) & ~settled)[0]
    if not len(doubtful):
        return known
    part = program.select(doubtful)
    side = None if box is None else box.select(doubtful)
    return known.put(doubtful, _followed(part, best.select(doubtful), side, equalities))


def _followed(
    program: NonlinearProgram, start: Candidate, box: Box | None, equalities: int
) -> Attainment:
    """Three steps: the first one may still be about what is going to converge."""
    step = newton_steps(program, box, equalities)
    points = [start]
    for _ in range(3):
        points.append(step(points[-1]))
    first, second, third = (relative_move(old, new) for old, new in itertools.pairwise(points))
    length = second.abs().amax(1)
    floor = _NOISE * rounding_move(program, start, box, equalities)
    share = (second * third).sum(1) / (second * second).sum(1)
    loud, distance = length > floor, first.abs().amax(1)
    endless = loud & (length > _SHORT) & (share >= _ENDLESS)
    return Attainment(
        ~endless & ~(distance > floor.clamp(min=NEAR)),
        (loud & (share >= _SLOW)) | _bent(program, points[1], points[2]),
        torch.nan_to_num(second),
    )


def _bent(program: NonlinearProgram, old: Candidate, new: Candidate) -> Tensor:
    """Whether curvature from one point to the other is another one there, bool, (batch,)."""
    move = new.point.x - old.point.x
    before, after = (_curvature(program, point, move) for point in (old, new))
    return (after - before).abs() > _BENT * torch.maximum(before.abs(), after.abs())


def _curvature(program: NonlinearProgram, there: Candidate, direction: Tensor) -> Tensor:
    """Of the Lagrangian along directions (batch, n), shape (batch,)."""
    if is_large(program):
        bend = hessian_product(program, there.point.x, there.point.y)(direction)
    else:
        bend = along(there.at.hessian, direction)
    return (direction * bend).sum(1)
