"""Conjugate gradients on a batch of Hessians that are only known by their products."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from declarative_cvx.nonconvex.minimization.program import NonlinearProgram

# Variables from which, in problems without rows, Hessians are not formed (measured).
LARGE = 200
# Curvature, relative to the largest met, that counts as none.
_FLAT = 1e-13


def is_large(program: NonlinearProgram) -> bool:
    """Whether a program's Hessians are better not formed."""
    rows = program.equality is not None or program.inequality is not None
    return not rows and program.variables >= LARGE


@dataclass(frozen=True, eq=False)
class ConjugateGradients:
    """What the method found.

    Attributes
    ----------
    solution : Tensor, shape (batch, n)
    residual : Tensor, shape (batch,)
        Largest error, relative to the right-hand side.
    negative : Tensor of bool, shape (batch,)
        Whether a direction of negative curvature was met.
    direction : Tensor, shape (batch, n)
        That direction.
    """

    solution: Tensor
    residual: Tensor
    negative: Tensor
    direction: Tensor


def conjugate_gradients(
    product: Callable[[Tensor], Tensor],
    rhs: Tensor,  # (batch, n)
    kept: Tensor,  # (batch, n), 1 for the variables that take part
    tol: float = 1e-14,
    rounds: int = 10,
) -> ConjugateGradients:
    """Solve H x = rhs of the variables that take part, from zero.

    It stops at the tolerance, or where the residual has stopped to decrease, after at most
    `rounds` times as many iterations as there are variables. Singular directions that rhs has no
    part in are left alone, so the solution is the one of least norm.
    """
    unit = rhs.abs().amax(1, keepdim=True)
    unit = torch.where(unit > 0, unit, 1.0)
    r = rhs / unit * kept
    x, best, p = torch.zeros_like(r), torch.zeros_like(r), r
    size = (r * r).sum(1)
    first = least = size
    steepest, negative = torch.zeros_like(size), torch.zeros_like(size, dtype=torch.bool)
    direction = torch.zeros_like(r)
    for iteration in range(rounds * rhs.shape[1]):
        if iteration % 16 == 0 and bool((least <= tol**2 * first).all()):
            break
        Hp = product(p) * kept
        curvature, length = (p * Hp).sum(1), (p * p).sum(1)
        steepest = torch.maximum(steepest, curvature.abs() / length.clamp(min=1e-300))
        bad = curvature <= _FLAT * steepest * length
        found = (curvature < -1e-8 * steepest * length) & ~negative
        direction = torch.where(found[:, None], p, direction)
        negative = negative | found
        step = torch.where(bad, 0.0, size / curvature)
        x, r = x + step[:, None] * p, r - step[:, None] * Hp
        new = (r * r).sum(1)
        best = torch.where((new < least)[:, None], x, best)
        least = torch.minimum(new, least)
        p = torch.where(bad[:, None], 0.0, r + (new / size.clamp(min=1e-300))[:, None] * p)
        size = new
    error = (rhs / unit * kept - product(best) * kept).abs().amax(1)
    return ConjugateGradients(best * unit, error, negative, direction)
