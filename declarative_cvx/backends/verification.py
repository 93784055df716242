"""What became of every element, from the numbers that a solver returned, whatever it said."""

from __future__ import annotations

import torch
from torch import Tensor

from declarative_cvx.backends.turns import ACCEPTED
from declarative_cvx.program import ConeProgram, Point
from declarative_cvx.residuals import Residuals, infeasibility, own_violation, unboundedness
from declarative_cvx.status import Status

# Largest relative violation of a certificate, unless the solver was asked for less.
CERTIFIED = 1e-9
# Residuals up to which nothing but rounding can be hidden beside larger terms.
ROUNDING = 1e-13
# How many times the residual that is accepted each condition may be violated by its own measure.
OWN = 10


def verify(
    program: ConeProgram, claimed: Tensor, found: Residuals, point: Point, accepted: float
) -> Tensor:
    """Statuses that the numbers bear out.

    Parameters
    ----------
    program : ConeProgram
    claimed : Tensor of int64, shape (batch,)
        What the solver says.
    found : Residuals
        Of the point.
    point : (x, y, s)
    accepted : float
        Largest residual of a solution.

    Returns
    -------
    Tensor of int64, shape (batch,)
    """
    optimal = torch.full_like(claimed, int(Status.OPTIMAL))
    good = _is_solution(program, found, point, accepted)
    if bool((good & (claimed == optimal)).all()):
        return optimal
    inaccurate = torch.full_like(claimed, int(Status.INACCURATE))
    infeasible = claimed == int(Status.INFEASIBLE)
    unbounded = claimed == int(Status.UNBOUNDED)
    status = torch.where(claimed == optimal, inaccurate, claimed)
    status = torch.where(good & ~infeasible & ~unbounded, optimal, status)
    certified = CERTIFIED * accepted / ACCEPTED
    if infeasible.any():
        false = infeasible & ~(infeasibility(program, point[1]) <= certified)
        status = torch.where(false, inaccurate, status)
    if unbounded.any():
        false = unbounded & ~(unboundedness(program, point[0]) <= certified)
        status = torch.where(false, inaccurate, status)
    return status


def _is_solution(program: ConeProgram, found: Residuals, point: Point, accepted: float) -> Tensor:
    """Which points satisfy the optimality conditions, bool, shape (batch,).

    Each of them relative to the largest terms of all, then, where this may hide something, by its
    own measure.
    """
    good = found.worst <= accepted
    doubtful = good & (found.worst > ROUNDING)
    if not bool(doubtful.any()):
        return good
    at = torch.where(doubtful)[0]
    x, y, s = (v[at] for v in point)
    own = own_violation(program.select(at), x, y, s)
    return good.index_copy(0, at, own <= OWN * accepted)
