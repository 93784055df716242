"""Moreau: batched interior-point and active-set methods."""

from __future__ import annotations

import threading
import warnings
from collections import OrderedDict
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np

from declarative_cvx.backends.base import SHARPEST, Answer, Backend, Capabilities, Point
from declarative_cvx.cones import KINDS, Cone
from declarative_cvx.host import HostProgram, upper_triangle_order
from declarative_cvx.program import Structure
from declarative_cvx.sparsity import Sparsity
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
_METHODS = ("auto", "interior_point", "active_set")
_TOLERANCES = ("tol_gap_abs", "tol_gap_rel", "tol_feas")
# Size up to which the active-set method is tried first.
ACTIVE_SET_VARIABLES = 500
# Compiled solvers kept by each thread: compiling costs as much as solving a small batch, and a
# compiled solver must not be used by two threads at once.
CACHED = 8
# Those for more entries of P and A than this are not kept: compiling costs little beside solving,
# and the solver holds several copies of the data.
LARGEST_CACHED = 2**22
_CACHE = threading.local()


@dataclass(frozen=True, kw_only=True)
class Moreau(Backend):
    """Conic solver that takes a batch in one call.

    Attributes
    ----------
    method : {"auto", "interior_point", "active_set"}
        "auto" tries the active-set method on small quadratic programs; elements that it does not
        solve go to the interior-point method.
    device : {"cpu", "cuda"}
        "cuda" needs the package ``moreau[cuda]``.
    """

    name: ClassVar[str] = "Moreau"
    capabilities: ClassVar[Capabilities] = Capabilities(
        cones=frozenset(KINDS),
        quadratic=True,
        batched=True,
        warm_start=True,
        devices=("cpu", "cuda"),
        package="moreau",
        licence="Apache-2.0",
    )
    aliases: ClassVar[dict[str, str]] = {"max_iter": "max_iters"}

    method: str = "auto"
    device: str = "cpu"

    @classmethod
    def native_settings(cls) -> frozenset[str]:
        import moreau

        return frozenset(moreau.IPMSettings.model_fields)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.method not in _METHODS:
            raise self.refusal(f"method must be one of {_METHODS}, got {self.method!r}")
        if self.device not in self.capabilities.devices:
            raise self.refusal(
                f"device must be one of {self.capabilities.devices}, got {self.device!r}"
            )

    def obstacle(self, structure: Structure) -> str | None:
        if any(dim < 2 for dim in structure.cone.soc):
            return "Moreau has no second-order cone of dimension 1"
        if self.method == "active_set" and not structure.rows:
            return "Moreau's active-set method does not take problems without constraints"
        if self.method == "active_set" and not structure.cone.kinds <= {"zero", "nonneg"}:
            return "Moreau's active-set method takes equalities and inequalities only"
        return super().obstacle(structure)

    def stages(self, structure: Structure) -> tuple[Backend, ...]:
        if self.method != "auto":
            return (self,)
        interior_point = replace(self, method="interior_point")
        active_set = replace(self, method="active_set")
        small = structure.variables <= ACTIVE_SET_VARIABLES
        small &= structure.rows <= max(ACTIVE_SET_VARIABLES, 2 * structure.variables)
        quadratic = structure.P.nnz > 0
        if small and quadratic and active_set.obstacle(structure) is None:
            return (active_set, interior_point)
        return (interior_point,)

    def sharpened(self) -> Backend | None:
        if self.method == "active_set":
            return None
        return replace(self, tol=min(self.tol, SHARPEST))

    def solve(self, program: HostProgram, start: Point | None = None) -> Answer:
        structure = program.structure
        solver, order, entries = self._compiled(structure, program.batch)
        A = program.A if entries is None else program.A[:, entries]
        b = program.b if order is None else program.b[:, order]
        solver.setup(*_values(program.P, A))
        warm = None if start is None else _warm_start(start, order)
        with warnings.catch_warnings():
            # Elements that fail from a warm start are tried again from a cold one.
            warnings.filterwarnings("ignore", message="Warm-started solve failed")
            found = solver.solve(program.q, b, warm_start=warm)
        names = {status: status.name for status in set(solver.info.status)}
        said = [names[status] for status in solver.info.status]
        return Answer(
            x=found.x,
            y=_in_order(found.z, order),
            s=_in_order(found.s, order),
            status=[_STATUS.get(word, Status.NUMERICAL_ERROR) for word in said],
            said=said,
            iterations=np.atleast_1d(solver.info.iterations).tolist(),
        )

    def _compiled(
        self, structure: Structure, batch: int
    ) -> tuple[Any, np.ndarray | None, np.ndarray | None]:
        """A solver for this structure and batch size, from the thread's own cache.

        With it the order of rows that it takes and that of the entries of A; None if they are
        ours.
        """
        cache = _CACHE.__dict__.setdefault("solvers", OrderedDict())
        key = (id(structure), batch, repr(self))
        if key in cache and cache[key][0] is structure:
            cache.move_to_end(key)
            return cache[key][1]
        order = upper_triangle_order(structure.cone)
        A, entries = structure.A.permuted(order, np.arange(structure.variables))
        same = np.array_equal(order, np.arange(order.size))
        solver = self._compile(structure, A, batch)
        compiled = (solver, *((None, None) if same else (order, entries)))
        if batch * (structure.P.nnz + structure.A.nnz) <= LARGEST_CACHED:
            cache[key] = (structure, compiled)
        if len(cache) > CACHED:
            cache.popitem(last=False)
        return compiled

    def _compile(self, structure: Structure, A: Sparsity, batch: int) -> Any:
        import moreau

        return moreau.CompiledSolver(
            n=structure.variables,
            m=structure.rows,
            P_row_offsets=structure.P.row_offsets,
            P_col_indices=structure.P.cols,
            A_row_offsets=A.row_offsets,
            A_col_indices=A.cols,
            cones=_cones(structure.cone),
            settings=self._options(batch),
        )

    def _options(self, batch: int) -> Any:
        import moreau

        settings: dict[str, Any] = {}
        if self.max_iters is not None:
            settings["max_iter"] = self.max_iters
        if self.time_limit is not None:
            settings["time_limit"] = self.time_limit
        tolerances = dict.fromkeys(_TOLERANCES, self.tol)
        return moreau.Settings(
            solver="active_set" if self.method == "active_set" else "ipm",
            device=self.device,
            batch_size=batch,
            verbose=self.verbose,
            ipm_settings=moreau.IPMSettings(**{**tolerances, **self.settings}),
            **settings,
        )


def _cones(cone: Cone) -> Any:
    import moreau

    return moreau.Cones(
        num_zero_cones=cone.zero,
        num_nonneg_cones=cone.nonneg,
        so_cone_dims=list(cone.soc),
        psd_dims=list(cone.psd),
        num_exp_cones=cone.exp,
        power_alphas=list(cone.power),
    )


def _in_order(found: np.ndarray, order: np.ndarray | None) -> np.ndarray:
    """Vectors over rows in our order."""
    if order is None:
        return found
    out = np.empty_like(found)
    out[:, order] = found
    return out


def _values(P: np.ndarray, A: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Values of P and A: without a batch dimension if all elements share both."""
    if len(P) == len(A) == 1:
        return P[0], A[0]
    batch = max(len(P), len(A))
    return (
        np.ascontiguousarray(np.broadcast_to(P, (batch, P.shape[1]))),
        np.ascontiguousarray(np.broadcast_to(A, (batch, A.shape[1]))),
    )


def _warm_start(start: Point, order: np.ndarray | None) -> Any:
    """A warm start for the batch; elements without a point start from x = 0, s = z = 1."""
    import moreau

    rows = slice(None) if order is None else order
    cold = ~np.isfinite(start.x).all(1, keepdims=True)
    return moreau.BatchedWarmStart(
        x=np.where(cold, 0.0, start.x),
        z=np.where(cold, 1.0, start.y[:, rows]),
        s=np.where(cold, 1.0, start.s[:, rows]),
    )
