"""Optimisation problems written in CVXPY, as differentiable PyTorch layers."""

from declarative_cvx._version import __version__
from declarative_cvx.backends import (
    DIFFCP,
    ECOS,
    OSQP,
    SCS,
    Backend,
    Capabilities,
    Clarabel,
    Moreau,
)
from declarative_cvx.derivative import Derivative, DerivativeReport, Diffcp, Implicit
from declarative_cvx.errors import (
    BackendError,
    DeclarativeError,
    DerivativeModeError,
    IrregularError,
    IrregularWarning,
    MissingBackendError,
    ParameterError,
    SolveError,
    SpecificationError,
)
from declarative_cvx.layer import DeclarativeLayer
from declarative_cvx.residuals import Residuals
from declarative_cvx.solution import Attempt, Solution
from declarative_cvx.specification import ProblemSpec, Verdict, classify
from declarative_cvx.status import Status

__all__ = [
    "DIFFCP",
    "ECOS",
    "OSQP",
    "SCS",
    "Attempt",
    "Backend",
    "BackendError",
    "Capabilities",
    "Clarabel",
    "DeclarativeError",
    "DeclarativeLayer",
    "Derivative",
    "DerivativeModeError",
    "DerivativeReport",
    "Diffcp",
    "Implicit",
    "IrregularError",
    "IrregularWarning",
    "MissingBackendError",
    "Moreau",
    "ParameterError",
    "ProblemSpec",
    "Residuals",
    "Solution",
    "SolveError",
    "SpecificationError",
    "Status",
    "Verdict",
    "__version__",
    "classify",
]
