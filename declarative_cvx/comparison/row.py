"""What was measured of one solver and derivative."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from declarative_cvx.comparison.candidate import Candidate

NAN = math.nan


@dataclass(frozen=True)
class Timing:
    """Seconds of repeated calls.

    Attributes
    ----------
    median, low, high : float
        Of all calls; NaN if there was none.
    calls : int
    """

    median: float
    low: float
    high: float
    calls: int

    @classmethod
    def of(cls, seconds: Sequence[float]) -> Timing:
        if not seconds:
            return cls(NAN, NAN, NAN, 0)
        return cls(statistics.median(seconds), min(seconds), max(seconds), len(seconds))


NEVER = Timing.of(())


@dataclass(frozen=True)
class Row:
    """One solver with one derivative on all elements of the batch.

    Attributes
    ----------
    candidate : Candidate
    failure : str
        Why there are no numbers; empty if there are.
    status : mapping of str to int
        How many elements ended how.
    agrees : bool
        Whether every element's status is that of the reference, where this one is final.
    forward, backward : Timing
    objective : float
        Mean over the elements solved.
    primal, dual, gap, cone : float
        The largest residuals of solved elements.
    solution_error : float
        Largest distance from the reference solution over the elements that both solved, relative
        to the largest entry of the variable in that element.
    gradient_error : float
        Likewise of gradients of the parameters, over elements that have a derivative.
    irregular : int
        Elements that the row's own report calls irregular.
    iterations : float
        Median over the elements.
    memory : float
        Peak over what was in use before, in bytes; NaN where it cannot be measured.
    """

    candidate: Candidate
    failure: str = ""
    status: Mapping[str, int] = field(default_factory=dict)
    agrees: bool = False
    forward: Timing = NEVER
    backward: Timing = NEVER
    objective: float = NAN
    primal: float = NAN
    dual: float = NAN
    gap: float = NAN
    cone: float = NAN
    solution_error: float = NAN
    gradient_error: float = NAN
    irregular: int = 0
    iterations: float = NAN
    memory: float = NAN

    @property
    def solver(self) -> str:
        return self.candidate.label

    @property
    def derivative(self) -> str:
        return self.candidate.derivative

    @property
    def seconds(self) -> float:
        """Forward and backward pass together, medians."""
        return self.forward.median + self.backward.median

    @property
    def error(self) -> float:
        """The larger of the errors of solution and gradient; infinite if the status is wrong."""
        if self.failure or not self.agrees:
            return math.inf
        errors = (self.solution_error, self.gradient_error)
        return max((error for error in errors if not math.isnan(error)), default=0.0)

    def is_right(self, accuracy: float) -> bool:
        """Whether statuses, solutions and gradients are those of the reference."""
        return self.error <= accuracy

    def to_dict(self) -> dict[str, Any]:
        """All numbers, flat, with NaN as None."""
        found: dict[str, Any] = {"solver": self.solver, "derivative": self.derivative}
        found |= {"failure": self.failure, "status": dict(self.status), "agrees": self.agrees}
        for name in ("forward", "backward"):
            timing = getattr(self, name)
            for part in ("median", "low", "high"):
                found[f"{name}_{part}_seconds"] = _plain(getattr(timing, part))
        numbers = "objective primal dual gap cone solution_error gradient_error iterations memory"
        found |= {name: _plain(getattr(self, name)) for name in numbers.split()}
        return found | {"irregular": self.irregular}


def _plain(value: float) -> float | None:
    return None if math.isnan(value) else value
