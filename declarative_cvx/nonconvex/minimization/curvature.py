"""Whether a stationary point is a minimum: curvature in the directions constraints leave."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from declarative_cvx.nonconvex.minimization.active_set import WEAK, ActiveSet
from declarative_cvx.nonconvex.minimization.conjugate_gradients import conjugate_gradients
from declarative_cvx.nonconvex.minimization.evaluation import Evaluation, Record, hessian_product
from declarative_cvx.nonconvex.minimization.kkt_residual import Violations
from declarative_cvx.nonconvex.minimization.matrices import (
    Matrix,
    absolute,
    along,
    full,
    row_largest,
    row_norms,
    scale,
    select,
)
from declarative_cvx.nonconvex.minimization.polish import Candidate
from declarative_cvx.nonconvex.minimization.program import NonlinearProgram
from declarative_cvx.nonconvex.minimization.sparse.matrix import SparseMatrix
from declarative_cvx.nonconvex.minimization.sparse.plan import Plan
from declarative_cvx.nonconvex.minimization.trust_region import row_sizes

# Curvature, in units of the Hessian's rows, that counts as negative.
_NEGATIVE = 1e-6
# Share of a row's terms that counts as no change of it.
_REST = 1e-9
# Curvature that counts as none.
FLAT = 1e-6
# Weight of the constraints in the first, cheap test.
_WEIGHT = 1e6


@dataclass(frozen=True, eq=False)
class Tangent(Record):
    """Curvature of the Lagrangian in the directions that constraints leave.

    Of elements some of whose curvatures are not clearly positive, in units of the Hessian's rows.

    Attributes
    ----------
    elements : Tensor of int64, shape (elements,)
    curvatures : Tensor, shape (elements, n)
        Ascending; one or more in directions that constraints do not leave.
    directions : Tensor, shape (elements, n, n)
        Columns.
    """

    elements: Tensor
    curvatures: Tensor
    directions: Tensor


def tangent(at: Evaluation, x: Tensor, found: Violations, equalities: int) -> Tangent:
    """At stationary points x, from the Hessian of the Lagrangian.

    Parameters
    ----------
    at : Evaluation
    x : Tensor, shape (batch, n)
    found : Violations
    equalities : int
    """
    inequalities = at.rows.shape[1] - equalities
    active = strongly_active(found, inequalities)
    units = row_sizes(at.hessian, at.gradient, x).rsqrt()
    columns = units * active.free
    hessian, rows = scale(at.hessian, columns, columns), scale(at.rows, active.rows, columns)
    rows = scale(rows, 1 / row_norms(rows).clamp(min=1e-200))
    suspects = torch.where(_may_be_flat(at.plan, hessian, rows, ~active.free) & at.finite)[0]
    n = x.shape[1]
    if not len(suspects):
        return Tangent(suspects, x.new_zeros(0, n), x.new_zeros(0, n, n))
    hessian, rows = full(select(hessian, suspects)), full(select(rows, suspects))
    hessian.diagonal(dim1=1, dim2=2).add_(~active.free[suspects])
    across = torch.linalg.pinv(rows, rtol=1e-9) @ rows if rows.shape[1] else 0.0
    onto = torch.eye(n, dtype=x.dtype, device=x.device) - across
    curvatures, vectors = torch.linalg.eigh(onto @ hessian @ onto + across)
    free = units[suspects] * active.free[suspects]
    return Tangent(suspects, curvatures, vectors * free[:, :, None])


def strongly_active(found: Violations, inequalities: int) -> ActiveSet:
    strong = found.active & (found.multiplier > WEAK)
    return ActiveSet.where_marked(found, strong, inequalities)


def descent_directions(
    at: Evaluation, found: Violations, equalities: int, left: Tangent
) -> tuple[Tensor, Tensor]:
    """Where the necessary second-order condition fails, and a direction that shows it.

    Returns
    -------
    elements : Tensor of int64, shape (elements,)
    directions : Tensor, shape (elements, n)
        Of negative curvature, in which no constraint is violated to first order.
    """
    suspects = left.elements
    if not len(suspects):
        return suspects, left.curvatures
    inequalities = at.rows.shape[1] - equalities
    near = ActiveSet.where_marked(found, found.slack <= WEAK, inequalities).select(suspects)
    strong = strongly_active(found, inequalities).select(suspects)
    part, steepest = at.select(suspects), left.directions[:, :, 0]
    direction, possible = _feasible(steepest, part, near, equalities)
    for side in (steepest, -steepest):
        cut = _within_bounds(side, near)
        falls = ~possible & _bends_down(cut, part, strong)
        cut, fits = _feasible(cut, part, near, equalities)
        direction = torch.where((falls & fits)[:, None], cut, direction)
        possible = possible | (falls & fits)
    keep = (left.curvatures[:, 0] < -_NEGATIVE) & possible
    return suspects[keep], direction[keep]


def _within_bounds(direction: Tensor, near: ActiveSet) -> Tensor:
    """Without what leads out of bounds."""
    out = (near.lower & (direction < 0)) | (near.upper & (direction > 0))
    return direction.masked_fill(out, 0.0)


def _bends_down(direction: Tensor, at: Evaluation, strong: ActiveSet) -> Tensor:
    """Whether directions leave what is strongly active at rest, and curvature is negative."""
    terms = along(absolute(at.rows), direction.abs())
    rest = ((along(at.rows, direction).abs() <= _REST * terms) | ~strong.rows).all(1)
    curvature = direction * along(at.hessian, direction)
    size = direction.square() * row_largest(at.hessian)
    return rest & (curvature.sum(1) < -_NEGATIVE * size.sum(1))


def _may_be_flat(plan: Plan | None, hessian: Matrix, rows: Matrix, held: Tensor) -> Tensor:
    """A quick test that only elements with positive curvature on the null space of rows pass."""
    shift = held.to(torch.float64) - _NEGATIVE
    if plan is not None:
        return _may_be_flat_sparsely(plan, hessian, rows, shift)
    rows = full(rows)
    shifted = full(hessian) + _WEIGHT * rows.mT @ rows
    shifted.diagonal(dim1=1, dim2=2).add_(shift)
    return torch.linalg.cholesky_ex(shifted)[1] > 0


def _may_be_flat_sparsely(plan: Plan, hessian: Matrix, rows: Matrix, shift: Tensor) -> Tensor:
    assert isinstance(hessian, SparseMatrix)
    assert isinstance(rows, SparseMatrix)
    weights = hessian.values.new_full(rows.shape[:2], _WEIGHT)
    return ~plan.definite(plan.factors(plan.assemble(hessian, rows, weights, shift)))


def _feasible(
    direction: Tensor, at: Evaluation, near: ActiveSet, equalities: int
) -> tuple[Tensor, Tensor]:
    """The direction or its opposite, whichever leaves constraints at rest or inactive."""
    rates = along(at.rows, direction)[:, equalities:]
    bounds = torch.cat(
        [
            torch.where(near.rows[:, equalities:], rates, 0.0),
            torch.where(near.lower, -direction, 0.0),
            torch.where(near.upper, direction, 0.0),
        ],
        1,
    )
    size = 1e-7 * torch.maximum(
        direction.abs().amax(1), rates.abs().amax(1) if rates.shape[1] else direction.abs().amax(1)
    )
    forward = (bounds <= size[:, None]).all(1)
    backward = (bounds >= -size[:, None]).all(1)
    return torch.where(forward[:, None], direction, -direction), forward | backward


def downhill(program: NonlinearProgram, best: Candidate) -> tuple[Tensor, Tensor]:
    """As `descent_directions`, where Hessians are not formed: as far as conjugate gradients see."""
    x = best.point.x
    free = ActiveSet.of(best.found, 0).free.to(x)
    generator = torch.Generator().manual_seed(0)
    random = torch.randn(x.shape[1], generator=generator, dtype=x.dtype).to(x.device)
    product = hessian_product(program, x, x.new_zeros(len(x), 0))
    met = conjugate_gradients(product, random.expand_as(x), free, tol=1e-3, rounds=1)
    at = torch.where(met.negative)[0]
    return at, met.direction[at]
