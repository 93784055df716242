"""Smooth problems written in CVXPY, as nonlinear programs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import cvxpy as cp
import torch
from torch import Tensor

from declarative_cvx.errors import SpecificationError
from declarative_cvx.nonconvex.form import Form, Unknown
from declarative_cvx.nonconvex.minimization.program import NonlinearProgram
from declarative_cvx.nonconvex.minimization.solve import NonlinearSolution
from declarative_cvx.nonconvex.translation.translate import Multipliers, NonlinearForm
from declarative_cvx.parameters import Arguments


class CvxpyForm(Form):
    """A CVXPY problem; variables and dual variables are named by their ids.

    Parameters
    ----------
    problem : cvxpy.Problem
    parameters, variables : sequence
        As for `DeclarativeLayer`.
    """

    def __init__(
        self,
        problem: cp.Problem,
        parameters: Sequence[cp.Parameter],
        variables: Sequence[cp.Variable],
    ) -> None:
        self._source = (problem, tuple(parameters), tuple(variables))
        self._form = NonlinearForm(problem, parameters)
        self._variables = {variable.id: variable for variable in problem.variables()}
        self.outputs = tuple(variable.id for variable in variables)
        self.maximize = self._form.maximize
        self._asked = [v for v in variables if v.id in self._variables]
        self.own = max(self._form.layout.slices[key].stop for key in self._variables)
        self.unknowns = tuple(Unknown(v.name(), v.shape) for v in problem.variables())

    @property
    def problem(self) -> cp.Problem:
        return self._source[0]

    @property
    def parameters(self) -> tuple[cp.Parameter, ...]:
        return self._form.parameters

    def program(self, arguments: Arguments, batch: int) -> NonlinearProgram:
        return self._form.program(arguments.values, arguments.batched, batch, arguments.device)

    def violation(self, program: NonlinearProgram) -> Tensor:
        return self._form.violation(program)

    def start(
        self,
        program: NonlinearProgram,
        generator: torch.Generator | None = None,
        given: Mapping[int, Tensor] | None = None,
    ) -> Tensor:
        keys = list(self._variables)
        values = {keys[place]: value for place, value in (given or {}).items()}
        return self._form.start(program, values, generator)

    def place(self, variable: Any) -> int:
        keys = list(self._variables)
        if getattr(variable, "id", None) not in keys:
            names = ", ".join(unknown.name for unknown in self.unknowns)
            raise SpecificationError(
                f"start has a value for {variable!r}, which is no variable of the problem; it has "
                f"{names}."
            )
        return keys.index(variable.id)

    def unpack(self, result: Any, solver: str) -> Sequence[Any]:
        found = self._by_id(result, solver)
        missing = [v.name() for key, v in self._variables.items() if key not in found]
        if missing:
            raise SpecificationError(
                f"the solver {solver} returns no value for {', '.join(missing)}: return a mapping "
                "from each of the problem's variables to its value, or list them all in variables="
                "[...] and return their values in that order."
            )
        return [found[key] for key in self._variables]

    def _by_id(self, result: Any, solver: str) -> dict[int, Any]:
        if isinstance(result, Mapping):
            unknown = [key for key in result if getattr(key, "id", None) not in self._variables]
            if unknown:
                raise SpecificationError(
                    f"the solver {solver} returns a value for {unknown[0]!r}, which is no variable "
                    "of the problem."
                )
            return {key.id: value for key, value in result.items()}
        values = result if isinstance(result, tuple) else (result,)
        if len(values) != len(self._asked):
            names = ", ".join(variable.name() for variable in self._asked)
            raise SpecificationError(
                f"the solver {solver} returns {len(values)} values, but a tuple of "
                f"{len(self._asked)}, for {names}, is expected."
            )
        return {v.id: value for v, value in zip(self._asked, values, strict=True)}

    def assemble(self, program: NonlinearProgram, values: Sequence[Tensor]) -> Tensor:
        given = dict(zip(self._variables, values, strict=True))
        return self._form.at(program, given).expand(program.batch, -1)

    def disassemble(self, x: Tensor) -> list[Tensor]:
        return [self._form.recover(variable, x) for variable in self._variables.values()]

    def read(self, name: Any, program: NonlinearProgram, found: NonlinearSolution) -> Tensor:
        if name in self._variables:
            return self._form.recover(self._variables[name], found.x)
        multipliers = Multipliers(
            found.equality, found.inequality, found.lower_bound, found.upper_bound
        )
        return self._form.duals(program, found.x, multipliers)[name]

    def __deepcopy__(self, memo: Any) -> CvxpyForm:
        return self  # nothing in it changes, and CVXPY gives copies of its leaves new ids

    def __getstate__(self) -> Any:
        return self._source

    def __setstate__(self, state: Any) -> None:
        self.__init__(*state)  # type: ignore[misc]
