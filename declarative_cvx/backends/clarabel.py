"""Clarabel: an interior-point method for every cone."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np

from declarative_cvx.backends.base import SHARPEST, Backend, Capabilities, Point
from declarative_cvx.backends.elementwise import ElementwiseBackend, One
from declarative_cvx.cones import KINDS, Cone
from declarative_cvx.host import Element, upper_triangle_order
from declarative_cvx.status import Status

_STATUS = {
    "Solved": Status.OPTIMAL,
    "AlmostSolved": Status.INACCURATE,
    "PrimalInfeasible": Status.INFEASIBLE,
    "AlmostPrimalInfeasible": Status.INFEASIBLE,
    "DualInfeasible": Status.UNBOUNDED,
    "AlmostDualInfeasible": Status.UNBOUNDED,
    "MaxIterations": Status.ITERATION_LIMIT,
    "MaxTime": Status.TIME_LIMIT,
}
_TOLERANCES = ("tol_gap_abs", "tol_gap_rel", "tol_feas")


@dataclass(frozen=True, kw_only=True)
class Clarabel(ElementwiseBackend):
    """Interior-point method with a homogeneous embedding (Goulart and Chen 2024)."""

    name: ClassVar[str] = "Clarabel"
    capabilities: ClassVar[Capabilities] = Capabilities(
        cones=frozenset(KINDS),
        quadratic=True,
        batched=False,
        warm_start=False,
        devices=("cpu",),
        package="clarabel",
        licence="Apache-2.0",
    )
    aliases: ClassVar[dict[str, str]] = {"max_iter": "max_iters"}

    @classmethod
    def native_settings(cls) -> frozenset[str]:
        import clarabel

        return frozenset(n for n in dir(clarabel.DefaultSettings()) if not n.startswith("_"))

    def sharpened(self) -> Backend:
        return replace(self, tol=min(self.tol, SHARPEST))

    def solve_one(self, element: Element, start: Point | None) -> One:
        import clarabel

        order = upper_triangle_order(element.cone)
        solver = clarabel.DefaultSolver(
            element.P,
            element.q,
            element.A[order] if element.cone.psd else element.A,
            element.b[order],
            _cones(element.cone),
            self._options(),
        )
        found = solver.solve()
        y, s = np.empty(order.size), np.empty(order.size)
        y[order], s[order] = found.z, found.s
        return One(
            x=np.array(found.x),
            y=y,
            s=s,
            status=_STATUS.get(str(found.status), Status.NUMERICAL_ERROR),
            said=str(found.status),
            iterations=int(found.iterations),
        )

    def _options(self) -> Any:
        import clarabel

        settings = clarabel.DefaultSettings()
        settings.verbose = self.verbose
        settings.max_threads = 1  # the batch is what runs in parallel
        for tolerance in _TOLERANCES:
            setattr(settings, tolerance, self.tol)
        if self.max_iters is not None:
            settings.max_iter = self.max_iters
        if self.time_limit is not None:
            settings.time_limit = self.time_limit
        for name, value in self.settings.items():
            setattr(settings, name, value)
        return settings


def _cones(cone: Cone) -> list[Any]:
    import clarabel

    cones = [clarabel.ZeroConeT(cone.zero)] if cone.zero else []
    cones += [clarabel.NonnegativeConeT(cone.nonneg)] if cone.nonneg else []
    cones += [clarabel.SecondOrderConeT(dim) for dim in cone.soc]
    cones += [clarabel.PSDTriangleConeT(k) for k in cone.psd]
    cones += [clarabel.ExponentialConeT() for _ in range(cone.exp)]
    cones += [clarabel.PowerConeT(alpha) for alpha in cone.power]
    return cones
