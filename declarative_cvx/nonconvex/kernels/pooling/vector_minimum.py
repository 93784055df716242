"""Local minima of a sum of penalties of distances in space, from several starts."""

from __future__ import annotations

import torch
from torch import Tensor

from declarative_cvx.nonconvex.kernels.pooling.pools import Minimum, blocks, centre
from declarative_cvx.penalties import Penalty

# Cheap steps for all starts, after which only the best of them is followed to the end.
_TRIAL = 12
_STEPS = 200
_CANDIDATES = 32


def vector_minimum(
    penalty: Penalty,
    x: Tensor,  # (batch, n, d)
    alpha: Tensor,  # (batch,)
    weights: Tensor | None,  # (batch, n)
    restarts: int,
) -> Minimum:
    """Minimise sum_i w_i phi(||u - x_i||; alpha) over u in each pool.

    Starts are the coordinatewise median of a sample, and, unless the penalty is convex, the mean
    and the `restarts` best of a sample of the data. The gap is the bound that a convex function's
    gradient gives, NaN for others.
    """
    found = []
    for rows in blocks(x):
        scaled = None if weights is None else weights[rows] / weights[rows].amax(-1, keepdim=True)
        found.append(_block(penalty, x[rows], alpha[rows], scaled, restarts))
    fields = zip(*((m.point, m.gap, m.unique) for m in found), strict=True)
    return Minimum(*(torch.cat(field) for field in fields))


def _block(
    penalty: Penalty, x: Tensor, alpha: Tensor, weights: Tensor | None, restarts: int
) -> Minimum:
    weight = x.new_ones(x.shape[:2]) if weights is None else weights
    middle = centre(x.mT.flatten(0, 1)).reshape(x.shape[0], -1)
    points = (x - middle.unsqueeze(1)) / alpha[:, None, None]
    u = torch.zeros_like(middle)
    if not penalty.convex:
        u = _best(penalty, points, weight, _starts(penalty, points, weight, restarts))
    u = _descended(penalty, points, weight, u)
    gap = torch.full_like(alpha, torch.nan)
    if penalty.convex:
        offsets = u.unsqueeze(1) - points
        pull = weight * penalty.rho_weight(norm(offsets))
        gradient = (pull.unsqueeze(-1) * offsets).sum(1)
        gap = norm(gradient) * norm(offsets).amax(-1) / weight.sum(-1)
    unique = torch.ones_like(alpha, dtype=torch.bool)
    return Minimum(middle + alpha.unsqueeze(-1) * u, gap, unique)


def _starts(penalty: Penalty, points: Tensor, weight: Tensor, restarts: int) -> Tensor:
    """Starts (batch, starts, d) for points (batch, n, d) about their median."""
    mean = (weight.unsqueeze(1) @ points) / weight.sum(-1)[:, None, None]
    sample = points[:, :: max(1, points.shape[1] // _CANDIDATES)]
    value = (penalty.rho(torch.cdist(sample, points)) * weight.unsqueeze(1)).sum(-1)
    best = value.topk(min(restarts, sample.shape[1]), dim=-1, largest=False).indices
    chosen = sample.gather(1, best.unsqueeze(-1).expand(-1, -1, points.shape[-1]))
    return torch.cat([torch.zeros_like(mean), mean, chosen], dim=1)


def _best(penalty: Penalty, points: Tensor, weight: Tensor, u: Tensor) -> Tensor:
    """The best (batch, d) of the starts after some steps of reweighted least squares."""
    for _ in range(_TRIAL):
        pull = penalty.rho_weight(torch.cdist(u, points)) * weight.unsqueeze(1)
        total = pull.sum(-1, keepdim=True)
        u = torch.where(total > 0, pull @ points / total, u)
    value = (penalty.rho(torch.cdist(u, points)) * weight.unsqueeze(1)).sum(-1)
    best = value.argmin(-1)[:, None, None].expand(-1, 1, u.shape[-1])
    return u.gather(1, best).squeeze(1)


def _descended(penalty: Penalty, points: Tensor, weight: Tensor, u: Tensor) -> Tensor:
    """A local minimum, from u (batch, d), by the better of two steps each time."""
    precision = torch.finfo(u.dtype).eps
    done = torch.zeros_like(u[:, 0], dtype=torch.bool)
    for _ in range(_STEPS):
        step, newton = _step(penalty, points, weight, u)
        u = torch.where(done.unsqueeze(-1), u, u + step)
        # Reweighting only reduces the error by a factor, so it has to go on for longer.
        limit = torch.where(newton, 0.1 * precision**0.5, 0.01 * precision) * (1 + norm(u))
        done |= norm(step) <= limit
        if bool(done.all()):
            break
    return u


def _step(penalty: Penalty, points: Tensor, weight: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """Newton's step, and that of reweighted least squares where it lowers the sum more.

    Returns
    -------
    step : Tensor, shape (batch, d)
    newton : Tensor of bool, shape (batch,)
    """
    offsets = u.unsqueeze(-2) - points
    pull, distance, _, matrix = hessian(penalty, offsets, weight)
    gradient = (pull.unsqueeze(-2) @ offsets).mT
    total = pull.sum(-1)[:, None, None].clamp(min=torch.finfo(u.dtype).tiny)
    factor, failed = torch.linalg.cholesky_ex(matrix)
    eye = torch.eye(u.shape[-1], dtype=u.dtype, device=u.device)
    factor = torch.where((failed != 0)[:, None, None], eye, factor)
    steps = -torch.cat([gradient / total, torch.cholesky_solve(gradient, factor)], dim=-1)
    square = distance.square().unsqueeze(-1) + 2 * offsets @ steps
    distance = (square + steps.square().sum(-2, keepdim=True)).clamp(min=0).sqrt()
    safe, bold = (penalty.rho(distance) * weight.unsqueeze(-1)).sum(-2).unbind(-1)
    newton = (failed == 0) & (bold <= safe * (1 + 64 * torch.finfo(u.dtype).eps))
    return torch.where(newton.unsqueeze(-1), steps[..., 1], steps[..., 0]), newton


def norm(offsets: Tensor) -> Tensor:
    """Length along the last dimension, with derivative zero at zero."""
    square = offsets.square().sum(-1)
    zero = square == 0
    return torch.where(zero, 0.0, torch.where(zero, 1.0, square).sqrt())


def hessian(
    penalty: Penalty,
    offsets: Tensor,  # (..., n, d)
    weights: Tensor | None,  # (..., n)
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Hessian of the sum of penalties at an argument with these offsets from the points.

    That of one point is `pull` times the identity and `stretch` times the outer product of its
    offset with itself.

    Returns
    -------
    pull, distance, stretch : Tensor, shape (..., n)
    matrix : Tensor, shape (..., d, d)
    """
    distance = norm(offsets)
    pull = penalty.rho_weight(distance)
    square = torch.where(distance == 0, 1.0, distance).square()
    stretch = (penalty.rho_curvature(distance) - pull) / square
    if weights is not None:
        pull, stretch = pull * weights, stretch * weights
    # A direction in which nothing bends must not make the matrix singular.
    total = pull.sum(-1) * (1 + 4 * torch.finfo(offsets.dtype).eps)
    eye = torch.eye(offsets.shape[-1], dtype=offsets.dtype, device=offsets.device)
    matrix = total[..., None, None] * eye + (stretch.unsqueeze(-1) * offsets).mT @ offsets
    return pull, distance, stretch, matrix
