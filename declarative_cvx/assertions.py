"""Whether constants are what a problem asserts of them, which CVXPY takes on trust.

A matrix of a quadratic form that is not positive semidefinite although ``psd_wrap`` or
``assume_PSD=True`` says so makes the problem nonconvex: what satisfies its optimality conditions
may then be a saddle point. (What is asserted of parameters is checked with their values.)
"""

from __future__ import annotations

from collections.abc import Iterator
from textwrap import shorten

import cvxpy as cp
import numpy as np
import scipy.sparse as sp
from cvxpy.atoms.affine.wraps import nsd_wrap, psd_wrap

from declarative_cvx.errors import SpecificationError
from declarative_cvx.parameters import SEMIDEFINITE_TOLERANCE

# Matrices of a larger order are taken on trust here, too: their eigenvalues take seconds.
LARGE = 2000


def check_assertions(problem: cp.Problem) -> None:
    """Refuse constants that are not as definite as the problem asserts.

    Parameters
    ----------
    problem : cvxpy.Problem

    Raises
    ------
    SpecificationError
        Naming the expression and its eigenvalue.
    """
    for wrap in _asserted(problem):
        sign, word = (1, "positive") if isinstance(wrap, psd_wrap) else (-1, "negative")
        smallest = _smallest_eigenvalue(sign * wrap.args[0].value)
        if smallest < 0:
            raise SpecificationError(
                f"`{shorten(str(wrap), 60)}` is asserted to be {word} semidefinite but has the "
                f"eigenvalue {sign * smallest:.3g}. Leave the assertion out, and the problem is "
                "solved as a nonconvex one; or correct the matrix."
            )


def _asserted(tree: cp.Problem | cp.Constraint | cp.Expression) -> Iterator[cp.Expression]:
    """Constants whose definiteness is asserted."""
    if isinstance(tree, (psd_wrap, nsd_wrap)) and not tree.variables() and not tree.parameters():
        yield tree
        return
    parts = [tree.objective, *tree.constraints] if isinstance(tree, cp.Problem) else tree.args
    for part in parts:
        yield from _asserted(part)


def _smallest_eigenvalue(matrix: np.ndarray | sp.sparray) -> float:
    """The smallest eigenvalue of a symmetric matrix; zero if it is not below rounding."""
    size = float(abs(matrix).max()) if matrix.shape[0] else 0.0
    if not 0.0 < size < np.inf or matrix.shape[0] > LARGE:
        return 0.0
    dense = sp.csc_array(matrix).toarray()
    smallest = float(np.linalg.eigvalsh((dense + dense.T) / 2)[0])
    return smallest if smallest < -SEMIDEFINITE_TOLERANCE * size else 0.0
