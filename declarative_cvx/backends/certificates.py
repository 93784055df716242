"""Certificates that there is no solution, sharpened until nothing but rounding speaks against them.

A solver stops at a tolerance of about 1e-8, at which a certificate of infeasibility shows no more
than that a feasible point would be large. True ones get to rounding level in a few Gauss-Newton
steps; false ones cannot.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from declarative_cvx.least_squares import RANK_TOLERANCE
from declarative_cvx.program import ConeProgram
from declarative_cvx.refinement import LARGE
from declarative_cvx.residuals import infeasibility, unboundedness

STEPS = 4
# Violation at which nothing is left to gain.
SHARP = 1e-12

Measure = Callable[[ConeProgram, Tensor], Tensor]
Towards = Callable[[ConeProgram, Tensor], Tensor]


def sharpen_infeasibility(program: ConeProgram, y: Tensor) -> Tensor:
    """Certificates of infeasibility, y (batch, m), nearer to A'y = 0, b'y = -1, y in K*."""
    return _sharpen(program, y, infeasibility, _towards_infeasibility, program.b)


def sharpen_unboundedness(program: ConeProgram, x: Tensor) -> Tensor:
    """Certificates of unboundedness, x (batch, n), nearer to P x = 0, q'x = -1, -A x in K."""
    return _sharpen(program, x, unboundedness, _towards_unboundedness, program.q)


def _sharpen(
    program: ConeProgram, v: Tensor, measure: Measure, towards: Towards, weight: Tensor
) -> Tensor:
    """Gauss-Newton steps of least norm, as long as an element gains by them."""
    if program.structure.variables + program.structure.rows > LARGE:
        return v
    at, best = torch.arange(len(v), device=v.device), measure(program, v)
    for _ in range(STEPS):
        at = at[(best[at] > SHARP) & torch.isfinite(best[at])]
        if not len(at):
            break
        part = program.select(at)
        moved = towards(part, v[at] / -(weight[at] * v[at]).sum(1, keepdim=True))
        found = measure(part, moved)
        better = found < best[at]
        at = at[better]
        v, best = v.index_copy(0, at, moved[better]), best.index_copy(0, at, found[better])
    return v


def _towards_infeasibility(program: ConeProgram, y: Tensor) -> Tensor:
    """A step for w in A'y = 0, b'y = -1, y = Π*(w), from w = y."""
    cone = program.structure.cone
    units = _inverse(program.absolute.At_times(torch.ones_like(y)))
    dual = cone.project_dual(y)
    equations = torch.cat([program.dense_A * units[:, None, :], program.b[:, :, None]], 2)
    error = torch.cat([program.At_times(dual) * units, 1 + _product(program.b, dual)], 1)
    matrix = -cone.derivative(-y).minus_identity(equations).mT
    return cone.project_dual(y - _least_norm(matrix, error))


def _towards_unboundedness(program: ConeProgram, x: Tensor) -> Tensor:
    """A step for x in P x = 0, q'x = -1, A x + Π(-A x) = 0."""
    cone, image, sizes = program.structure.cone, program.A_times(x), program.absolute
    rows, curvature = (_inverse(f(torch.ones_like(x))) for f in (sizes.A_times, sizes.P_times))
    outside = (image + cone.project(-image)) * rows
    error = torch.cat([program.P_times(x) * curvature, 1 + _product(program.q, x), outside], 1)
    A = -cone.derivative(-image).minus_identity(program.dense_A.expand(len(x), -1, -1))
    P = program.dense_P * curvature[:, :, None]
    matrix = torch.cat([P, program.q[:, None, :], A * rows[:, :, None]], 1)
    return x - _least_norm(matrix, error)


def _least_norm(matrix: Tensor, error: Tensor) -> Tensor:
    inverse = torch.linalg.pinv(matrix, rtol=RANK_TOLERANCE)
    return (inverse @ error[:, :, None])[:, :, 0]


def _product(v: Tensor, w: Tensor) -> Tensor:
    return (v * w).sum(1, keepdim=True)


def _inverse(sizes: Tensor) -> Tensor:
    return torch.where(sizes > 0, 1 / sizes, 1.0)
