"""Points to start the solution of nonlinear programs from."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import cvxpy as cp
import numpy as np
import torch
from torch import Tensor

from declarative_cvx.nonconvex.minimization.evaluation import evaluate
from declarative_cvx.nonconvex.minimization.program import NonlinearProgram
from declarative_cvx.nonconvex.translation.domains import DEFINITE
from declarative_cvx.nonconvex.translation.expression import Values, translate_expression
from declarative_cvx.nonconvex.translation.layout import Layout
from declarative_cvx.nonconvex.translation.over_batch import over_batch
from declarative_cvx.nonconvex.translation.smoothing import Auxiliary, Restriction
from declarative_cvx.transforms import transforming


class StartingPoint:
    """Starting values of the vector that a layout describes.

    Parameters
    ----------
    layout : Layout
    unknowns : sequence of cvxpy.Variable
        The problem's own variables.
    restrictions : sequence of Restriction
    auxiliaries : sequence of Auxiliary
    values : callable
        From one vector and one element's parameters to the values of all leaves.
    """

    def __init__(
        self,
        layout: Layout,
        unknowns: Sequence[cp.Variable],
        restrictions: Sequence[Restriction],
        auxiliaries: Sequence[Auxiliary],
        values: Callable[[Tensor, tuple[Tensor, ...]], Values],
    ) -> None:
        self._layout = layout
        self._unknowns = tuple(unknowns)
        self._restrictions = [(r, _mask(r)) for r in restrictions]
        self._auxiliaries = [
            (a, translate_expression(a.start, "a starting value")) for a in auxiliaries
        ]
        self._values = values

    def of(
        self,
        program: NonlinearProgram,
        given: Mapping[int, Tensor],
        generator: torch.Generator | None,
    ) -> Tensor:
        """Starting points, (batch, n); arguments as for `NonlinearForm.start`."""
        assert program.lower is not None
        assert program.upper is not None
        x = middle(program.lower, program.upper).expand(program.batch, -1).clone()
        shift = torch.zeros_like(x[0])
        for variable in self._unknowns:
            at = self._layout.slices[variable.id]
            value = _first_value(variable, program.batch, given, generator)
            if value is None:
                shift[at] = _spread(shift[at].shape[0]).to(x)
            else:
                x[:, at] = over_batch(self._reducer(variable), [value.to(x)], program.batch)
        first = self._repaired(program, x)
        usable = _usable(program, first)
        if not transforming() and usable.all():
            return first
        return torch.where(usable[:, None], first, self._repaired(program, x + shift))

    def at(self, program: NonlinearProgram, given: Mapping[int, Tensor]) -> Tensor:
        """Points where the unknowns have given values; arguments as for `NonlinearForm.at`."""
        assert program.lower is not None
        assert program.upper is not None
        first = self.of(program, given, None)
        x = first.clone()
        for variable in self._unknowns:
            value = given[variable.id].to(x)
            x[:, self._layout.slices[variable.id]] = over_batch(
                self._reducer(variable), [value], program.batch
            )
        arguments = [x, program.lower, program.upper, *program.parameters]
        exact = over_batch(self._place, arguments, program.batch)
        usable = _usable(program, exact)
        return torch.where(usable[:, None], exact, first)

    def _repaired(self, program: NonlinearProgram, x: Tensor) -> Tensor:
        assert program.lower is not None
        assert program.upper is not None
        if not self._restrictions and not self._auxiliaries:
            return torch.clamp(x, program.lower, program.upper)
        arguments = [x, program.lower, program.upper, *program.parameters]
        return over_batch(self._repair, arguments, program.batch)

    def _reducer(self, variable: cp.Variable) -> Callable[[Tensor], Tensor]:
        return lambda value: self._layout.reduce(variable, value)

    def _repair(self, x: Tensor, lower: Tensor, upper: Tensor, *parameters: Tensor) -> Tensor:
        """Move a point into domains and bounds, and auxiliary variables near where they belong."""
        for restriction, mask in self._restrictions:
            value = self._layout.values(x)[restriction.variable.id]
            repaired = restriction.domain.repair(value)
            if mask is not None:
                repaired = torch.where(torch.as_tensor(mask, device=x.device), repaired, value)
            x = self._put(x, restriction.variable, repaired)
        return self._place(x, lower, upper, *parameters, exact=False)

    def _place(
        self, x: Tensor, lower: Tensor, upper: Tensor, *parameters: Tensor, exact: bool = True
    ) -> Tensor:
        """Move a point into bounds, then put auxiliary variables where they belong."""
        x = torch.clamp(x, lower, upper)
        for auxiliary, start in self._auxiliaries:
            value = start(self._values(x, parameters))
            value = auxiliary.exact(value) if exact else auxiliary.repair(value)
            x = torch.clamp(self._put(x, auxiliary.variable, value), lower, upper)
        return x

    def _put(self, x: Tensor, variable: cp.Variable, value: Tensor) -> Tensor:
        at = self._layout.slices[variable.id]
        return torch.cat([x[: at.start], self._layout.reduce(variable, value), x[at.stop :]])


def _usable(program: NonlinearProgram, x: Tensor) -> Tensor:
    """Where all functions and their derivatives are finite, bool, shape (batch,)."""
    if transforming():
        return over_batch(_finite(program), [x, *program.parameters], program.batch)
    return evaluate(program, x).finite


def _finite(program: NonlinearProgram) -> Callable[..., Tensor]:
    """Whether all functions of one element are finite, and their derivatives in a direction."""
    functions = [f for f in (program.objective, program.equality, program.inequality) if f]

    def finite(x: Tensor, *p: Tensor) -> Tensor:
        def rows(x: Tensor) -> Tensor:
            return torch.cat([f(x, p).reshape(-1) for f in functions])

        found = torch.func.jvp(rows, (x,), (1 + _spread(len(x)).to(x),))
        return torch.cat(found).isfinite().all()

    return finite


def _spread(count: int) -> Tensor:
    """Different numbers between 0.5 and 1, by multiples of the golden ratio."""
    numbers = torch.arange(1, count + 1, dtype=torch.float64, device="cpu")
    return 0.5 + numbers * (math.sqrt(5) - 1) / 2 % 1 / 2


def _mask(restriction: Restriction) -> np.ndarray | None:
    """Which entries are restricted; None for all of a matrix."""
    if restriction.domain is DEFINITE:
        return None
    mask = np.zeros(restriction.variable.size, dtype=bool)
    mask[restriction.entries] = True
    return mask.reshape(restriction.variable.shape)


def middle(lower: Tensor, upper: Tensor) -> Tensor:
    """The middle of two bounds, 1 from a single one, and 0 without any."""
    one_sided = torch.where(
        lower.isfinite(), lower + 1, torch.where(upper.isfinite(), upper - 1, 0.0)
    )
    return torch.where(lower.isfinite() & upper.isfinite(), (lower + upper) / 2, one_sided)


def _first_value(
    variable: cp.Variable,
    batch: int,
    given: Mapping[int, Tensor],
    generator: torch.Generator | None,
) -> Tensor | None:
    if variable.id in given:
        return given[variable.id]
    if generator is not None:
        limits = _limits(variable)
        if limits is not None:
            low, high = (torch.from_numpy(_dense(end)) for end in limits)
            shape = (batch, *variable.shape)
            share = torch.rand(shape, generator=generator, dtype=torch.float64, device="cpu")
            return low + (high - low) * share
    value = variable.value
    if value is None and (variable.attributes["PSD"] or variable.attributes["NSD"]):
        value = np.eye(variable.shape[-1]) * (1 if variable.attributes["PSD"] else -1)
    return None if value is None else torch.from_numpy(_dense(value))[None]


def _limits(variable: cp.Variable) -> Sequence[Any] | None:
    """Between which values a variable is drawn at random; None if it is not."""
    if variable.sample_bounds is not None:
        return variable.sample_bounds
    limits = variable.get_bounds()
    finite = all(np.all(np.isfinite(_dense(end))) for end in limits)
    return limits if variable.value is None and finite else None


def _dense(value: Any) -> np.ndarray:
    return np.array(value.toarray() if hasattr(value, "toarray") else value, dtype=float)
