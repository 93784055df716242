"""The solution of a batch of cone programs, and who found it how."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from declarative_cvx.residuals import Residuals
from declarative_cvx.status import Status


@dataclass(frozen=True, eq=False)
class Attempt:
    """One solver's work on some elements of a batch.

    Attributes
    ----------
    backend : str
        Name of the solver.
    at : Tensor of int64, shape (elements,)
        Elements it was given.
    codes : Tensor of int64, shape (elements,)
        Their statuses, as verified by the library.
    words : sequence of str
        The solver's own words.
    steps : sequence of int
        Its iterations.
    seconds : float
        Wall-clock time of the whole attempt.
    """

    backend: str
    at: Tensor
    codes: Tensor
    words: Sequence[str]
    steps: Sequence[int]
    seconds: float

    @cached_property
    def elements(self) -> tuple[int, ...]:
        """Elements it was given."""
        return tuple(self.at.tolist())

    @cached_property
    def status(self) -> tuple[Status, ...]:
        """Their statuses, as verified by the library."""
        return tuple(Status(code) for code in self.codes.tolist())

    @cached_property
    def said(self) -> tuple[str, ...]:
        """The solver's own words."""
        return tuple(self.words)

    @cached_property
    def iterations(self) -> tuple[int, ...]:
        """The solver's iterations."""
        return tuple(int(count) for count in self.steps)


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

    @cached_property
    def solved(self) -> Tensor:
        """Whether each element has a verified solution, bool, shape (batch,)."""
        return self.status == int(Status.OPTIMAL)

    @cached_property
    def all_solved(self) -> bool:
        """Whether all elements have a verified solution."""
        return bool(self.solved.all())

    def placed(self, x: Tensor, y: Tensor, s: Tensor) -> ConeSolution:
        """The same, of the same points in other terms."""
        other = replace(self, x=x, y=y, s=s)
        other.__dict__["all_solved"] = self.all_solved
        return other

    @property
    def rays(self) -> tuple[Tensor, Tensor] | None:
        """Where x is a direction of unboundedness, and y a certificate; None if nowhere."""
        if self.all_solved:
            return None
        return self.status == int(Status.UNBOUNDED), self.status == int(Status.INFEASIBLE)

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
