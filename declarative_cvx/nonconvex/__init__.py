"""Problems solved in torch, batched, by methods of the library's own."""

from declarative_cvx.nonconvex.fixed_points import (
    FixedPointLayer,
    FixedPointProblem,
    FixedPointSolution,
)
from declarative_cvx.nonconvex.forward_solver import ForwardSolver
from declarative_cvx.nonconvex.kernels.eigen import (
    EigenSolution,
    GeneralisedEigen,
    SymmetricEigen,
    generalised_eigen,
    symmetric_eigen,
)
from declarative_cvx.nonconvex.kernels.optimal_transport import OptimalTransport, optimal_transport
from declarative_cvx.nonconvex.kernels.pooling import RobustPool, robust_pool
from declarative_cvx.nonconvex.kernels.projection import Projection, project
from declarative_cvx.nonconvex.kernels.report import KernelSolution
from declarative_cvx.nonconvex.kernels.total_variation import TotalVariation1d, total_variation_1d
from declarative_cvx.nonconvex.kernels.tridiagonal import TridiagonalSolve, tridiagonal_solve
from declarative_cvx.nonconvex.kernels.weighted_least_squares import (
    WeightedLeastSquares,
    weighted_least_squares,
)
from declarative_cvx.nonconvex.minimization.interior_point import InteriorPoint
from declarative_cvx.nonconvex.minimization.lbfgs import LBFGS
from declarative_cvx.nonconvex.minimization.minimizer import Minimizer
from declarative_cvx.nonconvex.minimization.program import NonlinearProgram
from declarative_cvx.nonconvex.minimization.solve import NonlinearSolution, solve_nonlinear
from declarative_cvx.nonconvex.minimization.trust_region import TrustRegion
from declarative_cvx.nonconvex.nlp_solver import COPT, IPOPT, UNO, Knitro, NLPSolver
from declarative_cvx.nonconvex.torch_problem import TorchProblem

__all__ = [
    "COPT",
    "IPOPT",
    "LBFGS",
    "UNO",
    "EigenSolution",
    "FixedPointLayer",
    "FixedPointProblem",
    "FixedPointSolution",
    "ForwardSolver",
    "GeneralisedEigen",
    "InteriorPoint",
    "KernelSolution",
    "Knitro",
    "Minimizer",
    "NLPSolver",
    "NonlinearProgram",
    "NonlinearSolution",
    "OptimalTransport",
    "Projection",
    "RobustPool",
    "SymmetricEigen",
    "TorchProblem",
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
