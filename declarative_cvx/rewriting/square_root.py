"""The square root of a matrix of parameters, by which a quadratic form is a sum of squares."""

from __future__ import annotations

from typing import Any

import cvxpy as cp
import numpy as np
from cvxpy.atoms.atom import Atom

# Eigenvalues are taken to be at least this share of the largest. Where a matrix is singular, its
# root has no derivative but the quadratic form x'Px has: the form of the matrix with so little
# added has the derivative of x'Px, and at a distance of 1e-12 its value.
FLOOR = 1e-12


class SquareRoot(Atom):
    """The symmetric R with R R = P, for a positive semidefinite P.

    It is no function for optimisation: CVXPY's rules know it as neither convex nor concave, so
    that it has to be computed beforehand.

    Parameters
    ----------
    P : cvxpy.Expression
        Symmetric, without variables.
    """

    def __init__(self, P: cp.Expression) -> None:
        super().__init__(P)

    def shape_from_args(self) -> tuple[int, ...]:
        return self.args[0].shape

    def sign_from_args(self) -> tuple[bool, bool]:
        return False, False

    def is_symmetric(self) -> bool:
        return True

    def is_atom_convex(self) -> bool:
        return False

    def is_atom_concave(self) -> bool:
        return False

    def is_incr(self, idx: int) -> bool:
        return False

    def is_decr(self, idx: int) -> bool:
        return False

    def numeric(self, values: list[Any]) -> np.ndarray:
        eigenvalues, vectors = np.linalg.eigh(values[0])
        roots = np.sqrt(np.maximum(eigenvalues, FLOOR * eigenvalues[-1]))
        return (vectors * roots) @ vectors.T

    def _grad(self, values: list[Any]) -> list[None]:
        return [None]
