"""Euclidean projections (DDN Sec. 5.2)."""

from declarative_cvx.nonconvex.kernels.projection.projection import Projection, project

__all__ = ["Projection", "project"]
