"""What a problem of the nonconvex collection is."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import cvxpy as cp
import numpy as np

Built = tuple[cp.Problem, list[cp.Parameter], list[cp.Variable]]
Arrays = tuple[np.ndarray, ...]


@dataclass(frozen=True)
class NonconvexProblem:
    """A problem in CVXPY's words, values of its parameters, and what must come out.

    Attributes
    ----------
    name : str
    statement : callable
        Returns a fresh (problem, parameters, variables).
    data : tuple of array
        Values of the parameters.
    start : tuple of array
        Values of the variables from which a descent method finds the intended minimum.
    optimum : float
        Optimal value at `data`, from the literature or a formula.
    answer : callable or None
        From values of the parameters to the solution, where a formula or a route without an
        optimisation solver is known; it follows the branch of the intended minimum.
    unique : bool
        Whether no other global minimum exists. Elsewhere `start` selects one.
    regular : bool
        Whether the solution has a derivative with respect to the parameters.
    independent : bool
        Whether the gradients of the active constraints are linearly independent.
    convex : bool
        Whether CVXPY's rules find the problem convex (`is_dcp`).
    dnlp : bool
        Whether CVXPY's rules admit it as a nonlinear program (`is_dnlp`).
    note : str
        What is particular about it.
    """

    name: str
    statement: Callable[[], Built] = field(repr=False)
    data: Arrays = field(repr=False)
    start: Arrays = field(repr=False)
    optimum: float
    answer: Callable[..., Sequence[Any]] | None = field(default=None, repr=False)
    unique: bool = True
    regular: bool = True
    independent: bool = True
    convex: bool = False
    dnlp: bool = True
    note: str = ""

    def build(self) -> Built:
        """A fresh (problem, parameters, variables), the variables set to the start."""
        problem, parameters, variables = self.statement()
        for variable, value in zip(variables, self.start, strict=True):
            variable.value = value
        return problem, parameters, variables

    def values(self) -> list[np.ndarray]:
        """Values of the parameters, free to be changed."""
        return [value.copy() for value in self.data]

    @property
    def solution(self) -> list[np.ndarray]:
        """The intended minimum, accurate to rounding."""
        if self.answer is None:
            return arrays(_recorded()[self.name])
        return arrays(self.answer(*self.values()))

    def solved(self) -> Built:
        """Like `build`, with parameters and variables at `data` and `solution`."""
        problem, parameters, variables = self.build()
        assign(parameters, self.values())
        assign(variables, self.solution)
        return problem, parameters, variables


class Collector(list[NonconvexProblem]):
    """A list that problems are put on by a decorator of their statements."""

    def add(
        self, data: Sequence[Any], start: Sequence[Any], optimum: float, **known: Any
    ) -> Callable[[Callable[[], Built]], Callable[[], Built]]:
        """Arguments as the attributes of `NonconvexProblem`; named after the statement."""

        def register(statement: Callable[[], Built]) -> Callable[[], Built]:
            name = known.pop("name", statement.__name__)
            given = tuple(arrays(data)), tuple(arrays(start)), float(optimum)
            self.append(NonconvexProblem(name, statement, *given, **known))
            return statement

        return register


def arrays(values: Sequence[Any]) -> list[np.ndarray]:
    """Fresh float64 arrays."""
    return [np.array(value, dtype=np.float64) for value in values]


def assign(leaves: Sequence[cp.Parameter | cp.Variable], values: Sequence[np.ndarray]) -> None:
    """Give parameters or variables their values, without the projection that `value` checks."""
    for leaf, value in zip(leaves, values, strict=True):
        leaf.save_value(np.reshape(value, leaf.shape))


@cache
def _recorded() -> dict[str, list[Any]]:
    """Solutions without a formula: by interior-point runs, then Newton's method to rounding."""
    return json.loads((Path(__file__).parent / "solutions.json").read_text())
