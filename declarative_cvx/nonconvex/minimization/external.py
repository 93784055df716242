"""Points that somebody else has found: a user's own solver, or another program."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from declarative_cvx.errors import SpecificationError
from declarative_cvx.nonconvex.minimization.evaluation import equality_count, values
from declarative_cvx.nonconvex.minimization.minimizer import Minimizer, MinimizerAnswer
from declarative_cvx.nonconvex.minimization.program import NonlinearProgram
from declarative_cvx.status import Status

# Of a program and starts (batch, n): points (batch, n), and codes of `Status`, (batch,), or None.
Find = Callable[[NonlinearProgram, Tensor], tuple[Tensor, Tensor | None]]


@dataclass(frozen=True)
class External(Minimizer):
    """A minimiser that asks a function for the answer.

    Only the points are used. Their multipliers are estimated, Newton's method sharpens them, and
    they are verified and differentiated like any other answer (DDN Sec. 4.3). But no other point
    takes the place of one that is no local minimum: Newton's method may move it by
    1e-2 (1 + |x|), not more, and saddle points are not left.

    Parameters
    ----------
    find : callable
        Called once, outside of any graph and transform, with a `NonlinearProgram` (its
        `parameters` are each (batch or 1, ...), in float64) and points to start from, float64,
        shape (batch, n). Returns points x, shape (batch, n), with NaN in elements for which there
        is none, and either None or what it thinks of each element, codes of `Status`, int64,
        shape (batch,). OPTIMAL and INACCURATE are verified; an element with another code is not
        looked at, and keeps it, so INFEASIBLE and UNBOUNDED need a certificate.
    own : int or None
        How many entries of x, from the first on, are the answer; the others, auxiliary variables,
        may be moved at will. None: all of them.
    """

    name: ClassVar[str] = "external"
    takes_constraints: ClassVar[bool] = True
    find: Find
    own: int | None = None

    def solve(self, program: NonlinearProgram, start: Tensor) -> MinimizerAnswer:
        with torch.no_grad():
            x, status = self.find(program, start.detach())
            _check(x, status, start)
            x = x.detach().to(start)
            if status is None:
                status = torch.full_like(x[:, 0], int(Status.OPTIMAL), dtype=torch.long)
            status = status.to(x.device, torch.long)
            lost = ~torch.isfinite(x).all(1) & (status == int(Status.OPTIMAL))
            status = torch.where(lost, int(Status.NUMERICAL_ERROR), status)
            rows = torch.full_like(values(program, start)[:, 1:], torch.nan)
            k, none = equality_count(program), torch.full_like(x, torch.nan)
            return MinimizerAnswer(
                x, rows[:, :k], rows[:, k:], none, none, status, torch.zeros_like(status)
            )


@dataclass(frozen=True)
class InTurn(Minimizer):
    """Minimisers that are tried one after the other, on what those before have not settled.

    Parameters
    ----------
    turns : tuple of Minimizer
        At least one. Their own alternatives are not tried.
    """

    name: ClassVar[str] = "in turn"
    takes_constraints: ClassVar[bool] = True
    turns: tuple[Minimizer, ...]

    def solve(self, program: NonlinearProgram, start: Tensor) -> MinimizerAnswer:
        return self.turns[0].solve(program, start)

    def alternatives(self) -> tuple[Minimizer, ...]:
        return self.turns[1:]


def claimed(answer: MinimizerAnswer) -> Tensor:
    """Elements with a point that is said to be one, bool, shape (batch,)."""
    status = answer.status
    said = (status == int(Status.OPTIMAL)) | (status == int(Status.INACCURATE))
    return said & torch.isfinite(answer.x).all(1)


def _check(x: Tensor, status: Tensor | None, start: Tensor) -> None:
    if not isinstance(x, Tensor) or x.shape != start.shape:
        found = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
        raise SpecificationError(
            f"the solver returns points of shape {found}, but {tuple(start.shape)}, (batch, n), "
            "is expected."
        )
    if status is not None and tuple(status.shape) != (len(start),):
        raise SpecificationError(
            f"the solver returns statuses of shape {tuple(status.shape)}, but ({len(start)},), "
            "one for each element, is expected."
        )
