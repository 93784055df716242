"""Variables that an equality defines, and the smaller program without them.

CVXPY writes ||Q x - c||^2 as ||t||^2 with t = Q x - c. Such a t occurs in one equality, with a
constant coefficient, and on the diagonal of P: it can be substituted. Solving and factorising then
work on the smaller program; residuals are always those of the whole one, so that the squared
condition number of Q'Q costs no accuracy unseen.

Notation: E are the defining equalities, T the variables they define, X and R the variables and
rows that remain, c the coefficients of T in E, p the diagonal of P at T.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import scipy.sparse as sp
import torch
from torch import Tensor

from declarative_cvx.program import ConeProgram, Elimination, Point, Structure
from declarative_cvx.reduced_program import ReducedProgram, Squares
from declarative_cvx.sparsity import Sparsity, complement, image

# Largest number of remaining variables: P over them is handled as a dense matrix.
LARGEST = 1000
# Up to so many of them a denser P costs less than the variables that it replaces.
SMALL = 100
# From this share of nonzero entries on, the pattern of a product is found by a dense one sooner.
DENSE = 0.03

# For each of P, q, A and b the places that its values are taken from.
Orders = dict[str, np.ndarray]


def reduce(program: ConeProgram) -> ConeProgram:
    """The program over X and R with the same solutions, made once.

    It is the program itself if nothing is eliminated.
    """
    elimination = program.structure.elimination
    if elimination is None:
        return program
    if "_reduced" not in program.__dict__:
        program.__dict__["_reduced"] = _reduced(program, elimination)
    return program.__dict__["_reduced"]


def _reduced(program: ConeProgram, elimination: Elimination) -> ReducedProgram:
    reduced, parts = elimination.reduced, _parts(program)
    squares = Squares.of(program, parts.pop("A_E"), elimination.places)
    P, q = squares.formed()
    P = reduced.P.places.take(P.flatten(1))
    found = ReducedProgram(reduced, P, squares=squares, **{**parts, "q": q})
    sizes = program.__dict__.pop("absolute", None)
    if sizes is not None:  # as views, free of charge
        parts = _parts(sizes)
        A_E, P_X = parts.pop("A_E"), None if squares.P is None else squares.P.abs()
        squares = replace(squares, A_E=A_E, P=P_X, q=parts["q"])
        found.__dict__["absolute"] = replace(found, squares=squares, **parts)
    return found


def _parts(program: ConeProgram) -> dict[str, Any]:
    """What of q, A and b is left for X and R, and A_E, alone and with A_R."""
    structure, elimination = program.structure, program.structure.elimination
    assert elimination is not None
    if structure.has_joined_blocks:
        rows, cols = structure.rows, elimination.reduced.variables
        joined = program.A.narrow(1, 0, rows * cols).view(-1, rows, cols)
        A_E = joined.narrow(1, 0, elimination.E.size)
    else:
        joined, A_E = None, structure.blocks.A_E.read(program.A)
    return {
        "q": elimination.places.X.take(program.q),
        "A": structure.blocks.A_R_values.take(program.A),
        "b": elimination.places.R.take(program.b),
        "joined": joined,
        "A_E": A_E,
    }


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
    (x, y, s), places, reduced = point, elimination.places, _reduced_of(program)
    if rays is not None:
        squares = reduced.squares
        squares = replace(squares, d=torch.where(rays[0].unsqueeze(1), 0.0, squares.d))
        reduced = replace(reduced, squares=squares)
    u, y, _ = reduced.image(x, y)
    if rays is not None:
        E = torch.where(rays[1].unsqueeze(1), 0.0, y[:, : u.shape[1]])
        y = torch.cat([E, y[:, u.shape[1] :]], 1)
    return (
        places.variables.take(torch.cat([u / reduced.squares.c, x], 1)),
        places.rows.take(y),
        places.rows.take(torch.cat([torch.zeros_like(u), s], 1)),
    )


def restrict_changes(program: ConeProgram, q: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Changes of q and b of a program as those of the reduced program."""
    elimination = program.structure.elimination
    if elimination is None:
        return q, b
    places, squares = elimination.places, _reduced_of(program).squares
    moved = squares.w * places.E.take(b) + places.T.take(q) / squares.c
    return places.X.take(q) - squares.back(moved), places.R.take(b)


def extend_data_gradients(program: ConeProgram, q: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients for q and b of the reduced program as those for a program's (see above)."""
    elimination = program.structure.elimination
    if elimination is None:
        return q, b
    places, squares = elimination.places, _reduced_of(program).squares
    moved = 0.0 - image(squares.A_E, q)  # not -: gradients of -0 would puzzle
    return (
        places.variables.take(torch.cat([moved / squares.c, q], 1)),
        places.rows.take(torch.cat([squares.w * moved, b], 1)),
    )


def restrict_gradients(program: ConeProgram, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients for x and y of a program as those for the reduced program's (see `extend`)."""
    elimination = program.structure.elimination
    if elimination is None:
        return x, y
    places, squares = elimination.places, _reduced_of(program).squares
    t = places.T.take(x) / squares.c - squares.w * places.E.take(y)
    return places.X.take(x) - squares.back(t), places.R.take(y)


def _reduced_of(program: ConeProgram) -> ReducedProgram:
    reduced = reduce(program)
    assert isinstance(reduced, ReducedProgram)
    return reduced


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
    X, R = complement(T, n), complement(E, structure.rows)
    if not T.size or not R.size or not X.size or X.size > LARGEST:
        return None
    curvature = _curvature(structure, E, T, X)
    if X.size > SMALL and curvature.nnz > A.nnz + P.nnz:
        return None
    cone = replace(structure.cone, zero=structure.cone.zero - E.size)
    return Elimination(Structure(curvature, A.part(R, X)[0], cone), E, T, X, R)


def arrange(structure: Structure, elimination: Elimination) -> tuple[Structure, Orders]:
    """The structure with T before X and E before R, so that every block is a view.

    Where no entry of A_E and A_R is missing, they are stored as one matrix, and c behind it.
    """
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
    structure, A = replace(structure, elimination=moved), structure.A
    others = A.cols >= count
    if others.sum() < rows.size * elimination.X.size:
        return structure, orders
    joined = np.concatenate([np.flatnonzero(others), np.flatnonzero(~others)])
    A = Sparsity(A.shape, A.rows[joined], A.cols[joined])
    return replace(structure, A=A), {**orders, "A": orders["A"][joined]}


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
    P, curved = structure.P, np.zeros(structure.variables, dtype=bool)
    curved[P.rows[P.rows == P.cols]] = True
    squares, _ = structure.A.part(E[curved[T]], X)
    counts = np.bincount(squares.rows, minlength=squares.shape[0])
    occurs = np.full((X.size, X.size), bool((counts == X.size).any()))  # if one row couples all
    known, _ = P.part(X, X)
    occurs[known.rows, known.cols] = occurs[squares.cols, squares.cols] = True
    if counts.max(initial=0) > 1 and not occurs.all():
        ones = np.ones(squares.nnz, dtype=np.float32)
        factor = sp.csr_array((ones, (squares.rows, squares.cols)), squares.shape)
        if squares.nnz > DENSE * squares.shape[0] * X.size:
            factor = factor.toarray()
        occurs[(factor.T @ factor).nonzero()] = True
    return Sparsity(occurs.shape, *np.nonzero(occurs))
