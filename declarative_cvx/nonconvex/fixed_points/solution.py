"""Fixed points of a batch, and what is known of each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from declarative_cvx.errors import SolveError
from declarative_cvx.status import Status

KINK = (
    "the activation has a kink where the state lies, so that the derivatives on its two sides "
    "differ; one of them is returned"
)
SINGULAR = (
    "the linear system of the derivative is singular (or was not solved to the tolerance); its "
    "least-squares solution is returned"
)
_ADVICE = {
    Status.ITERATION_LIMIT: (
        "No fixed point was reached: raise max_iters, or see whether there is one "
        "(`is_well_posed`, a norm of A below 1)."
    ),
    Status.NUMERICAL_ERROR: (
        "The iterates overflowed: there may be no fixed point (`is_well_posed`, a norm of A below "
        "1); or rescale the data."
    ),
}


@dataclass(frozen=True, eq=False)
class FixedPointSolution:
    """Solutions of x = f(x), with a report per element.

    Attributes
    ----------
    x : Tensor, shape (..., n)
        Differentiable. NaN, with zero gradient, for elements that were not solved.
    residual : Tensor, shape (...)
        ||x - f(x)|| relative to the size of the terms of f(x), in the max norm. If ||f(x) - f(x')||
        <= kappa ||x - x'|| in this norm, the error is at most 1 / (1 - kappa) times that.
    iterations : Tensor of int64, shape (...)
        Evaluations of f; each Newton step counts as one more.
    """

    x: Tensor
    residual: Tensor
    iterations: Tensor
    _tol: float
    _kinked: Callable[[], Tensor]

    @property
    def codes(self) -> Tensor:
        """Codes of `Status`, int64, shape (...)."""
        unsolved = torch.where(
            self.residual.isfinite(), int(Status.ITERATION_LIMIT), int(Status.NUMERICAL_ERROR)
        )
        return torch.where(self.solved, int(Status.OPTIMAL), unsolved)

    @property
    def status(self) -> tuple[Status, ...]:
        """What happened to each element, of the batch made flat."""
        return tuple(Status(code) for code in self.codes.flatten().tolist())

    @property
    def solved(self) -> Tensor:
        """Whether each element's fixed point was verified, bool, shape (...)."""
        return self.residual <= self._tol

    @property
    def regular(self) -> Tensor:
        """Whether x is differentiable there, bool, shape (...).

        Of implicit models by the kinks of their activations, of other functions by whether the
        linear system of the derivative is singular.
        """
        return self.solved & ~self._kinked().reshape(self.residual.shape)

    def require_solved(self) -> Self:
        """This, if every element has a solution.

        Raises
        ------
        SolveError
            Naming the elements.
        """
        if not bool(self.solved.all()):
            raise SolveError(self.describe_failures())
        return self

    def describe_failures(self) -> str:
        """The failed elements, each with what is known of it, then what to do."""
        status, failed = self.status, torch.nonzero(~self.solved.flatten())[:, 0].tolist()
        iterations, residual = self.iterations.flatten(), self.residual.flatten()
        listed = "; ".join(
            f"element {i}: {status[i].name} ({int(iterations[i])} iterations, residual "
            f"{float(residual[i]):.1e})"
            for i in failed[:10]
        )
        advice = dict.fromkeys(status[i] for i in failed)
        return (
            f"{len(failed)} of {len(status)} fixed points were not found. {listed}"
            f"{'; ...' if len(failed) > 10 else '.'}\n  "
            + "\n  ".join(f"{s.name}: {_ADVICE.get(s, s.advice)}" for s in advice)
            + '\n  To go on without them use on_failure="nan" or solve(...).'
        )

    def __repr__(self) -> str:
        names = [status.name for status in self.status]
        counts = ", ".join(f"{names.count(name)} {name}" for name in sorted(set(names)))
        worst = self.residual[self.solved]
        largest = f", largest residual {float(worst.max()):.1e}" if worst.numel() else ""
        return f"{type(self).__name__}({counts}{largest})"
