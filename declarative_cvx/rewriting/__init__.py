"""Convex problems that break the rules for parameters, written so that they keep them.

CVXPY's rules for parameters (DPP) allow no product of parameters and no nonlinear function of one.
What depends on parameters only can be computed before anything is solved: each such expression
becomes a parameter itself. Everything here is said in CVXPY's terms; nothing is computed here.
"""

from __future__ import annotations

from declarative_cvx.rewriting.computed import ComputedParameter
from declarative_cvx.rewriting.rewriting import Rewriting, rewrite
from declarative_cvx.rewriting.square_root import SquareRoot

__all__ = ["ComputedParameter", "Rewriting", "SquareRoot", "rewrite"]
