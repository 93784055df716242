"""The maps whose fixed points are looked for."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor

# Iterates that acceleration combines.
MEMORY = 3


class FixedPointMap(ABC):
    """A map ``x -> outer(inner(x))`` for each element of a batch.

    Attributes
    ----------
    direct : bool
        Whether `newton` is there.
    contracts : bool
        Whether the map is known to contract in the norm of `relative`.
    widens : bool
        Whether `double` is there.
    memory : int
        Iterates that acceleration combines.
    """

    direct: bool = False
    contracts: bool = False
    widens: bool = False
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

    def double(self) -> FixedPointMap:
        """The map in float64, if it `widens`."""
        raise NotImplementedError

    def relative(self, x: Tensor, f: Tensor, floor: Tensor | float) -> Tensor:
        """How far x is from its image f, relative to the size of f, but at least to a floor."""
        return relative_to_norm(x, f, math.inf, floor)

    def cost(self, n: int) -> float:
        """What Newton's method costs, in accelerated steps."""
        return 20.0 + n


def max_norm(x: Tensor) -> Tensor:
    return x.abs().amax(1)


def magnitude(x: Tensor, p: float) -> Tensor:
    """The norm of each row. (torch's own for p = 1 and inf takes many times as long.)"""
    if p == math.inf:
        return max_norm(x)
    return x.abs().sum(1) if p == 1 else torch.linalg.vector_norm(x, p, dim=1)


def relative_to_norm(x: Tensor, f: Tensor, p: float, floor: Tensor | float) -> Tensor:
    """How far x is from f in a norm.

    Where the map contracts in that norm, by kappa, the error is at most 1 / (1 - kappa) times that.
    """
    return magnitude(f - x, p) / magnitude(f, p).clamp(min=floor)


def relative_to_terms(
    x: Tensor, f: Tensor, terms: Tensor, floor: Tensor | float, least: float | None = None
) -> Tensor:
    """How far x is from f, each component relative to the size of its own terms.

    That does not change where states are scaled, so that components which are small, and multiplied
    up by what depends on them, are as right as the others. Where all terms of a component go to
    zero, it is right when it is beyond the rounding of the rounding of the largest; `least` is
    another share of that down to which sizes count.
    """
    share = torch.finfo(f.dtype).eps if least is None else least
    lowest = (share * terms.amax(1)).clamp(min=floor)
    sizes = torch.maximum(torch.maximum(terms, f.abs()), lowest[:, None])
    return ((f - x).abs() / sizes).amax(1)
