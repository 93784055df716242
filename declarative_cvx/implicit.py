"""Implicit deep learning: models defined by fixed points, their training and robustness."""

from declarative_cvx.nonconvex.implicit import *  # noqa: F403  # all public names, listed there
from declarative_cvx.nonconvex.implicit import __all__ as __all__
