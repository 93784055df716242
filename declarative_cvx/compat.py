"""The interface of `cvxpylayers.torch`, for code that wants to change one import only.

``from cvxpylayers.torch import CvxpyLayer`` becomes
``from declarative_cvx.compat import CvxpyLayer``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import cvxpy as cp
from torch import Tensor

from declarative_cvx.backends import Backend
from declarative_cvx.errors import BackendError
from declarative_cvx.layer import DeclarativeLayer

# Options of cvxpylayers' default solver, diffcp, that choose or speed up its derivative. Here the
# derivative is exact and a thing apart, so that they have nothing to choose.
_DERIVATIVE_OPTIONS = ("mode", "n_jobs_backward")
_EXACT_MODES = ("lsqr", "lsmr", "dense")


class CvxpyLayer(DeclarativeLayer):
    """`DeclarativeLayer` with the signature of ``cvxpylayers.torch.CvxpyLayer``.

    Parameters
    ----------
    problem, parameters, variables
        As for `DeclarativeLayer`.
    solver : str or Backend, optional
        Solver by its CVXPY name. None is "auto"; with `solver_args` it is diffcp, whose options
        they are in cvxpylayers.
    gp, verbose, canon_backend
        As for `DeclarativeLayer`.
    solver_args : mapping, optional
        Options of the solver, by its own or cvxpylayers' names. They take effect, and a
        misspelt one is an error.
    """

    _optional_solver = "diffcp"

    def __init__(
        self,
        problem: cp.Problem,
        parameters: Sequence[cp.Parameter],
        variables: Sequence[cp.Variable],
        solver: str | Backend | None = None,
        gp: bool = False,
        verbose: bool = False,
        canon_backend: str | None = None,
        solver_args: Mapping[str, Any] | None = None,
    ) -> None:
        options = _translate(solver_args)
        super().__init__(
            problem,
            parameters,
            variables,
            solver="auto" if solver is None and not options else solver or "diffcp",
            gp=gp,
            verbose=verbose,
            canon_backend=canon_backend,
            solver_args=options,
            nonconvex=False,
        )

    def forward(
        self,
        *params: Tensor,
        solver_args: Mapping[str, Any] | None = None,
        warm_start: bool | None = False,
    ) -> tuple[Tensor, ...]:
        """Solve; see `DeclarativeLayer.forward`.

        Parameters
        ----------
        *params : Tensor
        solver_args : mapping, optional
            Options for this call, over those of the constructor.
        warm_start : bool, optional
            Start from the solution of the last call that asked for it.
        """
        return super().forward(*params, solver_args=_translate(solver_args), warm_start=warm_start)


def _translate(solver_args: Mapping[str, Any] | None) -> dict[str, Any]:
    """Cvxpylayers' options for diffcp in the words of this library; others unchanged."""
    options = dict(solver_args or {})
    mode = options.get("mode", "dense")
    if mode not in _EXACT_MODES:
        raise BackendError(
            f"mode={mode!r} is not offered: it replaces the derivative by an approximation. "
            f"Leave it out, or use one of {_EXACT_MODES}, which all give the exact derivative."
        )
    for option in _DERIVATIVE_OPTIONS:
        options.pop(option, None)
    if options.get("n_jobs_forward") == -1:
        options["n_jobs_forward"] = None
    return options
