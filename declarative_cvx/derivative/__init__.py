"""Derivatives of solutions with respect to problem data, independent of any solver."""

from declarative_cvx.derivative.base import Adjoint, Derivative
from declarative_cvx.derivative.diffcp import Diffcp
from declarative_cvx.derivative.implicit import Implicit
from declarative_cvx.derivative.regularity import DerivativeReport, Outputs

DERIVATIVES: dict[str, type[Derivative]] = {d.name: d for d in (Implicit, Diffcp)}

__all__ = [
    "DERIVATIVES",
    "Adjoint",
    "Derivative",
    "DerivativeReport",
    "Diffcp",
    "Implicit",
    "Outputs",
]
