"""A cone program whose data are affine functions of parameters, as torch evaluates it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from declarative_cvx.fixed_variables import FixedVariables
from declarative_cvx.linear_map import AffineMap
from declarative_cvx.program import ConeProgram, Structure
from declarative_cvx.sparsity import Places


@dataclass(frozen=True, eq=False)
class Source:
    """How a variable, or a dual variable, is read off x or y.

    Attributes
    ----------
    shape : tuple of int
    index : ndarray of int64
        For every entry (C order) the row it is read from; -1 for an entry that is always zero.
    scale : ndarray or None
        Factors, None if all are 1.
    dual : bool
        Read from y rather than x.
    """

    shape: tuple[int, ...]
    index: np.ndarray
    scale: np.ndarray | None
    dual: bool

    def read(self, vector: Tensor) -> Tensor:  # (batch, n or m) -> (batch, *shape)
        out = self._places.take(vector)
        if self._zeros is not None:
            out = torch.where(torch.as_tensor(self._zeros, device=vector.device), 0.0, out)
        if self.scale is not None:
            out = out * torch.as_tensor(self.scale, device=vector.device)
        if self._zeros is None and self.scale is None:
            out = out.clone()  # the caller's own
        return out.reshape(vector.shape[0], *self.shape)

    @cached_property
    def _places(self) -> Places:
        return Places(np.maximum(self.index, 0))

    @cached_property
    def _zeros(self) -> np.ndarray | None:
        """Which entries are always zero; None if there are none."""
        zeros = self.index < 0
        return zeros if zeros.any() else None

    def among(self, variables: np.ndarray, rows: np.ndarray) -> Source | None:
        """The same entries in x[variables] or y[rows]; None if one of them is not there."""
        kept = rows if self.dual else variables
        place = np.full(max(self.index.max(initial=0), kept.max(initial=0)) + 2, -2)
        place[kept], place[-1] = np.arange(kept.size), -1
        index = place[self.index]
        return None if (index == -2).any() else replace(self, index=index)

    def moved(self, variables: np.ndarray, rows: np.ndarray) -> Source:
        """The same entries when x[variables] and y[rows] take the places of x and y."""
        order = rows if self.dual else variables
        place = np.append(np.argsort(order), -1)
        return replace(self, index=place[self.index])


class _Plan(NamedTuple):
    """How some of the data come from some of the parameters."""

    rows: tuple[int, ...]
    cols: tuple[int, ...]
    part: AffineMap
    varies: bool  # between elements

    @classmethod
    def of(cls, data: AffineMap, rows: np.ndarray, varies: bool) -> _Plan:
        cols = np.flatnonzero(data.dependence[rows].any(0)).tolist()
        return cls(tuple(rows.tolist()), tuple(cols), data.part(rows.tolist(), cols), varies)


@dataclass(frozen=True, eq=False)
class ParamConeProgram:
    """A cone program whose data are affine functions of parameters.

    Attributes
    ----------
    structure : Structure
    fixed : FixedVariables or None
        Variables that equalities set, which no solver sees.
    data : AffineMap
        From the vectors (parameters, logarithms of some) to the values of P, q, A and b and the
        objective's constant.
    logarithms : tuple of int
        Positions of the parameters that enter by their logarithm (geometric programs).
    sources : dict of int to Source
        Variable id to where its value is read.
    gp, maximize : bool
    """

    structure: Structure
    fixed: FixedVariables | None
    data: AffineMap
    logarithms: tuple[int, ...]
    sizes: tuple[int, ...]
    sources: dict[int, Source]
    gp: bool
    maximize: bool
    _direct: dict[int, Source | None] = field(default_factory=dict)
    _plans: dict[tuple[bool, ...], list[_Plan]] = field(default_factory=dict)

    @property
    def solved_structure(self) -> Structure:
        """The structure of the program that is solved and differentiated."""
        return self.structure if self.fixed is None else self.fixed.remaining

    def apply(
        self,
        parameters: Sequence[Tensor],
        batched: Sequence[bool],
        batch: int,
        device: torch.device,
    ) -> tuple[ConeProgram, Tensor]:
        """Problem data for parameter values.

        Parameters
        ----------
        parameters : sequence of Tensor
            In the order given to `canonicalize`; shape (batch, *shape) where `batched`, else
            (*shape).
        batched : sequence of bool
        batch : int
            Number of elements.
        device : torch.device
            Where the data are put.

        Returns
        -------
        program : ConeProgram
        offset : Tensor, shape (batch or 1,)
            Constant of the objective.
        """
        columns = self._columns(parameters, batched, batch)
        blocks: dict[int, Tensor] = {}
        for plan in self._planned(tuple(batched)):
            size = batch if plan.varies else 1
            x = (columns[i] for i in plan.cols)
            found = plan.part(device, *(v if v.shape[0] == size else v.expand(size, -1) for v in x))
            blocks.update(zip(plan.rows, found, strict=True))
        P, q, A, b, d = (blocks[i] for i in range(5))
        q, b = (v if v.shape[0] == batch else v.expand(batch, -1) for v in (q, b))
        return ConeProgram(self.structure, P, q, A, b), d[:, 0]

    def _planned(self, batched: tuple[bool, ...]) -> list[_Plan]:
        """Maps to the data that all elements share, and to the others."""
        if batched not in self._plans:
            varies = self.data.dependence @ np.array([batched[i] for i in self._order], dtype=bool)
            self._plans[batched] = [
                _Plan.of(self.data, np.flatnonzero(rows), varying)
                for rows, varying in ((~varies, False), (varies, True))
                if rows.any()
            ]
        return self._plans[batched]

    @property
    def _order(self) -> list[int]:
        """The parameters that the blocks of vectors belong to."""
        return [*range(len(self.sizes)), *self.logarithms]

    def _columns(
        self, parameters: Sequence[Tensor], batched: Sequence[bool], batch: int
    ) -> list[Tensor]:
        """Vectors (parameters, logarithms), each (batch or 1, entries)."""
        columns = [
            value.reshape(batch if is_batched else 1, size).to(torch.float64)
            for value, is_batched, size in zip(parameters, batched, self.sizes, strict=True)
        ]
        return columns + [columns[position].log() for position in self.logarithms]

    def recover(
        self, variable_id: int, point: tuple[Tensor, Tensor], whole: Callable[[], Any]
    ) -> Tensor:
        """Value of a variable or dual variable, shape (batch, *shape).

        Read off (x, y) of the program that solvers see, `point`, if it is there; if it is not, off
        those of this program, which `whole` returns.
        """
        direct = self.direct_source(variable_id)
        source, (x, y) = (self.sources[variable_id], whole()) if direct is None else (direct, point)
        value = source.read(y if source.dual else x)
        return value.exp() if self.gp and not source.dual else value

    def direct_source(self, variable_id: int) -> Source | None:
        """How a (dual) variable is read off what solvers see; None if it is not there."""
        if variable_id not in self._direct:
            self._direct[variable_id] = self.sources[variable_id].among(*self._seen)
        return self._direct[variable_id]

    @cached_property
    def _seen(self) -> tuple[np.ndarray, np.ndarray]:
        """Variables and rows that are left to solvers."""
        elimination = self.solved_structure.elimination
        X, R = np.arange(self.structure.variables), np.arange(self.structure.rows)
        if self.fixed is not None:
            X, R = self.fixed.X, self.fixed.R
        return (X, R) if elimination is None else (X[elimination.X], R[elimination.R])

    def pull_back(
        self, wanted: Sequence[bool], P: Tensor, q: Tensor, A: Tensor, b: Tensor
    ) -> Tensor:
        """Gradients with respect to the solved program's data as those of the parameters.

        Shape (batch, entries): the parameters that are wanted, then logarithms of some of them.
        """
        if self.fixed is not None:
            P, q, A, b = self.fixed.pull_back(P, q, A, b)
        cols = [block for block, position in enumerate(self._order) if wanted[position]]
        return torch.cat(self.data.part(range(4), cols).transposed(P, q, A, b), 1)

    def masks(self, variable_ids: Iterable[int], device: torch.device) -> tuple[Tensor, Tensor]:
        """1 where one of the variables depends on an entry of the solved program's x, or y."""
        x = torch.zeros(self.structure.variables, dtype=torch.float64, device=device)
        y = torch.zeros(self.structure.rows, dtype=torch.float64, device=device)
        for variable_id in variable_ids:
            source = self.sources[variable_id]
            read = source.index[source.index >= 0]
            (y if source.dual else x)[torch.as_tensor(read, device=device)] = 1.0
        return (x, y) if self.fixed is None else self.fixed.restrict_masks(x, y)

    def value(self, objective: Tensor) -> Tensor:
        """Optimal value of the problem as it was written, shape (batch,)."""
        value = -objective if self.maximize else objective
        return value.exp() if self.gp else value
