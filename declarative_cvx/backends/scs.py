"""SCS: operator splitting on the homogeneous self-dual embedding."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from declarative_cvx.backends.base import Capabilities, Point
from declarative_cvx.backends.elementwise import ElementwiseBackend, One
from declarative_cvx.cones import KINDS, Cone
from declarative_cvx.host import Element
from declarative_cvx.program import Structure
from declarative_cvx.status import Status

# SCS's exit codes; -6, -7 and 2 are its answers when it stopped at a limit.
_STATUS = {
    1: Status.OPTIMAL,
    2: Status.ITERATION_LIMIT,
    -1: Status.UNBOUNDED,
    -2: Status.INFEASIBLE,
    -3: Status.NUMERICAL_ERROR,
    -4: Status.NUMERICAL_ERROR,
    -5: Status.NUMERICAL_ERROR,
    -6: Status.ITERATION_LIMIT,
    -7: Status.ITERATION_LIMIT,
}


@dataclass(frozen=True, kw_only=True)
class SCS(ElementwiseBackend):
    """Splitting conic solver (O'Donoghue et al. 2016): every cone, modest accuracy, fast steps.

    The default tolerance is far below SCS's own 1e-4, which leaves no correct digit in data of
    small units.
    """

    name: ClassVar[str] = "SCS"
    capabilities: ClassVar[Capabilities] = Capabilities(
        cones=frozenset(KINDS),
        quadratic=True,
        batched=False,
        warm_start=True,
        devices=("cpu",),
        package="scs",
        licence="MIT",
    )
    aliases: ClassVar[dict[str, str]] = {"eps": "tol", "time_limit_secs": "time_limit"}

    @classmethod
    def native_settings(cls) -> frozenset[str]:
        return frozenset(
            "normalize scale adaptive_scale rho_x eps_abs eps_rel eps_infeas alpha "
            "acceleration_lookback acceleration_interval write_data_filename log_csv_filename "
            "linear_solver".split()
        )

    def obstacle(self, structure: Structure) -> str | None:
        if not structure.rows:
            return "SCS does not take problems without constraints"
        return super().obstacle(structure)

    def solve_one(self, element: Element, start: Point | None) -> One:
        import scs

        data = {"A": element.A, "b": element.b, "c": element.q}
        if element.P.nnz:
            data["P"] = element.P
        solver = scs.SCS(data, scs_cone(element.cone), **self._options())
        if start is None:
            found = solver.solve(warm_start=False)
        else:
            found = solver.solve(warm_start=True, x=start.x, y=start.y, s=start.s)
        info = found["info"]
        status = _STATUS.get(info["status_val"], Status.NUMERICAL_ERROR)
        if status is Status.ITERATION_LIMIT and "time_limit" in info["status"]:
            status = Status.TIME_LIMIT
        return One(
            x=found["x"],
            y=found["y"],
            s=found["s"],
            status=status,
            said=info["status"],
            iterations=int(info["iter"]),
        )

    def _options(self) -> dict[str, Any]:
        return {
            "eps_abs": self.tol,
            "eps_rel": self.tol,
            "max_iters": self.max_iters or 100_000,
            "time_limit_secs": self.time_limit or 0.0,
            "verbose": self.verbose,
            **self.settings,
        }


def scs_cone(cone: Cone) -> dict[str, Any]:
    """The cone in SCS's dictionary form, whose row order `Cone` shares."""
    return {
        "z": cone.zero,
        "l": cone.nonneg,
        "q": list(cone.soc),
        "s": list(cone.psd),
        "ep": cone.exp,
        "p": list(cone.power),
    }
