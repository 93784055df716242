"""What every minimiser of nonlinear programs shares: the loop over a batch."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from declarative_cvx.errors import BackendError
from declarative_cvx.nonconvex.minimization.program import NonlinearProgram
from declarative_cvx.nonconvex.minimization.records import Record
from declarative_cvx.status import Status

# Iterations between looks at what is finished, where looking means waiting for the device.
_BLOCK = 8
# Elements below which finished ones are kept along: leaving them out would save nothing.
_FEW = 16
# What a state's `outcome` is while the element is being worked on.
RUNNING = -1


@dataclass(frozen=True, eq=False)
class MinimizerAnswer(Record):
    """What a minimiser found, before anybody has checked it.

    The Lagrangian is L = f + y'h + z'g - z_l'(x - lower) - z_u'(upper - x) with z, z_l, z_u >= 0
    (in the notation of DDN, lambda = -y and -z).

    Attributes
    ----------
    x : Tensor, shape (batch, n)
    equality, inequality : Tensor, shapes (batch, k) and (batch, l)
        Multipliers y and z.
    lower, upper : Tensor, shape (batch, n)
        Multipliers z_l and z_u of the bounds; 0 where there are none.
    status : Tensor of int64, shape (batch,)
        The minimiser's own opinion, codes of `Status`.
    iterations : Tensor of int64, shape (batch,)
    """

    x: Tensor
    equality: Tensor
    inequality: Tensor
    lower: Tensor
    upper: Tensor
    status: Tensor
    iterations: Tensor


@dataclass(frozen=True, eq=False)
class State(Record):
    """Where a minimiser is: subclasses add what it needs.

    Attributes
    ----------
    x : Tensor, shape (batch, n)
    outcome : Tensor of int64, shape (batch,)
        RUNNING, or the `Status` that an element ended with.
    iterations : Tensor of int64, shape (batch,)
    """

    x: Tensor
    outcome: Tensor
    iterations: Tensor


@dataclass(frozen=True)
class Minimizer(ABC):
    """A method that finds local minima of a batch of programs.

    What it answers is polished and verified, so its tolerance need not be tighter than Newton's
    method needs, and multipliers that it does not know may be NaN.
    """

    name: ClassVar[str]
    takes_constraints: ClassVar[bool]

    @abstractmethod
    def solve(self, program: NonlinearProgram, start: Tensor) -> MinimizerAnswer:
        """Minimise each element from its own start, of shape (batch, n)."""

    def alternatives(self) -> tuple[Minimizer, ...]:
        """Others to try, in this order, on elements that this one has not settled."""
        return ()


@dataclass(frozen=True)
class Iterative(Minimizer):
    """A minimiser that works on all elements at once, step by step.

    Every element has its own steps and stops on its own; what the others are does not change its
    answer. Finished elements are frozen, and left out once they are many.

    Parameters
    ----------
    tol : float
        Relative size of the violations of the optimality conditions to stop at.
    max_iters : int

    Attributes
    ----------
    freezes : bool
        Whether `step` itself leaves finished elements as they are.
    """

    freezes: ClassVar[bool] = False
    tol: float = 1e-9
    max_iters: int = 500

    def __post_init__(self) -> None:
        if not 0 < self.tol < 1:
            raise BackendError(f"tol is {self.tol}, but a number between 0 and 1 is expected.")
        if self.max_iters < 1:
            raise BackendError(f"max_iters is {self.max_iters}, but at least 1 is expected.")

    def solve(self, program: NonlinearProgram, start: Tensor) -> MinimizerAnswer:
        if not self.takes_constraints and (program.equality or program.inequality):
            raise BackendError(
                f"{self.name} takes bounds but no other constraints; use InteriorPoint()."
            )
        with torch.no_grad():
            state = self._run(program, self.begin(program, start.detach()))
            limit = int(Status.ITERATION_LIMIT)
            status = torch.where(state.outcome == RUNNING, limit, state.outcome)
            return self.answer(program, state, status)

    def _run(self, program: NonlinearProgram, state: Any) -> Any:
        every = 1 if state.x.device.type == "cpu" else _BLOCK
        whole, at = state, torch.arange(len(state.x), device=state.x.device)
        for iteration in range(self.max_iters):
            if iteration % every == 0:
                running = state.outcome == RUNNING
                count = int(running.sum())
                if not count:
                    break
                if len(running) > _FEW and 2 * count <= len(running):
                    whole, keep = whole.put(at, state), torch.where(running)[0]
                    at, state, program = at[keep], state.select(keep), program.select(keep)
            running = state.outcome == RUNNING
            new = self.step(program, state)
            state = new if self.freezes else new.where(running, state)
        return whole.put(at, state)

    @abstractmethod
    def begin(self, program: NonlinearProgram, start: Tensor) -> Any:
        """The state at the start."""

    @abstractmethod
    def step(self, program: NonlinearProgram, state: Any) -> Any:
        """The state one iteration later (of finished elements anything, unless it `freezes`)."""

    @abstractmethod
    def answer(self, program: NonlinearProgram, state: Any, status: Tensor) -> MinimizerAnswer:
        """What the state says."""


def bounds(program: NonlinearProgram, x: Tensor) -> tuple[Tensor, Tensor]:
    """Lower and upper bounds of every element, infinite where there are none."""
    infinite = x.new_full((1, 1), torch.inf)
    lower = -infinite if program.lower is None else program.lower.detach().to(x)
    upper = infinite if program.upper is None else program.upper.detach().to(x)
    return lower.expand_as(x), upper.expand_as(x)


def held_back(x: Tensor, gradient: Tensor, lower: Tensor, upper: Tensor) -> Tensor:
    """Variables at a bound that the objective pushes against, bool, shape (batch, n)."""
    return ((x <= lower) & (gradient > 0)) | ((x >= upper) & (gradient < 0))


def bounded_answer(
    program: NonlinearProgram, state: State, gradient: Tensor, status: Tensor
) -> MinimizerAnswer:
    """The answer to a problem with bounds only, whose multipliers are the gradient's parts."""
    lower, upper = bounds(program, state.x)
    none = state.x.new_zeros(len(state.x), 0)
    return MinimizerAnswer(
        state.x,
        none,
        none,
        torch.where(state.x <= lower, gradient, 0.0).clamp(min=0.0),
        torch.where(state.x >= upper, -gradient, 0.0).clamp(min=0.0),
        status,
        state.iterations,
    )
