"""Nonconvex problems in CVXPY's words, with their optima and independent derivatives."""

from __future__ import annotations

from nonconvex_collection import (
    dynamics,
    estimation,
    geometry,
    hock_schittkowski,
    hock_schittkowski_last,
    hock_schittkowski_later,
    pose,
)
from nonconvex_collection.problem import NonconvexProblem
from nonconvex_collection.reference import loss, reference_gradient, resolved, weights

__all__ = [
    "NonconvexProblem",
    "all_problems",
    "loss",
    "reference_gradient",
    "resolved",
    "weights",
]

_MODULES = (
    estimation,
    dynamics,
    geometry,
    pose,
    hock_schittkowski,
    hock_schittkowski_last,
    hock_schittkowski_later,
)


def all_problems() -> list[NonconvexProblem]:
    """All of them, in order of their files."""
    return [problem for module in _MODULES for problem in module.PROBLEMS]
