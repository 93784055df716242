"""The table of solvers, and how a user's choice becomes one of its entries."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from declarative_cvx.backends.base import Backend
from declarative_cvx.backends.clarabel import Clarabel
from declarative_cvx.backends.diffcp import DIFFCP
from declarative_cvx.backends.dual_active_set import DualActiveSet
from declarative_cvx.backends.ecos import ECOS
from declarative_cvx.backends.moreau import Moreau
from declarative_cvx.backends.osqp import OSQP
from declarative_cvx.backends.scs import SCS
from declarative_cvx.errors import BackendError, nearest

BACKENDS: dict[str, type[Backend]] = {
    backend.name: backend for backend in (DualActiveSet, Moreau, Clarabel, SCS, ECOS, OSQP, DIFFCP)
}


def backend_class(name: str) -> type[Backend]:
    """The solver of this name, in any mixture of upper and lower case."""
    by_lower = {known.lower(): backend for known, backend in BACKENDS.items()}
    if name.lower() not in by_lower:
        raise BackendError(f"Unknown solver {name!r}. {nearest(name, ['auto', *BACKENDS])}")
    return by_lower[name.lower()]


def backend_named(name: str, options: Mapping[str, Any] | None = None) -> Backend:
    """A solver by name, with options by any of their names."""
    return backend_class(name).configured(options or {})


def installed() -> dict[str, type[Backend]]:
    """The solvers whose packages are installed."""
    return {name: backend for name, backend in BACKENDS.items() if backend.is_installed()}
