"""A primal-dual interior-point method with an augmented Lagrangian for the constraints."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from declarative_cvx.nonconvex.minimization.evaluation import (
    Evaluation,
    Record,
    along,
    equality_count,
    evaluate,
    mix,
)
from declarative_cvx.nonconvex.minimization.infeasibility import excess_of, infeasibility_slope
from declarative_cvx.nonconvex.minimization.kkt_residual import KKTPoint, stationarity, violations
from declarative_cvx.nonconvex.minimization.minimizer import (
    RUNNING,
    Iterative,
    MinimizerAnswer,
    State,
    bounds,
)
from declarative_cvx.nonconvex.minimization.program import NonlinearProgram
from declarative_cvx.nonconvex.minimization.trust_region import damped_factor, row_sizes
from declarative_cvx.status import Status

# Share of the predicted decrease of the merit function that a step has to achieve.
_ENOUGH = 1e-4
# Steps go at most this share of the way to the boundary, or 1 - m if that is more.
_BOUNDARY = 0.9
# By how much bounds are widened, so that fixed variables have an inside.
_WIDER = 1e-9
# Limits of the multipliers that the augmented Lagrangian is centred at.
_LARGE = 1e6


@dataclass(frozen=True, eq=False)
class _Interior(State):
    """The scaled problem's iterate; row 0 of `scale` is the objective's."""

    s: Tensor  # (batch, l), slack
    y: Tensor  # (batch, k), multipliers of the equalities
    z: Tensor  # (batch, l + 2n) or (batch, l), multipliers of inequalities and bounds
    centre: Tensor  # (batch, k + l), of the augmented Lagrangian
    barrier: Tensor  # (batch,)
    penalty: Tensor  # (batch,), inverse of the weight of |c|^2 / 2
    reach: Tensor  # (batch,), largest violation to go to
    damping: Tensor  # (batch,)
    shrink: Tensor  # (batch,), share of the step to try
    best: Tensor  # (batch,), smallest residual so far
    scale: Tensor  # (batch, 1 + k + l)
    at: Evaluation  # scaled


@dataclass(frozen=True, eq=False)
class _Direction(Record):
    x: Tensor
    s: Tensor
    y: Tensor
    z: Tensor
    gaps: Tensor
    slope: Tensor  # (batch,), of the merit function
    damping: Tensor


@dataclass(frozen=True)
class InteriorPoint(Iterative):
    """Newton steps on a barrier function whose constraints are penalised.

    Inequalities get slacks, g + s = 0, s >= 0; slacks and bounds a logarithmic barrier m, all
    equations an augmented Lagrangian ``c'(centre) + |c|^2 / (2 m)``. The step is the primal-dual
    Newton step; it is a descent direction of this merit function once enough damping has made the
    condensed matrix positive definite, which is tested by its Cholesky factorisation, and is
    shortened until the merit function decreases. As each subproblem has one merit function, steps
    cannot cycle, dependent constraints do no harm, and infeasible problems end at a stationary
    point of ``|c|^2`` (Armand and Omheni 2017, "A globally and quadratically convergent primal-dual
    augmented Lagrangian algorithm").

    Parameters
    ----------
    barrier : float
        The first m, in units of the scaled objective.
    """

    name: ClassVar[str] = "InteriorPoint"
    takes_constraints: ClassVar[bool] = True
    barrier: float = 0.1

    def alternatives(self) -> tuple[InteriorPoint, ...]:
        """A more central and a less central path."""
        return replace(self, barrier=100 * self.barrier), replace(self, barrier=self.barrier / 100)

    # --- start ---------------------------------------------------------------------------------

    def begin(self, program: NonlinearProgram, start: Tensor) -> _Interior:
        lower, upper = _wide_bounds(program, start)
        x = _inside(start, lower, upper)
        raw = evaluate(program, x, torch.ones_like(x[:, :1]))
        scale = _scaling(raw)
        at = _scaled(raw, scale)
        at = replace(at, hessian=raw.hessian * scale[:, 0, None, None])
        k, one = equality_count(program), x.new_ones(len(x))
        s = (-at.constraints[:, k:]).clamp(min=0.1)
        gaps = _gaps(x, s, lower, upper, program)
        z = torch.where(torch.isfinite(gaps), self.barrier / gaps, 0.0)
        y = x.new_zeros(len(x), k)
        outcome = torch.where(at.finite, RUNNING, int(Status.NUMERICAL_ERROR))
        state = _Interior(
            x, outcome, torch.zeros_like(outcome), s, y, z, torch.cat([y, z[:, : s.shape[1]]], 1),
            self.barrier * one, self.barrier * one, one, 0 * one, one, torch.inf * one, scale, at,
        )  # fmt: skip
        reach = 10 * _largest(_equations(state)).clamp(min=1.0)
        residual = self._residual(program, state, lower, upper)
        return replace(
            state, reach=reach, outcome=self._outcome(program, state, residual, lower, upper)
        )

    # --- one iteration ---------------------------------------------------------------------------

    def step(self, program: NonlinearProgram, state: _Interior) -> _Interior:
        lower, upper = _wide_bounds(program, state.x)
        gaps = _gaps(state.x, state.s, lower, upper, program)
        c = _equations(state)
        d = self._direction(state, gaps, c)
        share = (1 - state.barrier).clamp(min=_BOUNDARY)
        primal = _longest(gaps, d.gaps, share) * state.shrink
        trial = self._trial(program, state, d, primal, _longest(state.z, d.z, share), lower, upper)
        new_gaps = _gaps(trial.x, trial.s, lower, upper, program)
        new_c = _equations(trial)
        old, new = _merit(state, gaps, c), _merit(trial, new_gaps, new_c)
        residual = self._residual(program, trial, lower, upper)
        taken = new <= old + _ENOUGH * primal * d.slope + 1e-14 * (1 + old.abs())
        taken |= residual <= 0.9 * state.best
        astray = _largest(new_c) > state.reach
        taken &= trial.at.finite & torch.isfinite(new) & ~astray
        trial = self._advance(trial, new_gaps, new_c)
        smaller = torch.where(d.damping < 1e-8, 0.0, d.damping / 10)
        trial = replace(
            trial,
            damping=torch.where(primal > 0.1, smaller, d.damping),
            shrink=torch.ones_like(primal),
            best=torch.minimum(residual, state.best),
            outcome=self._outcome(program, trial, residual, lower, upper),
        )
        shrink = state.shrink / 3
        rejected = replace(
            state,
            damping=torch.clamp(4 * d.damping, min=1e-4),
            shrink=shrink,
            penalty=torch.where(astray, (state.penalty / 4).clamp(min=1e-12), state.penalty),
            outcome=torch.where(shrink < 1e-12, int(Status.INACCURATE), state.outcome),
        )
        return replace(trial.where(taken, rejected), iterations=state.iterations + 1)

    def _direction(self, state: _Interior, gaps: Tensor, c: Tensor) -> _Direction:
        """The primal-dual Newton step, s and the multipliers eliminated."""
        at, k, q, n = state.at, state.y.shape[1], state.s.shape[1], state.x.shape[1]
        penalty = state.penalty[:, None]
        weight, central = state.z / gaps, state.barrier[:, None] / gaps
        A = at.rows
        pi = state.centre + c / penalty
        grad_x, matrix = at.gradient + mix(pi, A), at.hessian
        if gaps.shape[1] > q:
            grad_x = grad_x - central[:, q : q + n] + central[:, q + n :]
            matrix = matrix + torch.diag_embed(weight[:, q : q + n] + weight[:, q + n :])
        grad_s = pi[:, k:] - central[:, :q]
        share = 1 / (1 + penalty * weight[:, :q])
        row_weight = torch.cat([(1 / penalty).expand(-1, k), weight[:, :q] * share], 1)
        matrix = matrix + (A * row_weight[:, :, None]).mT @ A
        units = row_sizes(at.hessian, at.gradient, state.x)
        damping, factor = damped_factor(matrix, units, state.damping)
        rhs = mix(grad_s * share, A[:, k:]) - grad_x
        dx = torch.cholesky_solve(rhs[:, :, None], factor)[:, :, 0]
        Adx = along(A, dx)
        ds = -(penalty * grad_s + Adx[:, k:]) * share
        move = torch.cat([ds, dx, -dx], 1) if gaps.shape[1] > q else ds
        dz = central - state.z - weight * move
        dy = pi[:, :k] + Adx[:, :k] / penalty - state.y
        slope = (grad_x * dx).sum(1) + (grad_s * ds).sum(1)
        return _Direction(dx, ds, dy, dz, move, slope, damping)

    def _trial(
        self,
        program: NonlinearProgram,
        state: _Interior,
        d: _Direction,
        primal: Tensor,
        dual: Tensor,
        lower: Tensor,
        upper: Tensor,
    ) -> _Interior:
        """The program some way along the direction."""
        p, q = primal[:, None], dual[:, None]
        x, s = state.x + p * d.x, state.s + p * d.s
        y, z = state.y + p * d.y, state.z + q * d.z
        z = _near_central(z, _gaps(x, s, lower, upper, program), state.barrier)
        weights = torch.cat([torch.ones_like(p), y, z[:, : s.shape[1]]], 1) * state.scale
        at = _scaled(evaluate(program, x, weights), state.scale)
        return replace(state, x=x, s=s, y=y, z=z, at=at)

    # --- what is known after a step --------------------------------------------------------------

    def _residual(
        self, program: NonlinearProgram, state: _Interior, lower: Tensor, upper: Tensor
    ) -> Tensor:
        """Largest relative violation of the optimality conditions, shape (batch,)."""
        low, high = (lower, upper) if _has_bounds(program) else (None, None)
        found = violations(state.at, _point(state), low, high, state.y.shape[1])
        products = (found.slack.clamp(0, 1e3) * found.multiplier).abs()
        residuals = found.residuals
        together = torch.maximum(residuals.primal, residuals.dual)
        return torch.maximum(together, _largest(products))

    def _advance(self, state: _Interior, gaps: Tensor, c: Tensor) -> _Interior:
        """The next subproblem, where this one is solved well enough."""
        m, point = state.barrier[:, None], _point(state)
        gradient = stationarity(state.at, point)
        products = torch.where(torch.isfinite(gaps), gaps * state.z - m, 0.0)
        equations = c + state.penalty[:, None] * (state.centre - point.y)
        multipliers = torch.cat([state.y, state.z], 1)
        size = 1 + multipliers.abs().mean(1) / 10 if multipliers.shape[1] else 1.0
        error = torch.maximum(_largest(gradient), _largest(products)) / size
        error = torch.maximum(error, _largest(equations))
        m, least = state.barrier, 0.01 * self.tol
        ready = (error <= 10 * m) & (m > least)
        smaller = torch.clamp(torch.minimum(0.2 * m, m**1.5), min=least)
        penalty = torch.minimum(smaller, state.penalty)
        centre = point.y.clamp(-_LARGE, _LARGE)
        return replace(
            state,
            barrier=torch.where(ready, smaller, m),
            penalty=torch.where(ready, penalty, state.penalty),
            centre=torch.where(ready[:, None], centre, state.centre),
        )

    def _outcome(
        self,
        program: NonlinearProgram,
        state: _Interior,
        residual: Tensor,
        lower: Tensor,
        upper: Tensor,
    ) -> Tensor:
        """What each element has ended with, if it has."""
        excess = excess_of(state.at, state.y.shape[1])
        feasible = _largest(excess) <= 1e-6
        away = feasible & (state.at.objective < -1e12) & (state.x.abs().amax(1) > 1e10)
        outcome = torch.where(away, int(Status.UNBOUNDED), state.outcome)
        y = _point(state).y
        pulls = (excess, 1e-5), (torch.where(y * excess > 0, y, 0.0), 0.01 * self.tol)
        for pull, enough in pulls:
            slope = infeasibility_slope(pull, excess, state.at.rows, state.x, lower, upper)
            no = ~feasible & (slope <= 1e-6) & (state.penalty <= enough)
            outcome = torch.where(no, int(Status.INFEASIBLE), outcome)
        outcome = torch.where(residual <= self.tol, int(Status.OPTIMAL), outcome)
        return torch.where(state.outcome == RUNNING, outcome, state.outcome)

    def answer(
        self, program: NonlinearProgram, state: _Interior, status: Tensor
    ) -> MinimizerAnswer:
        point = _point(state)
        objective, rows = state.scale[:, :1], state.scale[:, 1:]
        y = point.y * rows / objective
        k = state.y.shape[1]
        lower, upper = bounds(program, state.x)
        return MinimizerAnswer(
            torch.minimum(torch.maximum(state.x, lower), upper), y[:, :k], y[:, k:],
            point.lower / objective, point.upper / objective, status, state.iterations,
        )  # fmt: skip


# --- parts ---------------------------------------------------------------------------------------


def _scaled(raw: Evaluation, scale: Tensor) -> Evaluation:
    """Values and Jacobian of the scaled program; the Hessian's weights were scaled before."""
    return replace(raw, values=raw.values * scale, jacobian=raw.jacobian * scale[:, :, None])


def _scaling(raw: Evaluation) -> Tensor:
    """Factors that give slopes (and the objective's curvature) at the start size one or so."""
    rows = raw.jacobian.abs().amax(2)
    first = torch.maximum(rows[:, :1], raw.hessian.abs().amax((1, 2))[:, None]) / 10
    sizes = torch.cat([first, rows[:, 1:]], 1)
    return torch.where(sizes > 1e-8, 1 / sizes.clamp(min=1e-8), 1.0).nan_to_num(1.0, 1.0)


def _wide_bounds(program: NonlinearProgram, x: Tensor) -> tuple[Tensor, Tensor]:
    lower, upper = bounds(program, x)
    return (
        torch.where(torch.isfinite(lower), lower - _WIDER * (1 + lower.abs()), lower),
        torch.where(torch.isfinite(upper), upper + _WIDER * (1 + upper.abs()), upper),
    )


def _inside(x: Tensor, lower: Tensor, upper: Tensor) -> Tensor:
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


def _gaps(x: Tensor, s: Tensor, lower: Tensor, upper: Tensor, program: NonlinearProgram) -> Tensor:
    """What has to stay positive: slacks, then distances from the bounds."""
    if not _has_bounds(program):
        return s
    return torch.cat([s, x - lower, upper - x], 1)


def _longest(value: Tensor, move: Tensor, share: Tensor) -> Tensor:
    """Part of a move, at most one, that uses up at most a share of each value, (batch,)."""
    if not value.shape[1]:
        return value.new_ones(len(value))
    room = torch.where(move < 0, -share[:, None] * value / move, torch.inf)
    return room.nan_to_num(torch.inf).amin(1).clamp(max=1.0)


def _near_central(z: Tensor, gaps: Tensor, barrier: Tensor) -> Tensor:
    """Multipliers that are not too far from m / gap, as convergence needs."""
    central = torch.where(torch.isfinite(gaps), barrier[:, None] / gaps, 0.0)
    return torch.minimum(torch.maximum(z, 1e-8 * central), 1e8 * central)


def _equations(state: _Interior) -> Tensor:
    """(h, g + s), shape (batch, k + l)."""
    k = state.y.shape[1]
    c = state.at.constraints
    return torch.cat([c[:, :k], c[:, k:] + state.s], 1)


def _largest(values: Tensor) -> Tensor:
    """Largest absolute value of each row, zero of rows without entries, shape (batch,)."""
    return values.abs().amax(1) if values.shape[1] else values.new_zeros(len(values))


def _merit(state: _Interior, gaps: Tensor, c: Tensor) -> Tensor:
    """The augmented Lagrangian of the barrier problem, shape (batch,)."""
    logs = torch.where(torch.isfinite(gaps), gaps, 1.0).log().sum(1)
    penalty = (c * (state.centre + c / (2 * state.penalty[:, None]))).sum(1)
    return state.at.objective - state.barrier * logs + penalty


def _has_bounds(program: NonlinearProgram) -> bool:
    return program.lower is not None or program.upper is not None


def _point(state: _Interior) -> KKTPoint:
    """The scaled problem's point."""
    q, n = state.s.shape[1], state.x.shape[1]
    y = torch.cat([state.y, state.z[:, :q]], 1)
    if state.z.shape[1] == q:
        none = torch.zeros_like(state.x)
        return KKTPoint(state.x, y, none, none)
    return KKTPoint(state.x, y, state.z[:, q : q + n], state.z[:, q + n :])
