"""How fixed points are solved for."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from declarative_cvx.errors import SpecificationError
from declarative_cvx.nonconvex.fixed_points.iteration import METHODS, Found, solve_map
from declarative_cvx.nonconvex.fixed_points.map import FixedPointMap
from declarative_cvx.nonconvex.fixed_points.structure import NONE, Structure

ON_IRREGULAR = ("warn", "ignore", "raise")


@dataclass(frozen=True)
class Settings:
    """How systems are solved.

    Attributes
    ----------
    tol : float
        Relative residual.
    max_iters : int
    method : {"auto", "picard", "anderson", "newton"}
    on_irregular : {"warn", "ignore", "raise"}
    structure : Structure, optional
        Of M in the forward pass.
    """

    tol: float
    max_iters: int
    method: str
    on_irregular: str
    structure: Structure = NONE

    def solve(self, problem: FixedPointMap, start: Tensor, warm: bool = False) -> Found:
        """`solve_map` with these settings."""
        return solve_map(
            problem,
            start,
            self.tol,
            self.max_iters,
            self.method,
            depth=self.structure.depth,
            warm=warm,
        )

    def transposed(self) -> Settings:
        return replace(self, structure=self.structure.transposed())


def default_tolerance(dtype: torch.dtype) -> float:
    """Relative residual that is asked for if nothing else is."""
    return 1e-12 if dtype == torch.float64 else 5e-7


def check_solver(tol: float | None, max_iters: int, method: str, on_irregular: str) -> None:
    """Refuse options that mean nothing.

    Raises
    ------
    SpecificationError
    """
    if tol is not None and not 0 < tol < 1:
        raise SpecificationError(f"tol must be a number between 0 and 1, got {tol!r}.")
    if not isinstance(max_iters, int) or max_iters < 1:
        raise SpecificationError(f"max_iters must be an integer from 1 on, got {max_iters!r}.")
    for option, given, choices in (
        ("method", method, METHODS),
        ("on_irregular", on_irregular, ON_IRREGULAR),
    ):
        if given not in choices:
            raise SpecificationError(f"{option} must be one of {choices}, got {given!r}.")
