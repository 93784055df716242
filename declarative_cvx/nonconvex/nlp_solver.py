"""Solvers of nonlinear programs that CVXPY drives: IPOPT, Uno, Knitro, COPT."""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, Self

import cvxpy as cp
import numpy as np

from declarative_cvx.errors import BackendError, MissingBackendError, nearest
from declarative_cvx.nonconvex.problem_solver import Found, ProblemSolver
from declarative_cvx.status import Status

_STATUS = {
    cp.OPTIMAL: Status.OPTIMAL,
    cp.OPTIMAL_INACCURATE: Status.INACCURATE,
    cp.USER_LIMIT: Status.ITERATION_LIMIT,
    # Without a certificate: somebody's word.
    cp.INFEASIBLE: Status.INACCURATE,
    cp.INFEASIBLE_INACCURATE: Status.INACCURATE,
    cp.UNBOUNDED: Status.INACCURATE,
    cp.UNBOUNDED_INACCURATE: Status.INACCURATE,
}


@dataclass(frozen=True, kw_only=True)
class NLPSolver(ProblemSolver):
    """A solver of nonlinear programs, through ``problem.solve(nlp=True)`` of CVXPY.

    It is given one element after the other, with numbers in the place of parameters, and starts
    from `Variable.value`, the previous call's solution or, with `restarts`, from random points.
    Its answers are sharpened, verified and differentiated like those of a user's own function.

    Attributes
    ----------
    tol : float
        Accuracy asked of the solver, by its own measure.
    max_iters : int or None
        Iteration limit; None is the solver's own default.
    verbose : bool
        Let the solver print its log.
    settings : mapping
        Further options by the solver's own names.
    """

    takes_start: ClassVar[bool] = True
    label: ClassVar[str]  # CVXPY's name
    package: ClassVar[str]
    module: ClassVar[str]
    tolerances: ClassVar[tuple[str, ...]]
    iteration_limit: ClassVar[str]
    silent: ClassVar[Mapping[str, Any]] = {}

    tol: float = 1e-8
    max_iters: int | None = None
    verbose: bool = False
    settings: Mapping[str, Any] = field(default_factory=dict)

    def __new__(cls, *args: Any, **options: Any) -> Self:
        known = [option.name for option in fields(cls)]
        for option in options:
            if option not in known:
                raise BackendError(
                    f"{cls.__name__} has no option {option!r}. {nearest(option, known)} Options "
                    "by the solver's own names go into settings={...}."
                )
        return super().__new__(cls)

    def __post_init__(self) -> None:
        if importlib.util.find_spec(self.module) is None:
            raise MissingBackendError(
                f"Solver {self.name} needs the package {self.package!r}, which is not installed: "
                f"pip install {self.package}"
            )
        if not isinstance(self.tol, (int, float)) or not self.tol > 0:
            raise BackendError(f"{self.name}: tol must be a positive number, got {self.tol!r}.")
        limit = self.max_iters
        if limit is not None and not (isinstance(limit, int) and limit >= 1):
            raise BackendError(
                f"{self.name}: max_iters must be an integer of at least 1, got {limit!r}."
            )
        for name, value in self.settings.items():
            self.check_setting(name, value)

    @property
    def name(self) -> str:
        return type(self).__name__

    @classmethod
    def configured(cls, options: Mapping[str, Any]) -> Self:
        """Build from a flat dictionary of options: fields and the solver's own names."""
        known = {option.name for option in fields(cls)}
        own = {name: value for name, value in options.items() if name not in known}
        settings = {**options.get("settings", {}), **own}
        given = {name: value for name, value in options.items() if name in known}
        return cls(**{**given, "settings": settings})

    def changed(self, options: Mapping[str, Any]) -> Self:
        if not options:
            return self
        now = {option.name: getattr(self, option.name) for option in fields(self)}
        settings = {**self.settings, **options.get("settings", {})}
        return type(self).configured({**now, **options, "settings": settings})

    def check_setting(self, name: str, value: Any) -> None:
        """Refuse a setting that the solver does not know, where it can be asked."""

    def refuse(self, name: str, value: Any) -> BackendError:
        return BackendError(f"{self.name} does not take the setting {name!r} with {value!r}.")

    def options(self) -> dict[str, Any]:
        """All options by the solver's own names."""
        found = dict[str, Any]({} if self.verbose else self.silent)
        found |= dict.fromkeys(self.tolerances, self.tol)
        if self.max_iters is not None:
            found[self.iteration_limit] = self.max_iters
        return {**found, **self.settings}

    def solve_one(self, problem: cp.Problem) -> Found:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what they warn of, verification finds out
            problem.solve(solver=self.label, nlp=True, verbose=self.verbose, **self.options())
        status = _STATUS.get(problem.status, Status.NUMERICAL_ERROR)
        said = "" if status is Status.OPTIMAL else f"{self.name} says {problem.status}"
        values = {
            variable.id: np.asarray(_dense(variable.value), dtype=float)
            for variable in problem.variables()
            if variable.value is not None
        }
        return Found(values if status in _HAS_POINT else {}, status, said)


_HAS_POINT = (Status.OPTIMAL, Status.INACCURATE)


def _dense(value: Any) -> Any:
    return value.toarray() if hasattr(value, "toarray") else value


@dataclass(frozen=True, kw_only=True)
class IPOPT(NLPSolver):
    """Interior-point method with a filter line search (Wächter and Biegler 2006)."""

    label, package, module = "IPOPT", "cyipopt", "cyipopt"
    tolerances, iteration_limit = ("tol",), "max_iter"
    silent: ClassVar[Mapping[str, Any]] = {"print_level": 0, "sb": "yes"}

    def check_setting(self, name: str, value: Any) -> None:
        import cyipopt

        class Nothing:
            def objective(self, x: np.ndarray) -> float:
                return 0.0

            def gradient(self, x: np.ndarray) -> np.ndarray:
                return 0 * x

        try:
            cyipopt.Problem(n=1, m=0, problem_obj=Nothing()).add_option(name, value)
        except TypeError as error:
            raise self.refuse(name, value) from error


@dataclass(frozen=True, kw_only=True)
class UNO(NLPSolver):
    """Sequential quadratic programming and other methods (Vanaret and Leyffer 2024)."""

    label, package, module = "UNO", "unopy", "unopy"
    tolerances, iteration_limit = ("primal_tolerance", "dual_tolerance"), "max_iterations"
    silent: ClassVar[Mapping[str, Any]] = {"logger": "SILENT"}

    def check_setting(self, name: str, value: Any) -> None:
        import unopy

        solver = unopy.UnoSolver()
        try:
            solver.set_preset(value) if name == "preset" else solver.set_option(name, value)
        except (KeyError, ValueError, TypeError, RuntimeError) as error:
            raise self.refuse(name, value) from error


@dataclass(frozen=True, kw_only=True)
class Knitro(NLPSolver):
    """Interior-point and active-set methods (Byrd, Nocedal and Waltz 2006); commercial."""

    label, package, module = "KNITRO", "knitro", "knitro"
    tolerances, iteration_limit = ("feastol", "opttol"), "maxit"


@dataclass(frozen=True, kw_only=True)
class COPT(NLPSolver):
    """Cardinal Optimizer's interior-point method; commercial."""

    label, package, module = "COPT", "coptpy", "coptpy"
    tolerances, iteration_limit = ("NLPTol",), "NLPIterLimit"


NLP_SOLVERS: dict[str, type[NLPSolver]] = {cls.__name__: cls for cls in (IPOPT, UNO, Knitro, COPT)}
