"""Euclidean projections (DDN Sec. 5.2)."""

from declarative_cvx.nonconvex.projection.projection import Projection, project

__all__ = ["Projection", "project"]
