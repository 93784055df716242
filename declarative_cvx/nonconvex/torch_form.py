"""Problems whose functions are written in torch, as nonlinear programs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from declarative_cvx.errors import SpecificationError, nearest
from declarative_cvx.nonconvex.form import Form, Unknown
from declarative_cvx.nonconvex.minimization.program import NonlinearProgram, Parameters
from declarative_cvx.nonconvex.minimization.solve import NonlinearSolution
from declarative_cvx.nonconvex.torch_functions import Function, Weights
from declarative_cvx.nonconvex.torch_problem import FUNCTIONS, MULTIPLIERS, TorchProblem
from declarative_cvx.nonconvex.torch_vector import Entries, Vector
from declarative_cvx.nonconvex.translation.over_batch import over_batch
from declarative_cvx.nonconvex.translation.starting_point import middle
from declarative_cvx.parameters import Arguments, ParameterSpec


class TorchForm(Form):
    """A torch problem; its quantities are named by strings.

    Parameters
    ----------
    problem : TorchProblem
    variables : sequence of str or None
        Names of variables, and of multipliers: "equality", "inequality", "lower", "upper". None:
        all variables.
    restarts : int
        As for `DeclarativeLayer`.
    """

    def __init__(
        self, problem: TorchProblem, variables: Sequence[str] | None, restarts: int
    ) -> None:
        self._problem = problem
        self._vector = Vector(problem.variable_shapes)
        self._weights = Weights(problem.modules)
        self._count = len(problem.parameter_shapes)
        self.outputs = _output_names(problem, variables)
        self.parameters = tuple(
            ParameterSpec(name, shape) for name, shape in problem.parameter_shapes.items()
        )
        self.unknowns = tuple(Unknown(*item) for item in problem.variable_shapes.items())
        self._lower = self._entries("lower", -torch.inf, problem.lower)
        self._upper = self._entries("upper", torch.inf, problem.upper)
        self._start = self._entries("start", torch.nan, problem.start)
        self._sample = self._sample_bounds(restarts)

    def _entries(self, name: str, default: float, given: Any) -> Entries:
        return Entries(name, given, self._vector, default, self._over_batch)

    def _sample_bounds(self, restarts: int) -> tuple[Entries, Entries]:
        """Limits of random starts, NaN where there are none."""
        given = self._problem.sample_bounds
        bounded = self._lower.given and self._upper.given and not self._start.given
        if restarts and given is None and not bounded:
            raise SpecificationError(
                f"restarts={restarts} has nothing to draw: give the TorchProblem sample_bounds=, "
                "or lower= and upper= without start=."
            )
        pairs = _pairs(given, list(self._vector.shapes))
        low, high = (self._entries("sample_bounds", torch.nan, one) for one in pairs)
        return low, high

    def program(self, arguments: Arguments, batch: int) -> NonlinearProgram:
        values = [
            value if is_batched else value[None]
            for value, is_batched in zip(arguments.values, arguments.batched, strict=True)
        ]
        parameters = tuple(
            value.to(arguments.device, torch.float64)
            for value in (*values, *self._weights.values())
        )
        mine = parameters[: self._count]
        lower, upper = (
            entries.at(mine, arguments.device) if entries.given else None
            for entries in (self._lower, self._upper)
        )
        functions = {
            name: Function(self._problem, name, self._vector, self._weights)
            for name in FUNCTIONS
            if getattr(self._problem, name) is not None
        }
        return NonlinearProgram(
            variables=self._vector.size,
            objective=functions["objective"],
            equality=functions.get("equality"),
            inequality=functions.get("inequality"),
            lower=lower,
            upper=upper,
            parameters=parameters,
            batch=batch,
            batched=self._problem.batched,
        )

    def _over_batch(self, function: Callable[..., Any], parameters: Parameters) -> Any:
        """What a function of the parameters returns for each element."""
        batch = max((len(value) for value in parameters), default=1)
        parameters = tuple(value.clone() for value in parameters)  # writes stay in the function
        if not self._problem.batched:
            return over_batch(function, parameters, batch)
        return function(*(value.expand(batch, *value.shape[1:]) for value in parameters))

    def violation(self, program: NonlinearProgram) -> Tensor:
        return program.crossing

    def start(
        self,
        program: NonlinearProgram,
        generator: torch.Generator | None = None,
        given: Mapping[int, Tensor] | None = None,
    ) -> Tensor:
        x = self._point(program, generator)
        if not given:
            return x
        parts = [part.expand(program.batch, *part.shape[1:]) for part in self.disassemble(x)]
        for place, value in given.items():
            parts[place] = value.expand_as(parts[place])
        return self.assemble(program, parts)

    def place(self, variable: Any) -> int:
        names = list(self._vector.shapes)
        if variable not in names:
            raise SpecificationError(
                f"start has a value for {variable!r}, which is no variable. "
                f"{nearest(str(variable), names)}"
            )
        return names.index(variable)

    def _point(self, program: NonlinearProgram, generator: torch.Generator | None) -> Tensor:
        lower, upper = _bounds(program)
        parameters = tuple(value.detach() for value in self.given(program))
        with torch.no_grad():
            given = self._start.at(parameters, lower.device)
            free = torch.isnan(given)
            x = torch.where(free, middle(lower, upper), given)
            if generator is not None:
                low, high = (entries.at(parameters, lower.device) for entries in self._sample)
                low = torch.where(torch.isnan(low) & free, lower, low)
                high = torch.where(torch.isnan(high) & free, upper, high)
                drawn = low + (high - low) * _shares(program, generator).to(low)
                x = torch.where(torch.isfinite(drawn), drawn, x)
            return torch.clamp(x, lower, upper)

    def given(self, program: NonlinearProgram) -> Sequence[Tensor]:
        return program.parameters[: self._count]

    def unpack(self, result: Any, solver: str) -> Sequence[Any]:
        names = list(self._vector.shapes)
        if isinstance(result, Mapping):
            values = [result[name] for name in names if name in result]
            good = len(values) == len(result) == len(names)
        else:
            values = list(result) if isinstance(result, tuple) else [result]
            good = len(values) == len(names)
        if not good:
            raise SpecificationError(
                f"the solver {solver} does not return one value for each variable: a tuple in the "
                f"order {', '.join(names)}, or a mapping from these names, is expected."
            )
        return values

    def assemble(self, program: NonlinearProgram, values: Sequence[Tensor]) -> Tensor:
        x = self._vector.join(dict(zip(self._vector.shapes, values, strict=True)))
        return torch.clamp(x, *_bounds(program))

    def disassemble(self, x: Tensor) -> list[Tensor]:
        return list(self._vector.split(x).values())

    def read(self, name: Any, program: NonlinearProgram, found: NonlinearSolution) -> Tensor:
        known = _names(self._problem)
        if name not in known:
            raise KeyError(f"{name!r} is no variable. {nearest(str(name), known)}")
        if name in self._vector.shapes:
            return self._vector.split(found.x)[name]
        if name in ("equality", "inequality"):
            multipliers, function = getattr(found, name), getattr(program, name)
            return multipliers.reshape((len(multipliers), *function.shape))
        multipliers = getattr(found, f"{name}_bound")
        shapes = list(self._vector.shapes.values())
        return multipliers if len(shapes) > 1 else multipliers.reshape((-1, *shapes[0]))


def _bounds(program: NonlinearProgram) -> tuple[Tensor, Tensor]:
    """Lower and upper bounds without their gradients, (batch or 1, n or 1)."""
    infinite = torch.full((1, 1), torch.inf, dtype=torch.float64, device=program.device)
    lower = -infinite if program.lower is None else program.lower.detach()
    upper = infinite if program.upper is None else program.upper.detach()
    return lower, upper


def _shares(program: NonlinearProgram, generator: torch.Generator) -> Tensor:
    """Random numbers between 0 and 1, (batch, n), the same on every device."""
    shape = (program.batch, program.variables)
    return torch.rand(shape, generator=generator, dtype=torch.float64, device="cpu")


def _pairs(given: Any, names: list[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The first and the second of each variable's pair."""
    if given is None:
        return {}, {}
    by_name = given if isinstance(given, Mapping) else dict.fromkeys(names, given)
    for name, pair in by_name.items():
        if not isinstance(pair, (list, tuple)) or len(pair) != 2:
            raise SpecificationError(
                f"sample_bounds of {name!r} is {pair!r}, but a pair, lower and upper, is expected."
            )
    low, high = ({name: pair[side] for name, pair in by_name.items()} for side in (0, 1))
    return low, high


def _names(problem: TorchProblem) -> list[str]:
    """What can be asked for."""
    present = (name for name in MULTIPLIERS if getattr(problem, name) is not None)
    return [*problem.variable_shapes, *present]


def _output_names(problem: TorchProblem, variables: Sequence[str] | None) -> tuple[str, ...]:
    if variables is None:
        return tuple(problem.variable_shapes)
    known = _names(problem)
    if not isinstance(variables, (list, tuple)):
        raise SpecificationError(
            f"variables must be a list of names ({', '.join(known)}), got {variables!r}."
        )
    for position, name in enumerate(variables):
        if not isinstance(name, str) or name not in known:
            raise SpecificationError(
                f"variables[{position}] is {name!r}, but a variable of the TorchProblem, or the "
                f"multipliers of one of its constraints, is expected. "
                f"{nearest(str(name), known)}"
            )
    return tuple(variables)
