"""The maps whose fixed points are looked for."""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor

# Iterates that acceleration combines.
MEMORY = 3


class FixedPointMap(ABC):
    """A map ``x -> outer(inner(x))`` for each element of a batch.

    Attributes
    ----------
    scale : float
        Size of the terms of ``inner(x)`` relative to x, at least 1: of what rounding is a part.
    direct : bool
        Whether `newton` is there.
    memory : int
        Iterates that acceleration combines.
    """

    scale: float = 1.0
    direct: bool = False
    memory: int = MEMORY

    @abstractmethod
    def inner(self, x: Tensor) -> Tensor:
        """The expensive part, (batch, n) -> (batch, n)."""

    def outer(self, q: Tensor) -> Tensor:
        """The cheap part, componentwise."""
        return q

    def outer_changes(self, q: Tensor, changes: Tensor) -> Tensor:
        """Changes of ``outer(q)`` for changes of q, (batch, m, n), to first order."""
        return changes

    def newton(self, x: Tensor, q: Tensor, r: Tensor) -> Tensor:
        """The solution d of ``d - outer'(q) inner'(x) d = r``, (batch, n)."""
        raise NotImplementedError

    @abstractmethod
    def select(self, index: Tensor) -> FixedPointMap:
        """The map of the elements that an index names."""

    def double(self) -> FixedPointMap | None:
        """The map in float64, if there is one."""
        return None

    def norm(self, x: Tensor) -> Tensor:
        """The size that a residual is relative to, (batch,)."""
        return max_norm(x) if self.scale == 1 else self.scale * max_norm(x)

    def cost(self, n: int) -> float:
        """What Newton's method costs, in accelerated steps."""
        return 20.0 + n


def max_norm(x: Tensor) -> Tensor:
    return x.abs().amax(1)
