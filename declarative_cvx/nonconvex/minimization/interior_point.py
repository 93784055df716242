"""A primal-dual interior-point method with an augmented Lagrangian for the constraints."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from declarative_cvx.nonconvex.minimization.condensed import condensed, damped_factors
from declarative_cvx.nonconvex.minimization.evaluation import (
    equality_count,
    evaluate,
)
from declarative_cvx.nonconvex.minimization.infeasibility import excess_of, infeasibility_slope
from declarative_cvx.nonconvex.minimization.interior_state import (
    Direction,
    Errors,
    Interior,
    Tried,
    all_gaps,
    equations_of,
    gap_moves,
    inside,
    largest,
    longest,
    merit,
    near_central,
    scaled,
    scaling,
)
from declarative_cvx.nonconvex.minimization.matrices import absolute, along, mix
from declarative_cvx.nonconvex.minimization.matrices import scale as scaled_matrix
from declarative_cvx.nonconvex.minimization.minimizer import (
    RUNNING,
    Iterative,
    MinimizerAnswer,
    bounds,
)
from declarative_cvx.nonconvex.minimization.program import NonlinearProgram
from declarative_cvx.nonconvex.minimization.sides import Sides
from declarative_cvx.nonconvex.minimization.trust_region import row_sizes
from declarative_cvx.status import Status

# Share of the predicted decrease of the merit function that a step has to achieve.
_ENOUGH = 1e-4
# Largest violation of what counts as feasible.
_FEASIBLE = 1e-6
# Limits of the multipliers that the augmented Lagrangian is centred at.
_LARGE = 1e6


@dataclass(frozen=True)
class InteriorPoint(Iterative):
    """Newton steps on a barrier function whose constraints are penalised.

    Inequalities get slacks, g + s = 0, s >= 0; slacks and bounds a logarithmic barrier m, all
    equations an augmented Lagrangian ``c'(centre) + |c|^2 / (2 m)``. The step is the primal-dual
    Newton step; it is a descent direction of this merit function once enough damping has made the
    condensed matrix positive definite, which is tested by its Cholesky factorisation, and is
    corrected for the curvature of the constraints and shortened until the merit function
    decreases. As each subproblem has one merit function, steps cannot cycle, dependent constraints
    do no harm, and infeasible problems end at a stationary point of ``|c|^2`` (Armand and Omheni
    2017, "A globally and quadratically convergent primal-dual augmented Lagrangian algorithm").

    Parameters
    ----------
    barrier : float
        The first m, in units of the scaled objective.
    """

    name: ClassVar[str] = "InteriorPoint"
    takes_constraints: ClassVar[bool] = True
    freezes: ClassVar[bool] = True
    barrier: float = 0.1

    def alternatives(self) -> tuple[InteriorPoint, ...]:
        """A more central and a less central path."""
        return replace(self, barrier=100 * self.barrier), replace(self, barrier=self.barrier / 100)

    # --- start ---------------------------------------------------------------------------------

    def begin(self, program: NonlinearProgram, start: Tensor) -> Interior:
        sides = Sides.of(program, start)
        x = inside(start, *bounds(program, start))
        raw = evaluate(program, x, torch.ones_like(x[:, :1]))
        scale = scaling(raw, x)
        at = scaled(raw, scale)
        at = replace(at, hessian=scaled_matrix(raw.hessian, scale[:, :1].expand_as(x)))
        k, one = equality_count(program), x.new_ones(len(x))
        s = (-at.constraints[:, k:]).clamp(min=0.1)
        gaps = all_gaps(x, s, sides)
        z, y = self.barrier / gaps, x.new_zeros(len(x), k)
        outcome = torch.where(at.finite, RUNNING, int(Status.NUMERICAL_ERROR))
        state = Interior(
            x, outcome, torch.zeros_like(outcome), s, y, z, torch.cat([y, z[:, : s.shape[1]]], 1),
            self.barrier * one, self.barrier * one, one, 0 * one, one, torch.inf * one, scale,
            sides, at, gaps, equations_of(at, s), gaps.log().sum(1),
        )  # fmt: skip
        errors = self._errors(state)
        return replace(
            state,
            reach=10 * errors.equations.clamp(min=1.0),
            outcome=self._outcome(program, state, errors),
        )

    # --- one iteration ---------------------------------------------------------------------------

    def step(self, program: NonlinearProgram, state: Interior) -> Interior:
        d = self._direction(program, state)
        primal, dual = longest(state, d)
        tried = self._tried(program, state, d, primal * state.shrink, dual)
        on_host, running = state.x.device.type == "cpu", state.outcome == RUNNING
        if on_host and bool(tried.taken.all()):
            return self._accepted(program, tried, d.damping)
        bent = torch.where(running & ~tried.taken & tried.finite)[0] if on_host else None
        tried = self._corrected(program, state, d, tried, dual, bent)
        shrink, least = state.shrink / 2, (state.penalty / 4).clamp(min=1e-12)
        rejected = replace(
            state,
            damping=torch.clamp(4 * d.damping, min=1e-4),
            shrink=shrink,
            penalty=torch.where(tried.astray, least, state.penalty),
            outcome=torch.where(running & (shrink < 1e-12), int(Status.INACCURATE), state.outcome),
            iterations=state.iterations + running,
        )
        return self._accepted(program, tried, d.damping).where(tried.taken, rejected)

    def _tried(
        self,
        program: NonlinearProgram,
        state: Interior,
        d: Direction,
        primal: Tensor,
        dual: Tensor,
    ) -> Tried:
        """Where a step leads, and whether it is good enough to be taken."""
        trial = self._trial(program, state, d, primal, dual)
        errors = self._errors(trial)
        old, new = merit(state), merit(trial)
        good = new <= old + _ENOUGH * primal * d.slope + 1e-14 * (1 + old.abs())
        good |= errors.residual <= 0.9 * state.best
        finite = trial.at.finite & torch.isfinite(new)
        astray = errors.equations > state.reach
        taken = good & finite & ~astray & (state.outcome == RUNNING)
        return Tried(trial, errors, primal, taken, finite, astray)

    def _corrected(
        self,
        program: NonlinearProgram,
        state: Interior,
        d: Direction,
        tried: Tried,
        dual: Tensor,
        elements: Tensor | None,
    ) -> Tried:
        """Second-order corrections: back to where the equations' linear model had promised.

        Along curved constraints a step that is right to first order would be refused otherwise.
        """
        if elements is None:
            return self._second(program, state, d, tried, dual).where(~tried.taken, tried)
        if not len(elements):
            return tried
        old = tried.select(elements)
        part, start = program.select(elements), state.select(elements)
        new = self._second(part, start, d.select(elements), old, dual[elements])
        return tried.put(elements, new.where(new.taken, old))

    def _second(
        self,
        program: NonlinearProgram,
        state: Interior,
        d: Direction,
        tried: Tried,
        dual: Tensor,
    ) -> Tried:
        k, p = state.y.shape[1], tried.primal[:, None]
        missed = (tried.trial.c - state.c) / p - d.equations
        rhs = -mix(d.row_weight * missed, state.at.rows)
        dx = d.factors.solve(rhs)
        ds = -(missed + along(state.at.rows, dx))[:, k:] * d.share
        gaps = d.gaps + gap_moves(dx, ds, state.sides)
        bent = replace(d, x=d.x + dx, s=d.s + ds, gaps=gaps)
        primal = torch.minimum(longest(state, bent)[0], tried.primal)
        return self._tried(program, state, bent, primal, dual)

    def _direction(self, program: NonlinearProgram, state: Interior) -> Direction:
        """The primal-dual Newton step, s and the multipliers eliminated."""
        at, k, q, sides = state.at, state.y.shape[1], state.s.shape[1], state.sides
        A, penalty = at.rows, state.penalty[:, None]
        weight, central = state.z / state.gaps, state.barrier[:, None] / state.gaps
        pi = torch.addcdiv(state.centre, state.c, penalty)
        grad_x = at.gradient  # but for the part of the equations, which is pi'A
        grad_s = pi[:, k:] - central[:, :q]
        share = 1 / (1 + penalty * weight[:, :q])
        row_weight = torch.cat([(1 / penalty).expand(-1, k), weight[:, :q] * share], 1)
        diagonal = None
        if sides.count:
            grad_x = grad_x - sides.pull(central[:, q:])
            diagonal = sides.spread(weight[:, q:])
        matrix = condensed(program, at.hessian, A, row_weight, diagonal)
        units = partial(row_sizes, at.hessian, at.gradient, state.x)
        damping, factors = damped_factors(matrix, units, state.damping)
        pull = torch.cat([pi[:, :k], pi[:, k:] - grad_s * share], 1)
        dx = factors.solve(-mix(pull, A) - grad_x)
        Adx = along(A, dx)
        ds = -(penalty * grad_s + Adx[:, k:]) * share
        move = gap_moves(dx, ds, sides)
        dz = torch.addcmul(central - state.z, weight, move, value=-1)
        dy = pi[:, :k] + Adx[:, :k] / penalty - state.y
        slope = (grad_x * dx).sum(1) + (pi * Adx).sum(1) + (grad_s * ds).sum(1)
        equations = Adx + torch.nn.functional.pad(ds, (k, 0))
        return Direction(
            dx, ds, dy, dz, move, equations, slope, damping, factors, row_weight, share
        )  # fmt: skip

    def _trial(
        self,
        program: NonlinearProgram,
        state: Interior,
        d: Direction,
        primal: Tensor,
        dual: Tensor,
    ) -> Interior:
        """The program some way along the direction."""
        p = primal[:, None]
        x, s = torch.addcmul(state.x, p, d.x), torch.addcmul(state.s, p, d.s)
        y, z = torch.addcmul(state.y, p, d.y), torch.addcmul(state.z, dual[:, None], d.z)
        gaps = all_gaps(x, s, state.sides)
        z = near_central(z, gaps, state.barrier)
        weights = torch.cat([torch.ones_like(p), y, z[:, : s.shape[1]]], 1) * state.scale
        at = scaled(evaluate(program, x, weights), state.scale)
        c, logs = equations_of(at, s), gaps.log().sum(1)
        return replace(state, x=x, s=s, y=y, z=z, at=at, gaps=gaps, c=c, logs=logs)

    # --- what is known after a step --------------------------------------------------------------

    def _errors(self, state: Interior) -> Errors:
        """Stationarity, complementarity and feasibility, as they are and relative."""
        at, multipliers = state.at, state.multipliers
        rows, size = absolute(at.rows), 1 + state.x.abs()
        slope = at.gradient + mix(multipliers, at.rows)
        if state.sides.count:
            slope = slope - state.sides.pull(state.z[:, state.s.shape[1] :])
        terms = torch.maximum(at.gradient.abs(), mix(multipliers.abs(), rows))
        terms = torch.maximum(terms, along(absolute(at.hessian), size))
        dual, products = largest(slope), state.gaps * state.z
        mean = (state.y.abs().sum(1) + state.z.sum(1)) / max(state.y.shape[1] + state.z.shape[1], 1)
        error = torch.maximum(dual, largest(products - state.barrier[:, None])) / (1 + mean / 10)
        centred = state.c + state.penalty[:, None] * (state.centre - multipliers)
        primal = largest(state.c / (1e-8 + along(rows, size)))
        relative = dual / largest(terms).clamp(min=1e-8)
        comparable = largest(products) / (1 + at.objective.abs())
        return Errors(
            torch.maximum(error, largest(centred)),
            torch.maximum(torch.maximum(primal, relative), comparable),
            largest(state.c),
        )

    def _accepted(self, program: NonlinearProgram, tried: Tried, damping: Tensor) -> Interior:
        """After a step; with the next subproblem where this one is solved well enough."""
        trial, errors, primal = tried.trial, tried.errors, tried.primal
        m, least = trial.barrier, 0.01 * self.tol
        ready = errors.subproblem <= 10 * m
        smaller = torch.clamp(torch.minimum(0.2 * m, m**1.5), min=least)
        penalty = torch.minimum(smaller, trial.penalty)
        centre = trial.multipliers.clamp(-_LARGE, _LARGE)
        relaxed = torch.where(damping < 1e-8, 0.0, damping / 3)
        return replace(
            trial,
            barrier=torch.where(ready, smaller, m),
            penalty=torch.where(ready, penalty, trial.penalty),
            centre=torch.where(ready[:, None], centre, trial.centre),
            damping=torch.where(primal > 0.1, relaxed, damping),
            shrink=torch.ones_like(primal),
            best=torch.minimum(errors.residual, trial.best),
            outcome=self._outcome(program, trial, errors),
            iterations=trial.iterations + 1,
        )

    def _outcome(self, program: NonlinearProgram, state: Interior, errors: Errors) -> Tensor:
        """What each element has ended with, if it has."""
        outcome = torch.where(errors.residual <= self.tol, int(Status.OPTIMAL), state.outcome)
        low = state.at.objective < -1e12
        stuck = (errors.equations > _FEASIBLE) & (state.penalty <= 1e-5)
        if outcome.device.type == "cpu" and not bool((low | stuck).any()):
            return outcome
        excess = excess_of(state.at, state.y.shape[1])
        feasible, no = largest(excess) <= _FEASIBLE, torch.zeros_like(stuck)
        # Violations alone or, once nothing else counts, as the multipliers weigh them.
        y = state.multipliers
        pulls = (excess, 1e-5), (torch.where(y * excess > 0, y, 0.0), 0.01 * self.tol)
        for pull, enough in pulls:
            slope = infeasibility_slope(
                pull, excess, state.at.rows, state.x, *bounds(program, state.x)
            )
            no |= stuck & ~feasible & (slope <= 1e-6) & (state.penalty <= enough)
        away = low & feasible & (state.x.abs().amax(1) > 1e10)
        ended = torch.where(no, int(Status.INFEASIBLE), int(Status.UNBOUNDED))
        return torch.where((no | away) & (outcome == RUNNING), ended, outcome)

    def answer(self, program: NonlinearProgram, state: Interior, status: Tensor) -> MinimizerAnswer:
        objective, rows = state.scale[:, :1], state.scale[:, 1:]
        y = state.multipliers * rows / objective
        k = state.y.shape[1]
        lower, upper = bounds(program, state.x)
        low, high = state.sides.split(state.z[:, state.s.shape[1] :] / objective)
        return MinimizerAnswer(
            torch.minimum(torch.maximum(state.x, lower), upper), y[:, :k], y[:, k:],
            low, high, status, state.iterations,
        )  # fmt: skip
