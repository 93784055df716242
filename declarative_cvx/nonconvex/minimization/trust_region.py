"""Newton's method with a trust region, for problems with bounds only."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from declarative_cvx.nonconvex.minimization.condensed import FullCondensed, damped_factors
from declarative_cvx.nonconvex.minimization.evaluation import Evaluation, evaluate
from declarative_cvx.nonconvex.minimization.matrices import Matrix, along, full, row_largest, scale
from declarative_cvx.nonconvex.minimization.minimizer import (
    RUNNING,
    Iterative,
    MinimizerAnswer,
    State,
    bounded_answer,
    bounds,
    held_back,
)
from declarative_cvx.nonconvex.minimization.program import NonlinearProgram
from declarative_cvx.status import Status

# Steps whose actual decrease is less than this share of the predicted one are not taken.
_ENOUGH = 1e-4
# Damping below which there is none, and above which no step can help any more.
_LEAST, _MOST = 1e-10, 1e16
# Share of the largest change of slope that those of other variables are taken for, at least.
_FLAT = 1e-12
# Attempts at a factorisation in one iteration, each with more damping.
_ATTEMPTS = 6


@dataclass(frozen=True, eq=False)
class _TrustState(State):
    at: Evaluation
    damping: Tensor  # (batch,)


@dataclass(frozen=True)
class TrustRegion(Iterative):
    """Damped Newton steps, (H + tD) d = -g, projected onto the bounds.

    The damping t >= 0 plays the part of the radius: it grows until the matrix is positive
    definite and the step makes the objective decrease as predicted, and shrinks afterwards. D
    holds the largest entry of each row of H, so that units do not matter. Variables that a bound
    holds back take no part (Bertsekas 1982, "Projected Newton methods").
    """

    name: ClassVar[str] = "TrustRegion"
    takes_constraints: ClassVar[bool] = False

    def begin(self, program: NonlinearProgram, start: Tensor) -> _TrustState:
        lower, upper = bounds(program, start)
        x = torch.minimum(torch.maximum(start, lower), upper)
        at = evaluate(program, x, x.new_ones(len(x), 1))
        zero = torch.zeros(len(x), dtype=torch.long, device=x.device)
        outcome = torch.where(at.finite, RUNNING, int(Status.NUMERICAL_ERROR))
        return self._judge(program, _TrustState(x, outcome, zero, at, x.new_zeros(len(x))))

    def step(self, program: NonlinearProgram, state: _TrustState) -> _TrustState:
        lower, upper = bounds(program, state.x)
        at = state.at
        damping, step = damped_step(
            full(at.hessian),
            at.gradient,
            ~held_back(state.x, state.at.gradient, lower, upper),
            state,
        )
        x = torch.minimum(torch.maximum(state.x + step, lower), upper)
        move = x - state.x
        curvature = (move * along(at.hessian, move)).sum(1)
        predicted = -(at.gradient * move).sum(1) - curvature / 2
        new = evaluate(program, x, x.new_ones(len(x), 1))
        ratio = (at.objective - new.objective) / predicted
        noise = 256 * torch.finfo(x.dtype).eps * at.objective.abs()
        better = new.gradient.abs().amax(1) < at.gradient.abs().amax(1)
        taken = (ratio >= _ENOUGH) & (predicted > 0)
        taken |= (predicted.abs() <= noise) & better & ((new.objective - at.objective) <= noise)
        taken &= new.finite
        smaller = torch.where(ratio > 0.7, damping / 5, damping)
        smaller = torch.where(smaller < _LEAST, 0.0, smaller)
        larger = torch.clamp(damping * 8, min=1e-3)
        moved = replace(state, x=x, at=new).where(taken, state)
        moved = replace(
            moved,
            damping=torch.where(taken, smaller, larger),
            iterations=state.iterations + 1,
        )
        return self._judge(program, moved)

    def _judge(self, program: NonlinearProgram, state: _TrustState) -> _TrustState:
        """The state with the outcome of elements that are finished."""
        lower, upper = bounds(program, state.x)
        gradient = state.at.gradient.masked_fill(
            held_back(state.x, state.at.gradient, lower, upper), 0.0
        )
        size = row_largest(scale(state.at.hessian, columns=1 + state.x.abs()))
        size = torch.maximum(size, _FLAT * size.amax(1, keepdim=True))
        done = (gradient.abs() <= self.tol * size).all(1)
        away = state.at.objective < -1e18
        away |= (state.x.abs().amax(1) > 1e15) & (state.at.objective < 0)
        stuck = state.damping > _MOST
        outcome = torch.where(stuck, int(Status.INACCURATE), state.outcome)
        outcome = torch.where(away, int(Status.UNBOUNDED), outcome)
        outcome = torch.where(done, int(Status.OPTIMAL), outcome)
        running = state.outcome == RUNNING
        return replace(state, outcome=torch.where(running, outcome, state.outcome))

    def answer(
        self, program: NonlinearProgram, state: _TrustState, status: Tensor
    ) -> MinimizerAnswer:
        return bounded_answer(program, state, state.at.gradient, status)


def damped_step(
    hessian: Tensor, gradient: Tensor, free: Tensor, state: _TrustState
) -> tuple[Tensor, Tensor]:
    """Enough damping, and -(H + tD)^-1 g of the free variables."""
    mask = free.to(hessian.dtype)
    diagonal = row_sizes(hessian, gradient, state.x) * mask + (1 - mask)
    matrix = hessian * mask[:, :, None] * mask[:, None, :] + torch.diag_embed(1 - mask)
    damping, factors = damped_factors(FullCondensed(matrix), lambda: diagonal, state.damping)
    return damping, factors.solve(-gradient * mask)


def row_sizes(hessian: Matrix, gradient: Tensor, x: Tensor) -> Tensor:
    """Units of curvature of the variables, shape (batch, n), positive."""
    rows = row_largest(hessian)
    slope = gradient.abs().amax(1, keepdim=True) / (1 + x.abs().amax(1, keepdim=True))
    tiny = torch.finfo(x.dtype).tiny ** 0.5
    return torch.maximum(rows, 1e-4 * torch.maximum(rows.amax(1, keepdim=True), slope) + tiny)
