"""Solvers of cone programs: one a file, options as fields, capabilities as data."""

from declarative_cvx.backends.base import Answer, Backend, Capabilities, Point
from declarative_cvx.backends.clarabel import Clarabel
from declarative_cvx.backends.diffcp import DIFFCP
from declarative_cvx.backends.dispatch import automatic, require_capable, solve
from declarative_cvx.backends.dual_active_set import DualActiveSet
from declarative_cvx.backends.ecos import ECOS
from declarative_cvx.backends.elementwise import ElementwiseBackend, One
from declarative_cvx.backends.moreau import Moreau
from declarative_cvx.backends.osqp import OSQP
from declarative_cvx.backends.scs import SCS
from declarative_cvx.backends.table import BACKENDS, backend_class, backend_named, installed

__all__ = [
    "BACKENDS",
    "DIFFCP",
    "ECOS",
    "OSQP",
    "SCS",
    "Answer",
    "Backend",
    "Capabilities",
    "Clarabel",
    "DualActiveSet",
    "ElementwiseBackend",
    "Moreau",
    "One",
    "Point",
    "automatic",
    "backend_class",
    "backend_named",
    "installed",
    "require_capable",
    "solve",
]
