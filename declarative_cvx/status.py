"""What happened to one element of a batch, and what to do about it."""

from __future__ import annotations

from enum import IntEnum


class Status(IntEnum):
    """Outcome of solving one element.

    ``OPTIMAL``, ``INFEASIBLE`` and ``UNBOUNDED`` are verified by the library from the
    numbers that the solver returned (residuals, certificates), not taken on trust.
    """

    OPTIMAL = 0
    INFEASIBLE = 1
    UNBOUNDED = 2
    INACCURATE = 3
    ITERATION_LIMIT = 4
    TIME_LIMIT = 5
    NUMERICAL_ERROR = 6

    @property
    def solved(self) -> bool:
        """Whether the element has a verified solution."""
        return self is Status.OPTIMAL

    @property
    def final(self) -> bool:
        """Whether another solver could not say anything better."""
        return self in (Status.OPTIMAL, Status.INFEASIBLE, Status.UNBOUNDED)

    @property
    def advice(self) -> str:
        """One sentence on what the status means and what to try."""
        return _ADVICE[self]


_ADVICE = {
    Status.OPTIMAL: "The optimality conditions hold to the tolerance asked for.",
    Status.INFEASIBLE: (
        "A certificate shows that no point satisfies the constraints; check the parameter values."
    ),
    Status.UNBOUNDED: (
        "A certificate shows a direction of unbounded improvement; bound the variables or check "
        "the parameter values."
    ),
    Status.INACCURATE: (
        "The solver's answer does not satisfy the optimality conditions (or its certificate the "
        "alternative) to the tolerance asked for; tighten the solver's tolerance or try another "
        "solver."
    ),
    Status.ITERATION_LIMIT: (
        "The solver reached its maximum number of iterations; raise it or try another solver."
    ),
    Status.TIME_LIMIT: "The solver reached its time limit; raise it or try another solver.",
    Status.NUMERICAL_ERROR: (
        "The solver stopped with numerical difficulties; rescale the data or try another solver."
    ),
}
