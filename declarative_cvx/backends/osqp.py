"""OSQP: operator splitting for quadratic programs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from declarative_cvx.backends.base import Capabilities, Point
from declarative_cvx.backends.elementwise import ElementwiseBackend, One
from declarative_cvx.host import Element
from declarative_cvx.status import Status

# OSQP's exit codes. Inaccurate certificates count as claims: the library checks them.
_STATUS = {
    1: Status.OPTIMAL,
    2: Status.INACCURATE,
    3: Status.INFEASIBLE,
    4: Status.INFEASIBLE,
    5: Status.UNBOUNDED,
    6: Status.UNBOUNDED,
    7: Status.ITERATION_LIMIT,
    8: Status.TIME_LIMIT,
}


@dataclass(frozen=True, kw_only=True)
class OSQP(ElementwiseBackend):
    """Operator splitting for quadratic programs (Stellato et al. 2020), with polishing."""

    name: ClassVar[str] = "OSQP"
    capabilities: ClassVar[Capabilities] = Capabilities(
        cones=frozenset({"zero", "nonneg"}),
        quadratic=True,
        batched=False,
        warm_start=True,
        devices=("cpu",),
        package="osqp",
        licence="Apache-2.0",
    )
    aliases: ClassVar[dict[str, str]] = {
        "max_iter": "max_iters",
        "polish": "polishing",
        "warm_start": "warm_starting",
    }

    @classmethod
    def native_settings(cls) -> frozenset[str]:
        import osqp

        settings = osqp.OSQP().ext.OSQPSettings
        return frozenset(name for name in dir(settings) if not name.startswith("_"))

    def solve_one(self, element: Element, start: Point | None) -> One:
        import osqp

        m = element.b.size
        lower = np.full(m, -np.inf)
        lower[: element.cone.zero] = element.b[: element.cone.zero]
        solver = osqp.OSQP()
        solver.setup(element.P, element.q, element.A, lower, element.b, **self._options())
        if start is not None:
            solver.warm_start(x=start.x, y=start.y)
        found = solver.solve(raise_error=False)
        status = _STATUS.get(int(found.info.status_val), Status.NUMERICAL_ERROR)
        x, y = found.x, found.y
        if status is Status.INFEASIBLE:
            y = found.prim_inf_cert
        if status is Status.UNBOUNDED:
            x = found.dual_inf_cert
        slack = element.b - element.A @ x if np.isfinite(x).all() else None
        return One(
            x=x,
            y=y,
            s=slack,
            status=status,
            said=str(found.info.status),
            iterations=int(found.info.iter),
        )

    def _options(self) -> dict[str, Any]:
        options: dict[str, Any] = {
            "eps_abs": self.tol,
            "eps_rel": self.tol,
            "eps_prim_inf": self.tol,
            "eps_dual_inf": self.tol,
            "max_iter": self.max_iters or 100_000,
            "verbose": self.verbose,
            "polishing": True,
        }
        if self.time_limit is not None:
            options["time_limit"] = self.time_limit
        return {**options, **self.settings}
