"""Values of computed parameters."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import cvxpy as cp
import torch
from torch import Tensor

from declarative_cvx.nonconvex.translation.expression import translate_expressions
from declarative_cvx.nonconvex.translation.over_batch import over_batch
from declarative_cvx.parameters import Arguments, ParameterSpec, check_values
from declarative_cvx.rewriting import ComputedParameter


class ComputedValues:
    """Expressions of parameters as torch functions, differentiable any number of times.

    Parameters
    ----------
    parameters : sequence of cvxpy.Parameter
        In the order in which values are passed.
    computed : sequence of ComputedParameter

    Raises
    ------
    SpecificationError
        If an atom has no translation.
    """

    def __init__(
        self, parameters: Sequence[cp.Parameter], computed: Sequence[ComputedParameter]
    ) -> None:
        self._source = (tuple(parameters), tuple(computed))
        self._symmetric = [ParameterSpec.of(p).symmetric for p in parameters]
        self._specs = [_Spec(c.parameter.name(), c.parameter.shape, c.claims) for c in computed]
        needs = [{p.id for p in c.expression.parameters()} for c in computed]
        self._needs = [[p.id in ids for p in parameters] for ids in needs]
        self._functions: dict[tuple[int, ...], Callable[..., tuple[Tensor, ...]]] = {}
        self._function(tuple(range(len(computed))))

    def appended(self, arguments: Arguments) -> Arguments:
        """The arguments of a call with the computed ones after the others.

        What depends on no batched parameter is computed once for the whole batch.

        Raises
        ------
        ParameterError
            If a value is not finite, or not of the sign or definiteness that it should have.
        """
        batched = tuple(
            any(
                need and is_batched
                for need, is_batched in zip(needs, arguments.batched, strict=True)
            )
            for needs in self._needs
        )
        values: list[Any] = [None] * len(batched)
        for kind in (False, True):
            places = tuple(place for place, own in enumerate(batched) if own is kind)
            found = self._evaluate(places, arguments, kind) if places else ()
            for place, value in zip(places, found, strict=True):
                values[place] = value
        check_values(self._specs, values)
        return replace(
            arguments,
            values=(*arguments.values, *values),
            batched=(*arguments.batched, *batched),
        )

    def _evaluate(
        self, places: tuple[int, ...], arguments: Arguments, batched: bool
    ) -> Sequence[Tensor]:
        given = [
            value if is_batched else value[None]
            for value, is_batched in zip(arguments.values, arguments.batched, strict=True)
        ]
        given = [
            (value + value.mT) / 2 if symmetric else value
            for value, symmetric in zip(given, self._symmetric, strict=True)
        ]
        needed = [
            value.to(torch.float64) for at, value in enumerate(given) if self._any(places, at)
        ]
        if not batched:
            return [value[0] for value in over_batch(self._function(places), needed, 1)]
        assert arguments.batch is not None
        return over_batch(self._function(places), needed, arguments.batch)

    def _any(self, places: tuple[int, ...], parameter: int) -> bool:
        return any(self._needs[place][parameter] for place in places)

    def _function(self, places: tuple[int, ...]) -> Callable[..., tuple[Tensor, ...]]:
        """The computed parameters at some places, for one element's values of what they need."""
        if places not in self._functions:
            parameters, computed = self._source
            chosen = [computed[place] for place in places]
            program = translate_expressions(
                [c.expression for c in chosen], [f"`{c.parameter.name()}`" for c in chosen]
            )
            ids = [p.id for at, p in enumerate(parameters) if self._any(places, at)]
            self._functions[places] = lambda *values: program(dict(zip(ids, values, strict=True)))
        return self._functions[places]

    def __deepcopy__(self, memo: Any) -> ComputedValues:
        return self  # nothing in it changes, and CVXPY gives copies of its leaves new ids

    def __getstate__(self) -> Any:
        return self._source

    def __setstate__(self, state: Any) -> None:
        self.__init__(*state)  # type: ignore[misc]


class _Spec(ParameterSpec):
    """What has to hold of a computed parameter."""

    def _where(self, position: int) -> str:
        return f"`{self.name}` (computed from parameters)"
