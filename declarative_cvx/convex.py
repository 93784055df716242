"""Convex problems: canonicalised once, solved by cone solvers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import cvxpy as cp
import torch
from torch import Tensor

from declarative_cvx.autograd import (
    Call,
    extend_differentiably,
    solve_differentiably,
)
from declarative_cvx.backends import Backend, automatic, backend_named, require_capable, solve
from declarative_cvx.backends.diffcp import DIFFCP
from declarative_cvx.backends.dual_active_set import DualActiveSet
from declarative_cvx.canonical import canonicalize
from declarative_cvx.compiled_pass import CompiledPass
from declarative_cvx.cone_solution import ConeSolution
from declarative_cvx.derivative import DERIVATIVES, Derivative, Diffcp, Implicit
from declarative_cvx.derivative.regularity import Outputs
from declarative_cvx.errors import BackendError, SolveError, nearest
from declarative_cvx.fixed_variables import FixedVariables
from declarative_cvx.optimal_value import objective
from declarative_cvx.param_program import ParamConeProgram
from declarative_cvx.parameters import Arguments
from declarative_cvx.program import ConeProgram
from declarative_cvx.route import Route, shape_output
from declarative_cvx.solution import ConicSolution
from declarative_cvx.status import Status
from declarative_cvx.transforms import followed, outside_transforms, transforming


class ConvexRoute(Route):
    """A DPP or DGP problem as a cone program with parameters.

    Parameters
    ----------
    problem : cvxpy.Problem
    parameters, variables : sequence
        As for `DeclarativeLayer`, whose other arguments these are too.
    optional_solver : str
        The solver that options of a single call are for where `solver` is "auto".
    """

    def __init__(
        self,
        problem: cp.Problem,
        parameters: Sequence[cp.Parameter],
        variables: Sequence[cp.Variable],
        *,
        solver: str | Backend,
        optional_solver: str,
        solver_args: Mapping[str, Any],
        derivative: str | Derivative,
        on_irregular: str,
        gp: bool,
        canon_backend: str | None,
    ) -> None:
        self._output_ids = tuple(variable.id for variable in variables)
        self._canonical = canonicalize(problem, parameters, gp, canon_backend)
        self._solver, self._solver_args = solver, dict(solver_args)
        self._optional_solver = optional_solver
        self._on_irregular = on_irregular
        self._backends = self._choose_backends({})
        self._derivative = self._choose_derivative(derivative)
        self._known_outputs: dict[tuple[torch.device, tuple[bool, ...]], Outputs] = {}

    @property
    def solvers(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(backend.name for backend in self._backends))

    def solve(
        self, arguments: Arguments, options: Mapping[str, Any] | None, start: Any
    ) -> ConicSolution:
        backends = self._choose_backends(options) if options else self._backends
        batch = 1 if arguments.batch is None else arguments.batch
        whole, offset = self._canonical.apply(
            arguments.values, arguments.batched, batch, arguments.device
        )
        fixed = self._canonical.fixed
        program, constant = (whole, None) if fixed is None else fixed.reduce(whole)
        outputs = self._outputs(arguments)
        solver = partial(solve, backends=backends, start=start)
        call = Call(program.structure, solver, self._derivative, outputs, self._on_irregular)
        point = solve_differentiably(program, call)
        assert call.solution is not None
        cone = call.solution
        if fixed is not None and not transforming():
            cone = _extend(fixed, whole.detach(), cone)
        offset = offset if constant is None else offset + constant
        answer = _Answer(self._canonical, arguments, whole, program, offset, point)
        return ConicSolution(
            variables=tuple(answer.read(identity) for identity in self._output_ids),
            cone=cone,
            _recover=answer.read,
            _evaluate=answer.value,
            _state=call.solution,
            _assess=call.assess,
        )

    def outputs(self, arguments: Arguments) -> tuple[Tensor, ...] | None:
        return None if self._pass is None else self._pass.outputs(arguments, self._solved)

    def _solved(self, arguments: Arguments) -> tuple[Tensor, ...]:
        """The outputs, by `solve`; the arguments may be those of a rewritten problem."""
        solution = ConvexRoute.solve(self, arguments, None, None)
        if not solution.all_solved:
            raise SolveError(solution.describe_failures())
        return solution.variables

    @cached_property
    def _pass(self) -> CompiledPass | None:
        """The shorter way, where nothing else is asked for than what it does."""
        first = self._backends[0]
        if not isinstance(first, DualActiveSet) or first != DualActiveSet():
            return None
        if not isinstance(self._derivative, Implicit):
            return None
        return CompiledPass.of(self._canonical, self._output_ids)

    def _outputs(self, arguments: Arguments) -> Outputs:
        """Outputs, and parameters that a derivative follows (or all), in the cone program.

        Once for each device and choice of parameters.
        """
        wanted = tuple(followed(value) for value in arguments.values)
        wanted = wanted if any(wanted) else tuple(True for _ in wanted)
        key = (arguments.device, wanted)
        if key not in self._known_outputs:
            with outside_transforms():
                masks = self._canonical.masks(self._output_ids, arguments.device)
            pull_back = partial(self._canonical.pull_back, wanted)
            self._known_outputs[key] = Outputs(*masks, pull_back)
        return self._known_outputs[key]

    def _choose_backends(self, extra: Mapping[str, Any]) -> tuple[Backend, ...]:
        solver = self._optional_solver if extra and self._solver == "auto" else self._solver
        return self._backends_of(solver, {**self._solver_args, **extra})

    def _backends_of(
        self, solver: str | Backend, options: Mapping[str, Any]
    ) -> tuple[Backend, ...]:
        """The solvers that a choice means, in the order in which they are tried."""
        structure = self._canonical.solved_structure.reduced
        if isinstance(solver, Backend):
            backend = solver.changed(options)
        elif not isinstance(solver, str):
            raise BackendError(f"solver must be a name or a Backend object, got {solver!r}.")
        elif solver.lower() == "auto":
            return automatic(structure, options)
        else:
            backend = backend_named(solver, options)
        require_capable(backend, structure)
        return backend.stages(structure)

    def _choose_derivative(self, choice: str | Derivative) -> Derivative:
        if choice == "auto":
            choice = Diffcp() if isinstance(self._backends[0], DIFFCP) else Implicit()
        if isinstance(choice, str):
            if choice not in DERIVATIVES:
                raise BackendError(
                    f"Unknown derivative {choice!r}. {nearest(choice, ['auto', *DERIVATIVES])}"
                )
            choice = DERIVATIVES[choice]()
        obstacle = choice.obstacle(self._canonical.solved_structure)
        if obstacle:
            raise BackendError(f"{obstacle}.")
        return choice


@dataclass(frozen=True, eq=False)
class _Answer:
    """What can be read off a solved program, differentiably; computed when it is asked for.

    Attributes
    ----------
    canonical : ParamConeProgram
    arguments : Arguments
    whole, program : ConeProgram
        With the variables that equalities fix, and without.
    offset : Tensor, shape (batch or 1,)
        Constant of the objective of `program`.
    point : (Tensor, Tensor)
        x and y of the program that solvers see.
    """

    canonical: ParamConeProgram
    arguments: Arguments
    whole: ConeProgram
    program: ConeProgram
    offset: Tensor
    point: tuple[Tensor, Tensor]

    def read(self, identity: int) -> Tensor:
        """The value of a variable or dual variable."""
        value = self.canonical.recover(identity, self.point, lambda: self._all)
        return shape_output(self.arguments, value)

    def value(self) -> Tensor:
        """The optimal value."""
        found = objective(self.program, *self._remaining) + self.offset
        return shape_output(self.arguments, self.canonical.value(found))

    @cached_property
    def _remaining(self) -> tuple[Tensor, Tensor]:
        """X and y of the program without fixed variables."""
        return extend_differentiably(self.program, *self.point)

    @cached_property
    def _all(self) -> tuple[Tensor, Tensor]:
        """X and y of the whole program."""
        fixed = self.canonical.fixed
        return self._remaining if fixed is None else fixed.extend(self.whole, *self._remaining)


def _extend(fixed: FixedVariables, whole: ConeProgram, found: ConeSolution) -> ConeSolution:
    """The solution of the program without fixed variables as that of the whole one."""
    rays = (found.status == int(Status.UNBOUNDED), found.status == int(Status.INFEASIBLE))
    x, y, s = fixed.extend_point(whole, (found.x, found.y, found.s), rays)
    return replace(found, x=x, y=y, s=s)
