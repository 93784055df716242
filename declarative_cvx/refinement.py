"""Polishing a solution to rounding level by Newton steps on the optimality conditions.

Busseti, Moursi and Boyd, "Solution refinement at regular points of conic problems", 2019. The
matrix of a step is the one that the derivative needs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from declarative_cvx.kkt import solve_kkt
from declarative_cvx.least_squares import RANK_TOLERANCE
from declarative_cvx.optimality import residual_map
from declarative_cvx.program import ConeProgram
from declarative_cvx.residuals import SMALLEST_SCALE

MAX_STEPS = 12
MAX_HALVINGS = 8
# A step that gains less than this factor is the last one.
GAIN = 0.5
# Relative residual at rounding level, and one at which a step that does not gain is not shortened:
# it has met rounding, not curvature.
ROUNDING = 4e-15
NEARLY = 1e-11
# Programs with more variables and rows than this are left as they come.
LARGE = 2000


def refine(program: ConeProgram, x: Tensor, y: Tensor, s: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Semismooth Newton with backtracking, element by element.

    Each element stops when its residual map is at rounding level or no longer falls.

    Parameters
    ----------
    program : ConeProgram
        In units of size one (`declarative_cvx.scaling`).
    x : Tensor, shape (batch, n)
    y, s : Tensor, shape (batch, m)
        Finite.

    Returns
    -------
    x, y, s : Tensor
        Points with s in K, y in K* and s'y = 0 to rounding. The caller compares their residuals
        with those of the points that came.
    """
    point = torch.cat([x, s - y], 1)  # (batch, n + m)
    scale = _scales(program, x, y, s)
    merit = _merit(program, point, scale)
    active = torch.where(merit > ROUNDING)[0]
    for _ in range(MAX_STEPS):
        if not len(active):
            break
        moved, better = _step(program.select(active), point[active], merit[active], scale[active])
        gained = better < GAIN * merit[active]
        point = point.index_copy(0, active, moved)
        merit = merit.index_copy(0, active, better)
        active = active[gained & (better > ROUNDING)]
    n = program.structure.variables
    slack = program.structure.cone.project(point[:, n:])
    return point[:, :n], slack - point[:, n:], slack


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


def _step(
    program: ConeProgram, point: Tensor, merit: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor]:
    """One Newton step, halved until the merit falls; points that it does not improve stay."""
    n = program.structure.variables
    x, z = point[:, :n], point[:, n:]
    rhs = torch.cat(residual_map(program, x, z), 1)[:, :, None]
    projection = program.structure.cone.derivative(z)
    direction = solve_kkt(program, projection, rhs)[0][:, :, 0]
    best, best_merit = point, merit
    length = 1.0
    for _ in range(MAX_HALVINGS):
        trial = point - length * direction
        found = _merit(program, trial, scale)
        better = found < best_merit
        best = torch.where(better[:, None], trial, best)
        best_merit = torch.where(better, found, best_merit)
        if bool(((best_merit < merit) | (merit < NEARLY)).all()):
            break
        length /= 2
    return best, best_merit


def _scales(program: ConeProgram, x: Tensor, y: Tensor, s: Tensor) -> Tensor:
    """Sizes of the terms of the two parts of the residual map, shape (batch, 2)."""

    def size(*terms: Tensor) -> Tensor:
        largest = [term.abs().amax(1) for term in terms if term.shape[1]]
        return torch.stack(torch.broadcast_tensors(*largest)).amax(0).clamp(min=SMALLEST_SCALE)

    dual = size(program.P_times(x), program.q, program.At_times(y))
    if not s.shape[1]:
        return torch.stack([dual, torch.ones_like(dual)], 1)
    return torch.stack([dual, size(program.A_times(x), s, program.b)], 1)


def _merit(program: ConeProgram, point: Tensor, scale: Tensor) -> Tensor:
    """Largest relative residual of each element, shape (batch,)."""
    n = program.structure.variables
    dual, primal = residual_map(program, point[:, :n], point[:, n:])
    worst = dual.abs().amax(1) / scale[:, 0]
    if primal.shape[1]:
        worst = torch.maximum(worst, primal.abs().amax(1) / scale[:, 1])
    return worst
