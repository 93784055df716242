"""Optimisation problems written in CVXPY, as differentiable PyTorch layers."""

from declarative_cvx._version import __version__
from declarative_cvx.atoms import (
    PenaltyAtom,
    cauchy,
    geman_mcclure,
    penalty_atom,
    pseudo_huber,
    truncated_quadratic,
    tukey,
    welsch,
)
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
from declarative_cvx.penalties import PENALTIES, Penalty
from declarative_cvx.residuals import Residuals
from declarative_cvx.solution import Attempt, Solution
from declarative_cvx.specification import ProblemSpec, Verdict, classify
from declarative_cvx.status import Status

__all__ = [
    "DIFFCP",
    "ECOS",
    "OSQP",
    "PENALTIES",
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
    "Penalty",
    "PenaltyAtom",
    "ProblemSpec",
    "Residuals",
    "Solution",
    "SolveError",
    "SpecificationError",
    "Status",
    "Verdict",
    "__version__",
    "cauchy",
    "classify",
    "geman_mcclure",
    "penalty_atom",
    "pseudo_huber",
    "truncated_quadratic",
    "tukey",
    "welsch",
]
