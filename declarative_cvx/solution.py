"""The answer to a batch of problems, and everything that is known about it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from declarative_cvx.derivative import DerivativeReport
from declarative_cvx.residuals import Residuals
from declarative_cvx.status import Status


@dataclass(frozen=True, eq=False)
class Attempt:
    """One solver's work on some elements of a batch.

    Attributes
    ----------
    backend : str
        Name of the solver.
    elements : tuple of int
        Elements it was given.
    status : tuple of Status
        Their statuses, as verified by the library.
    said : tuple of str
        The solver's own words.
    iterations : tuple of int
    seconds : float
        Wall-clock time of the whole attempt.
    """

    backend: str
    elements: tuple[int, ...]
    status: tuple[Status, ...]
    said: tuple[str, ...]
    iterations: tuple[int, ...]
    seconds: float


@dataclass(frozen=True, eq=False)
class ConeSolution:
    """Points x, s and duals y of a batch of cone programs, verified.

    Attributes
    ----------
    x : Tensor, shape (batch, n)
    y, s : Tensor, shape (batch, m)
        For an element that is INFEASIBLE y is the certificate, for an UNBOUNDED one x is.
    status : Tensor of int64, shape (batch,)
    source : Tensor of int64, shape (batch,)
        Which of the attempts gave each element its answer.
    residuals : Residuals
    attempts : tuple of Attempt
        What was tried, in order.
    """

    x: Tensor
    y: Tensor
    s: Tensor
    status: Tensor
    source: Tensor
    residuals: Residuals
    attempts: tuple[Attempt, ...]

    def attempt_of(self, element: int) -> tuple[Attempt, int]:
        """The attempt that gave an element its answer, and the element's place in it."""
        attempt = self.attempts[int(self.source[element])]
        return attempt, attempt.elements.index(element)

    @property
    def solved(self) -> Tensor:
        """Whether each element has a verified solution, bool, shape (batch,)."""
        return self.status == int(Status.OPTIMAL)

    def merge(self, other: ConeSolution, index: Tensor, better: Tensor) -> ConeSolution:
        """This solution after another attempt.

        Parameters
        ----------
        other : ConeSolution
            Of some elements.
        index : Tensor of int64
            Their places in this solution.
        better : Tensor of int64
            Which of them are taken from `other`.
        """
        at = index[better]
        return replace(
            self,
            x=self.x.index_copy(0, at, other.x[better]),
            y=self.y.index_copy(0, at, other.y[better]),
            s=self.s.index_copy(0, at, other.s[better]),
            status=self.status.index_copy(0, at, other.status[better]),
            source=self.source.index_fill(0, at, len(self.attempts)),
            residuals=self.residuals.merge(other.residuals.select(better), at),
            attempts=self.attempts + other.attempts,
        )


@dataclass(frozen=True, eq=False)
class Solution:
    """What `DeclarativeLayer.solve` returns: values, duals and a report per batch element.

    Index it with any variable of the problem, or any constraint's dual variable, to get that
    value: ``solution[x]``, ``solution[constraint.dual_variables[0]]``.

    Attributes
    ----------
    variables : tuple of Tensor
        The outputs asked for in ``variables=``, shaped as the layer returns them.
    value : Tensor, shape (batch,)
        Optimal value of the problem; () for an unbatched call.
    status : tuple of Status, one per element
    residuals : Residuals
        Primal, dual, gap and cone residual, each of shape (batch,).
    backend : tuple of str
        The solver whose answer each element has.
    iterations : tuple of int
        That solver's iterations.
    seconds : float
        Wall-clock time of all attempts.
    derivative : DerivativeReport
        Whether the outputs have a derivative with respect to the parameters, and how accurately
        the adjoint system is solved: from the last backward pass, or, before there is one,
        from a probe when it is asked for.
    cone : ConeSolution
        The solution of the cone program that the problem was turned into.
    """

    variables: tuple[Tensor, ...]
    value: Tensor
    cone: ConeSolution
    _recover: Callable[[int], Tensor]
    _assess: Callable[[], DerivativeReport]

    def __getitem__(self, variable: object) -> Tensor:
        return self._recover(variable.id)  # type: ignore[attr-defined]

    @property
    def status(self) -> tuple[Status, ...]:
        return tuple(Status(code) for code in self.cone.status.tolist())

    @property
    def derivative(self) -> DerivativeReport:
        return self._assess()

    @property
    def residuals(self) -> Residuals:
        return self.cone.residuals

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

    def __repr__(self) -> str:
        names = [status.name for status in self.status]
        counts = ", ".join(f"{names.count(name)} {name}" for name in sorted(set(names)))
        worst = self.residuals.worst[self.cone.solved]
        residual = f", largest residual {worst.max():.1e}" if worst.numel() else ""
        solvers = ", ".join(sorted(set(self.backend)))
        return f"Solution({counts}{residual}, by {solvers}, {self.seconds:.3g} s)"


def describe_failures(solution: ConeSolution, limit: int = 10) -> str:
    """The failed elements, each with its status, solver and residual, then what to do."""
    failed = torch.nonzero(~solution.solved)[:, 0].tolist()
    texts = [_describe(solution, element) for element in failed[:limit]]
    more = f"; and {len(failed) - limit} more" if len(failed) > limit else ""
    advice = dict.fromkeys(Status(int(solution.status[element])) for element in failed)
    return (
        f"{len(failed)} of {len(solution.status)} problems were not solved. "
        + "; ".join(texts) + more + ".\n  "
        + "\n  ".join(f"{status.name}: {status.advice}" for status in advice)
        + '\n  To go on without them use on_failure="nan" and read layer.solve(...).status.'
    )  # fmt: skip


def _describe(solution: ConeSolution, element: int) -> str:
    attempt, at = solution.attempt_of(element)
    status = Status(int(solution.status[element]))
    text = f"element {element}: {status.name} by {attempt.backend} ({attempt.said[at]!r}, "
    text += f"{attempt.iterations[at]} iterations"
    if not status.final:
        found = solution.residuals
        text += (
            f", residuals: primal {found.primal[element]:.1e}, dual {found.dual[element]:.1e}, "
            f"gap {found.gap[element]:.1e}, cone {found.cone[element]:.1e}"
        )
    return text + ")"
