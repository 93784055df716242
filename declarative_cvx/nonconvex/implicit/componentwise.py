"""Activations that map every state by itself, with their potentials and conjugates (IDL 4.1)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from declarative_cvx.errors import SpecificationError
from declarative_cvx.nonconvex.implicit.activation import Componentwise


@dataclass(frozen=True)
class Identity(Componentwise):
    """phi(z) = z."""

    name = "identity"
    monotone = piecewise_linear = positively_homogeneous = True

    def __call__(self, z: Tensor) -> Tensor:
        return z

    def slope(self, z: Tensor) -> Tensor:
        return torch.ones_like(z)

    def potential(self, z: Tensor) -> Tensor:
        return z * z / 2

    def conjugate(self, x: Tensor) -> Tensor:
        return x * x / 2

    def inverse(self, x: Tensor) -> Tensor:
        return x

    def divergence(self, x: Tensor, z: Tensor) -> Tensor:
        return (x - z).square() / 2


@dataclass(frozen=True)
class ReLU(Componentwise):
    """phi(z) = max(z, 0). Psi = max(z, 0)^2 / 2, Psi* = x^2 / 2 for x >= 0 (IDL eq. 7)."""

    name = "relu"
    monotone = piecewise_linear = positively_homogeneous = True
    domain = (0.0, math.inf)

    def __call__(self, z: Tensor) -> Tensor:
        return torch.relu(z)

    def slope(self, z: Tensor) -> Tensor:
        return z.detach().sign().relu()  # comparisons take torch several times as long

    def potential(self, z: Tensor) -> Tensor:
        return torch.relu(z).square() / 2

    def conjugate(self, x: Tensor) -> Tensor:
        return torch.where(x >= 0, x * x / 2, math.inf)

    def inverse(self, x: Tensor) -> Tensor:
        return torch.where(x >= 0, x, math.nan)

    def divergence(self, x: Tensor, z: Tensor) -> Tensor:
        above, below = torch.relu(z), torch.relu(-z)
        return torch.where(x >= 0, (x - above).square() / 2 + x * below, math.inf)


@dataclass(frozen=True)
class LeakyReLU(Componentwise):
    """phi(z) = z for z > 0, else leak * z.

    Parameters
    ----------
    leak : float
        Between 0 and 1, ends excluded.
    """

    leak: float = 0.01

    name = "leaky_relu"
    monotone = piecewise_linear = positively_homogeneous = True

    def __post_init__(self) -> None:
        if not 0 < self.leak < 1:
            raise SpecificationError(
                f"The leak of LeakyReLU is {self.leak!r}; it must be between 0 and 1. For 0 use "
                "ReLU(), for 1 Identity()."
            )

    def __call__(self, z: Tensor) -> Tensor:
        return functional.leaky_relu(z, self.leak)

    def slope(self, z: Tensor) -> Tensor:
        return torch.where(z > 0, torch.ones_like(z), self.leak)

    def potential(self, z: Tensor) -> Tensor:
        return z * self(z) / 2

    def conjugate(self, x: Tensor) -> Tensor:
        return x * self.inverse(x) / 2

    def inverse(self, x: Tensor) -> Tensor:
        return torch.where(x > 0, x, x / self.leak)

    def divergence(self, x: Tensor, z: Tensor) -> Tensor:
        with_kink = torch.relu(x) * torch.relu(-z) + torch.relu(-x) * torch.relu(z)
        above = (torch.relu(x) - torch.relu(z)).square() / 2
        below = (torch.relu(-x) - self.leak * torch.relu(-z)).square() / (2 * self.leak)
        return above + below + with_kink


@dataclass(frozen=True)
class Sigmoid(Componentwise):
    """phi(z) = 1 / (1 + exp(-z)). Psi = log(1 + exp(z)), Psi* = x log x + (1 - x) log(1 - x).

    The divergence is that of Kullback and Leibler between Bernoulli(x) and Bernoulli(phi(z)).
    """

    name = "sigmoid"
    monotone = True
    lipschitz = 0.25
    domain = (0.0, 1.0)

    def __call__(self, z: Tensor) -> Tensor:
        return torch.sigmoid(z)

    def slope(self, z: Tensor) -> Tensor:
        return torch.sigmoid(z) * torch.sigmoid(-z)

    def potential(self, z: Tensor) -> Tensor:
        # softplus has a threshold in torch, above which it is z itself.
        return torch.logaddexp(z, torch.zeros_like(z))

    def conjugate(self, x: Tensor) -> Tensor:
        return -torch.special.entr(x) - torch.special.entr(1 - x)

    def inverse(self, x: Tensor) -> Tensor:
        return torch.special.logit(x)

    def divergence(self, x: Tensor, z: Tensor) -> Tensor:
        # Psi(z) - x z as a sum of nonnegative terms.
        linear = torch.where(z > 0, (1 - x) * z, -x * z)
        return (torch.log1p(torch.exp(-z.abs())) + self.conjugate(x) + linear).clamp(min=0)


@dataclass(frozen=True)
class Tanh(Componentwise):
    """phi(z) = tanh(z). Psi = log cosh z, Psi* = ((1 + x) log(1 + x) + (1 - x) log(1 - x)) / 2.

    (IDL eq. 8 as printed halves log cosh too: then F(tanh z, z) would not be 0.) As tanh z is
    2 sigmoid(2 z) - 1, the divergence is that of the sigmoid at ((1 + x) / 2, 2 z).
    """

    name = "tanh"
    monotone = True
    domain = (-1.0, 1.0)

    def __call__(self, z: Tensor) -> Tensor:
        return torch.tanh(z)

    def slope(self, z: Tensor) -> Tensor:
        return 4 * torch.sigmoid(2 * z) * torch.sigmoid(-2 * z)

    def potential(self, z: Tensor) -> Tensor:
        size = z.abs()
        # Both forms are exact somewhere: log cosh z is z^2 / 2 near zero, abs(z) - log 2 far off.
        near = torch.log1p(2 * torch.sinh(size.clamp(max=1) / 2).square())
        far = size + torch.log1p(torch.exp(-2 * size)) - math.log(2)
        return torch.where(size < 1, near, far)

    def conjugate(self, x: Tensor) -> Tensor:
        inner = x.clamp(-0.5, 0.5)
        near = inner * torch.atanh(inner) + torch.log1p(-inner * inner) / 2
        far = -(torch.special.entr(1 + x) + torch.special.entr(1 - x)) / 2
        return torch.where(x.abs() < 0.5, near, far)

    def inverse(self, x: Tensor) -> Tensor:
        return torch.atanh(x)

    def divergence(self, x: Tensor, z: Tensor) -> Tensor:
        return Sigmoid().divergence((1 + x) / 2, 2 * z)
