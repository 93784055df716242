"""Smooth problems, convex or not, minimised in torch."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from declarative_cvx.derivative import DerivativeReport
from declarative_cvx.nonconvex.form import Form
from declarative_cvx.nonconvex.minimization.program import NonlinearProgram
from declarative_cvx.nonconvex.minimization.solve import (
    NonlinearSolution,
    automatic_minimizer,
    solve_nonlinear,
)
from declarative_cvx.nonconvex.proposer import Inquiry, Proposer
from declarative_cvx.nonconvex.solver_choice import Choice, changed, chosen
from declarative_cvx.parameters import Arguments
from declarative_cvx.residuals import Residuals
from declarative_cvx.route import Route, batch_of, check_value, shape_output
from declarative_cvx.solution import Solution
from declarative_cvx.status import Status
from declarative_cvx.transforms import observed, without_inference_mode

# Violation of constraints without variables, above which an element has no feasible point.
VIOLATED = 1e-8


@dataclass(frozen=True, eq=False, repr=False)
class NonlinearRouteSolution(Solution):
    """The solution of a problem that was minimised in torch.

    Attributes
    ----------
    nonlinear : NonlinearSolution
        The solution of the nonlinear program that the problem was turned into.
    said : tuple of str
        What a solver that is not the library's own said about each element, for example the
        exception that it raised.
    """

    nonlinear: NonlinearSolution
    said: tuple[str, ...]
    _codes: Tensor
    _names: tuple[str, ...]
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
        return tuple(self._names[source] for source in self.nonlinear.source.tolist())

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
            f"element {i}: {status[i].name} by {self.backend[i]} ({self.iterations[i]} iterations, "
            f"largest residual {float(worst[i]):.1e})" + (self.said[i] and f", {self.said[i]}")
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
        "(Variable.value, TorchProblem(start=...), restarts=...) or check the parameter values."
    ),
    Status.UNBOUNDED: "The objective falls without end; bound the variables.",
    Status.INACCURATE: (
        "The point found is no local minimum to the tolerance asked for: perhaps a saddle point, "
        "or one on the way to a limit that the objective does not attain. Start elsewhere, bound "
        "the variables, use restarts=... or another solver."
    ),
    Status.NUMERICAL_ERROR: (
        "A function or one of its derivatives is not finite, at the start or on the way; start "
        "elsewhere, bound the variables, or rescale the data."
    ),
}


class NonlinearRoute(Route):
    """A smooth problem as a batch of nonlinear programs.

    Parameters
    ----------
    form : Form
    solver, solver_args, on_irregular, restarts
        As for `DeclarativeLayer`.
    """

    def __init__(
        self,
        form: Form,
        *,
        solver: Choice,
        solver_args: Mapping[str, Any],
        on_irregular: str,
        restarts: int,
    ) -> None:
        self._form = form
        self._solver = chosen(solver, solver_args)
        self._on_irregular, self._restarts = on_irregular, restarts
        if isinstance(self._solver, Proposer):
            self._solver.require(form, restarts)
            self._restarts = restarts if self._solver.takes_start else 0

    @property
    def solvers(self) -> tuple[str, ...]:
        return ("torch",) if self._solver is None else (self._solver.name,)

    @without_inference_mode()
    def solve(
        self, arguments: Arguments, options: Mapping[str, Any] | None, start: Any
    ) -> NonlinearRouteSolution:
        began = time.perf_counter()
        program = self._form.program(arguments, batch_of(arguments))
        solver = self._solver or automatic_minimizer(program)
        if options:
            solver = changed(solver, options)
        inquiry = Inquiry.of(solver, self._form, program)
        starts = self._starts(program, start)
        found = solve_nonlinear(program, starts, inquiry.minimizer, self._on_irregular)
        violated = self._form.violation(program) > VIOLATED
        seen = observed(violated, found.x)[0]  # together: both then have vmapped elements
        codes = torch.where(seen, int(Status.INFEASIBLE), found.codes)

        def read(name: Any) -> Tensor:
            value = self._form.read(name, program, found)
            return shape_output(arguments, _without(violated, value))

        value = -found.value if self._form.maximize else found.value
        return NonlinearRouteSolution(
            variables=tuple(read(name) for name in self._form.outputs),
            _evaluate=partial(shape_output, arguments, _without(violated, value)),
            nonlinear=found,
            said=inquiry.said[: len(codes)] or ("",) * len(codes),
            _recover=read,
            _codes=codes,
            _names=inquiry.names,
            _seconds=time.perf_counter() - began,
        )

    @without_inference_mode()
    def state_at(self, arguments: Arguments, values: Mapping[Any, Tensor]) -> Tensor:
        if isinstance(self._solver, Proposer) and not self._solver.takes_start:
            return super().state_at(arguments, values)
        given = {}
        for variable, value in values.items():
            place = self._form.place(variable)
            unknown = self._form.unknowns[place]
            given[place] = check_value(unknown.name, unknown.shape, value, arguments)
        program = self._form.program(arguments, batch_of(arguments))
        return self._form.start(program, given=given).expand(program.batch, -1)

    def _starts(self, program: NonlinearProgram, previous: Tensor | None) -> Tensor:
        """Points to start from, (starts, batch, n); the first is where the last call ended."""
        first = self._form.start(program).expand(program.batch, -1)
        if previous is not None and previous.shape == first.shape:
            first = torch.where(torch.isfinite(previous), previous.to(first), first)
        starts = [first]
        generator = torch.Generator().manual_seed(0)
        starts += [self._form.start(program, generator) for _ in range(self._restarts)]
        return torch.stack([start.expand(program.batch, -1) for start in starts])


def _without(violated: Tensor, value: Tensor) -> Tensor:
    """A value (batch, ...), NaN for the elements that parameters alone make infeasible."""
    mask = violated.reshape(-1, *(1 for _ in value.shape[1:]))
    return torch.where(mask, torch.nan, value)
