"""What a problem of the collection is."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import cvxpy as cp
import numpy as np

Values = tuple[np.ndarray, ...]
Built = tuple[cp.Problem, list[cp.Parameter], list[cp.Variable]]


@dataclass(frozen=True)
class Exact:
    """Outputs of a problem and the gradients of its loss.

    Attributes
    ----------
    outputs : tuple of array
    gradients : tuple of array
        With respect to every parameter. At a kink, those on one side.
    others : tuple of array or None
        At a kink, the gradients on the other side; every mean of the two is valid.
    """

    outputs: Values
    gradients: Values
    others: Values | None = None


Oracle = Callable[[Values, Values], Exact]


@dataclass(frozen=True)
class Problem:
    """A problem, values of its parameters, and an oracle that knows the exact answer.

    Attributes
    ----------
    name : str
    group : str
        One of `collection.GROUPS`.
    build : callable
        Returns a fresh (problem, parameters, variables).
    values : tuple of array
        Of the parameters.
    oracle : callable or None
        From the values and the weights of the loss, one array for each output, to what is exact.
    gp : bool
    regular : bool
        Whether the outputs have a derivative.
    scale : float
        Factor of the loss.
    slow : bool
        Whether test runs leave it out.
    suboptimality : callable or None
        Instead of an oracle, where the solution is not unique: how far outputs are from being a
        solution, from (values, outputs).
    """

    name: str
    group: str
    build: Callable[[], Built]
    values: Values
    oracle: Oracle | None = None
    gp: bool = False
    regular: bool = True
    scale: float = 1.0
    slow: bool = False
    suboptimality: Callable[[Values, Values], float] | None = None

    def rng(self) -> np.random.Generator:
        """Random numbers for the weights of the loss, the same in every run."""
        return np.random.default_rng(zlib.crc32(self.name.encode()))

    def weights(self) -> Values:
        """Weights of the loss, which is the sum of weights times outputs."""
        rng = self.rng()
        _, _, variables = self.build()
        return tuple(self.scale * rng.standard_normal(variable.shape) for variable in variables)

    def __str__(self) -> str:
        return self.name


class Collector(list[Problem]):
    """A list of problems with a decorator that adds to it."""

    def add(
        self, group: str, values: Any, oracle: Oracle | None = None, **known: Any
    ) -> Callable[[Callable[..., Built]], Callable[..., Built]]:
        """Add the decorated builder, under its own name or `name`."""

        def register(build: Callable[..., Built]) -> Callable[..., Built]:
            name = known.pop("name", build.__name__.strip("_"))
            exact = tuple(np.asarray(value, dtype=float) for value in values)
            self.append(Problem(name, group, build, exact, oracle, **known))
            return build

        return register
