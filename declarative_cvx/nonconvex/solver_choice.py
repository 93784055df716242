"""How a user's choice of solver becomes one, for problems that are minimised in torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields, replace
from typing import Any

from declarative_cvx.errors import BackendError, nearest
from declarative_cvx.nonconvex.forward_solver import ForwardSolver
from declarative_cvx.nonconvex.minimization.interior_point import InteriorPoint
from declarative_cvx.nonconvex.minimization.lbfgs import LBFGS
from declarative_cvx.nonconvex.minimization.minimizer import Minimizer
from declarative_cvx.nonconvex.minimization.trust_region import TrustRegion
from declarative_cvx.nonconvex.nlp_solver import NLP_SOLVERS
from declarative_cvx.nonconvex.proposer import Proposer

MINIMIZERS: dict[str, type[Minimizer]] = {
    cls.name: cls for cls in (TrustRegion, LBFGS, InteriorPoint)
}
# What a solver may be given as.
Choice = str | Minimizer | Proposer | Callable[..., Any]


def chosen(choice: Choice, options: Mapping[str, Any]) -> Minimizer | Proposer | None:
    """The solver that a choice means; None is to choose a minimiser by the program.

    Raises
    ------
    BackendError
        If it is none, or has no such options.
    """
    if isinstance(choice, str):
        return _named(choice, options)
    if isinstance(choice, (Minimizer, Proposer)):
        return changed(choice, options)
    if isinstance(choice, type) or not callable(choice):
        raise BackendError(
            "solver must be a name, a Minimizer, an NLPSolver or a function for a problem that "
            f"is not convex (DPP), got {choice!r}."
        )
    return changed(ForwardSolver(choice), options)


def proposes(choice: object) -> bool:
    """Whether a choice means a solver of points for any problem, convex or not."""
    if isinstance(choice, str):
        return choice.lower() in (name.lower() for name in NLP_SOLVERS)
    if isinstance(choice, Proposer):
        return True
    return callable(choice) and not isinstance(choice, type)


def _named(name: str, options: Mapping[str, Any]) -> Minimizer | Proposer | None:
    if name.lower() == "auto":
        return None if not options else changed(InteriorPoint(), options)
    everything: dict[str, Any] = {**MINIMIZERS, **NLP_SOLVERS}
    by_lower = {known.lower(): known for known in everything}
    if name.lower() not in by_lower:
        raise BackendError(
            f"{name!r} is no solver for problems that are not convex (DPP). "
            f"{nearest(name, ['auto', *everything])}"
        )
    known = by_lower[name.lower()]
    if known in NLP_SOLVERS:
        return NLP_SOLVERS[known].configured(options)
    return changed(MINIMIZERS[known](), options)


def changed(solver: Minimizer | Proposer, options: Mapping[str, Any]) -> Minimizer | Proposer:
    """The same solver with some options changed."""
    if isinstance(solver, Proposer):
        return solver.changed(options)
    known = [option.name for option in fields(solver)]
    for option in options:
        if option not in known:
            raise BackendError(f"{solver.name} has no option {option!r}. {nearest(option, known)}")
    return replace(solver, **options)
