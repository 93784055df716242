"""Problems of every kind whose exact solution and gradient are known without the library.

`PROBLEMS` holds all of them, `FAST` those that a test run can afford.
"""

from __future__ import annotations

from collection import (
    degenerate,
    exponential,
    geometric,
    hard,
    known,
    linear,
    power,
    quadratic,
    second_order,
    semidefinite,
)
from collection.measure import Measurement, measure
from collection.problem import Problem

GROUPS = ("LP", "QP", "SOCP", "SDP", "exp", "power", "GP", "mixed", "degenerate")
_MODULES = (
    linear,
    quadratic,
    second_order,
    semidefinite,
    exponential,
    geometric,
    power,
    known,
    hard,
    degenerate,
)
PROBLEMS: tuple[Problem, ...] = tuple(
    sorted((p for m in _MODULES for p in m.PROBLEMS), key=lambda p: GROUPS.index(p.group))
)
SLOW = tuple(problem for problem in PROBLEMS if problem.slow)
FAST = tuple(problem for problem in PROBLEMS if not problem.slow)

__all__ = ["FAST", "GROUPS", "PROBLEMS", "SLOW", "Measurement", "Problem", "measure"]
