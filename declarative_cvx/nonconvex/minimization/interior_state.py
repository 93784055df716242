"""What the interior-point method knows of its iterates."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from declarative_cvx.nonconvex.minimization.condensed import Factors
from declarative_cvx.nonconvex.minimization.evaluation import Evaluation
from declarative_cvx.nonconvex.minimization.matrices import largest_entry, row_largest
from declarative_cvx.nonconvex.minimization.matrices import scale as scaled_matrix
from declarative_cvx.nonconvex.minimization.minimizer import State
from declarative_cvx.nonconvex.minimization.records import Record
from declarative_cvx.nonconvex.minimization.sides import Sides

# Steps go at most this share of the way to the boundary, or 1 - m if that is more.
_BOUNDARY = 0.9
# Share of a row's value that its slope is taken for, at least.
_STEEPEST = 0.1


@dataclass(frozen=True, eq=False)
class Interior(State):
    """The scaled problem's iterate; row 0 of `scale` is the objective's."""

    s: Tensor  # (batch, l), slack
    y: Tensor  # (batch, k), multipliers of the equalities
    z: Tensor  # (batch, l + sides), multipliers of inequalities and bounds
    centre: Tensor  # (batch, k + l), of the augmented Lagrangian
    barrier: Tensor  # (batch,)
    penalty: Tensor  # (batch,), inverse of the weight of |c|^2 / 2
    reach: Tensor  # (batch,), largest violation to go to
    damping: Tensor  # (batch,)
    shrink: Tensor  # (batch,), share of the step to try
    best: Tensor  # (batch,), smallest residual so far
    scale: Tensor  # (batch, 1 + k + l)
    sides: Sides
    at: Evaluation  # scaled
    gaps: Tensor  # (batch, l + sides): slacks, then distances from the bounds
    c: Tensor  # (batch, k + l), equations (h, g + s)
    logs: Tensor  # (batch,), sum of the logarithms of the gaps

    @property
    def multipliers(self) -> Tensor:
        """Of the equations, (batch, k + l)."""
        return torch.cat([self.y, self.z[:, : self.s.shape[1]]], 1)


@dataclass(frozen=True, eq=False)
class Direction(Record):
    x: Tensor
    s: Tensor
    y: Tensor
    z: Tensor
    gaps: Tensor
    equations: Tensor  # (batch, k + l), of their linear model
    slope: Tensor  # (batch,), of the merit function
    damping: Tensor
    factors: Factors  # of the condensed matrix
    row_weight: Tensor  # (batch, k + l), of the equations in it
    share: Tensor  # (batch, l), of a violation that the slack takes


@dataclass(frozen=True, eq=False)
class Errors(Record):
    """Violations of the optimality conditions, each (batch,)."""

    subproblem: Tensor  # of the present barrier and penalty
    residual: Tensor  # of the problem itself, relative
    equations: Tensor  # largest absolute equation


@dataclass(frozen=True, eq=False)
class Tried(Record):
    """Where a step has led."""

    trial: Interior
    errors: Errors
    primal: Tensor  # (batch,), part of the step
    taken: Tensor  # (batch,), whether it is good enough
    finite: Tensor  # (batch,)
    astray: Tensor  # (batch,), whether equations are violated too much


def scaled(raw: Evaluation, scale: Tensor) -> Evaluation:
    """Values and Jacobian of the scaled program; the Hessian's weights were scaled before."""
    return replace(raw, values=raw.values * scale, jacobian=scaled_matrix(raw.jacobian, scale))


def scaling(raw: Evaluation, x: Tensor) -> Tensor:
    """Factors that give slopes (and the objective's curvature) at the start size one or so.

    A row whose slope happens to be small there, as that of |x|^2 = 1 near zero, is judged by its
    value, which a change of x by its size or one may well make up for.
    """
    rows = row_largest(raw.jacobian)
    first = torch.maximum(rows[:, :1], largest_entry(raw.hessian)[:, None]) / 10
    steepest = _STEEPEST * raw.constraints.abs() / (1 + x.abs().amax(1, keepdim=True))
    sizes = torch.cat([first, torch.maximum(rows[:, 1:], steepest)], 1)
    return torch.where(sizes > 1e-8, 1 / sizes.clamp(min=1e-8), 1.0).nan_to_num(1.0, 1.0)


def inside(x: Tensor, lower: Tensor, upper: Tensor) -> Tensor:
    """The nearest point that is some way inside the bounds."""
    width = (upper - lower) / 4
    low = torch.where(torch.isfinite(lower), lower, 0.0)
    high = torch.where(torch.isfinite(upper), upper, 0.0)
    least = torch.where(
        torch.isfinite(lower), low + torch.minimum(0.01 * (1 + low.abs()), width), -torch.inf
    )
    most = torch.where(
        torch.isfinite(upper), high - torch.minimum(0.01 * (1 + high.abs()), width), torch.inf
    )
    return torch.minimum(torch.maximum(x, least), most)


def all_gaps(x: Tensor, s: Tensor, sides: Sides) -> Tensor:
    """What has to stay positive: slacks, then distances from the bounds."""
    return torch.cat([s, sides.gaps(x)], 1) if sides.count else s


def gap_moves(dx: Tensor, ds: Tensor, sides: Sides) -> Tensor:
    return torch.cat([ds, sides.moves(dx)], 1) if sides.count else ds


def longest(state: Interior, d: Direction) -> tuple[Tensor, Tensor]:
    """Parts of the moves of gaps and multipliers, at most one, that keep them positive, (batch,).

    They use up a share of each, which grows to one with the barrier's end.
    """
    if not state.z.shape[1]:
        one = torch.ones_like(state.barrier)
        return one, one
    share = (1 - state.barrier).clamp(min=_BOUNDARY)
    used = -torch.stack([d.gaps / state.gaps, d.z / state.z]).amin(2)
    primal, dual = 1 / (used / share).clamp(min=1.0)
    return primal, dual


def near_central(z: Tensor, gaps: Tensor, barrier: Tensor) -> Tensor:
    """Multipliers that are not too far from m / gap, as convergence needs."""
    central = barrier[:, None] / gaps
    return torch.minimum(torch.maximum(z, 1e-8 * central), 1e8 * central)


def equations_of(at: Evaluation, s: Tensor) -> Tensor:
    """(h, g + s), shape (batch, k + l)."""
    c = at.constraints
    return c + torch.nn.functional.pad(s, (c.shape[1] - s.shape[1], 0)) if s.shape[1] else c


def largest(values: Tensor) -> Tensor:
    """Largest absolute value of each row, zero of rows without entries, shape (batch,)."""
    return values.abs().amax(1) if values.shape[1] else values.new_zeros(len(values))


def merit(state: Interior) -> Tensor:
    """The augmented Lagrangian of the barrier problem, shape (batch,)."""
    c = state.c
    penalty = (c * torch.addcdiv(state.centre, c, 2 * state.penalty[:, None])).sum(1)
    return state.at.objective - state.barrier * state.logs + penalty
