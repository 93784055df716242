"""A start, a minimiser, and Newton's method to end with."""

from __future__ import annotations

import torch
from torch import Tensor

from declarative_cvx.nonconvex.minimization.curvature import descent_directions, tangent
from declarative_cvx.nonconvex.minimization.kkt_residual import KKTPoint
from declarative_cvx.nonconvex.minimization.minimizer import Minimizer
from declarative_cvx.nonconvex.minimization.multipliers import with_multipliers
from declarative_cvx.nonconvex.minimization.polish import ACCEPTED, Box, Candidate, look, polish
from declarative_cvx.nonconvex.minimization.program import NonlinearProgram
from declarative_cvx.status import Status

# Residual of a start that Newton's method is tried from at once, and how far that may then lead.
_WARM, _NEAR = 1e-2, 0.1


def stationary_point(
    program: NonlinearProgram,
    start: Tensor,
    minimizer: Minimizer,
    box: Box | None,
    equalities: int,
) -> tuple[Candidate, Tensor, Tensor, Tensor]:
    """Where the conditions for a minimum hold, as well as Newton's method can make them.

    Returns
    -------
    Candidate
    settled : Tensor of bool, shape (batch,)
        As of `polish`.
    said, iterations : Tensor of int64, shape (batch,)
        The minimiser's status, and its iterations, none where the start was enough.
    """
    best, settled, warm = _from_start(program, start, box, equalities)
    said = torch.full_like(warm, int(Status.OPTIMAL), dtype=torch.long)
    iterations = torch.zeros_like(said)
    cold = torch.where(~warm)[0]
    if not len(cold):
        return best, settled, said, iterations
    part = program if len(cold) == len(start) else program.select(cold)
    answer = minimizer.solve(part, start[cold])
    side = None if box is None else box.select(cold)
    y = torch.cat([answer.equality, answer.inequality], 1)
    given = KKTPoint(answer.x, y, answer.lower, answer.upper)
    unknown = torch.isnan(torch.cat([y, answer.lower, answer.upper], 1)).any(1)
    if bool(unknown.any()):
        given = with_multipliers(part, answer.x, side, equalities).where(unknown, given)
    found, rests = polish(part, given, side, equalities)
    if len(cold) == len(start):
        return found, rests, answer.status, answer.iterations
    pairs = (settled, rests), (said, answer.status), (iterations, answer.iterations)
    settled, said, iterations = (v.index_copy(0, cold, w) for v, w in pairs)
    return best.put(cold, found), settled, said, iterations


def _from_start(
    program: NonlinearProgram, start: Tensor, box: Box | None, equalities: int
) -> tuple[Candidate, Tensor, Tensor]:
    """Newton's method from the start, whether it settles, stays near it and ends at a minimum.

    A start that is nearly a minimum so keeps its branch, whatever path a minimiser would take.
    """
    x = start if box is None else torch.minimum(torch.maximum(start, box.lower), box.upper)
    first = look(program, with_multipliers(program, x, box, equalities), box, equalities)
    warm = first.worst <= _WARM
    near = torch.where(warm)[0]
    if not len(near):
        return first, warm, warm
    part = program if len(near) == len(x) else program.select(near)
    side = None if box is None else box.select(near)
    found, rests = polish(part, first.point.select(near), side, equalities)
    move = (found.point.x - x[near]).abs() / (1 + x[near].abs())
    good = (found.worst <= ACCEPTED) & (move <= _NEAR).all(1)
    left = tangent(found.at, found.point.x, found.found, equalities)
    saddles = descent_directions(found.at, found.found, equalities, left)[0]
    good = good.index_fill(0, saddles, False)
    settled = torch.zeros_like(warm).index_copy(0, near, rests)
    return first.put(near, found), settled, warm.index_copy(0, near, good)
