"""The Jacobian of the optimality conditions, factorised without what need not be in the matrix.

J = [[P, A'(D - I)], [A, D]] for D = DΠ (see `declarative_cvx.optimality`). In the basis of the
eigenvectors of D every row of A has an eigenvalue d of its own. Where d is not small the row's
entry of z is eliminated: in J (x, z) = (u, v)

    z = (v - a x) / d,   which leaves   a'a (1 - d) / d   in P   and   a'v (1 - d) / d   in u,

and in the transposed system

    z = (v + (1 - d) a x) / d,   which leaves the same in P   and   -a'v / d   in u.

So what does not bind a solution (inactive constraints, the inside of a face of a cone) is not in
the matrix; only rows with small d are kept, as many as the element with most of them has.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from declarative_cvx import compiled_cone_systems
from declarative_cvx.compiled_cone_systems import CompiledConeSystems
from declarative_cvx.compiled_systems import CompiledSystems, Solver, suits
from declarative_cvx.cones import ConeDerivative
from declarative_cvx.cones.rows import join, polyhedral, split
from declarative_cvx.cones.spectrum import Spectrum, blockwise
from declarative_cvx.least_squares import Factors
from declarative_cvx.program import ConeProgram
from declarative_cvx.sparsity import product

# Eigenvalues from which on rows are eliminated: rounding grows by the inverse.
LARGE_ENOUGH = 0.01


@dataclass(frozen=True)
class Rotation:
    """The change of basis of the rows to the eigenvectors of D.

    Attributes
    ----------
    first : int
        Number of rows, the first ones, that are eigenvectors as they are.
    parts : tuple of (Tensor, Tensor)
        Rows (cones, dim) and eigenvectors (batch, cones, dim, dim) of the others.
    order : Tensor or None
        Where each row stands when parts follow each other; None if they do.
    """

    first: int
    parts: tuple[tuple[Tensor, Tensor], ...]
    order: Tensor | None

    @classmethod
    def of(cls, projection: ConeDerivative) -> tuple[Rotation, Tensor]:
        """The rotation, and the eigenvalues after it, shape (batch, m)."""
        if not projection.parts:
            return cls(projection.diagonal.shape[1], (), None), projection.diagonal
        spectra = [
            (rows, Spectrum.of(part) if isinstance(part, Tensor) else part)
            for rows, part in projection.parts
        ]
        first = polyhedral(projection.diagonal.shape[1], (rows for rows, _ in spectra))
        values = [projection.diagonal[:, :first]]
        values += [spectrum.values.flatten(1) for _, spectrum in spectra]
        parts = tuple((rows, spectrum.vectors) for rows, spectrum in spectra)
        return cls(first, parts, projection.order), torch.cat(values, 1)

    def apply(self, v: Tensor) -> Tensor:
        """To the eigenvectors; v of shape (batch or 1, m, columns)."""
        if not self.parts:
            return v
        batch = self.parts[0][1].shape[0]
        pieces = split(v, [rows for rows, _ in self.parts], self.order)
        return self._turned(v[:, : self.first].expand(batch, -1, -1), pieces, True, None)

    def back(self, v: Tensor) -> Tensor:
        """From the eigenvectors; v of shape (batch, m, columns)."""
        if not self.parts:
            return v
        pieces = split(v, [rows for rows, _ in self.parts], None)
        return self._turned(v[:, : self.first], pieces, False, self.order)

    def _turned(
        self, first: Tensor, pieces: list[Tensor], forth: bool, order: Tensor | None
    ) -> Tensor:
        turned = [
            blockwise(vectors.mT if forth else vectors, piece)
            for (_, vectors), piece in zip(self.parts, pieces, strict=True)
        ]
        return join(first, turned, order)


@dataclass(frozen=True)
class Condensed:
    """J of a batch, factorised.

    Attributes
    ----------
    factors : Factors
        Of [[P + A_e'W A_e, A_k'(D_k - I)], [A_k, D_k]], with eliminated rows e and kept rows k.
    rotation : Rotation
    A : Tensor, shape (batch or 1, m, n)
        Rotated.
    inverse, weight : Tensor, shape (batch, m, 1)
        1 / d and (1 - d) / d where rows are eliminated, 0 where they are kept.
    kept : Tensor of int64, shape (batch, k, 1)
    free : Tensor of bool, shape (batch, n)
        Variables that no optimality condition contains, as those that bound a term of an inactive
        constraint from above: they make J singular. They are put to zero.
    """

    factors: Factors
    rotation: Rotation
    A: Tensor
    inverse: Tensor
    weight: Tensor
    kept: Tensor
    free: Tensor

    @classmethod
    def of(cls, P: Tensor, A: Tensor, projection: ConeDerivative) -> Condensed:
        """Factorise, from P (batch or 1, n, n), A (batch or 1, m, n) and DΠ."""
        rotation, d = Rotation.of(projection)
        A = rotation.apply(A)
        count = int((d < LARGE_ENOUGH).sum(1).amax()) if d.numel() else 0
        small, kept = d.topk(count, 1, largest=False, sorted=False)
        inverse = (1 / d).scatter(1, kept, 0.0)[:, :, None]
        weight, kept = (1 - d)[:, :, None] * inverse, kept[:, :, None]
        A_k = A.expand(len(d), -1, -1).gather(1, kept.expand(-1, -1, A.shape[2]))
        matrix = _matrix(_curvature(P, A, weight, rotation.first), A_k, small)
        n = P.shape[1]
        free = ~matrix[:, :n].any(2)
        matrix.diagonal(dim1=1, dim2=2)[:, :n].add_(free)
        return cls(Factors.of(matrix), rotation, A, inverse, weight, kept, free)

    @property
    def doubtful(self) -> Tensor:
        """Which matrices may be singular but for rounding, bool, shape (batch,)."""
        return self.factors.doubtful

    def solve(self, rhs: Tensor, transpose: bool) -> Tensor:
        """Solutions for rhs (batch, n + m, columns); NaN or meaningless for singular matrices."""
        n = self.free.shape[1]
        u, v = rhs[:, :n], self.rotation.apply(rhs[:, n:])
        free = self.free[:, :, None]
        scaled = self.inverse * v
        moved = -scaled if transpose else self.weight * v
        u = (u + product(self.A.mT, moved)).masked_fill(free, 0.0)
        kept = self.kept.expand(-1, -1, v.shape[2])
        inner = self.factors.solve(torch.cat([u, v.gather(1, kept)], 1), transpose)
        x = inner[:, :n].masked_fill(free, 0.0)
        Ax = product(self.A, x)
        z = scaled + self.weight * Ax if transpose else scaled - self.inverse * Ax
        return torch.cat([x, self.rotation.back(z.scatter(1, kept, inner[:, n:]))], 1)


def condense(P: Tensor, A: Tensor, projection: ConeDerivative) -> Solver:
    """What solves with J, for P (batch or 1, n, n), A (batch or 1, m, n) and DΠ."""
    if projection.parts:
        if compiled_cone_systems.suits(P, A, projection):
            return CompiledConeSystems(P, A, projection, partial(Condensed.of, P, A, projection))
        return Condensed.of(P, A, projection)
    if not suits(P, A):
        return Condensed.of(P, A, projection)

    def otherwise(at: Tensor) -> Condensed:
        P_at, A_at = (v if v.shape[0] == 1 else v[at] for v in (P, A))
        return Condensed.of(P_at, A_at, projection.select(at))

    return CompiledSystems(P, A, projection.diagonal, otherwise)


def _curvature(P: Tensor, A: Tensor, weight: Tensor, polyhedral: int) -> Tensor:
    """P + A'W A over the eliminated rows; W is zero where the eigenvalues are 1."""
    if polyhedral and not bool(weight[:, :polyhedral].any()):
        A, weight = A[:, polyhedral:], weight[:, polyhedral:]
    return P + A.mT @ (weight * A) if A.shape[1] else P


def _matrix(P: Tensor, A: Tensor, d: Tensor) -> Tensor:
    """[[P, A'(D - I)], [A, D]] for a diagonal D, shape (batch, n + k, n + k)."""
    batch, k, n = A.shape
    out = P.new_empty((batch, n + k, n + k))
    out[:, :n, :n] = P
    out[:, :n, n:] = ((d - 1)[:, :, None] * A).mT
    out[:, n:, :n] = A
    out[:, n:, n:] = torch.diag_embed(d)
    return out


@dataclass(frozen=True)
class Core:
    """J condensed, and the DΠ that is in it."""

    condensed: Solver
    projection: ConeDerivative

    @classmethod
    def of(cls, program: ConeProgram, projection: ConeDerivative) -> Core:
        return cls(condense(program.dense_P, program.dense_A, projection), projection)

    def belongs_to(self, projection: ConeDerivative) -> bool:
        """Whether this is the factorised Jacobian for a DΠ, of which only 0 and 1 recur."""
        if self.projection is projection:
            return True
        return not projection.parts and torch.equal(projection.diagonal, self.projection.diagonal)
