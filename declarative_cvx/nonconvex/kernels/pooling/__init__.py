"""Pooling by the minimum of a sum of penalties (DDN Sec. 5.1)."""

from declarative_cvx.nonconvex.kernels.pooling.robust_pool import Pooling, RobustPool, robust_pool

__all__ = ["Pooling", "RobustPool", "robust_pool"]
