"""The answer to a batch of problems, and everything that is known about it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import Tensor

from declarative_cvx.cone_solution import ConeSolution, describe_failures
from declarative_cvx.derivative import DerivativeReport
from declarative_cvx.residuals import Residuals
from declarative_cvx.status import Status


@dataclass(frozen=True, eq=False)
class Solution(ABC):
    """What `DeclarativeLayer.solve` returns: values, duals and a report per batch element.

    Index it with any variable of the problem, or any constraint's dual variable, to get that
    value: ``solution[x]``, ``solution[constraint.dual_variables[0]]``; for a `TorchProblem` with a
    name: ``solution["x"]``, ``solution["equality"]``.

    Attributes
    ----------
    variables : tuple of Tensor
        The outputs asked for in ``variables=``, shaped as the layer returns them.
    """

    variables: tuple[Tensor, ...]
    _recover: Callable[[Any], Tensor]
    _evaluate: Callable[[], Tensor]

    def __getitem__(self, variable: object) -> Tensor:
        return self._recover(getattr(variable, "id", variable))

    @cached_property
    def value(self) -> Tensor:
        """Optimal value of the problem, shape (batch,); () for an unbatched call."""
        return self._evaluate()

    @property
    @abstractmethod
    def codes(self) -> Tensor:
        """Codes of `Status`, int64, shape (batch,)."""

    @property
    def status(self) -> tuple[Status, ...]:
        """What happened to each element."""
        return tuple(Status(code) for code in self.codes.tolist())

    @property
    def solved(self) -> Tensor:
        """Whether each element has a verified solution, bool, shape (batch,)."""
        return self.codes == int(Status.OPTIMAL)

    @property
    def all_solved(self) -> bool:
        """Whether all elements have a verified solution."""
        return bool(self.solved.all())

    @property
    @abstractmethod
    def residuals(self) -> Residuals:
        """Violations of the optimality conditions, each of shape (batch,)."""

    @property
    @abstractmethod
    def derivative(self) -> DerivativeReport:
        """Whether the outputs have a derivative with respect to the parameters.

        For convex problems those parameters that require a gradient, or all if none does. And how
        accurately the adjoint system is solved: from the last backward pass, or, before there is
        one, from a probe when it is asked for.
        """

    @property
    @abstractmethod
    def backend(self) -> tuple[str, ...]:
        """The solver whose answer each element has."""

    @property
    @abstractmethod
    def iterations(self) -> tuple[int, ...]:
        """That solver's iterations, for each element."""

    @property
    @abstractmethod
    def seconds(self) -> float:
        """Wall-clock time of all attempts."""

    @property
    @abstractmethod
    def state(self) -> Any:
        """Where the next call may start from."""

    @abstractmethod
    def describe_failures(self) -> str:
        """The failed elements, each with what is known of it, then what to do."""

    def __repr__(self) -> str:
        names = [status.name for status in self.status]
        counts = ", ".join(f"{names.count(name)} {name}" for name in sorted(set(names)))
        worst = self.residuals.worst[self.solved]
        residual = f", largest residual {worst.max():.1e}" if worst.numel() else ""
        solvers = ", ".join(sorted(set(self.backend)))
        return f"Solution({counts}{residual}, by {solvers}, {self.seconds:.3g} s)"


@dataclass(frozen=True, eq=False, repr=False)
class ConicSolution(Solution):
    """The solution of a convex problem.

    Attributes
    ----------
    cone : ConeSolution
        The solution of the cone program that the problem was turned into; inside of transforms of
        torch.func, of what is left of it once variables are set that equalities fix.
    """

    cone: ConeSolution
    _state: ConeSolution
    _assess: Callable[[], DerivativeReport]

    @property
    def codes(self) -> Tensor:
        return self.cone.status

    @property
    def all_solved(self) -> bool:
        return self.cone.all_solved

    @property
    def residuals(self) -> Residuals:
        return self.cone.residuals

    @property
    def derivative(self) -> DerivativeReport:
        return self._assess()

    @property
    def backend(self) -> tuple[str, ...]:
        names = [attempt.backend for attempt in self.cone.attempts]
        return tuple(names[source] for source in self.cone.source.tolist())

    @property
    def iterations(self) -> tuple[int, ...]:
        return tuple(
            attempt.iterations[at]
            for attempt, at in map(self.cone.attempt_of, range(len(self.cone.status)))
        )

    @property
    def seconds(self) -> float:
        return sum(attempt.seconds for attempt in self.cone.attempts)

    @property
    def state(self) -> ConeSolution:
        return self._state

    def describe_failures(self) -> str:
        return describe_failures(self.cone)
