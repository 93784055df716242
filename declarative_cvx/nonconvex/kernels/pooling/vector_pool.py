"""Pools of points: a local minimum from several starts, its quality and its derivative."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from declarative_cvx.nonconvex.kernels.pooling.implicit_pool import Gradients, Needs
from declarative_cvx.nonconvex.kernels.pooling.pools import Minimum, Quality, blocks, joined
from declarative_cvx.nonconvex.kernels.pooling.scalar_pool import away_from
from declarative_cvx.nonconvex.kernels.pooling.vector_minimum import hessian, norm, vector_minimum
from declarative_cvx.penalties import Penalty


@dataclass(frozen=True)
class VectorPool:
    """Minimise sum_i w_i phi(||u - x_i||; alpha) over a point u.

    The derivatives are those of the implicit function theorem with the Hessian of the sum, which
    is raised by a few roundings of itself so that it can be inverted everywhere.
    """

    penalty: Penalty
    restarts: int

    def minimum(self, x: Tensor, alpha: Tensor, weights: Tensor | None) -> Minimum:
        return vector_minimum(self.penalty, x, alpha, weights, self.restarts)

    def gradients(
        self,
        x: Tensor,  # (*batch, n, d)
        alpha: Tensor,  # (*batch,)
        weights: Tensor | None,  # (*batch, n)
        y: Tensor,  # (*batch, d)
        g: Tensor,  # (*batch, d)
        needs: Needs,
    ) -> Gradients:
        offsets = (y.unsqueeze(-2) - x) / alpha[..., None, None]
        pull, distance, stretch, matrix = hessian(self.penalty, offsets, weights)
        solution = torch.linalg.solve(matrix, g)
        along = (offsets @ solution.unsqueeze(-1)).squeeze(-1)
        by_x = pull.unsqueeze(-1) * solution.unsqueeze(-2)
        by_x.addcmul_((stretch * along).unsqueeze(-1), offsets)
        found = [by_x] if needs[0] else []
        if needs[1]:
            found.append((by_x * offsets).sum((-1, -2)))
        if needs[2]:
            weight = self.penalty.rho_weight(distance)
            found.append(-alpha.unsqueeze(-1) * weight * along)
        return found

    def quality(self, x: Tensor, alpha: Tensor, weights: Tensor | None, y: Tensor) -> Quality:
        """How good minimisers (batch, d) of data (batch, n, d) are."""
        return joined(
            self._quality(x[rows], alpha[rows], None if weights is None else weights[rows], y[rows])
            for rows in blocks(x)
        )

    def _quality(self, x: Tensor, alpha: Tensor, weights: Tensor | None, y: Tensor) -> Quality:
        offsets = (y.unsqueeze(-2) - x) / alpha[..., None, None]
        pull, distance, _, matrix = hessian(self.penalty, offsets, weights)
        weight = torch.ones_like(distance) if weights is None else weights
        objective = (weight * self.penalty.rho(distance)).sum(-1) * alpha**self.penalty.power
        scale = weight.sum(-1) + (pull * distance).sum(-1)
        residual = norm((pull.unsqueeze(-1) * offsets).sum(-2)) / scale
        rounding = 16 * torch.finfo(x.dtype).eps * (1 + norm(y) / alpha)
        bent = torch.linalg.eigvalsh(matrix)[..., 0] > rounding.sqrt() * pull.sum(-1)
        return Quality(
            objective, residual, rounding, bent & away_from(self.penalty, distance, rounding)
        )
