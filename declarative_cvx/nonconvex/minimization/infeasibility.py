"""Points that show that a nonlinear program has no feasible point nearby."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from declarative_cvx.nonconvex.minimization.evaluation import Evaluation, evaluate
from declarative_cvx.nonconvex.minimization.matrices import (
    Matrix,
    full,
    largest_entry,
    mix,
    scale,
)
from declarative_cvx.nonconvex.minimization.program import NonlinearProgram

# Curvature, relative to the Hessian's largest entry, that counts as negative.
_NEGATIVE = 1e-6


def excess_of(at: Evaluation, equalities: int) -> Tensor:
    """Violations of the constraints, shape (batch, k + l)."""
    c = at.constraints
    return torch.cat([c[:, :equalities], c[:, equalities:].clamp(min=0.0)], 1)


def infeasibility_slope(
    pull: Tensor, excess: Tensor, rows: Matrix, x: Tensor, lower: Tensor, upper: Tensor
) -> Tensor:
    """Slope of the weighted, squared violation where bounds leave one, shape (batch,).

    For a change of x by its own size (or one), relative to the terms of the slope or to the
    violation itself, whichever is larger.

    Parameters
    ----------
    pull : Tensor, shape (batch, k + l)
        Violations times their weights; the violations themselves are the unweighted ones.
    excess : Tensor, shape (batch, k + l)
    rows : Tensor or SparseMatrix, shape (batch, k + l, n)
    x, lower, upper : Tensor, shape (batch, n)
    """
    if not pull.shape[1]:
        return torch.full_like(x[:, 0], torch.inf)
    slope = mix(pull, rows)
    size = 1 + x.abs()
    near = 1e-7 * size
    blocked = ((x - lower <= near) & (slope > 0)) | ((upper - x <= near) & (slope < 0))
    slope = (slope * size).masked_fill(blocked, 0.0)
    terms = largest_entry(scale(rows, pull, size))
    whole = torch.maximum(terms, (pull * excess).sum(1))
    return slope.abs().amax(1) / whole.clamp(min=torch.finfo(x.dtype).tiny)


def less_violated(
    program: NonlinearProgram,
    x: Tensor,  # (batch, n)
    at: Evaluation,
    pull: Tensor,  # (batch, k + l)
    excess: Tensor,  # (batch, k + l)
    inside: Tensor,  # (batch, n), 1 for variables at no bound
) -> tuple[Tensor, Tensor]:
    """Where the weighted violation has negative curvature at a stationary point, and which way.

    Returns
    -------
    negative : Tensor of bool, shape (batch,)
    direction : Tensor, shape (batch, n)
    """
    weights = torch.cat([torch.zeros_like(x[:, :1]), pull], 1)
    program, at = replace(program, sparse=False), at.dense()
    rows = full(at.rows) * torch.where(excess != 0, (pull / excess).abs().sqrt(), 0.0)[:, :, None]
    hessian = full(evaluate(program, x, weights).hessian) + rows.mT @ rows
    hessian = torch.nan_to_num(hessian * inside[:, :, None] * inside[:, None])
    curvatures, vectors = torch.linalg.eigh(hessian)
    negative = curvatures[:, 0] < -_NEGATIVE * hessian.abs().amax((1, 2))
    return negative, vectors[:, :, 0]
