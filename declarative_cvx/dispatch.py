"""Which way a problem is solved."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import cvxpy as cp

from declarative_cvx.assertions import check_assertions
from declarative_cvx.backends import BACKENDS, Backend
from declarative_cvx.computed_route import ComputedRoute
from declarative_cvx.conic_points import ConicSolver
from declarative_cvx.convex import ConvexRoute
from declarative_cvx.derivative import Derivative
from declarative_cvx.errors import BackendError, SpecificationError
from declarative_cvx.nonconvex.cvxpy_form import CvxpyForm
from declarative_cvx.nonconvex.fixed_points import FixedPointProblem
from declarative_cvx.nonconvex.fixed_points.iteration import METHODS
from declarative_cvx.nonconvex.fixed_points.route import FixedPointRoute
from declarative_cvx.nonconvex.form import Form
from declarative_cvx.nonconvex.kernel_route import KernelRoute
from declarative_cvx.nonconvex.nonlinear_route import NonlinearRoute
from declarative_cvx.nonconvex.solver_choice import Choice, proposes
from declarative_cvx.nonconvex.torch_form import TorchForm
from declarative_cvx.nonconvex.torch_problem import TorchProblem
from declarative_cvx.route import Route
from declarative_cvx.specification import ProblemSpec, Verdict, require_convex, require_smooth


@dataclass(frozen=True)
class Wishes:
    """What the constructor of `DeclarativeLayer` was told about how to solve.

    Attributes
    ----------
    optional_solver : str
        The solver that options of a single call are for where `solver` is "auto".
    """

    solver: Backend | Choice
    optional_solver: str
    solver_args: Mapping[str, Any]
    derivative: str | Derivative
    on_irregular: str
    restarts: int
    gp: bool
    canon_backend: str | None
    nonconvex: bool


def cvxpy_route(
    problem: cp.Problem,
    spec: ProblemSpec,
    parameters: Sequence[cp.Parameter],
    variables: Sequence[cp.Variable],
    wishes: Wishes,
) -> Route:
    """The way to solve a problem written in CVXPY, of which `spec` says what it is."""
    if _fits_kernel(problem, spec, variables, wishes):
        assert spec.pattern is not None
        return KernelRoute(
            problem, spec.pattern, parameters, variables, wishes.on_irregular, wishes.restarts
        )
    convex = spec.is_convex or not wishes.nonconvex or wishes.gp
    if convex and not proposes(wishes.solver):
        require_convex(spec, wishes.gp)
        return _convex_route(problem, spec, parameters, variables, wishes)
    if spec.rewriting is not None and wishes.nonconvex and _means_cone_solver(wishes.solver):
        return _convex_route(problem, spec, parameters, variables, wishes)
    require_smooth(spec)
    if not wishes.nonconvex:
        require_convex(spec, wishes.gp)
    _require_no_cone_options(wishes)
    if spec.verdict is Verdict.CONVEX and _means_cone_solver(wishes.solver):
        conic = ConicSolver(wishes.solver, wishes.solver_args)  # type: ignore[arg-type]
        wishes = replace(wishes, solver=conic, solver_args={})
    return nonlinear_route(CvxpyForm(problem, parameters, variables), wishes)


def _convex_route(
    problem: cp.Problem,
    spec: ProblemSpec,
    parameters: Sequence[cp.Parameter],
    variables: Sequence[cp.Variable],
    wishes: Wishes,
) -> ConvexRoute:
    """Cone programs, of the problem as it is or as it had to be rewritten."""
    check_assertions(problem)
    options: dict[str, Any] = {
        "solver": wishes.solver,  # a Minimizer is refused there
        "optional_solver": wishes.optional_solver,
        "solver_args": wishes.solver_args,
        "derivative": wishes.derivative,
        "on_irregular": wishes.on_irregular,
        "gp": wishes.gp,
        "canon_backend": wishes.canon_backend,
    }
    if spec.rewriting is not None:
        try:
            return ComputedRoute(spec.rewriting, parameters, variables, **options)
        except SpecificationError:  # an atom that torch does not know, but cone programs may
            if not spec.is_convex:
                raise
    return ConvexRoute(problem, parameters, variables, **options)


def nonlinear_route(form: Form, wishes: Wishes) -> NonlinearRoute:
    """Minimisation in torch."""
    return NonlinearRoute(
        form,
        solver=wishes.solver,  # type: ignore[arg-type]  # a Backend is refused there
        solver_args=wishes.solver_args,
        on_irregular=wishes.on_irregular,
        restarts=wishes.restarts,
    )


def _means_cone_solver(choice: Backend | Choice) -> bool:
    if isinstance(choice, str):
        return choice.lower() in ("auto", *(name.lower() for name in BACKENDS))
    return isinstance(choice, Backend)


def torch_form(
    problem: TorchProblem, parameters: Any, variables: Sequence[str] | None, wishes: Wishes
) -> TorchForm:
    """A problem written in torch; options that would do nothing are refused."""
    _refuse_options_of_cvxpy(problem, parameters, wishes)
    return TorchForm(problem, variables, wishes.restarts)


def fixed_point_route(
    problem: FixedPointProblem, parameters: Any, variables: Any, wishes: Wishes
) -> FixedPointRoute:
    """Fixed points; options that would do nothing are refused."""
    _refuse_options_of_cvxpy(problem, parameters, wishes)
    if variables is not None or wishes.restarts:
        raise SpecificationError(
            "a FixedPointProblem has one variable, and one solution that is looked for: leave "
            "variables= and restarts= out."
        )
    if not isinstance(wishes.solver, str):
        raise BackendError(
            f"solver={wishes.solver!r} is for problems with an objective; for a fixed point name a "
            f"method: {', '.join(METHODS)}."
        )
    changed = problem if wishes.solver == "auto" else replace(problem, method=wishes.solver)
    return FixedPointRoute(changed, wishes.on_irregular, wishes.solver_args)


def _refuse_options_of_cvxpy(problem: Any, parameters: Any, wishes: Wishes) -> None:
    for option, given, default in (
        ("parameters", parameters, None),
        ("derivative", wishes.derivative, "auto"),
        ("gp", wishes.gp, False),
        ("canon_backend", wishes.canon_backend, None),
        ("nonconvex", wishes.nonconvex, True),
    ):
        if given != default:
            raise SpecificationError(
                f"{option}={given!r} is for problems written in CVXPY; a "
                f"{type(problem).__name__}, which names its parameters itself, is solved without."
            )


def _fits_kernel(
    problem: cp.Problem, spec: ProblemSpec, variables: Sequence[cp.Variable], wishes: Wishes
) -> bool:
    """Whether a fast kernel gives what is asked for, and nobody asks for anything else."""
    automatic = wishes.solver == wishes.derivative == "auto" and not wishes.solver_args
    allowed = wishes.nonconvex or spec.is_convex
    primal = {variable.id for variable in problem.variables()}
    return (
        spec.pattern is not None and automatic and allowed and primal >= {v.id for v in variables}
    )


def _require_no_cone_options(wishes: Wishes) -> None:
    if wishes.gp:
        raise BackendError(
            f"gp=True is for cone solvers; with solver={wishes.solver!r} write the problem "
            "without it."
        )
    if wishes.derivative != "auto":
        raise BackendError(
            f"derivative={wishes.derivative!r} is for convex problems (DPP); for others there is "
            'one, that of the optimality conditions: leave derivative="auto".'
        )


def check_leaves(problem: cp.Problem, parameters: Any, variables: Any) -> None:
    """Refuse parameters and variables that are not exactly the problem's, or none of it.

    Raises
    ------
    SpecificationError
    """
    if not isinstance(problem, cp.Problem):
        raise SpecificationError(
            f"problem must be a cvxpy.Problem or a TorchProblem, got {type(problem).__name__}."
        )
    _require_kind("parameters", parameters, cp.Parameter)
    _require_kind("variables", variables, cp.Variable)
    _require_all_parameters(problem, parameters)
    available = {variable.id for variable in problem.variables()}
    available |= {dual.id for con in problem.constraints for dual in con.dual_variables}
    for position, variable in enumerate(variables):
        if variable.id not in available:
            raise SpecificationError(
                f"variables[{position}], {variable.name()!r}, is neither a variable of the "
                "problem nor a dual variable of one of its constraints."
            )


def _require_kind(name: str, given: Any, kind: type) -> None:
    if not isinstance(given, (list, tuple)):
        raise SpecificationError(f"{name} must be a list or tuple, got {given!r}.")
    for position, item in enumerate(given):
        if not isinstance(item, kind):
            raise SpecificationError(
                f"{name}[{position}] must be a cvxpy.{kind.__name__}, got {item!r}."
            )


def _require_all_parameters(problem: cp.Problem, parameters: Sequence[cp.Parameter]) -> None:
    bounds = [end for variable in problem.variables() for end in variable.bounds or ()]
    trees = [problem, *(end for end in bounds if isinstance(end, cp.Expression))]
    known = {parameter.id: parameter for tree in trees for parameter in tree.parameters()}
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
