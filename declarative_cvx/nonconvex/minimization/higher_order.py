"""Stationary points without curvature in a direction: does the objective fall to a higher order?"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from declarative_cvx.nonconvex.minimization.active_set import ActiveSet
from declarative_cvx.nonconvex.minimization.curvature import FLAT, Tangent, strongly_active
from declarative_cvx.nonconvex.minimization.evaluation import equality_count, evaluate
from declarative_cvx.nonconvex.minimization.kkt_residual import KKTPoint, violations
from declarative_cvx.nonconvex.minimization.matrices import along, full, scale
from declarative_cvx.nonconvex.minimization.polish import Box, Candidate
from declarative_cvx.nonconvex.minimization.program import NonlinearProgram

# Lengths of the steps that are tried, relative to the size of x or one, each twice the last.
_LENGTHS = (0.01, 0.02, 0.04)
# What a decrease of third order or more is multiplied by, at least, when the step is doubled.
_GROWTH = 3.0
# Decrease, relative to the objective, and violation that are rounding.
_ROUNDING, _VIOLATED = 1e-13, 1e-9
# Directions without curvature that are tried, and steps back to the constraints.
_MOST, _RETURNS = 4, 3


def falling_directions(
    program: NonlinearProgram, best: Candidate, box: Box | None, left: Tangent, extra: Tensor
) -> tuple[Tensor, Tensor]:
    """Points with a direction of no curvature in which the objective falls nevertheless.

    As at the origin of -x^4 or x^3. On both sides of a point, and as far along the constraints
    that are active, the decrease has to grow with the step as one of third order or more does.

    Parameters
    ----------
    program : NonlinearProgram
    best : Candidate
    box : Box or None
    left : Tangent
        Of the same elements.
    extra : Tensor, shape (batch, n)
        A direction to try besides, zero where there is none.

    Returns
    -------
    elements : Tensor of int64, shape (elements,)
    directions : Tensor, shape (elements, n)
    """
    flat = torch.zeros_like(best.point.x[:, :0].sum(1), dtype=torch.bool)
    flat = flat.index_copy(0, left.elements, (left.curvatures.abs() <= FLAT).any(1))
    at = torch.where((flat | (extra != 0).any(1)) & (best.worst < torch.inf))[0]
    if not len(at):
        return at, extra[:0]
    tried = _directions(left, extra)[at]
    part, there = program.select(at), best.select(at)
    side = None if box is None else box.select(at)
    found, chosen = torch.zeros_like(at, dtype=torch.bool), torch.zeros_like(extra[at])
    for direction in tried.unbind(2):
        falls = _falls(part, there, side, direction)
        chosen = torch.where((falls & ~found)[:, None], direction, chosen)
        found = found | falls
    return at[found], chosen[found]


def _directions(left: Tangent, extra: Tensor) -> Tensor:
    """The first flat directions, two mixtures of all, and the given one, (batch, n, tried)."""
    batch, n = extra.shape
    flat = left.directions * (left.curvatures.abs() <= FLAT)[:, None]
    first = flat[:, :, : min(n, _MOST)]
    own = torch.cat([first, flat @ _mixtures(flat)], 2)
    out = extra.new_zeros(batch, n, own.shape[2]).index_copy(0, left.elements, own)
    return torch.cat([out, extra[:, :, None]], 2)


def _mixtures(flat: Tensor) -> Tensor:
    """Fixed weights of the directions, of one sign and of changing ones, (n, 2)."""
    weights = torch.linspace(0.5, 1.5, flat.shape[2], dtype=flat.dtype, device=flat.device)
    signs = 1.0 - 2.0 * (torch.arange(flat.shape[2], device=flat.device) % 2)
    return torch.stack([weights, weights * signs], 1)


def _falls(
    program: NonlinearProgram, there: Candidate, box: Box | None, direction: Tensor
) -> Tensor:
    """Whether the objective falls on one of the two sides, bool, shape (batch,)."""
    size = 1 + there.point.x.abs()
    longest = (direction / size).abs().amax(1, keepdim=True)
    unit = torch.where(longest > 0, direction / longest.clamp(min=1e-300), 0.0)
    found = torch.zeros_like(there.worst, dtype=torch.bool)
    for sign in (1, -1):
        drops = [_decrease(program, there, box, sign * length * unit) for length in _LENGTHS]
        grows = [b >= _GROWTH * a for a, b in itertools.pairwise(drops)]
        rounding = _ROUNDING * there.at.objective.abs()
        found |= (drops[0] > rounding) & grows[0] & grows[1]
    return found & (longest[:, 0] > 0)


def _decrease(program: NonlinearProgram, there: Candidate, box: Box | None, move: Tensor) -> Tensor:
    """Of the objective after a move along the active constraints; NaN if it leaves others."""
    equalities, point = equality_count(program), there.point
    active = strongly_active(there.found, there.at.rows.shape[1] - equalities)
    x = point.x + move
    for _ in range(_RETURNS if there.at.rows.shape[1] else 0):
        x = _nearer(program, x, active)
    at = evaluate(program, x)
    lower, upper = (None, None) if box is None else (box.lower, box.upper)
    zero = torch.zeros_like(x)
    new = KKTPoint(x, torch.zeros_like(point.y), zero, zero)
    violated = violations(at, new, lower, upper, equalities).residuals.primal
    return torch.where(violated <= _VIOLATED, there.at.objective - at.objective, torch.nan)


def _nearer(program: NonlinearProgram, x: Tensor, active: ActiveSet) -> Tensor:
    """A Gauss-Newton step back to the active rows, by the free variables."""
    at = evaluate(program, x)
    rows = full(scale(at.rows, active.rows, active.free))
    missed = torch.nan_to_num(at.constraints * active.rows)
    return x - along(torch.linalg.pinv(torch.nan_to_num(rows), rtol=1e-9), missed)
