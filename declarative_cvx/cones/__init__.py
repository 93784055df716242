"""Convex cones: dimensions, row order, projections and the derivatives of projections."""

from declarative_cvx.cones.product import KINDS, POLYHEDRAL, Cone, ConeDerivative

__all__ = ["KINDS", "POLYHEDRAL", "Cone", "ConeDerivative"]
