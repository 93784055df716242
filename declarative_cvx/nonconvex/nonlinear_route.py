"""Smooth problems written in CVXPY, convex or not, minimised in torch."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any

import cvxpy as cp
import torch
from torch import Tensor

from declarative_cvx.derivative import DerivativeReport
from declarative_cvx.errors import BackendError, nearest
from declarative_cvx.nonconvex.minimization.interior_point import InteriorPoint
from declarative_cvx.nonconvex.minimization.lbfgs import LBFGS
from declarative_cvx.nonconvex.minimization.minimizer import Minimizer
from declarative_cvx.nonconvex.minimization.program import NonlinearProgram
from declarative_cvx.nonconvex.minimization.solve import (
    NonlinearSolution,
    automatic_minimizer,
    solve_nonlinear,
)
from declarative_cvx.nonconvex.minimization.trust_region import TrustRegion
from declarative_cvx.nonconvex.translation.translate import Multipliers, NonlinearForm
from declarative_cvx.parameters import Arguments
from declarative_cvx.residuals import Residuals
from declarative_cvx.route import Route, batch_of, shape_output
from declarative_cvx.solution import Solution
from declarative_cvx.status import Status
from declarative_cvx.transforms import observed

MINIMIZERS: dict[str, type[Minimizer]] = {
    cls.name: cls for cls in (TrustRegion, LBFGS, InteriorPoint)
}
# Violation of constraints without variables, above which an element has no feasible point.
VIOLATED = 1e-8


@dataclass(frozen=True, eq=False, repr=False)
class NonlinearRouteSolution(Solution):
    """The solution of a problem that was minimised in torch.

    Attributes
    ----------
    nonlinear : NonlinearSolution
        The solution of the nonlinear program that the problem was turned into.
    """

    nonlinear: NonlinearSolution
    _codes: Tensor
    _name: str
    _seconds: float

    @property
    def codes(self) -> Tensor:
        return self._codes

    @property
    def residuals(self) -> Residuals:
        """Primal and dual residual, and complementarity as the gap."""
        found = self.nonlinear.residuals
        none = torch.zeros_like(found.primal)
        return Residuals(found.primal, found.dual, gap=found.complementarity, cone=none)

    @property
    def derivative(self) -> DerivativeReport:
        return self.nonlinear.derivative

    @property
    def backend(self) -> tuple[str, ...]:
        return (self._name,) * len(self._codes)

    @property
    def iterations(self) -> tuple[int, ...]:
        return tuple(self.nonlinear.iterations.tolist())

    @property
    def seconds(self) -> float:
        return self._seconds

    @property
    def state(self) -> Tensor:
        return self.nonlinear.x.detach()

    def describe_failures(self) -> str:
        failed = torch.nonzero(~self.solved)[:, 0].tolist()
        status, worst = self.status, self.residuals.worst
        listed = "; ".join(
            f"element {i}: {status[i].name} by {self._name} ({self.iterations[i]} iterations, "
            f"largest residual {float(worst[i]):.1e})"
            for i in failed[:10]
        )
        advice = dict.fromkeys(status[i] for i in failed)
        return (
            f"{len(failed)} of {len(status)} problems were not solved. {listed}.\n  "
            + "\n  ".join(f"{s.name}: {_ADVICE.get(s, s.advice)}" for s in advice)
            + '\n  To go on without them use on_failure="nan" and read layer.solve(...).status.'
        )


_ADVICE = {
    Status.INFEASIBLE: (
        "No point near the last one violates the constraints less; start elsewhere "
        "(Variable.value, restarts=...) or check the parameter values."
    ),
    Status.UNBOUNDED: "The objective falls without end; bound the variables.",
    Status.INACCURATE: (
        "The point found is no local minimum to the tolerance asked for; start elsewhere or use "
        "restarts=..."
    ),
}


class NonlinearRoute(Route):
    """A smooth problem as a batch of nonlinear programs.

    Parameters
    ----------
    problem : cvxpy.Problem
    parameters, variables : sequence
        As for `DeclarativeLayer`, whose other arguments these are too.
    """

    def __init__(
        self,
        problem: cp.Problem,
        parameters: Sequence[cp.Parameter],
        variables: Sequence[cp.Variable],
        *,
        solver: str | Minimizer,
        solver_args: Mapping[str, Any],
        on_irregular: str,
        restarts: int,
    ) -> None:
        self._source = (problem, tuple(parameters), tuple(variables))
        self._options = {
            "solver": solver,
            "solver_args": dict(solver_args),
            "on_irregular": on_irregular,
            "restarts": restarts,
        }
        self._form = NonlinearForm(problem, parameters)
        self._minimizer = _minimizer_of(solver, solver_args)
        self._on_irregular, self._restarts = on_irregular, restarts
        self._outputs = tuple(variable.id for variable in variables)
        self._variables = {variable.id: variable for variable in problem.variables()}

    @property
    def solvers(self) -> tuple[str, ...]:
        return ("torch",) if self._minimizer is None else (self._minimizer.name,)

    def solve(
        self, arguments: Arguments, options: Mapping[str, Any] | None, start: Any
    ) -> NonlinearRouteSolution:
        began = time.perf_counter()
        batch = batch_of(arguments)
        program = self._form.program(arguments.values, arguments.batched, batch, arguments.device)
        minimizer = self._minimizer or automatic_minimizer(program)
        if options:
            minimizer = _changed(minimizer, options)
        found = solve_nonlinear(
            program, self._starts(program, start), minimizer, self._on_irregular
        )
        violated = self._form.violation(program) > VIOLATED
        codes = torch.where(observed(violated)[0], int(Status.INFEASIBLE), found.codes)
        read = partial(self._read, arguments, program, found, violated)
        return NonlinearRouteSolution(
            variables=tuple(read(identity) for identity in self._outputs),
            value=shape_output(arguments, _without(violated, self._value(found))),
            nonlinear=found,
            _recover=read,
            _codes=codes,
            _name=minimizer.name,
            _seconds=time.perf_counter() - began,
        )

    def __deepcopy__(self, memo: Any) -> NonlinearRoute:
        return self  # nothing in it changes, and CVXPY gives copies of its leaves new ids

    def __getstate__(self) -> dict[str, Any]:
        return {"source": self._source, "options": self._options}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(*state["source"], **state["options"])  # type: ignore[misc]

    def _starts(self, program: NonlinearProgram, previous: Tensor | None) -> Tensor:
        """Points to start from, (starts, batch, n); the first is where the last call ended."""
        first = self._form.start(program).expand(program.batch, -1)
        if previous is not None and previous.shape == first.shape:
            first = torch.where(torch.isfinite(previous), previous.to(first), first)
        starts = [first]
        generator = torch.Generator().manual_seed(0)
        starts += [self._form.start(program, generator=generator) for _ in range(self._restarts)]
        return torch.stack([start.expand(program.batch, -1) for start in starts])

    def _read(
        self,
        arguments: Arguments,
        program: NonlinearProgram,
        found: NonlinearSolution,
        violated: Tensor,
        key: int,
    ) -> Tensor:
        if key in self._variables:
            value = self._form.recover(self._variables[key], found.x)
            return shape_output(arguments, _without(violated, value))
        multipliers = Multipliers(
            found.equality, found.inequality, found.lower_bound, found.upper_bound
        )
        value = self._form.duals(program, found.x, multipliers)[key]
        return shape_output(arguments, _without(violated, value))

    def _value(self, found: NonlinearSolution) -> Tensor:
        return -found.value if self._form.maximize else found.value


def _without(violated: Tensor, value: Tensor) -> Tensor:
    """A value (batch, ...), NaN for the elements that parameters alone make infeasible."""
    mask = violated.reshape(-1, *(1 for _ in value.shape[1:]))
    return torch.where(mask, torch.nan, value)


def _minimizer_of(solver: str | Minimizer, options: Mapping[str, Any]) -> Minimizer | None:
    """The minimiser that a choice means; None is to choose by the program."""
    if isinstance(solver, Minimizer):
        return _changed(solver, options)
    if not isinstance(solver, str):
        raise BackendError(
            "solver must be a name or a Minimizer for a problem that is not convex (DPP), got "
            f"{solver!r}."
        )
    if solver.lower() == "auto":
        return None if not options else _changed(InteriorPoint(), options)
    by_name = {name.lower(): cls for name, cls in MINIMIZERS.items()}
    if solver.lower() not in by_name:
        raise BackendError(
            f"{solver!r} is no solver for problems that are not convex (DPP). "
            f"{nearest(solver, ['auto', *MINIMIZERS])}"
        )
    return _changed(by_name[solver.lower()](), options)


def _changed(minimizer: Minimizer, options: Mapping[str, Any]) -> Minimizer:
    known = [option.name for option in fields(minimizer)]
    for option in options:
        if option not in known:
            raise BackendError(
                f"{minimizer.name} has no option {option!r}. {nearest(option, known)}"
            )
    return replace(minimizer, **options)
