"""The library's own compiled solver of small dense linear and quadratic programs.

The method is described in compiled/method.h.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch

from declarative_cvx.backends.base import Answer, Backend, Capabilities, Point
from declarative_cvx.compiled import MODULE
from declarative_cvx.errors import MissingBackendError
from declarative_cvx.host import HostProgram
from declarative_cvx.sparsity import Sparsity
from declarative_cvx.status import Status

# What the compiled function says of an element.
_STATUS = (
    (Status.OPTIMAL, "solved"),
    (Status.INFEASIBLE, "infeasible"),
    (Status.UNBOUNDED, "unbounded"),
    (Status.INACCURATE, "inaccurate"),
    (Status.NUMERICAL_ERROR, "objective not convex"),
    (Status.ITERATION_LIMIT, "iteration limit"),
    (Status.TIME_LIMIT, "time limit"),
)
# Slacks may be below zero by this share of `tol`, relative to the terms they are made of: the
# method ends with slacks that are right to rounding, or with wrong ones.
SLACK_SHARE = 1e-5
# Products n^2 (n + m), summed over a batch, that are worth another thread.
WORTH_A_THREAD = 50_000
# Programs of at most so many variables and rows are given to it by "auto".
VARIABLES, ROWS = 200, 500


@dataclass(frozen=True, kw_only=True)
class DualActiveSet(Backend):
    """Dual active-set method for linear and quadratic programs with small, dense matrices.

    It is part of this library, written in C and compiled when that is installed; without a
    compiler it is left out. Its answers are right to rounding.

    Attributes
    ----------
    threads : int or None
        How many elements are solved at the same time; None is torch's number of threads.
    """

    name: ClassVar[str] = "DualActiveSet"
    capabilities: ClassVar[Capabilities] = Capabilities(
        cones=frozenset({"zero", "nonneg"}),
        quadratic=True,
        batched=True,
        warm_start=True,
        devices=("cpu",),
        package="declarative_cvx",
        licence="Apache-2.0",
    )

    threads: int | None = None

    @classmethod
    def is_installed(cls) -> bool:
        return importlib.util.find_spec(MODULE) is not None

    @classmethod
    def how_to_install(cls) -> str:
        return (
            "pip install --force-reinstall --no-deps declarative_cvx, where there is a C compiler"
        )

    @classmethod
    def require_installed(cls) -> None:
        if not cls.is_installed():
            raise MissingBackendError(
                f"Solver {cls.name} is a compiled part of declarative_cvx, which was installed "
                f"without it: {cls.how_to_install()}."
            )

    @classmethod
    def native_settings(cls) -> frozenset[str]:
        return frozenset()

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.threads is not None and not (isinstance(self.threads, int) and self.threads >= 1):
            raise self.refusal(f"threads must be an integer of at least 1, got {self.threads!r}")

    def solve(self, program: HostProgram, start: Point | None = None) -> Answer:
        from declarative_cvx.compiled._programs import solve_programs

        structure, batch = program.structure, program.batch
        n, m = structure.variables, structure.rows
        x, y, s = (np.full((batch, size), np.nan) for size in (n, m, m))
        outcome, steps = np.zeros((2, batch), dtype=np.int64)
        solve_programs(
            batch,
            n,
            m,
            structure.cone.zero,
            SLACK_SHARE * self.tol,
            self.max_iters or most_exchanges(n, m),
            self.time_limit or 0.0,
            self._threads(batch, n, m),
            *_places(structure.P),
            *_places(structure.A),
            program.P,
            program.q,
            program.A,
            program.b,
            None if start is None else np.ascontiguousarray(start.y),
            x,
            y,
            s,
            outcome,
            steps,
        )
        found = [_STATUS[code] for code in outcome.tolist()]
        if self.verbose:
            print(_log(program, [said for _, said in found], steps))
        return Answer(
            x=x,
            y=y,
            s=s,
            status=[status for status, _ in found],
            said=[said for _, said in found],
            iterations=steps.tolist(),
        )

    def _threads(self, batch: int, n: int, m: int) -> int:
        worth = 1 + batch * n**2 * (n + m) // WORTH_A_THREAD
        return min(self.threads or torch.get_num_threads(), max(batch, 1), worth)


def most_exchanges(n: int, m: int) -> int:
    """How many single exchanges of rows a program may take, if nothing is said."""
    return 100 + 4 * (n + m)


def _places(pattern: Sparsity) -> tuple[np.ndarray, np.ndarray]:
    return (
        np.ascontiguousarray(pattern.rows, dtype=np.int64),
        np.ascontiguousarray(pattern.cols, dtype=np.int64),
    )


def _log(program: HostProgram, said: list[str], steps: np.ndarray) -> str:
    structure = program.structure
    counts = ", ".join(f"{said.count(word)} {word}" for word in dict.fromkeys(said))
    most = steps.max(initial=0)
    return (
        f"DualActiveSet: {program.batch} programs of {structure.variables} variables and "
        f"{structure.rows} rows: {counts}; {most} single exchanges of rows at most"
    )
