"""Pools of numbers: their global minimum, its quality and its derivative."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from declarative_cvx.nonconvex.kernels.pooling.implicit_pool import Gradients, Needs
from declarative_cvx.nonconvex.kernels.pooling.pools import Minimum, Quality, blocks, joined
from declarative_cvx.nonconvex.kernels.pooling.scalar_minimum import scalar_minimum
from declarative_cvx.penalties import Penalty


@dataclass(frozen=True)
class ScalarPool:
    """Minimise sum_i w_i phi(u - x_i; alpha) over a number u.

    With k_i = w_i phi''(y - x_i) (DDN Table 2), the derivatives of the minimiser y are
    k_i / sum(k) in x_i, sum_i k_i r_i / sum(k) in alpha for residuals r in units of alpha, and
    -phi'(y - x_i) / sum(k) in w_i. Where no point has any curvature (the minima fill an interval,
    of which y is the middle), the points nearest to y stand for all.
    """

    penalty: Penalty

    def minimum(self, x: Tensor, alpha: Tensor, weights: Tensor | None) -> Minimum:
        return scalar_minimum(self.penalty, x, alpha, weights)

    def gradients(
        self,
        x: Tensor,  # (*batch, n)
        alpha: Tensor,  # (*batch,)
        weights: Tensor | None,  # (*batch, n)
        y: Tensor,  # (*batch,)
        g: Tensor,  # (*batch,)
        needs: Needs,
    ) -> Gradients:
        residuals = (y.unsqueeze(-1) - x) / alpha.unsqueeze(-1)
        share = self.penalty.rho_curvature(residuals)
        if weights is not None:
            # Divided by the largest, lest products of small ones underflow.
            largest = weights.detach().amax(-1, keepdim=True)
            share = share * (weights / largest)
        total = share.sum(-1)
        flat = total.detach() <= 4 * torch.finfo(x.dtype).eps * share.detach().abs().sum(-1)
        if torch.is_grad_enabled() or bool(flat.any()):
            share = torch.where(flat.unsqueeze(-1), _nearest(residuals.detach()), share)
            total = share.sum(-1)
        by_x = share * (g / total).unsqueeze(-1)
        found = [by_x] if needs[0] else []
        if needs[1]:
            found.append((by_x * residuals).sum(-1))
        if needs[2]:
            scale = torch.where(flat, 0.0, -alpha * g / total).unsqueeze(-1) / largest
            found.append(self.penalty.rho_slope(residuals) * scale)
        return found

    def quality(self, x: Tensor, alpha: Tensor, weights: Tensor | None, y: Tensor) -> Quality:
        """How good minimisers (batch,) of data (batch, n) are."""
        return joined(
            self._quality(x[rows], alpha[rows], None if weights is None else weights[rows], y[rows])
            for rows in blocks(x)
        )

    def _quality(self, x: Tensor, alpha: Tensor, weights: Tensor | None, y: Tensor) -> Quality:
        residuals = (y.unsqueeze(-1) - x) / alpha.unsqueeze(-1)
        weight = torch.ones_like(x) if weights is None else weights
        slope = weight * self.penalty.rho_slope(residuals)
        curvature = weight * self.penalty.rho_curvature(residuals)
        objective = (weight * self.penalty.rho(residuals)).sum(-1) * alpha**self.penalty.power
        scale = weight.sum(-1) + slope.abs().sum(-1)
        rounding = 16 * torch.finfo(x.dtype).eps * (1 + y.abs() / alpha)
        bent = curvature.sum(-1) > rounding.sqrt() * curvature.abs().sum(-1)
        smooth = away_from(self.penalty, residuals, rounding)
        return Quality(objective, slope.sum(-1).abs() / scale, rounding, bent & smooth)


def _nearest(residuals: Tensor) -> Tensor:
    """1 for the points nearest to the argument of all, else 0."""
    distance = residuals.abs()
    least = distance.amin(-1, keepdim=True)
    return (distance <= least * (1 + 64 * torch.finfo(distance.dtype).eps)).to(distance.dtype)


def away_from(penalty: Penalty, residuals: Tensor, rounding: Tensor) -> Tensor:
    """Whether no residual (batch, n) is at a breakpoint of the penalty, up to rounding (batch,)."""
    clear = torch.ones_like(rounding, dtype=torch.bool)
    for breakpoint in penalty.breakpoints:
        clear &= (residuals.abs() - breakpoint).abs().amin(-1) > rounding
    return clear
