"""Variables that an equality defines, and the smaller program without them.

CVXPY writes ||Q x - c||^2 as ||t||^2 with t = Q x - c. Such a t occurs in one equality, with a
constant coefficient, and on the diagonal of P: it can be substituted. Solving and factorising then
work on the smaller program; residuals are always those of the whole one, so that the squared
condition number of Q'Q costs no accuracy unseen.

Notation: E are the defining equalities, T the variables they define, X and R the variables and
rows that remain, c the coefficients of T in E, p the diagonal of P at T.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import scipy.sparse as sp
import torch
from torch import Tensor

from declarative_cvx.program import ConeProgram, Elimination, Point, Structure
from declarative_cvx.sparsity import Sparsity, product

# Largest number of remaining variables: P over them is handled as a dense matrix.
LARGEST = 1000
# Up to so many of them a denser P costs less than the variables that it replaces.
SMALL = 100

# For each of P, q, A and b the places that its values are taken from.
Orders = dict[str, np.ndarray]


@dataclass(frozen=True, eq=False)
class Parts:
    """Blocks of a batch of programs.

    Attributes
    ----------
    P : Tensor, shape (batch or 1, X, X)
        P over X with the quadratic terms of T substituted.
    A_E : Tensor, shape (batch or 1, E, X)
    A_R : Tensor, shape (batch or 1, R, X)
    p, c : Tensor, shape (batch or 1, E)
    """

    P: Tensor
    A_E: Tensor
    A_R: Tensor
    p: Tensor
    c: Tensor

    @classmethod
    def of(cls, program: ConeProgram) -> Parts:
        """The blocks of a program that the substitution needs, computed once."""
        if "_parts" not in program.__dict__:
            (A_E, A_R, c), (p, P_X) = program.blocks, program.curvature
            P = product(A_E.mT, (p / c**2)[:, :, None] * A_E)
            if P_X is not None:
                P = P + P_X
            program.__dict__["_parts"] = cls(P, A_E, A_R, p, c)
        return program.__dict__["_parts"]


def reduce(program: ConeProgram) -> ConeProgram:
    """The program over X and R with the same solutions; itself if nothing is eliminated."""
    elimination = program.structure.elimination
    if elimination is None:
        return program
    places, parts = elimination.places, Parts.of(program)
    shift = (parts.p * places.E.take(program.b) / parts.c + places.T.take(program.q)) / parts.c
    return ConeProgram(
        elimination.reduced,
        P=elimination.reduced.P.places.take(parts.P.flatten(1)),
        q=places.X.take(program.q) - product(parts.A_E.mT, shift[:, :, None])[:, :, 0],
        A=program.structure.blocks.A_R_values.take(program.A),
        b=places.R.take(program.b),
    )


def restrict(program: ConeProgram, point: Point) -> Point:
    """A point of a program as one of the reduced program."""
    elimination = program.structure.elimination
    if elimination is None:
        return point
    X, R = elimination.places.X, elimination.places.R
    x, y, s = point
    return X.take(x), R.take(y), R.take(s)


def extend(program: ConeProgram, point: Point, rays: tuple[Tensor, Tensor] | None = None) -> Point:
    """A point of the reduced program as one of the program.

    Parameters
    ----------
    program : ConeProgram
        The whole one.
    point : (x, y, s)
        Of the reduced one.
    rays : (Tensor, Tensor) of bool, each of shape (batch,), optional
        Elements whose x is a direction of unboundedness, and whose y is a certificate of
        infeasibility, for which the constants do not count. None if there are none.
    """
    elimination = program.structure.elimination
    if elimination is None:
        return point
    places, parts = elimination.places, Parts.of(program)
    b = places.E.take(program.b)
    if rays is not None:
        b = torch.where(rays[0][:, None], 0.0, b)
    t = (b - product(parts.A_E, point[0][:, :, None])[:, :, 0]) / parts.c
    dual = (parts.p * t + places.T.take(program.q)) / -parts.c
    if rays is not None:
        dual = torch.where(rays[1][:, None], 0.0, dual)
    x = places.variables.take(torch.cat([t, point[0]], 1))
    y = places.rows.take(torch.cat([dual, point[1]], 1))
    s = places.rows.take(torch.cat([torch.zeros_like(dual), point[2]], 1))
    return x, y, s


def find_elimination(structure: Structure, constant: np.ndarray) -> Elimination | None:
    """The variables worth substituting; None if there are none.

    Parameters
    ----------
    structure : Structure
    constant : ndarray of float, shape (nnz of A,)
        Value of the entries of A that do not depend on parameters, NaN for the others.
    """
    A, P, n = structure.A, structure.P, structure.variables
    entries = np.flatnonzero(
        (np.bincount(A.cols, minlength=n)[A.cols] == 1)
        & (A.rows < structure.cone.zero)
        & (np.abs(constant) > 0)
    )
    coupled = np.zeros(n, dtype=bool)
    off = P.rows != P.cols
    coupled[P.rows[off]] = True
    entries = entries[~coupled[A.cols[entries]]]
    E, first = np.unique(A.rows[entries], return_index=True)
    T = A.cols[entries[first]]
    X, R = np.setdiff1d(np.arange(n), T), np.setdiff1d(np.arange(structure.rows), E)
    if not T.size or not R.size or not X.size or X.size > LARGEST:
        return None
    curvature = _curvature(structure, E, T, X)
    if X.size > SMALL and curvature.nnz > A.nnz + P.nnz:
        return None
    kept = np.flatnonzero(np.isin(A.rows, R) & np.isin(A.cols, X))
    reduced = Structure(
        curvature,
        Sparsity(
            (R.size, X.size),
            np.searchsorted(R, A.rows[kept]),
            np.searchsorted(X, A.cols[kept]),
        ),
        replace(structure.cone, zero=structure.cone.zero - E.size),
    )
    return Elimination(reduced, E, T, X, R)


def arrange(structure: Structure, elimination: Elimination) -> tuple[Structure, Orders]:
    """The structure with T before X and E before R, so that every block is a view."""
    variables = np.concatenate([elimination.T, elimination.X])
    rows = np.concatenate([elimination.E, elimination.R])
    count = elimination.T.size
    moved = Elimination(
        elimination.reduced,
        E=np.arange(count),
        T=np.arange(count),
        X=np.arange(count, variables.size),
        R=np.arange(count, rows.size),
    )
    structure, orders = ordered(structure, variables, rows)
    return replace(structure, elimination=moved), orders


def ordered(
    structure: Structure, variables: np.ndarray, rows: np.ndarray
) -> tuple[Structure, Orders]:
    """The structure with its variables and rows in another order, and where values are then."""
    P, P_order = structure.P.permuted(variables, variables)
    A, A_order = structure.A.permuted(rows, variables)
    orders = {"P": P_order, "q": variables, "A": A_order, "b": rows}
    return Structure(P, A, structure.cone), orders


def _curvature(structure: Structure, E: np.ndarray, T: np.ndarray, X: np.ndarray) -> Sparsity:
    """The pattern of P over X once T is substituted."""
    A, P = (
        sp.csr_array((np.ones(m.nnz), (m.rows, m.cols)), shape=m.shape)
        for m in (structure.A, structure.P)
    )
    curved = E[P.diagonal()[T] > 0]
    squares, shape = A[curved][:, X], (X.size, X.size)
    if (np.diff(squares.indptr) == X.size).any():  # one of them couples all
        rows, cols = (places.ravel() for places in np.indices(shape))
        return Sparsity(shape, rows, cols)
    pattern = sp.csr_array(squares.T @ squares + P[X][:, X])
    pattern.sort_indices()
    rows = np.repeat(np.arange(X.size), np.diff(pattern.indptr))
    return Sparsity(shape, rows, pattern.indices.astype(np.int64))
