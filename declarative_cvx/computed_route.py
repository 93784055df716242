"""Convex problems whose parameters enter a cone program through functions of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import cvxpy as cp
from torch import Tensor

from declarative_cvx.convex import ConvexRoute
from declarative_cvx.nonconvex.translation.computed_values import ComputedValues
from declarative_cvx.parameters import Arguments
from declarative_cvx.rewriting import Rewriting
from declarative_cvx.solution import ConicSolution


class ComputedRoute(ConvexRoute):
    """A problem that was rewritten: its computed parameters first, then as any convex one.

    Parameters
    ----------
    rewriting : Rewriting
    parameters, variables : sequence
        Of the original problem.
    **options
        As for `ConvexRoute`.
    """

    def __init__(
        self,
        rewriting: Rewriting,
        parameters: Sequence[cp.Parameter],
        variables: Sequence[cp.Variable],
        **options: Any,
    ) -> None:
        self._values = ComputedValues(parameters, rewriting.computed)
        every = [*parameters, *(computed.parameter for computed in rewriting.computed)]
        needed = {parameter.id for parameter in rewriting.parameters}
        self._needed = [at for at, parameter in enumerate(every) if parameter.id in needed]
        used = [every[at] for at in self._needed]
        super().__init__(rewriting.problem, used, variables, **options)

    def solve(
        self, arguments: Arguments, options: Mapping[str, Any] | None, start: Any
    ) -> ConicSolution:
        return super().solve(self._used(arguments), options, start)

    def outputs(self, arguments: Arguments) -> tuple[Tensor, ...] | None:
        return None if self._pass is None else super().outputs(self._used(arguments))

    def _used(self, arguments: Arguments) -> Arguments:
        """The arguments of the rewritten problem."""
        every = self._values.appended(arguments)
        return replace(
            every,
            values=tuple(every.values[at] for at in self._needed),
            batched=tuple(every.batched[at] for at in self._needed),
        )
