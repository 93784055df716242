"""Variables that an equality sets to a value, and the smaller program without them.

A product of two parameters is no disciplined program, so users give one of them a variable of its
own: ``W_tilde == W``; and controllers start from a measured state: ``x[0] == start``. Such a
variable stands alone in an equality, with a constant coefficient. Its value is known before
anything is solved, and goes into q and b; the multiplier of the equality follows from the solution.

Notation: E are the equalities, F the variables they set, c the coefficients, X and R the variables
and rows that remain.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from declarative_cvx.program import ConeProgram, Elimination, Point, Structure
from declarative_cvx.sparsity import Block, Sparsity, complement, matvec

DataGradients = tuple[Tensor, Tensor, Tensor, Tensor]  # with respect to P, q, A and b


@dataclass(frozen=True, eq=False)
class _Part:
    """The entries of a matrix in some rows and columns: a pattern, and where they are stored."""

    pattern: Sparsity
    stored: Block

    @classmethod
    def of(cls, whole: Sparsity, rows: np.ndarray, cols: np.ndarray) -> _Part:
        """Entries in sorted `rows` and `cols`, which are numbered anew."""
        pattern, kept = whole.part(rows, cols)
        return cls(pattern, Block(kept, whole.nnz))

    def times(self, values: Tensor, v: Tensor, transpose: bool = False) -> Tensor:
        """This part of a matrix times v, shape (batch, rows), or (batch, cols) transposed."""
        return matvec(self.stored.read(values), self.pattern, v, transpose)


@dataclass(frozen=True, eq=False)
class FixedVariables:
    """What equalities set, and the structure of the program without it.

    Attributes
    ----------
    whole, remaining : Structure
        With the variables, and without them.
    E, F, X, R : ndarray of int64
        Rows and variables; E[k] sets F[k]. F, X and R are sorted.
    c : ndarray of float
        Coefficients of F in E.
    """

    whole: Structure
    remaining: Structure
    E: np.ndarray
    F: np.ndarray
    X: np.ndarray
    R: np.ndarray
    c: np.ndarray

    def inner(self, constant: np.ndarray) -> tuple[Structure, np.ndarray]:
        """The remaining structure, and values of its entries of A out of those of the whole."""
        return self.remaining, constant[self._parts.A.stored.places]

    def order(self, elimination: Elimination) -> tuple[np.ndarray, np.ndarray]:
        """Variables and rows of the whole in an order that suits an elimination from the rest."""
        rows = self.R[np.concatenate([elimination.E, elimination.R])]
        zero = self.remaining.cone.zero
        return (
            np.concatenate([self.X[elimination.T], self.X[elimination.X], self.F]),
            np.concatenate([rows[:zero], self.E, rows[zero:]]),
        )

    def reduce(self, program: ConeProgram) -> tuple[ConeProgram, Tensor]:
        """The program without the variables, and what they add to its objective.

        Parameters
        ----------
        program : ConeProgram
            The whole one.

        Returns
        -------
        program : ConeProgram
        constant : Tensor, shape (batch,)
        """
        parts, values = self._parts, self.values(program)
        reduced = ConeProgram(
            self.remaining,
            P=parts.P.stored.read(program.P),
            q=parts.X.read(program.q) + parts.P_XF.times(program.P, values),
            A=parts.A.stored.read(program.A),
            b=parts.R.read(program.b) - parts.A_RF.times(program.A, values),
        )
        slope = parts.F.read(program.q) + parts.P_FF.times(program.P, values) / 2
        return reduced, (values * slope).sum(1)

    def values(self, program: ConeProgram) -> Tensor:
        """What the variables are set to, shape (batch, F)."""
        return self._parts.E.read(program.b) / self._coefficients(program.b)

    def extend(self, program: ConeProgram, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """A solution of the remaining program as one of the whole program.

        Parameters
        ----------
        program : ConeProgram
            The whole one.
        x, y : Tensor, shape (batch, X) and (batch, R)
            NaN in elements that were not solved, which stay so.
        """
        lost = torch.isnan(x).any(1, keepdim=True)
        x, y = torch.where(lost, 0.0, x), torch.where(lost, 0.0, y)
        x = self._join(x, self.values(program))
        y = self._join_rows(y, self._multipliers(program, y, x))
        return torch.where(lost, torch.nan, x), torch.where(lost, torch.nan, y)

    def extend_point(
        self, program: ConeProgram, point: Point, rays: tuple[Tensor, Tensor]
    ) -> Point:
        """A point of the remaining program, or a certificate, as that of the whole program.

        Parameters
        ----------
        program : ConeProgram
            The whole one.
        point : (x, y, s)
        rays : (Tensor, Tensor) of bool, each of shape (batch,)
            Elements whose x is a direction of unboundedness, and whose y is a certificate of
            infeasibility.
        """
        x_rays, y_rays = (ray[:, None] for ray in rays)
        values = torch.where(x_rays, 0.0, self.values(program))
        x, y, s = self._join(point[0], values), point[1], point[2]
        dual = self._multipliers(program, y, x)
        ray = self._multipliers(program, y, None)
        return (
            x,
            self._join_rows(y, torch.where(y_rays, ray, dual)),
            self._join_rows(s, torch.zeros_like(values)),
        )

    def restrict_masks(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Which entries of x and y outputs depend on, given those they read; (X,) and (R,)."""
        parts = self._parts
        asked = parts.E.read(y[None])  # multipliers of E, which follow from x and the other ones
        ones_P, ones_A = (asked.new_ones(1, v.nnz) for v in (self.whole.P, self.whole.A))
        through_x = parts.P_XF.times(ones_P, asked)
        through_y = parts.A_RF.times(ones_A, asked)
        read_x, read_y = parts.X.read(x[None]), parts.R.read(y[None])
        return tuple(  # type: ignore[return-value]
            ((a + b) > 0).to(x.dtype)[0] for a, b in ((read_x, through_x), (read_y, through_y))
        )

    def pull_back(self, P: Tensor, q: Tensor, A: Tensor, b: Tensor) -> DataGradients:
        """Gradients for the data of the remaining program as ones for those of the whole.

        With fixed, generic numbers in the place of the values and coefficients that they depend
        on: good to tell which data have a gradient that jumps or vanishes.
        """
        parts = self._parts
        generator = np.random.default_rng(1)

        def generic(size: int) -> Tensor:
            numbers = generator.uniform(0.5, 1.5, (1, size))
            return torch.as_tensor(numbers, dtype=q.dtype, device=q.device)

        P_rows, P_cols = parts.P_XF.pattern.index(q.device)
        A_rows, A_cols = parts.A_RF.pattern.index(q.device)
        values = generic(self.F.size)
        through_q = parts.P_XF.times(generic(self.whole.P.nnz), q, transpose=True)
        through_b = parts.A_RF.times(generic(self.whole.A.nnz), b, transpose=True)
        return (
            _spread((parts.P.stored, P), (parts.P_XF.stored, q[:, P_rows] * values[:, P_cols])),
            self._join(q, torch.zeros_like(through_q)),
            _spread((parts.A.stored, A), (parts.A_RF.stored, -b[:, A_rows] * values[:, A_cols])),
            self._join_rows(b, (through_q - through_b) / self._coefficients(b)),
        )

    def _multipliers(self, program: ConeProgram, y: Tensor, x: Tensor | None) -> Tensor:
        """Those of E, from (P x + q + A'y)_F = 0; without x, from (A'y)_F = 0."""
        parts = self._parts
        slope = parts.A_RF.times(program.A, y, transpose=True)
        if x is not None:
            slope = slope + parts.F.read(program.q) + parts.P_F.times(program.P, x)
        return -slope / self._coefficients(y)

    def _join(self, x: Tensor, values: Tensor) -> Tensor:
        return self._parts.variables.read(torch.cat([x, values], 1))

    def _join_rows(self, y: Tensor, multipliers: Tensor) -> Tensor:
        return self._parts.rows.read(torch.cat([y, multipliers], 1))

    def _coefficients(self, like: Tensor) -> Tensor:
        return torch.as_tensor(self.c, dtype=like.dtype, device=like.device)

    @cached_property
    def _parts(self) -> _Parts:
        P, A, everything = self.whole.P, self.whole.A, np.arange(self.whole.variables)
        n, m = self.whole.variables, self.whole.rows
        return _Parts(
            P=_Part.of(P, self.X, self.X),
            P_XF=_Part.of(P, self.X, self.F),
            P_FF=_Part.of(P, self.F, self.F),
            P_F=_Part.of(P, self.F, everything),
            A=_Part.of(A, self.R, self.X),
            A_RF=_Part.of(A, self.R, self.F),
            E=Block(self.E, m),
            F=Block(self.F, n),
            X=Block(self.X, n),
            R=Block(self.R, m),
            variables=Block(np.argsort(np.concatenate([self.X, self.F])), n),
            rows=Block(np.argsort(np.concatenate([self.R, self.E])), m),
        )


@dataclass(frozen=True, eq=False)
class _Parts:
    """Parts of P and A by variables and rows, places in vectors, and where joined ones go."""

    P: _Part
    P_XF: _Part
    P_FF: _Part
    P_F: _Part
    A: _Part
    A_RF: _Part
    E: Block
    F: Block
    X: Block
    R: Block
    variables: Block
    rows: Block


def _spread(*parts: tuple[Block, Tensor]) -> Tensor:
    """Stored values (batch, nnz) from those of some parts; zero elsewhere."""
    length = parts[0][0].length
    out = parts[0][1].new_zeros((max(len(v) for _, v in parts), length))
    for block, values in parts:
        out[:, torch.as_tensor(block.places, device=out.device)] = values
    return out


def find_fixed_variables(structure: Structure, constant: np.ndarray) -> FixedVariables | None:
    """The variables that equalities set; None if there are none, or nothing else.

    Variables stay where a row would be left without any: whether such a row can hold at all is for
    the solver to say.

    Parameters
    ----------
    structure : Structure
    constant : ndarray of float, shape (nnz of A,)
        Value of the entries of A that do not depend on parameters, NaN for the others.
    """
    A = structure.A
    alone = np.bincount(A.rows, minlength=structure.rows)[A.rows] == 1
    entries = np.flatnonzero(alone & (A.rows < structure.cone.zero) & (np.abs(constant) > 0))
    if not entries.size:
        return None
    _, first = np.unique(A.cols[entries], return_index=True)
    entries = _settled(A, entries[first])
    E, F, c = A.rows[entries], A.cols[entries], constant[entries]
    X, R = complement(F, structure.variables), complement(E, structure.rows)
    if not F.size or not X.size or not R.size:
        return None
    remaining = Structure(
        structure.P.part(X, X)[0],
        A.part(R, X)[0],
        replace(structure.cone, zero=structure.cone.zero - E.size),
    )
    return FixedVariables(structure, remaining, E, F, X, R, c)


def _settled(A: Sparsity, entries: np.ndarray) -> np.ndarray:
    """Those of the entries (row E, variable F) whose variable leaves no other row empty."""
    while entries.size:
        other, free = np.ones(A.shape[0], dtype=bool), np.ones(A.shape[1], dtype=bool)
        other[A.rows[entries]] = free[A.cols[entries]] = False
        left = np.bincount(A.rows[free[A.cols]], minlength=A.shape[0])
        emptied = np.zeros(A.shape[1], dtype=bool)
        emptied[A.cols[(other & (left == 0))[A.rows]]] = True
        kept = entries[~emptied[A.cols[entries]]]
        if kept.size == entries.size:
            break
        entries = kept
    return entries
