"""Problems solved in torch, batched, by methods of the library's own."""

from declarative_cvx.nonconvex.eigen import (
    EigenSolution,
    GeneralisedEigen,
    SymmetricEigen,
    generalised_eigen,
    symmetric_eigen,
)
from declarative_cvx.nonconvex.interior_point import InteriorPoint
from declarative_cvx.nonconvex.lbfgs import LBFGS
from declarative_cvx.nonconvex.minimizer import Minimizer
from declarative_cvx.nonconvex.optimal_transport import OptimalTransport, optimal_transport
from declarative_cvx.nonconvex.pooling import RobustPool, robust_pool
from declarative_cvx.nonconvex.program import NonlinearProgram
from declarative_cvx.nonconvex.projection import Projection, project
from declarative_cvx.nonconvex.report import KernelSolution
from declarative_cvx.nonconvex.solve import NonlinearSolution, solve_nonlinear
from declarative_cvx.nonconvex.total_variation import TotalVariation1d, total_variation_1d
from declarative_cvx.nonconvex.tridiagonal import TridiagonalSolve, tridiagonal_solve
from declarative_cvx.nonconvex.trust_region import TrustRegion
from declarative_cvx.nonconvex.weighted_least_squares import (
    WeightedLeastSquares,
    weighted_least_squares,
)

__all__ = [
    "LBFGS",
    "EigenSolution",
    "GeneralisedEigen",
    "InteriorPoint",
    "KernelSolution",
    "Minimizer",
    "NonlinearProgram",
    "NonlinearSolution",
    "OptimalTransport",
    "Projection",
    "RobustPool",
    "SymmetricEigen",
    "TotalVariation1d",
    "TridiagonalSolve",
    "TrustRegion",
    "WeightedLeastSquares",
    "generalised_eigen",
    "optimal_transport",
    "project",
    "robust_pool",
    "solve_nonlinear",
    "symmetric_eigen",
    "total_variation_1d",
    "tridiagonal_solve",
    "weighted_least_squares",
]
