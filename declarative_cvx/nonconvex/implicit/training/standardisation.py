"""Inputs and outputs brought to mean 0 and variance 1, and models freed of it again."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from declarative_cvx.nonconvex.implicit.weights import ImplicitWeights


@dataclass(frozen=True, eq=False)
class Standardisation:
    """u -> (u - u_mean) / u_scale, and the same for y. Tensors have shape (p,) or (q,)."""

    u_mean: Tensor
    u_scale: Tensor
    y_mean: Tensor
    y_scale: Tensor

    @classmethod
    def of(cls, u: Tensor, y: Tensor, *, outputs: bool) -> Standardisation:
        """From the columns of data; the outputs stay as they are unless asked for."""
        u_mean, u_scale = _moments(u)
        y_mean, y_scale = _moments(y)
        if not outputs:
            y_mean, y_scale = torch.zeros_like(y_mean), torch.ones_like(y_scale)
        return cls(u_mean, u_scale, y_mean, y_scale)

    @classmethod
    def none(cls, u: Tensor, y: Tensor) -> Standardisation:
        """That changes nothing."""
        zero, none = u.new_zeros(u.shape[1]), y.new_zeros(y.shape[1])
        return cls(zero, zero + 1, none, none + 1)

    def inputs(self, u: Tensor) -> Tensor:
        return (u - self.u_mean) / self.u_scale

    def outputs(self, y: Tensor) -> Tensor:
        return (y - self.y_mean) / self.y_scale

    def folded(self, weights: ImplicitWeights) -> ImplicitWeights:
        """The model that takes and returns data as they were: exactly the same function."""
        B, D = weights.B / self.u_scale, weights.D / self.u_scale
        b, c = weights.b - B @ self.u_mean, weights.c - D @ self.u_mean
        C, D = (self.y_scale[:, None] * value for value in (weights.C, D))
        return replace(weights, B=B, C=C, D=D, b=b, c=self.y_scale * c + self.y_mean)

    def unfolded(self, weights: ImplicitWeights) -> ImplicitWeights:
        """The inverse of `folded`."""
        C, D = (value / self.y_scale[:, None] for value in (weights.C, weights.D))
        c = (weights.c - self.y_mean) / self.y_scale + D @ self.u_mean
        b = weights.b + weights.B @ self.u_mean
        return replace(weights, B=weights.B * self.u_scale, C=C, D=D * self.u_scale, b=b, c=c)


def _moments(values: Tensor) -> tuple[Tensor, Tensor]:
    mean = values.mean(0)
    scale = (values - mean).square().mean(0).sqrt()
    constant = scale <= 1e-10 * values.abs().amax(0)
    return mean, torch.where(constant, 1.0, scale)
