"""diffcp: SCS, ECOS or Clarabel behind one function, with a derivative of its own."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any, ClassVar

from declarative_cvx.backends.base import Capabilities, Point
from declarative_cvx.backends.elementwise import ElementwiseBackend, One
from declarative_cvx.backends.scs import scs_cone
from declarative_cvx.host import Element
from declarative_cvx.program import Structure
from declarative_cvx.status import Status

_STATUS = {
    "solved": Status.OPTIMAL,
    "optimal": Status.OPTIMAL,
    "optimal inaccurate": Status.INACCURATE,
    "infeasible": Status.INFEASIBLE,
    "unbounded": Status.UNBOUNDED,
}
# What each method calls its tolerances and its iteration limit.
_NAMES = {
    "SCS": (("eps_abs", "eps_rel"), "max_iters"),
    "ECOS": (("abstol", "reltol", "feastol"), "max_iters"),
    "Clarabel": (("tol_gap_abs", "tol_gap_rel", "tol_feas"), "max_iter"),
}


@dataclass(frozen=True, kw_only=True)
class DIFFCP(ElementwiseBackend):
    """diffcp (Agrawal et al. 2019). With it, ``derivative="auto"`` means diffcp's derivative.

    Attributes
    ----------
    solve_method : {"SCS", "ECOS", "Clarabel"}
        The solver that diffcp calls.
    """

    name: ClassVar[str] = "diffcp"
    capabilities: ClassVar[Capabilities] = Capabilities(
        cones=frozenset({"zero", "nonneg", "soc", "psd", "exp"}),
        quadratic=False,
        batched=False,
        warm_start=True,
        devices=("cpu",),
        package="diffcp",
        licence="Apache-2.0",
    )
    aliases: ClassVar[dict[str, str]] = {"eps": "tol", "n_jobs_forward": "threads"}

    solve_method: str = "SCS"

    @classmethod
    def native_settings(cls) -> frozenset[str]:
        names = {name for tolerances, _ in _NAMES.values() for name in tolerances}
        return frozenset(names | {"acceleration_lookback", "scale", "normalize", "rho_x", "alpha"})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.solve_method not in _NAMES:
            raise self.refusal(
                f"solve_method must be one of {tuple(_NAMES)}, got {self.solve_method!r}"
            )
        if self.time_limit is not None:
            raise self.refusal("diffcp has no time limit; use max_iters")

    def obstacle(self, structure: Structure) -> str | None:
        cone = structure.cone
        if not structure.rows and not structure.P.nnz:
            return "diffcp does not take linear problems without constraints"
        if self.solve_method == "ECOS" and cone.kinds & {"psd", "exp"}:
            return "diffcp with ECOS takes no psd or exp cone; use DIFFCP(solve_method='SCS')"
        if self.solve_method == "Clarabel" and any(k >= 4 for k in cone.psd):
            return (
                "diffcp with Clarabel returns the duals of semidefinite cones of order 4 and more "
                "in the wrong order; use DIFFCP(solve_method='SCS')"
            )
        return super().obstacle(structure)

    def solve_one(self, element: Element, start: Point | None) -> One:
        from diffcp.cone_program import solve_internal

        warm = (start.x, start.y, start.s) if start and self.solve_method == "SCS" else None
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the status says the same
            found = solve_internal(
                element.A,
                element.b,
                element.q,
                {key: value for key, value in scs_cone(element.cone).items() if key != "p"},
                solve_method=self.solve_method,
                warm_start=warm,
                raise_on_error=False,
                **self._options(),
            )
        said = str(found["info"]["status"])
        return One(
            x=found["x"],
            y=found["y"],
            s=found["s"],
            status=_STATUS.get(said.lower(), _limit_or_error(said)),
            said=said,
            iterations=int(found["info"]["iter"]),
        )

    def _options(self) -> dict[str, Any]:
        tolerances, limit = _NAMES[self.solve_method]
        options: dict[str, Any] = dict.fromkeys(tolerances, self.tol)
        if self.max_iters is not None or self.solve_method == "SCS":
            options[limit] = self.max_iters or 100_000
        return {**options, "verbose": self.verbose, **self.settings}


def _limit_or_error(said: str) -> Status:
    limit = "inaccurate" in said.lower() or "limit" in said.lower()
    return Status.ITERATION_LIMIT if limit else Status.NUMERICAL_ERROR
