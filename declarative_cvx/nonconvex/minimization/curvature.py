"""Whether a stationary point is a minimum: curvature in the directions constraints leave."""

from __future__ import annotations

import torch
from torch import Tensor

from declarative_cvx.nonconvex.minimization.active_set import WEAK, ActiveSet
from declarative_cvx.nonconvex.minimization.conjugate_gradients import conjugate_gradients
from declarative_cvx.nonconvex.minimization.evaluation import Evaluation, along, hessian_product
from declarative_cvx.nonconvex.minimization.kkt_residual import Violations
from declarative_cvx.nonconvex.minimization.polish import Candidate
from declarative_cvx.nonconvex.minimization.program import NonlinearProgram
from declarative_cvx.nonconvex.minimization.trust_region import row_sizes

# Curvature, in units of the Hessian's rows, that counts as negative.
_NEGATIVE = 1e-6
# Weight of the constraints in the first, cheap test.
_WEIGHT = 1e6


def descent_directions(
    at: Evaluation, x: Tensor, found: Violations, equalities: int
) -> tuple[Tensor, Tensor]:
    """Where the necessary second-order condition fails, and a direction that shows it.

    Parameters
    ----------
    at : Evaluation
        At stationary points x, with the Hessian of the Lagrangian.
    x : Tensor, shape (batch, n)
    found : Violations
    equalities : int

    Returns
    -------
    elements : Tensor of int64, shape (elements,)
    directions : Tensor, shape (elements, n)
        Of negative curvature, in which no constraint is violated to first order.
    """
    strong = found.active & (found.multiplier > WEAK)
    inequalities = at.rows.shape[1] - equalities
    active = ActiveSet.where_marked(found, strong, inequalities)
    units = row_sizes(at.hessian, at.gradient, x).rsqrt()
    hessian = at.hessian * units[:, :, None] * units[:, None] * _both(active.free)
    rows = at.rows * units[:, None] * active.free[:, None] * active.rows[:, :, None]
    rows = rows / torch.linalg.vector_norm(rows, dim=2, keepdim=True).clamp(min=1e-200)
    suspects = torch.where(_may_be_negative(hessian, rows) & at.finite)[0]
    if not len(suspects):
        return suspects, x.new_zeros(0, x.shape[1])
    hessian, rows = hessian[suspects], rows[suspects]
    onto = torch.eye(x.shape[1], dtype=x.dtype, device=x.device) - (
        torch.linalg.pinv(rows, rtol=1e-9) @ rows if rows.shape[1] else 0.0
    )
    curvatures, vectors = torch.linalg.eigh(onto @ hessian @ onto)
    direction = vectors[:, :, 0] * units[suspects] * active.free[suspects]
    weak = ActiveSet.where_marked(found, found.slack <= WEAK, inequalities)
    direction, possible = _feasible(
        direction, at.select(suspects), weak.select(suspects), equalities
    )
    keep = (curvatures[:, 0] < -_NEGATIVE) & possible
    return suspects[keep], direction[keep]


def _both(mask: Tensor) -> Tensor:
    return mask[:, :, None] & mask[:, None]


def _may_be_negative(hessian: Tensor, rows: Tensor) -> Tensor:
    """A quick test that no element with negative curvature on the null space of rows passes."""
    shifted = hessian + _WEIGHT * rows.mT @ rows
    shifted.diagonal(dim1=1, dim2=2).add_(_NEGATIVE)
    return torch.linalg.cholesky_ex(shifted)[1] > 0


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
