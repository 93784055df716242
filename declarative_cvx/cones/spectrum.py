"""The derivative of a projection in terms of its eigenvectors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

# Entries of blocks up to which torch multiplies them by vectors entry by entry in one thread; to
# bring in another one takes longer than the product.
FEW = 2**15


def blockwise(blocks: Tensor, v: Tensor) -> Tensor:
    """Products of blocks (batch, cones, d, d) with the rows of v (batch or 1, cones d, columns)."""
    batch, cones, dim, _ = blocks.shape
    if v.shape[0] == batch or cones == 1:
        v = v if v.shape[0] == batch else v.expand(batch, -1, -1)
        if v.shape[2] == 1 and blocks.numel() <= FEW:
            return (blocks * v.reshape(batch, cones, 1, dim)).sum(3).reshape(v.shape)
        out = torch.bmm(blocks.flatten(0, 1), v.reshape(batch * cones, dim, v.shape[2]))
        return out.view(v.shape)
    # The same v for all elements, uncopied: one product for each cone.
    rows = blocks.transpose(0, 1).reshape(cones, batch * dim, dim)
    out = torch.bmm(rows, v.view(cones, dim, v.shape[2]))
    return out.unflatten(1, (batch, dim)).transpose(0, 1).flatten(1, 2)


@dataclass(frozen=True, eq=False)
class Spectrum:
    """Symmetric matrices DΠ(v) of cones of one kind and dimension d, computed when asked for.

    Attributes
    ----------
    compute : callable
        Gives vectors and values.
    distance : callable
        Gives kink.
    vectors : Tensor, shape (batch, cones, d, d)
        Orthonormal eigenvectors in the columns.
    values : Tensor, shape (batch, cones, d)
        Eigenvalues, in [0, 1].
    kink : Tensor, shape (batch, cones)
        How far v may move along the cone's centre, at least, before DΠ jumps.
    """

    compute: Callable[[], tuple[Tensor, Tensor]]
    distance: Callable[[], Tensor]

    @cached_property
    def _computed(self) -> tuple[Tensor, Tensor]:
        return self.compute()

    @property
    def vectors(self) -> Tensor:
        return self._computed[0]

    @property
    def values(self) -> Tensor:
        return self._computed[1]

    @cached_property
    def kink(self) -> Tensor:
        return self.distance()

    @classmethod
    def of(cls, matrices: Tensor) -> Spectrum:
        """That of given matrices, of which no more is known."""
        values, vectors = torch.linalg.eigh(matrices.detach())
        return cls(lambda: (vectors, values), lambda: torch.zeros_like(values[..., 0]))

    @property
    def matrices(self) -> Tensor:
        """The matrices themselves, shape (batch, cones, d, d)."""
        return (self.vectors * self.values[..., None, :]) @ self.vectors.mT

    def matmul(self, v: Tensor) -> Tensor:
        """Their products with the rows of v, shape (batch, cones d, columns)."""
        values = self.values.flatten(1)[:, :, None]
        return blockwise(self.vectors, values * blockwise(self.vectors.mT, v))

    def select(self, index: Tensor) -> Spectrum:
        """Those of the elements of the batch named by an index."""
        return Spectrum(lambda: (self.vectors[index], self.values[index]), lambda: self.kink[index])

    def part(self, cones: slice, dim: int) -> Spectrum:
        """Those of some of the cones, over their first entries."""
        return Spectrum(
            lambda: (
                self.vectors[:, cones, :dim, :dim].contiguous(),
                self.values[:, cones, :dim],
            ),
            lambda: self.kink[:, cones],
        )
