"""The limited-memory BFGS method, for many variables with bounds only."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from declarative_cvx.nonconvex.minimization.evaluation import evaluate
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

# Share of the decrease that the slope promises which a step has to achieve.
_ENOUGH = 1e-4
# Curvature of a step, relative to its length and the change of slope, for it to be remembered.
_CURVED = 1e-10
# Shortest share of a step that is tried.
_SHORTEST = 1e-14


@dataclass(frozen=True, eq=False)
class _Quasi(State):
    value: Tensor  # (batch,)
    gradient: Tensor  # (batch, n)
    steps: Tensor  # (batch, memory, n), the latest last
    changes: Tensor  # (batch, memory, n), of the gradient
    shrink: Tensor  # (batch,), share of the step to try


@dataclass(frozen=True)
class LBFGS(Iterative):
    """Quasi-Newton steps from the latest changes of the gradient, projected onto the bounds.

    Memory and time per iteration are linear in the number of variables. Variables that a bound
    holds back take no part; a step is shortened until it decreases the objective.

    Parameters
    ----------
    memory : int
        Number of steps that are remembered.
    """

    name: ClassVar[str] = "LBFGS"
    takes_constraints: ClassVar[bool] = False
    tol: float = 1e-7
    max_iters: int = 5000
    memory: int = 12

    def begin(self, program: NonlinearProgram, start: Tensor) -> _Quasi:
        lower, upper = bounds(program, start)
        x = torch.minimum(torch.maximum(start, lower), upper)
        at = evaluate(program, x)
        zero = torch.zeros(len(x), dtype=torch.long, device=x.device)
        outcome = torch.where(at.finite, RUNNING, int(Status.NUMERICAL_ERROR))
        past = x.new_zeros(len(x), self.memory, x.shape[1])
        one = x.new_ones(len(x))
        state = _Quasi(x, outcome, zero, at.objective, at.gradient, past, past, one)
        return self._judge(program, state, one)

    def step(self, program: NonlinearProgram, state: _Quasi) -> _Quasi:
        lower, upper = bounds(program, state.x)
        free = ~held_back(state.x, state.gradient, lower, upper)
        direction = self._direction(state, free) * state.shrink[:, None]
        x = torch.minimum(torch.maximum(state.x + direction, lower), upper)
        at = evaluate(program, x)
        move, change = x - state.x, at.gradient - state.gradient
        promised = (state.gradient * move).sum(1)
        noise = 4 * torch.finfo(x.dtype).eps * state.value.abs()
        flat = (promised.abs() <= noise) & ((at.gradient * move).sum(1).abs() <= promised.abs())
        taken = at.objective <= state.value + _ENOUGH * promised
        taken |= flat & (at.objective <= state.value + noise)
        taken &= at.finite & (promised < 0)
        excess = 2 * (at.objective - state.value - promised)
        shorter = (-promised / excess).clamp(0.1, 0.5).nan_to_num(0.1) * state.shrink
        bent = (move * change).sum(1) > 0
        steps, changes = _remember(state, move, change, taken)
        result = replace(state, x=x, value=at.objective, gradient=at.gradient)
        result = replace(
            result.where(taken, state),
            steps=steps,
            changes=changes,
            shrink=torch.where(taken, torch.where(bent, 1.0, 2 * state.shrink), shorter),
            iterations=state.iterations + 1,
        )
        return self._judge(program, result, _curvature(result))

    def _direction(self, state: _Quasi, free: Tensor) -> Tensor:
        """Minus the inverse Hessian's estimate times the gradient of the free variables."""
        mask = free.to(state.x)
        steps, changes = state.steps * mask[:, None], state.changes * mask[:, None]
        products = (steps * changes).sum(2)
        weights = torch.where(products > 0, 1 / products, 0.0)
        q, shares = state.gradient * mask, []
        for i in reversed(range(self.memory)):
            share = weights[:, i] * (steps[:, i] * q).sum(1)
            q = q - share[:, None] * changes[:, i]
            shares.append(share)
        q = q / _curvature(state)[:, None]
        for i, share in enumerate(reversed(shares)):
            back = weights[:, i] * (changes[:, i] * q).sum(1)
            q = q + (share - back)[:, None] * steps[:, i]
        return -q

    def _judge(self, program: NonlinearProgram, state: _Quasi, curvature: Tensor) -> _Quasi:
        lower, upper = bounds(program, state.x)
        held = held_back(state.x, state.gradient, lower, upper)
        slope = state.gradient.masked_fill(held, 0.0).abs()
        size = self.tol * curvature[:, None] * (1 + state.x.abs())
        away = (state.value < -1e18) | ((state.x.abs().amax(1) > 1e15) & (state.value < 0))
        outcome = torch.where(state.shrink < _SHORTEST, int(Status.INACCURATE), state.outcome)
        outcome = torch.where(away, int(Status.UNBOUNDED), outcome)
        outcome = torch.where((slope <= size).all(1), int(Status.OPTIMAL), outcome)
        return replace(state, outcome=torch.where(state.outcome == RUNNING, outcome, state.outcome))

    def answer(self, program: NonlinearProgram, state: _Quasi, status: Tensor) -> MinimizerAnswer:
        return bounded_answer(program, state, state.gradient, status)


def _curvature(state: _Quasi) -> Tensor:
    """Of the last step; at first, what makes a gradient step have length one."""
    step, change = state.steps[:, -1], state.changes[:, -1]
    product = (step * change).sum(1)
    first = torch.linalg.vector_norm(state.gradient, dim=1).clamp(min=1e-300)
    return torch.where(product > 0, (change * change).sum(1) / product, first)


def _remember(state: _Quasi, move: Tensor, change: Tensor, taken: Tensor) -> tuple[Tensor, Tensor]:
    """The memory with a step appended, where it was taken and has positive curvature."""
    length = torch.linalg.vector_norm(move, dim=1) * torch.linalg.vector_norm(change, dim=1)
    keep = (taken & ((move * change).sum(1) > _CURVED * length))[:, None, None]
    steps = torch.cat([state.steps[:, 1:], move[:, None]], 1)
    changes = torch.cat([state.changes[:, 1:], change[:, None]], 1)
    return torch.where(keep, steps, state.steps), torch.where(keep, changes, state.changes)
