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
# Distance from the origin, in units of alpha, from which a minimum is looked for once more about
# itself, and how often.
_NEAR, _MOVES = 4.0, 4


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
    points = (x - middle.unsqueeze(1)).div_(alpha[:, None, None])
    if not penalty.convex:
        start = _best(penalty, points, weight, _starts(penalty, points, weight, restarts))
        points, middle = points - start.unsqueeze(1), middle + alpha.unsqueeze(-1) * start
    u, square = _descended(penalty, points, weight)
    for _ in range(_MOVES):
        far = torch.where(norm(u) > _NEAR)[0]
        if not len(far):
            break
        # Again from there: squares of distances are exact near the origin only.
        there = points[far] - u[far].unsqueeze(1)
        middle = middle.index_add(0, far, alpha[far].unsqueeze(-1) * u[far])
        points = points.index_copy(0, far, there)
        again, squares = _descended(penalty, there, weight[far])
        u, square = u.index_copy(0, far, again), square.index_copy(0, far, squares)
    gap = torch.full_like(alpha, torch.nan)
    if penalty.convex:
        distance = square.sqrt()
        pull = weight * penalty.rho_weight(distance)
        gradient = pull.sum(-1, keepdim=True) * u - (pull.unsqueeze(1) @ points).squeeze(1)
        gap = norm(gradient) * distance.amax(-1) / weight.sum(-1)
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


def _descended(penalty: Penalty, points: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """A local minimum, from the origin, by the better of two steps each time.

    Returns
    -------
    u : Tensor, shape (batch, d)
    square : Tensor, shape (batch, n)
        Squares of its distances from the points.
    """
    precision = torch.finfo(points.dtype).eps
    u = torch.zeros_like(points[:, 0])
    done = torch.zeros_like(u[:, 0], dtype=torch.bool)
    scratch = points * points
    square = sizes = scratch.sum(-1)
    for _ in range(_STEPS):
        steps, failed = _steps(penalty, points, weight, u, square, scratch)
        squares = _squares(points, sizes, u.unsqueeze(-1) + steps)
        safe, bold = (penalty.rho(squares.sqrt()) * weight.unsqueeze(-1)).sum(-2).unbind(-1)
        newton = ~failed & (bold <= safe * (1 + 64 * precision))
        step = torch.where(newton.unsqueeze(-1), steps[..., 1], steps[..., 0])
        new = torch.where(newton.unsqueeze(-1), squares[..., 1], squares[..., 0])
        u = torch.where(done.unsqueeze(-1), u, u + step)
        square = torch.where(done.unsqueeze(-1), square, new)
        # Reweighting only reduces the error by a factor, so it has to go on for longer.
        limit = torch.where(newton, 0.1 * precision**0.5, 0.01 * precision) * (1 + norm(u))
        done |= norm(step) <= limit
        if bool(done.all()):
            break
    return u, square


def _squares(
    points: Tensor,  # (batch, n, d)
    sizes: Tensor,  # (batch, n), squares of their lengths
    u: Tensor,  # (batch, d, k)
) -> Tensor:  # (batch, n, k)
    """Squares of distances, by a product of matrices: no difference of points is stored.

    Their error is a rounding of the larger of the two lengths' squares: of the points that pull at
    u, none is far from the origin if u is near it.
    """
    product = points @ u
    return (sizes.unsqueeze(-1) - 2 * product + u.square().sum(-2, keepdim=True)).clamp(min=0)


def _steps(
    penalty: Penalty, points: Tensor, weight: Tensor, u: Tensor, square: Tensor, scratch: Tensor
) -> tuple[Tensor, Tensor]:
    """The steps of reweighted least squares and of Newton's method.

    `scratch` is memory of the size of the points: to ask for some each time takes as long as the
    arithmetic.

    Returns
    -------
    steps : Tensor, shape (batch, d, 2)
    failed : Tensor of bool, shape (batch,)
        Where there is no Newton step, as the Hessian is not positive definite.
    """
    distance = square.sqrt()
    pull = penalty.rho_weight(distance)
    stretch = (penalty.rho_curvature(distance) - pull) / torch.where(square == 0, 1.0, square)
    pull, stretch = pull * weight, stretch * weight
    total = pull.sum(-1, keepdim=True)
    # Sums of pull and of stretch over differences from u, from sums over the points.
    sums = torch.stack([pull, stretch], 1) @ points
    gradient = (total * u - sums[:, 0]).unsqueeze(-1)
    cross = sums[:, 1].unsqueeze(-1) - 0.5 * stretch.sum(-1)[:, None, None] * u.unsqueeze(-1)
    cross = cross * u.unsqueeze(-2)
    matrix = torch.mul(points, stretch.unsqueeze(-1), out=scratch).mT @ points - cross - cross.mT
    matrix.diagonal(dim1=-2, dim2=-1).add_(total * (1 + 4 * torch.finfo(u.dtype).eps))
    factor, info = torch.linalg.cholesky_ex(matrix)
    failed = info != 0
    eye = torch.eye(u.shape[-1], dtype=u.dtype, device=u.device)
    factor = torch.where(failed[:, None, None], eye, factor)
    safe = gradient / total.clamp(min=torch.finfo(u.dtype).tiny).unsqueeze(-1)
    return -torch.cat([safe, torch.cholesky_solve(gradient, factor)], dim=-1), failed


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
