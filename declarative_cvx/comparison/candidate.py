"""What is compared: a solver and a derivative."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from declarative_cvx.backends import Backend, backend_named
from declarative_cvx.backends.table import BACKENDS, installed
from declarative_cvx.derivative import DERIVATIVES
from declarative_cvx.errors import BackendError, MissingBackendError, nearest
from declarative_cvx.nonconvex.minimization.minimizer import Minimizer
from declarative_cvx.nonconvex.nlp_solver import NLP_SOLVERS
from declarative_cvx.nonconvex.proposer import Proposer
from declarative_cvx.nonconvex.solver_choice import MINIMIZERS
from declarative_cvx.specification import ProblemSpec, Verdict

Solver = str | Backend | Minimizer | Proposer


@dataclass(frozen=True)
class Candidate:
    """A solver and a derivative, as `DeclarativeLayer` takes them.

    Attributes
    ----------
    solver : str, Backend, Minimizer or NLPSolver
    derivative : str
    """

    solver: Solver
    derivative: str

    @property
    def name(self) -> str:
        """The solver's name, without options."""
        return self.solver if isinstance(self.solver, str) else self.solver.name

    @property
    def label(self) -> str:
        """The solver with those of its options that are not the default."""
        return self.label_without()

    def label_without(self, *options: str) -> str:
        """The label without some options."""
        if isinstance(self.solver, str):
            return self.solver
        changes = [change for change in _changes(self.solver) if change[0] not in options]
        changed = [f"{key}={value!r}" for key, value in changes]
        return f"{self.name}({', '.join(changed)})" if changed else self.name

    def limited(self, seconds: float | None) -> Candidate:
        """With a time limit for each problem, where the solver has one and none was set."""
        if not isinstance(self.solver, Backend) or self.solver.time_limit or seconds is None:
            return self
        try:
            return replace(self, solver=replace(self.solver, time_limit=seconds))
        except BackendError:  # the solver has no time limit
            return self

    def with_tolerance(self, tol: float) -> Candidate:
        """With another tolerance, as far as the solver has one."""
        if isinstance(self.solver, str) or not hasattr(self.solver, "tol"):
            return self
        changed: Any = replace(self.solver, tol=tol)  # type: ignore[type-var]
        return replace(self, solver=changed)


def _changes(solver: Any) -> list[tuple[str, Any]]:
    fields = dataclasses.fields(solver)
    pairs = [(field, getattr(solver, field.name)) for field in fields]
    return [(field.name, value) for field, value in pairs if value != _default(field)]


def _default(field: dataclasses.Field[Any]) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default


def candidates(
    spec: ProblemSpec,
    solvers: Sequence[Solver] | None,
    derivatives: Sequence[str] | None,
) -> list[Candidate]:
    """What to compare on a problem, given the user's choice.

    Parameters
    ----------
    spec : ProblemSpec
        What the problem is.
    solvers : sequence, optional
        Names or objects. By default "auto" and every solver that is installed and takes such
        problems, with the library's refinement and, cone solvers, without it.
    derivatives : sequence of str, optional
        By default all that there are.

    Raises
    ------
    BackendError
        For a name that is not known.
    """
    chosen = _default_solvers(spec) if solvers is None else [_named(s, spec) for s in solvers]
    known = list(DERIVATIVES) if spec.is_convex else ["auto"]
    for name in derivatives or ():
        if name not in [*DERIVATIVES, "auto"]:
            raise BackendError(f"Unknown derivative {name!r}. {nearest(name, DERIVATIVES)}")
    return [Candidate(solver, name) for solver in chosen for name in derivatives or known]


def _default_solvers(spec: ProblemSpec) -> list[Solver]:
    there: list[Solver] = [backend() for backend in installed().values()]
    if spec.is_convex:
        raw: list[Solver] = [backend(refine=False) for backend in installed().values()]
        return ["auto", *there, *raw]
    minimizers: list[Solver] = ["auto", *(minimizer() for minimizer in MINIMIZERS.values())]
    if spec.verdict is Verdict.TORCH:
        return minimizers
    cones = there if spec.verdict is Verdict.CONVEX else []
    return [*minimizers, *cones, *_nlp_solvers()]


def _nlp_solvers() -> list[Solver]:
    """Those whose packages are installed."""
    found: list[Solver] = []
    for solver in NLP_SOLVERS.values():
        with contextlib.suppress(MissingBackendError):
            found.append(solver())
    return found


def _named(solver: Solver, spec: ProblemSpec) -> Solver:
    """A solver's name as an object with its default options."""
    if not isinstance(solver, str) or solver.lower() == "auto":
        return solver
    cones = spec.is_convex or spec.verdict is Verdict.CONVEX
    makers: dict[str, Any] = {**NLP_SOLVERS, **({} if spec.is_convex else MINIMIZERS)}
    makers |= installed() if cones else {}
    by_name = {name.lower(): maker for name, maker in makers.items()}
    if solver.lower() not in by_name:
        known = solver.lower() in (name.lower() for name in BACKENDS)
        if known and cones:
            backend_named(solver)  # raises: it is not installed
        hint = " It solves cone programs, and this problem is none." if known else ""
        raise BackendError(f"Unknown solver {solver!r}.{hint} {nearest(solver, ['auto', *makers])}")
    made: Solver = by_name[solver.lower()]()
    return made
