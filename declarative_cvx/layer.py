"""A problem as a torch module."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import cvxpy as cp
import torch
from torch import Tensor, nn

from declarative_cvx.backends import Backend
from declarative_cvx.derivative import Derivative
from declarative_cvx.dispatch import (
    Wishes,
    check_leaves,
    cvxpy_route,
    fixed_point_route,
    nonlinear_route,
    torch_form,
)
from declarative_cvx.errors import SolveError, SpecificationError
from declarative_cvx.nonconvex.fixed_points import FixedPointProblem
from declarative_cvx.nonconvex.solver_choice import Choice
from declarative_cvx.nonconvex.torch_problem import TorchProblem
from declarative_cvx.parameters import Arguments, ParameterSpec, bind_arguments, check_values
from declarative_cvx.route import Route
from declarative_cvx.solution import Solution
from declarative_cvx.specification import ProblemSpec, Verdict, classify


class DeclarativeLayer(nn.Module):
    """The solution of an optimisation problem, as a differentiable function of its parameters.

    Parameters
    ----------
    problem : cvxpy.Problem, TorchProblem or FixedPointProblem
        Convex or, with ``gp=True``, a geometric program (DGP): solved by cone solvers. Where
        parameters do not stand as CVXPY's rules (DPP) want it, what depends on parameters only is
        computed beforehand. Or any problem of smooth functions (DNLP), of which a local minimum
        is found. `spec` says which of them it is. It is not changed. Or a problem written in
        torch, treated like the latter. Or a fixed point, without an objective: its optimal value
        is zero.
    parameters : sequence of cvxpy.Parameter
        All parameters of the problem, in the order in which tensors will be passed. A
        `TorchProblem` or `FixedPointProblem` names them itself.
    variables : sequence of cvxpy.Variable
        What the layer returns: variables of the problem, or dual variables of its constraints
        (``constraint.dual_variables[0]``). For a `TorchProblem` names: of variables (by default
        all of them), and "equality", "inequality", "lower", "upper" for multipliers.
    solver : str, Backend, Minimizer, NLPSolver, ForwardSolver or callable, optional
        "auto", a solver's name, or an object with its options, such as ``Clarabel(tol=1e-9)`` or,
        for problems that are not convex, ``InteriorPoint(max_iters=200)`` or, through CVXPY,
        ``IPOPT(max_iters=200)``. "auto" tries several in turn, element by element, and has a
        problem that fits one of the fast kernels (robust pooling, projection) solved by it. A
        function from a batch of parameter values to the variables' values is a solver too: see
        `ForwardSolver`. What NLP solvers and functions find is verified, and differentiated
        through the problem.
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
    nonconvex : bool, optional
        False refuses a problem that is not DPP (DGP).
    restarts : int, optional
        For problems that are not convex: so many random starts besides `Variable.value`, always
        the same ones, drawn for the variables that have sample bounds, or bounds and no value.
        The best minimum of each element is kept. Where the minimum is global anyway (convex
        problems, pooling of numbers, projections) there is nothing for them to find.

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

    # The solver that options of a single call are for where the constructor was told "auto".
    _optional_solver: ClassVar[str] = "auto"

    def __init__(
        self,
        problem: cp.Problem | TorchProblem | FixedPointProblem,
        parameters: Sequence[cp.Parameter] | None = None,
        variables: Sequence[cp.Variable] | Sequence[str] | None = None,
        solver: Backend | Choice = "auto",
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
        nonconvex: bool = True,
        restarts: int = 0,
    ) -> None:
        super().__init__()
        _require_choice("on_failure", on_failure, ("raise", "nan"))
        _require_choice("on_irregular", on_irregular, ("warn", "ignore", "raise"))
        if not isinstance(restarts, int) or restarts < 0:
            raise SpecificationError(f"restarts must be an integer from 0 on, got {restarts!r}.")
        self.on_failure = on_failure
        self.warm_start, self.optimal_value = warm_start, optimal_value
        wishes = Wishes(
            solver=solver,
            optional_solver=self._optional_solver,
            solver_args=dict(solver_args or {}, **({"verbose": True} if verbose else {})),
            derivative=derivative,
            on_irregular=on_irregular,
            restarts=restarts,
            gp=gp,
            canon_backend=canon_backend,
            nonconvex=nonconvex,
        )
        self._set_up(problem, parameters, variables, wishes)
        self._declares = any(spec.declares for spec in self._parameters_spec)
        self._previous: Any = None

    def _set_up(
        self,
        problem: cp.Problem | TorchProblem | FixedPointProblem,
        parameters: Any,
        variables: Any,
        wishes: Wishes,
    ) -> None:
        self._route: Route
        if isinstance(problem, TorchProblem):
            form = torch_form(problem, parameters, variables, wishes)
            self.spec, self._route = ProblemSpec(Verdict.TORCH), nonlinear_route(form, wishes)
            self._parameters_spec, self._output_names = form.parameters, form.outputs
            for name, module in problem.modules.items():
                self.add_module(name, module)
        elif isinstance(problem, FixedPointProblem):
            self.spec = ProblemSpec(Verdict.FIXED_POINT)
            self._route = fixed_point_route(problem, parameters, variables, wishes)
            self._parameters_spec = tuple(
                ParameterSpec(name, tuple(shape)) for name, shape in problem.parameters.items()
            )
            self._output_names = ("x",)
            if isinstance(problem.function, nn.Module):
                self.function = problem.function
        else:
            check_leaves(problem, parameters, variables)
            self.spec = classify(problem, wishes.gp)
            self._parameters_spec = tuple(ParameterSpec.of(parameter) for parameter in parameters)
            self._output_names = tuple(variable.name() for variable in variables)
            self._route = cvxpy_route(problem, self.spec, parameters, variables, wishes)

    @torch.compiler.disable  # solvers are not to be traced: torch.compile breaks its graph here
    def forward(
        self,
        *parameters: Tensor,
        solver_args: Mapping[str, Any] | None = None,
        warm_start: bool | None = None,
        start: Mapping[Any, Tensor] | None = None,
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
        start : mapping, optional
            For problems that are minimised in torch, where to start in this call: from variables
            (names, for a `TorchProblem`) to values, with or without the batch dimension. The other
            variables start where they always do.

        Returns
        -------
        tuple of Tensor
            Values of the `variables`, each ``(batch, *shape)``, or ``(*shape)`` if no parameter
            is batched, in the parameters' common dtype and on their device; with
            ``optimal_value=True`` the optimal value last.

        Raises
        ------
        ParameterError
            If a tensor does not fit its parameter.
        SolveError
            If an element is not solved and ``on_failure="raise"``.
        """
        arguments = self._bound(parameters)
        special = solver_args or start is not None or warm_start or self.warm_start
        if not (special or self.optimal_value):
            if self._declares:
                check_values(self._parameters_spec, parameters)
            outputs = self._route.outputs(arguments)
            if outputs is not None:
                return outputs
        solution = self._solve(arguments, solver_args, warm_start, start)
        if self.on_failure == "raise" and not solution.all_solved:
            raise SolveError(solution.describe_failures())
        return solution.variables

    @torch.compiler.disable
    def solve(
        self,
        *parameters: Tensor,
        solver_args: Mapping[str, Any] | None = None,
        warm_start: bool | None = None,
        start: Mapping[Any, Tensor] | None = None,
    ) -> Solution:
        """As calling the layer, but returning the full report; failures do not raise.

        Returns
        -------
        Solution
            Its values are differentiable like the layer's outputs.
        """
        return self._solve(self._bound(parameters), solver_args, warm_start, start)

    def _bound(self, parameters: tuple[Tensor, ...]) -> Arguments:
        like = () if parameters else tuple(self.parameters())
        return bind_arguments(self._parameters_spec, parameters, like)

    def _solve(
        self,
        arguments: Arguments,
        solver_args: Mapping[str, Any] | None,
        warm_start: bool | None,
        start: Mapping[Any, Tensor] | None,
    ) -> Solution:
        check_values(self._parameters_spec, arguments.values)
        warm = self.warm_start if warm_start is None else warm_start
        state = self._previous if warm else None
        if start is not None:
            state = self._route.state_at(arguments, start)
        solution = self._route.solve(arguments, solver_args, state)
        if warm:
            self._previous = solution.state
        if self.optimal_value:
            return replace(solution, variables=(*solution.variables, solution.value))
        return solution

    def extra_repr(self) -> str:
        inputs = ", ".join(f"{spec.name}{list(spec.shape)}" for spec in self._parameters_spec)
        outputs = ", ".join(self._output_names)
        solvers = ", ".join(self._route.solvers)
        return f"({inputs}) -> ({outputs}), {self.spec.verdict.name}, solver: {solvers}"

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_previous": None}


def _require_choice(option: str, given: str, choices: tuple[str, ...]) -> None:
    if given not in choices:
        raise SpecificationError(f"{option} must be one of {choices}, got {given!r}.")
