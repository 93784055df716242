"""A problem as a torch module."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import cvxpy as cp
import torch
from torch import Tensor, nn

from declarative_cvx.autograd import Call, solve_differentiably
from declarative_cvx.backends import (
    Backend,
    automatic,
    backend_named,
    require_capable,
    solve,
)
from declarative_cvx.backends.diffcp import DIFFCP
from declarative_cvx.canonical import canonicalize
from declarative_cvx.derivative import DERIVATIVES, Derivative, Diffcp, Implicit
from declarative_cvx.derivative.regularity import Outputs
from declarative_cvx.errors import BackendError, SolveError, SpecificationError, nearest
from declarative_cvx.parameters import Arguments, ParameterSpec, check_arguments
from declarative_cvx.solution import ConeSolution, Solution, describe_failures
from declarative_cvx.specification import classify, require_convex


class DeclarativeLayer(nn.Module):
    """The solution of an optimisation problem, as a differentiable function of its parameters.

    Parameters
    ----------
    problem : cvxpy.Problem
        A DPP problem or, with ``gp=True``, a DGP problem. It is not changed.
    parameters : sequence of cvxpy.Parameter
        All parameters of the problem, in the order in which tensors will be passed.
    variables : sequence of cvxpy.Variable
        What the layer returns: variables of the problem, or dual variables of its constraints
        (``constraint.dual_variables[0]``).
    solver : str or Backend, optional
        "auto", a solver's name, or an object with its options, such as ``Clarabel(tol=1e-9)``.
        "auto" tries several in turn, element by element.
    derivative : str or Derivative, optional
        "auto", "implicit" (the library's own) or "diffcp".
    gp : bool, optional
        Read the problem as a geometric program.
    optimal_value : bool, optional
        Return the optimal value, shape (batch,), as a last output.
    on_failure : {"raise", "nan"}, optional
        What to do if an element is not solved: raise `SolveError`, or return NaN for it, with
        zero gradient, and full results for the others.
    on_irregular : {"warn", "ignore", "raise"}, optional
        What to do in a backward pass at an element where the solution has no derivative:
        warn (`IrregularWarning`) and return a one-sided or least-squares gradient, return it
        silently, or raise `IrregularError`.
    warm_start : bool, optional
        Start from the previous call's solution, element by element, with solvers that can.
    solver_args : mapping, optional
        Options of the solver given by name.
    verbose : bool, optional
        Let the solver print its log.
    canon_backend : str, optional
        CVXPY's canonicalisation backend.

    Attributes
    ----------
    spec : ProblemSpec
        The verdict on the problem.

    Raises
    ------
    SpecificationError, BackendError

    Examples
    --------
    >>> import cvxpy as cp, torch, declarative_cvx as dcx
    >>> x, b = cp.Variable(2), cp.Parameter(2)
    >>> problem = cp.Problem(cp.Minimize(cp.sum_squares(x - b)), [x >= 0])
    >>> layer = dcx.DeclarativeLayer(problem, parameters=[b], variables=[x])
    >>> (x_star,) = layer(torch.tensor([1.0, -1.0]))
    """

    def __init__(
        self,
        problem: cp.Problem,
        parameters: Sequence[cp.Parameter],
        variables: Sequence[cp.Variable],
        solver: str | Backend = "auto",
        *,
        derivative: str | Derivative = "auto",
        gp: bool = False,
        optimal_value: bool = False,
        on_failure: str = "raise",
        on_irregular: str = "warn",
        warm_start: bool = False,
        solver_args: Mapping[str, Any] | None = None,
        verbose: bool = False,
        canon_backend: str | None = None,
    ) -> None:
        super().__init__()
        _check_problem(problem, parameters, variables)
        _require_choice("on_failure", on_failure, ("raise", "nan"))
        _require_choice("on_irregular", on_irregular, ("warn", "ignore", "raise"))
        self.spec = classify(problem, gp)
        require_convex(self.spec, gp)
        self.on_failure, self.on_irregular = on_failure, on_irregular
        self.warm_start, self.optimal_value = warm_start, optimal_value
        self._parameters_spec = tuple(ParameterSpec.of(parameter) for parameter in parameters)
        self._output_ids = tuple(variable.id for variable in variables)
        self._output_names = tuple(variable.name() for variable in variables)
        self._canonical = canonicalize(problem, parameters, gp, canon_backend)
        self._solver = solver
        self._solver_args = dict(solver_args or {}, **({"verbose": True} if verbose else {}))
        self._backends = self._choose_backends({})
        self._derivative = self._choose_derivative(derivative)
        self._previous: ConeSolution | None = None

    @torch.compiler.disable  # solvers are not to be traced: torch.compile breaks its graph here
    def forward(
        self,
        *parameters: Tensor,
        solver_args: Mapping[str, Any] | None = None,
        warm_start: bool | None = None,
    ) -> tuple[Tensor, ...]:
        """Solve the problem for each element of a batch.

        Parameters
        ----------
        *parameters : Tensor
            One for each parameter, shaped like it or with one batch dimension in front; batched
            and unbatched ones may be mixed.
        solver_args : mapping, optional
            Options of the solver for this call.
        warm_start : bool, optional
            For this call, instead of what the constructor was told.

        Returns
        -------
        tuple of Tensor
            Values of the `variables`, each (batch, *shape), or (*shape) if no parameter is
            batched, in the parameters' common dtype and on their device; with
            ``optimal_value=True`` the optimal value last.

        Raises
        ------
        ParameterError
            If a tensor does not fit its parameter.
        SolveError
            If an element is not solved and ``on_failure="raise"``.
        """
        solution = self.solve(*parameters, solver_args=solver_args, warm_start=warm_start)
        if self.on_failure == "raise" and not bool(solution.cone.solved.all()):
            raise SolveError(describe_failures(solution.cone))
        return solution.variables

    @torch.compiler.disable
    def solve(
        self,
        *parameters: Tensor,
        solver_args: Mapping[str, Any] | None = None,
        warm_start: bool | None = None,
    ) -> Solution:
        """As calling the layer, but returning the full report; failures do not raise.

        Returns
        -------
        Solution
            Its values are differentiable like the layer's outputs.
        """
        arguments = check_arguments(self._parameters_spec, parameters)
        backends = self._choose_backends(solver_args) if solver_args else self._backends
        batch = 1 if arguments.batch is None else arguments.batch
        program, offset = self._canonical.apply(
            arguments.values, arguments.batched, batch, arguments.device
        )
        warm = self.warm_start if warm_start is None else warm_start
        start = self._previous if warm else None
        solver = partial(solve, backends=backends, start=start)
        outputs = Outputs(
            *self._canonical.masks(self._output_ids, arguments.device), self._canonical.pull_back
        )
        call = Call(program.structure, solver, self._derivative, outputs, self.on_irregular)
        x, y, objective = solve_differentiably(program, call)
        if warm:
            self._previous = call.solution
        recover = partial(self._recover, arguments, x, y)
        value = _shape_output(arguments, self._canonical.value(objective, offset))
        variables = [recover(identity) for identity in self._output_ids]
        if self.optimal_value:
            variables.append(value)
        assert call.solution is not None
        return Solution(tuple(variables), value, call.solution, recover, call.assess)

    def extra_repr(self) -> str:
        inputs = ", ".join(f"{spec.name}{list(spec.shape)}" for spec in self._parameters_spec)
        outputs = ", ".join(self._output_names)
        solvers = ", ".join(dict.fromkeys(backend.name for backend in self._backends))
        return f"({inputs}) -> ({outputs}), {self.spec.verdict.name}, solver: {solvers}"

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_previous": None}

    def _recover(self, arguments: Arguments, x: Tensor, y: Tensor, identity: int) -> Tensor:
        return _shape_output(arguments, self._canonical.recover(identity, x, y))

    def _choose_backends(self, extra: Mapping[str, Any]) -> tuple[Backend, ...]:
        return self._backends_of(self._solver, {**self._solver_args, **extra})

    def _backends_of(
        self, solver: str | Backend, options: Mapping[str, Any]
    ) -> tuple[Backend, ...]:
        """The solvers that a choice means, in the order in which they are tried."""
        structure = self._canonical.structure.reduced
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
        obstacle = choice.obstacle(self._canonical.structure)
        if obstacle:
            raise BackendError(f"{obstacle}.")
        return choice


def _require_choice(option: str, given: str, choices: tuple[str, ...]) -> None:
    if given not in choices:
        raise SpecificationError(f"{option} must be one of {choices}, got {given!r}.")


def _shape_output(arguments: Arguments, value: Tensor) -> Tensor:
    value = value.to(arguments.dtype)
    return value[0] if arguments.batch is None else value


def _check_problem(
    problem: cp.Problem,
    parameters: Sequence[cp.Parameter],
    variables: Sequence[cp.Variable],
) -> None:
    if not isinstance(problem, cp.Problem):
        raise SpecificationError(f"problem must be a cvxpy.Problem, got {type(problem).__name__}.")
    for name, given, kind in (
        ("parameters", parameters, cp.Parameter),
        ("variables", variables, cp.Variable),
    ):
        if not isinstance(given, (list, tuple)):
            raise SpecificationError(f"{name} must be a list or tuple, got {given!r}.")
        for position, item in enumerate(given):
            if not isinstance(item, kind):
                raise SpecificationError(
                    f"{name}[{position}] must be a cvxpy.{kind.__name__}, got {item!r}."
                )
    known = {parameter.id: parameter for parameter in problem.parameters()}
    passed = [parameter.id for parameter in parameters]
    missing = [parameter.name() for key, parameter in known.items() if key not in passed]
    if missing:
        raise SpecificationError(
            f"parameters lacks {', '.join(missing)}: list every parameter of the problem."
        )
    for position, parameter in enumerate(parameters):
        if parameter.id not in known:
            raise SpecificationError(
                f"parameters[{position}], {parameter.name()!r}, does not occur in the problem."
            )
        if passed.index(parameter.id) != position:
            raise SpecificationError(f"parameters lists {parameter.name()!r} twice.")
    available = {variable.id for variable in problem.variables()}
    available |= {dual.id for con in problem.constraints for dual in con.dual_variables}
    for position, variable in enumerate(variables):
        if variable.id not in available:
            raise SpecificationError(
                f"variables[{position}], {variable.name()!r}, is neither a variable of the "
                "problem nor a dual variable of one of its constraints."
            )
