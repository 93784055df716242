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
from declarative_cvx.sparsity import Sparsity, columns

# Largest number of remaining variables: P over them is handled as a dense matrix.
LARGEST = 1000
# Up to so many of them a denser P costs less than the variables that it replaces.
SMALL = 100


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
            blocks = program.structure.blocks
            A_E, A_R, c = program.blocks
            p = blocks.p.read(program.P)
            P = A_E.mT @ ((p / c**2)[:, :, None] * A_E)
            if blocks.P_X.stored:
                P = P + blocks.P_X.read(program.P)
            program.__dict__["_parts"] = cls(P, A_E, A_R, p, c)
        return program.__dict__["_parts"]


def reduce(program: ConeProgram) -> ConeProgram:
    """The program over X and R with the same solutions; itself if nothing is eliminated."""
    elimination = program.structure.elimination
    if elimination is None:
        return program
    E, T, X, R, *_ = elimination.index(program.q.device)
    parts = Parts.of(program)
    shift = (parts.p * columns(program.b, E) / parts.c + columns(program.q, T)) / parts.c
    return ConeProgram(
        elimination.reduced,
        P=columns(parts.P.flatten(1), elimination.reduced.P.place(program.q.device)),
        q=columns(program.q, X) - (parts.A_E.mT @ shift[:, :, None])[:, :, 0],
        A=program.structure.blocks.A_R_values.read(program.A),
        b=columns(program.b, R),
    )


def restrict(program: ConeProgram, point: Point) -> Point:
    """A point of a program as one of the reduced program."""
    elimination = program.structure.elimination
    if elimination is None:
        return point
    _, _, X, R, *_ = elimination.index(program.q.device)
    x, y, s = point
    return x[:, X], y[:, R], s[:, R]


def extend(program: ConeProgram, point: Point, rays: tuple[Tensor, Tensor]) -> Point:
    """A point of the reduced program as one of the program.

    Parameters
    ----------
    program : ConeProgram
        The whole one.
    point : (x, y, s)
        Of the reduced one.
    rays : (Tensor, Tensor) of bool, each of shape (batch,)
        Elements whose x is a direction of unboundedness, and whose y is a certificate of
        infeasibility, for which the constants do not count.
    """
    elimination = program.structure.elimination
    if elimination is None:
        return point
    E, T, _, _, rows, variables = elimination.index(program.q.device)
    x_rays, y_rays = (ray[:, None] for ray in rays)
    parts = Parts.of(program)
    b = torch.where(x_rays, 0.0, columns(program.b, E))
    t = (b - (parts.A_E @ point[0][:, :, None])[:, :, 0]) / parts.c
    dual = torch.where(y_rays, 0.0, -(parts.p * t + columns(program.q, T)) / parts.c)
    x = columns(torch.cat([t, point[0]], 1), variables)
    y = columns(torch.cat([dual, point[1]], 1), rows)
    s = columns(torch.cat([torch.zeros_like(dual), point[2]], 1), rows)
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


def _curvature(structure: Structure, E: np.ndarray, T: np.ndarray, X: np.ndarray) -> Sparsity:
    """The pattern of P over X once T is substituted."""
    A, P = (
        sp.csr_array((np.ones(m.nnz), (m.rows, m.cols)), shape=m.shape)
        for m in (structure.A, structure.P)
    )
    curved = E[P.diagonal()[T] > 0]
    squares = A[curved][:, X]
    pattern = sp.coo_array(squares.T @ squares + P[X][:, X])
    order = np.lexsort((pattern.col, pattern.row))
    return Sparsity(
        (X.size, X.size),
        pattern.row[order].astype(np.int64),
        pattern.col[order].astype(np.int64),
    )
