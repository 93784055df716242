"""ECOS: an interior-point method for second-order and exponential cones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import scipy.sparse as sp

from declarative_cvx.backends.base import Capabilities, Point
from declarative_cvx.backends.elementwise import ElementwiseBackend, One
from declarative_cvx.cones import Cone
from declarative_cvx.host import Element
from declarative_cvx.status import Status

# ECOS's exit flags; those of 10 and more are the same at reduced accuracy.
_STATUS = {
    0: Status.OPTIMAL,
    10: Status.INACCURATE,
    1: Status.INFEASIBLE,
    11: Status.INFEASIBLE,
    2: Status.UNBOUNDED,
    12: Status.UNBOUNDED,
    -1: Status.ITERATION_LIMIT,
}


@dataclass(frozen=True, kw_only=True)
class ECOS(ElementwiseBackend):
    """Embedded conic solver (Domahidi et al. 2013). Its licence is GPL-3."""

    name: ClassVar[str] = "ECOS"
    capabilities: ClassVar[Capabilities] = Capabilities(
        cones=frozenset({"zero", "nonneg", "soc", "exp"}),
        quadratic=False,
        batched=False,
        warm_start=False,
        devices=("cpu",),
        package="ecos",
        licence="GPL-3.0",
    )

    tol: float = 1e-9  # at 1e-8 its certificates of infeasibility are only good to 1e-5

    @classmethod
    def native_settings(cls) -> frozenset[str]:
        return frozenset(
            ["abstol", "reltol", "feastol", "abstol_inacc", "reltol_inacc", "feastol_inacc"]
        )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.time_limit is not None:
            raise self.refusal("ECOS has no time limit; use max_iters")

    def solve_one(self, element: Element, start: Point | None) -> One:
        import ecos

        zero = element.cone.zero
        order = _ecos_order(element.cone)
        G = sp.csc_matrix(element.A[zero:][order])
        found = ecos.solve(
            element.q,
            G,
            element.b[zero:][order],
            {"l": element.cone.nonneg, "q": list(element.cone.soc), "e": element.cone.exp},
            A=sp.csc_matrix(element.A[:zero]) if zero else None,
            b=element.b[:zero] if zero else None,
            **self._options(),
        )
        y, s = np.zeros(element.b.size), np.zeros(element.b.size)
        y[:zero] = found["y"]
        y[zero + order], s[zero + order] = found["z"], found["s"]
        info = found["info"]
        return One(
            x=found["x"],
            y=y,
            s=s,
            status=_STATUS.get(info["exitFlag"], Status.NUMERICAL_ERROR),
            said=info["infostring"],
            iterations=int(info["iter"]),
        )

    def _options(self) -> dict[str, Any]:
        return {
            "abstol": self.tol,
            "reltol": self.tol,
            "feastol": self.tol,
            "max_iters": self.max_iters or 200,
            "verbose": self.verbose,
            **self.settings,
        }


def _ecos_order(cone: Cone) -> np.ndarray:
    """Row permutation of the rows after the zero cone: ECOS stores (x, z, y) for exp cones."""
    order = np.arange(cone.rows - cone.zero)
    start = cone.slice_of("exp").start - cone.zero
    for _ in range(cone.exp):
        order[start + 1 : start + 3] = [start + 2, start + 1]
        start += 3
    return order
