"""A cone program whose data are affine functions of parameters, as torch evaluates it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
import scipy.sparse as sp
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

    def moved(self, variables: np.ndarray, rows: np.ndarray) -> Source:
        """The same entries when x[variables] and y[rows] take the places of x and y."""
        order = rows if self.dual else variables
        place = np.append(np.argsort(order), -1)
        return replace(self, index=place[self.index])


@dataclass(frozen=True, eq=False)
class ParamConeProgram:
    """A cone program whose data are affine functions of parameters.

    Attributes
    ----------
    structure : Structure
    fixed : FixedVariables or None
        Variables that equalities set, which no solver sees.
    maps : dict of AffineMap
        For each of P, q, A, b and the objective's constant "d", the map that takes the vector
        (parameters, their logarithms) to the values.
    logarithms : tuple of int
        Positions of the parameters that enter by their logarithm (geometric programs).
    sources : dict of int to Source
        Variable id to where its value is read.
    gp, maximize : bool
    """

    structure: Structure
    fixed: FixedVariables | None
    maps: dict[str, AffineMap]
    used: dict[str, np.ndarray]
    logarithms: tuple[int, ...]
    sizes: tuple[int, ...]
    sources: dict[int, Source]
    gp: bool
    maximize: bool
    _stacked: dict[tuple[str, ...], AffineMap] = field(default_factory=dict)
    _named: dict[tuple[bool, ...], tuple[tuple[str, ...], tuple[str, ...]]] = field(
        default_factory=dict
    )

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
        offset : Tensor, shape (batch,)
            Constant of the objective.
        """
        theta = self._stack(parameters, batched, batch, device)  # (batch, entries)
        values: dict[str, Tensor] = {}
        shared, varying = self._kinds(tuple(batched))
        for names, rows in ((shared, theta[:1]), (varying, theta)):
            if names:
                values.update(self._values(names, rows))
        program = ConeProgram(
            self.structure,
            P=values["P"],
            q=values["q"].expand(batch, -1),
            A=values["A"],
            b=values["b"].expand(batch, -1),
        )
        return program, values["d"].expand(batch, -1)[:, 0]

    def _kinds(self, batched: tuple[bool, ...]) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Names of the data that all elements share, and of the others."""
        if batched not in self._named:
            varies = self._entries(batched)
            shared = tuple(name for name in self.maps if not (self.used[name] & varies).any())
            varying = tuple(name for name in self.maps if name not in shared)
            self._named[batched] = (shared, varying)
        return self._named[batched]

    def _values(self, names: tuple[str, ...], theta: Tensor) -> dict[str, Tensor]:
        """Some of the data, each (batch, entries), by one map."""
        sizes = [self.maps[name].shape[0] for name in names]
        return dict(zip(names, self._map(names)(theta).split(sizes, dim=1), strict=True))

    def _map(self, names: tuple[str, ...]) -> AffineMap:
        """The maps of some of the data, stacked."""
        if names not in self._stacked:
            self._stacked[names] = AffineMap(sp.vstack([self.maps[n].whole for n in names]))
        return self._stacked[names]

    def _stack(
        self,
        parameters: Sequence[Tensor],
        batched: Sequence[bool],
        batch: int,
        device: torch.device,
    ) -> Tensor:
        """The vectors (parameters, logarithms), one row per element."""
        columns = [
            value.reshape(batch if is_batched else 1, size).expand(batch, size)
            for value, is_batched, size in zip(parameters, batched, self.sizes, strict=True)
        ]
        columns = [column.to(torch.float64) for column in columns]
        columns += [columns[position].log() for position in self.logarithms]
        if not columns:
            return torch.zeros((batch, 0), dtype=torch.float64, device=device)
        return columns[0] if len(columns) == 1 else torch.cat(columns, dim=1)

    def _entries(self, which: Sequence[bool]) -> np.ndarray:
        """Which entries of the stacked vector belong to these parameters."""
        order = [*range(len(self.sizes)), *self.logarithms]
        flags = [np.full(self.sizes[i], which[i]) for i in order]
        return np.concatenate([np.zeros(0, dtype=bool), *flags])

    def recover(self, variable_id: int, x: Tensor, y: Tensor) -> Tensor:
        """Value of a variable or dual variable, shape (batch, *shape), from x and y."""
        source = self.sources[variable_id]
        if source.dual:
            return source.read(y)
        value = source.read(x)
        return value.exp() if self.gp else value

    def pull_back(
        self, wanted: Sequence[bool], P: Tensor, q: Tensor, A: Tensor, b: Tensor
    ) -> Tensor:
        """Gradients with respect to the solved program's data as those of the parameters.

        Shape (batch, entries): the stacked parameters, then the logarithms of some of them; zero
        for parameters that are not wanted.
        """
        if self.fixed is not None:
            P, q, A, b = self.fixed.pull_back(P, q, A, b)
        found = self._map(("P", "q", "A", "b")).transposed(torch.cat([P, q, A, b], 1))
        if all(wanted):
            return found
        return found * torch.as_tensor(self._entries(wanted), device=found.device)

    def masks(self, variable_ids: Iterable[int], device: torch.device) -> tuple[Tensor, Tensor]:
        """1 where one of the variables depends on an entry of the solved program's x, or y."""
        x = torch.zeros(self.structure.variables, dtype=torch.float64, device=device)
        y = torch.zeros(self.structure.rows, dtype=torch.float64, device=device)
        for variable_id in variable_ids:
            source = self.sources[variable_id]
            read = source.index[source.index >= 0]
            (y if source.dual else x)[torch.as_tensor(read, device=device)] = 1.0
        return (x, y) if self.fixed is None else self.fixed.restrict_masks(x, y)

    def value(self, cone_objective: Tensor, offset: Tensor) -> Tensor:
        """Optimal value of the problem as it was written, shape (batch,)."""
        value = cone_objective + offset
        value = -value if self.maximize else value
        return value.exp() if self.gp else value
