"""A `FixedPointProblem` behind the face of `DeclarativeLayer`."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from declarative_cvx.derivative import DerivativeReport
from declarative_cvx.errors import BackendError, SpecificationError, nearest
from declarative_cvx.nonconvex.fixed_points.problem import FixedPointProblem
from declarative_cvx.nonconvex.fixed_points.solution import FixedPointSolution
from declarative_cvx.parameters import Arguments
from declarative_cvx.residuals import Residuals
from declarative_cvx.route import Route, batch_of, check_value, shape_output
from declarative_cvx.solution import Solution

OPTIONS = ("tol", "max_iters", "method")


@dataclass(frozen=True, eq=False, repr=False)
class FixedPointRouteSolution(Solution):
    """The solution of x = f(x, ...); its value is zero, as nothing is minimised.

    Attributes
    ----------
    fixed_point : FixedPointSolution
    """

    fixed_point: FixedPointSolution
    _seconds: float

    @property
    def codes(self) -> Tensor:
        return self.fixed_point.codes

    @property
    def residuals(self) -> Residuals:
        """The residual of the equation, as the primal one."""
        found = self.fixed_point.residual
        none = torch.zeros_like(found)
        return Residuals(primal=found, dual=none, gap=none, cone=none)

    @property
    def derivative(self) -> DerivativeReport:
        """Whether the linear system of the derivative is singular; kinks are not looked for."""
        found = self.fixed_point
        no = torch.zeros_like(found.solved)
        residual = torch.where(found.regular, torch.zeros_like(found.residual), torch.inf)
        return DerivativeReport(torch.where(found.solved, residual, torch.nan), no, no)

    @property
    def backend(self) -> tuple[str, ...]:
        return ("fixed point",) * len(self.codes)

    @property
    def iterations(self) -> tuple[int, ...]:
        return tuple(self.fixed_point.iterations.tolist())

    @property
    def seconds(self) -> float:
        return self._seconds

    @property
    def state(self) -> Tensor:
        return self.fixed_point.x.detach()

    def describe_failures(self) -> str:
        return self.fixed_point.describe_failures()


class FixedPointRoute(Route):
    """A fixed-point problem, solved for batches of its inputs.

    Parameters
    ----------
    problem : FixedPointProblem
    on_irregular : {"warn", "ignore", "raise"}
    options : mapping, optional
        Fields of the problem to change.
    """

    def __init__(
        self,
        problem: FixedPointProblem,
        on_irregular: str,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        self._problem, self._on_irregular = _changed(problem, options or {}), on_irregular

    @property
    def solvers(self) -> tuple[str, ...]:
        return ("fixed point",)

    def solve(
        self, arguments: Arguments, options: Mapping[str, Any] | None, start: Any
    ) -> FixedPointRouteSolution:
        began = time.perf_counter()
        problem, batch = _changed(self._problem, options or {}), batch_of(arguments)
        inputs = [
            (value if batched else value.expand(batch, *value.shape)).to(arguments.dtype)
            for value, batched in zip(arguments.values, arguments.batched, strict=True)
        ]
        shape = (batch, *problem.shape)
        if start is None or start.shape != shape:
            start = torch.zeros(shape, dtype=arguments.dtype, device=arguments.device)
        found = problem.solve(*inputs, start=start, on_irregular=self._on_irregular)
        x = shape_output(arguments, found.x)
        return FixedPointRouteSolution(
            variables=(x,),
            _evaluate=partial(shape_output, arguments, torch.zeros_like(found.residual)),
            _recover=partial(_only, x),
            fixed_point=found,
            _seconds=time.perf_counter() - began,
        )

    def state_at(self, arguments: Arguments, values: Mapping[Any, Tensor]) -> Tensor:
        for name in values:
            if name != "x":
                raise SpecificationError(
                    f'start has a value for {name!r}, but a fixed point is called "x".'
                )
        x = check_value("x", self._problem.shape, values["x"], arguments)
        return x.to(arguments.dtype).expand(batch_of(arguments), *self._problem.shape)


def _only(x: Tensor, name: object) -> Tensor:
    if name != "x":
        raise KeyError(f'{name!r} is no variable: a fixed point is called "x".')
    return x


def _changed(problem: FixedPointProblem, options: Mapping[str, Any]) -> FixedPointProblem:
    known = [option.name for option in fields(problem) if option.name in OPTIONS]
    for option in options:
        if option not in known:
            raise BackendError(
                f"A fixed-point problem has no option {option!r}. {nearest(option, known)}"
            )
    return replace(problem, **options)
