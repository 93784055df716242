"""Polishing a solution to rounding level by Newton steps on the optimality conditions.

Busseti, Moursi and Boyd, "Solution refinement at regular points of conic problems", 2019. The
matrix of a step is the one that the derivative needs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from declarative_cvx.least_squares import solve_consistent
from declarative_cvx.optimality import jacobian, residual_map
from declarative_cvx.program import ConeProgram

MAX_STEPS = 12
MAX_HALVINGS = 8
# A step that gains less than this factor is the last one.
GAIN = 0.5
# Relative residual at rounding level.
ROUNDING = 1e-15


def refine(program: ConeProgram, x: Tensor, y: Tensor, s: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Semismooth Newton with backtracking, element by element.

    Each element stops when its residual is at rounding level or no longer falls. The residual
    never rises: an element that cannot be improved is returned as it came.

    Parameters
    ----------
    program : ConeProgram
    x : Tensor, shape (batch, n)
    y, s : Tensor, shape (batch, m)
        Finite.

    Returns
    -------
    x, y, s : Tensor
        Points with s in K, y in K* and s'y = 0 to rounding, unless returned as they came.
    """
    cone = program.structure.cone
    point = torch.cat([x, s - y], 1)  # (batch, n + m)
    scale = _scales(program, x, y, s)
    merit = _merit(program, point, scale)
    came = _merit_as_given(program, x, y, s, scale)
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
    z = point[:, n:]
    slack = cone.project(z)
    improved = (merit < came)[:, None]
    return (
        torch.where(improved, point[:, :n], x),
        torch.where(improved, slack - z, y),
        torch.where(improved, slack, s),
    )


def _step(
    program: ConeProgram, point: Tensor, merit: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor]:
    """One Newton step, halved until the merit falls; points that it does not improve stay."""
    n = program.structure.variables
    x, z = point[:, :n], point[:, n:]
    matrix = jacobian(program, program.structure.cone.derivative(z))
    direction, _ = solve_consistent(matrix, torch.cat(residual_map(program, x, z), 1))
    best, best_merit = point, merit
    length = 1.0
    for _ in range(MAX_HALVINGS):
        trial = point - length * direction
        found = _merit(program, trial, scale)
        better = found < best_merit
        best = torch.where(better[:, None], trial, best)
        best_merit = torch.where(better, found, best_merit)
        if bool((best_merit < merit).all()):
            break
        length /= 2
    return best, best_merit


def _scales(program: ConeProgram, x: Tensor, y: Tensor, s: Tensor) -> Tensor:
    """Sizes of the terms of the two parts of the residual map, shape (batch, 2)."""

    def size(*terms: Tensor) -> Tensor:
        largest = [term.abs().amax(1) for term in terms if term.shape[1]]
        total = torch.stack(torch.broadcast_tensors(*largest)).amax(0)
        return torch.where(total > 0, total, 1.0)

    dual = size(program.P_times(x), program.q, program.At_times(y))
    primal = size(program.A_times(x), s, program.b) if s.shape[1] else torch.ones_like(dual)
    return torch.stack([dual, primal], 1)


def _merit(program: ConeProgram, point: Tensor, scale: Tensor) -> Tensor:
    """Largest relative residual of each element, shape (batch,)."""
    n = program.structure.variables
    dual, primal = residual_map(program, point[:, :n], point[:, n:])
    return _largest(dual, primal, scale)


def _merit_as_given(program: ConeProgram, x: Tensor, y: Tensor, s: Tensor, scale: Tensor) -> Tensor:
    """The same for (x, y, s), whose s and y need not be in their cones."""
    cone = program.structure.cone
    dual = program.P_times(x) + program.q + program.At_times(y)
    primal = program.A_times(x) + s - program.b
    found = _largest(dual, primal, scale)
    away = torch.cat([s - cone.project(s), y - cone.project_dual(y)], 1)
    gap = (s * y).sum(1).abs()
    return found + (away.abs().amax(1) if away.shape[1] else 0.0) + gap


def _largest(dual: Tensor, primal: Tensor, scale: Tensor) -> Tensor:
    worst = dual.abs().amax(1) / scale[:, 0]
    if primal.shape[1]:
        worst = torch.maximum(worst, primal.abs().amax(1) / scale[:, 1])
    return worst
