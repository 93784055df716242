"""The derivative of a projection in terms of its eigenvectors."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Spectrum:
    """Symmetric matrices DΠ(v) of cones of one kind and dimension d.

    Attributes
    ----------
    vectors : Tensor, shape (batch, cones, d, d)
        Orthonormal eigenvectors in the columns.
    values : Tensor, shape (batch, cones, d)
        Eigenvalues, in [0, 1].
    kink : Tensor, shape (batch, cones)
        How far v may move along the cone's centre, at least, before DΠ jumps.
    """

    vectors: Tensor
    values: Tensor
    kink: Tensor

    @classmethod
    def of(cls, matrices: Tensor) -> Spectrum:
        """That of given matrices, of which no more is known."""
        values, vectors = torch.linalg.eigh(matrices.detach())
        return cls(vectors, values, torch.zeros_like(values[..., 0]))

    @property
    def matrices(self) -> Tensor:
        """The matrices themselves, shape (batch, cones, d, d)."""
        return (self.vectors * self.values[..., None, :]) @ self.vectors.mT

    def matmul(self, v: Tensor) -> Tensor:
        """Their products with v of shape (batch, cones, d, columns)."""
        return self.vectors @ (self.values[..., None] * (self.vectors.mT @ v))

    def select(self, index: Tensor) -> Spectrum:
        """Those of the elements of the batch named by an index."""
        return Spectrum(self.vectors[index], self.values[index], self.kink[index])
