"""Fixed points x = f(x, u) of a function of the user's own."""

from declarative_cvx.nonconvex.fixed_points.problem import FixedPointLayer, FixedPointProblem
from declarative_cvx.nonconvex.fixed_points.solution import FixedPointSolution

__all__ = ["FixedPointLayer", "FixedPointProblem", "FixedPointSolution"]
