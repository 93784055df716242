"""Solvers of one problem at a time, run over a batch in threads."""

from __future__ import annotations

import os
from abc import abstractmethod
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np

from declarative_cvx.backends.base import Answer, Backend, Point
from declarative_cvx.epigraph import Epigraph
from declarative_cvx.host import Element, HostProgram
from declarative_cvx.status import Status


@dataclass(frozen=True)
class One:
    """Answer to one problem; see `Answer`. Missing vectors are None."""

    x: np.ndarray | None
    y: np.ndarray | None
    s: np.ndarray | None
    status: Status
    said: str
    iterations: int


@dataclass(frozen=True, kw_only=True)
class ElementwiseBackend(Backend):
    """A solver of one problem at a time.

    Attributes
    ----------
    threads : int or None
        How many problems are solved at the same time; None is the number of cores.
    """

    threads: int | None = None

    @abstractmethod
    def solve_one(self, element: Element, start: Point | None) -> One:
        """Solve one cone program. `start` holds vectors, not batches; None is a cold start."""

    def solve(self, program: HostProgram, start: Point | None = None) -> Answer:
        def work(i: int) -> One:
            return self._solve_element(program.element(i), _start_of(start, i))

        workers = min(self.threads or os.cpu_count() or 1, program.batch)
        if workers > 1:
            with ThreadPoolExecutor(workers) as pool:
                ones = list(pool.map(work, range(program.batch)))
        else:
            ones = [work(i) for i in range(program.batch)]
        n, m = program.structure.variables, program.structure.rows
        return Answer(
            x=_stack([one.x for one in ones], n),
            y=_stack([one.y for one in ones], m),
            s=_stack([one.s for one in ones], m),
            status=[one.status for one in ones],
            said=[one.said for one in ones],
            iterations=[one.iterations for one in ones],
        )

    def _solve_element(self, element: Element, start: Point | None) -> One:
        try:
            return self._solve_form(element, start)
        except Exception as error:  # whatever a solver raises must not cost the others
            return One(None, None, None, Status.NUMERICAL_ERROR, f"{error!r}", 0)

    def _solve_form(self, element: Element, start: Point | None) -> One:
        """Solve in the form that the solver takes: with a quadratic objective or without."""
        if self.capabilities.quadratic or element.P.nnz == 0:
            return self.solve_one(element, start)
        epigraph = Epigraph.of(element)
        if start is not None:
            start = Point(*epigraph.extend(start.x, start.y, start.s))
        one = self.solve_one(epigraph.element, start)
        return replace(
            one,
            x=None if one.x is None else one.x[:-1],
            y=None if one.y is None else epigraph.drop_rows(one.y),
            s=None if one.s is None else epigraph.drop_rows(one.s),
        )


def _start_of(start: Point | None, i: int) -> Point | None:
    if start is None or not np.isfinite(start.x[i]).all():
        return None
    return Point(start.x[i], start.y[i], start.s[i])


def _stack(rows: list[np.ndarray | None], width: int) -> np.ndarray:
    out = np.full((len(rows), width), np.nan)
    for i, row in enumerate(rows):
        if row is not None:
            out[i] = row
    return out
