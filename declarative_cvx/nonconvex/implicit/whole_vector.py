"""Non-expansive maps of all states together: softmax, normalisation, pooling (IDL 1)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from declarative_cvx.errors import ParameterError, SpecificationError
from declarative_cvx.nonconvex.implicit.activation import Activation


@dataclass(frozen=True)
class Softmax(Activation):
    """phi(z) = exp(z) / sum exp(z); its Jacobian diag(x) - x x' has norm at most 1/2."""

    name = "softmax"
    lipschitz = 0.5
    domain = (0.0, 1.0)

    def __call__(self, z: Tensor) -> Tensor:
        return torch.softmax(z, -1)


@dataclass(frozen=True)
class Normalisation(Activation):
    """phi(z) = z for ||z||_2 <= radius, else radius z / ||z||_2: the projection onto the ball.

    Parameters
    ----------
    radius : float
        Positive.
    """

    radius: float = 1.0

    name = "normalisation"
    norms = (2,)

    def __post_init__(self) -> None:
        _require_positive("The radius of Normalisation", self.radius)

    @property
    def domain(self) -> tuple[float, float]:
        return -self.radius, self.radius

    def __call__(self, z: Tensor) -> Tensor:
        size = torch.linalg.vector_norm(z, dim=-1, keepdim=True)
        return z * (self.radius / size.clamp(min=self.radius))


@dataclass(frozen=True)
class LayerNormalisation(Activation):
    """phi(z) = (z - mean z) / sqrt(var z + eps), non-expansive in the 2-norm for eps >= 1.

    Parameters
    ----------
    eps : float
        Positive. The Lipschitz constant is 1 / sqrt(eps), so that the usual 1e-5 is of no use
        where a contraction is needed.
    """

    eps: float = 1.0

    name = "layer_normalisation"
    norms = (2,)

    def __post_init__(self) -> None:
        _require_positive("eps of LayerNormalisation", self.eps)

    @property
    def lipschitz(self) -> float:
        return self.eps**-0.5

    def __call__(self, z: Tensor) -> Tensor:
        return functional.layer_norm(z, z.shape[-1:], eps=self.eps)


@dataclass(frozen=True)
class _InGroups(Activation):
    """A map of groups of consecutive states.

    Parameters
    ----------
    size : int, optional
        States in a group; all of them unless given.
    """

    size: int | None = None

    piecewise_linear = positively_homogeneous = True

    def __post_init__(self) -> None:
        if self.size is not None and (not isinstance(self.size, int) or self.size < 1):
            raise SpecificationError(f"{self.name}: size is {self.size!r}; expected an integer > 0")

    def check(self, n: int) -> None:
        super().check(n)
        if self.size is not None and n % self.size:
            raise ParameterError(f"{n} states do not make up groups of {self.size} ({self.name}).")

    def groups(self, n: int) -> tuple[int, ...]:
        self.check(n)
        return (n,) if self.size is None else (self.size,) * (n // self.size)

    def _grouped(self, z: Tensor) -> Tensor:
        self.check(z.shape[-1])
        return z.unflatten(-1, (-1, self.size or z.shape[-1]))


@dataclass(frozen=True)
class Sort(_InGroups):
    """The entries of each group in descending order: the first is the maximum."""

    name = "sort"

    def __call__(self, z: Tensor) -> Tensor:
        return self._grouped(z).sort(stable=True, dim=-1, descending=True).values.flatten(-2)


@dataclass(frozen=True)
class MaxPool(_InGroups):
    """The first entry of each group becomes the group's maximum, the others zero."""

    name = "max_pool"

    def __call__(self, z: Tensor) -> Tensor:
        groups = self._grouped(z)
        rest = groups.shape[-1] - 1
        return functional.pad(groups.max(-1, keepdim=True).values, (0, rest)).flatten(-2)


def _require_positive(what: str, value: float) -> None:
    if not 0 < value < math.inf:
        raise SpecificationError(f"{what} is {value!r}; it must be positive and finite.")
