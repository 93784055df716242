"""Polishing a solution to rounding level by Newton steps on the optimality conditions.

Busseti, Moursi and Boyd, "Solution refinement at regular points of conic problems", 2019. The
matrix of a step is the one that the derivative needs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from declarative_cvx.kkt import solve_kkt
from declarative_cvx.least_squares import RANK_TOLERANCE
from declarative_cvx.optimality import residual_map
from declarative_cvx.program import ConeProgram

MAX_STEPS = 12
MAX_HALVINGS = 8
# A step is a gain if it reduces the residual by this factor; so many without one end the search.
GAIN = 0.5
PATIENCE = 4
# Relative residual at rounding level, and one below which only a clear gain is more than rounding.
ROUNDING = 4e-15
NEARLY = 1e-11
CLEAR_GAIN = 0.1
# Programs with more variables and rows than this are left as they come.
LARGE = 2000


def refine(
    program: ConeProgram, x: Tensor, y: Tensor, s: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Semismooth Newton steps, element by element.

    Each element stops when its residual map is at rounding level or no longer falls.

    Parameters
    ----------
    program : ConeProgram
        In units of size one (`declarative_cvx.scaling`).
    x : Tensor, shape (batch, n)
    y, s : Tensor, shape (batch, m)
        Finite.
    scale : Tensor, shape (batch, n + m)
        Sizes of the terms of the optimality conditions (`declarative_cvx.residuals.scales`).

    Returns
    -------
    x, y, s : Tensor
        Points with s in K, y in K* and s'y = 0 to rounding. The caller compares their residuals
        with those of the points that came.
    """
    point = torch.cat([x, s - y], 1)  # (batch, n + m)
    best = _Best(point, _merit(program, point, scale))
    _full_steps(program, best, scale)
    _shortened_steps(program, best, scale)
    n = program.structure.variables
    z = best.point[:, n:]
    slack = program.structure.cone.project(z)
    return best.point[:, :n], slack - z, slack


@dataclass
class _Best:
    """The best point of each element so far, shapes (batch, n + m) and (batch,)."""

    point: Tensor
    merit: Tensor

    def offer(self, at: Tensor, point: Tensor, merit: Tensor) -> Tensor:
        """Take what is better; which of the elements `at` gained much from it."""
        known = self.merit[at]
        better = merit < known
        self.point = self.point.index_copy(
            0, at, torch.where(better[:, None], point, self.point[at])
        )
        self.merit = self.merit.index_copy(0, at, torch.where(better, merit, known))
        return merit < torch.where(known < NEARLY, CLEAR_GAIN, GAIN) * known


def _full_steps(program: ConeProgram, best: _Best, scale: Tensor) -> None:
    """Newton's method without a line search.

    Where pieces of the cones change (active sets), the residual may rise before it falls to zero,
    so an element is given up only after several steps without a gain.
    """
    at = torch.where(best.merit > ROUNDING)[0]
    point, idle = best.point[at], torch.zeros(len(at), dtype=torch.int64, device=at.device)
    for _ in range(MAX_STEPS):
        if not len(at):
            return
        part = program.select(at)
        point = point - _direction(part, point)
        merit = _merit(part, point, scale[at])
        gained = best.offer(at, point, merit)
        idle = torch.where(gained, 0, idle + 1)
        patience = torch.where(best.merit[at] < NEARLY, 1, PATIENCE)
        go_on = (best.merit[at] > ROUNDING) & (idle < patience) & torch.isfinite(merit)
        at, point, idle = at[go_on], point[go_on], idle[go_on]


def _shortened_steps(program: ConeProgram, best: _Best, scale: Tensor) -> None:
    """Newton's method from the best point, each step halved until the residual falls."""
    at = torch.where(best.merit > NEARLY)[0]
    for _ in range(MAX_STEPS):
        if not len(at):
            return
        part, point, merit = program.select(at), best.point[at], best.merit[at]
        direction = _direction(part, point)
        for halving in range(MAX_HALVINGS):
            trial = point - direction / 2**halving
            best.offer(at, trial, _merit(part, trial, scale[at]))
            if bool((best.merit[at] < merit).all()):
                break
        gained = best.merit[at] < GAIN * merit
        at = at[gained & (best.merit[at] > NEARLY)]


def _direction(program: ConeProgram, point: Tensor) -> Tensor:
    """Newton direction of the residual map, least squares where the Jacobian is singular."""
    n = program.structure.variables
    x, z = point[:, :n], point[:, n:]
    rhs = torch.cat(residual_map(program, x, z), 1)[:, :, None]
    projection = program.structure.cone.derivative(z)
    return solve_kkt(program, projection, rhs)[0][:, :, 0]


def refine_ray(program: ConeProgram, x: Tensor) -> Tensor:
    """The nearest directions in which the objective has no curvature: P x = 0.

    Rays of programs whose quadratic objective was rewritten with a cone come back with the
    square root of the solver's accuracy.

    Parameters
    ----------
    program : ConeProgram
    x : Tensor, shape (batch, n)
        Claimed directions of unboundedness.
    """
    if not program.structure.P.nnz or program.structure.variables > LARGE:
        return x
    values, vectors = torch.linalg.eigh(program.dense_P)
    curved = values > RANK_TOLERANCE * values[:, -1:]
    parts = (vectors.mT @ x[:, :, None]) * curved[:, :, None]
    return x - (vectors @ parts)[:, :, 0]


def _merit(program: ConeProgram, point: Tensor, scale: Tensor) -> Tensor:
    """Largest relative residual of each element, shape (batch,)."""
    n = program.structure.variables
    both = torch.cat(residual_map(program, point[:, :n], point[:, n:]), 1)
    return (both / scale).abs().amax(1)
