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

import torch
from torch import Tensor

from declarative_cvx.cones import ConeDerivative
from declarative_cvx.cones.spectrum import Spectrum
from declarative_cvx.elimination import Parts
from declarative_cvx.least_squares import Factors
from declarative_cvx.program import ConeProgram
from declarative_cvx.sparsity import Places, columns, product

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
        spectra = [
            (rows, Spectrum.of(part) if isinstance(part, Tensor) else part)
            for rows, part in projection.parts
        ]
        size = projection.diagonal.shape[1]
        first = size - sum(rows.numel() for rows, _ in spectra)
        values = [projection.diagonal[:, :first]]
        values += [spectrum.values.flatten(1) for _, spectrum in spectra]
        parts = tuple((rows, spectrum.vectors) for rows, spectrum in spectra)
        return cls(first, parts, projection.order), torch.cat(values, 1)

    def apply(self, v: Tensor) -> Tensor:
        """To the eigenvectors; v of shape (batch or 1, m, columns)."""
        if not self.parts:
            return v
        batch = self.parts[0][1].shape[0]
        pieces = [(vectors.mT @ v[:, rows]).flatten(1, 2) for rows, vectors in self.parts]
        return torch.cat([v[:, : self.first].expand(batch, -1, -1), *pieces], 1)

    def back(self, v: Tensor) -> Tensor:
        """From the eigenvectors; v of shape (batch, m, columns)."""
        if not self.parts:
            return v
        pieces, start = [v[:, : self.first]], self.first
        for rows, vectors in self.parts:
            part = v.narrow(1, start, rows.numel()).unflatten(1, rows.shape)
            pieces.append((vectors @ part).flatten(1, 2))
            start += rows.numel()
        out = torch.cat(pieces, 1)
        return out if self.order is None else columns(out, self.order)


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
    """J condensed, and without the variables T and rows E that are eliminated if any are.

    In J w = v, with parts named after the variables and rows (`declarative_cvx.elimination`),
        dt = (v_E - A_E dx) / c,   dz_E = (p dt - v_T) / c,
    and in J'w = v
        w_t = -(v_E + A_E w_x) / c,   w_E = (v_T - p w_t) / c;
    what is left has P + A_E' (p / c^2) A_E in the place of P.
    """

    condensed: Condensed
    projection: ConeDerivative
    parts: Parts | None
    places: tuple[Places, ...] = ()  # of E, T, X, R in the whole system
    order: Places | None = None  # of the whole system in (T, X, E, R)

    @classmethod
    def of(cls, program: ConeProgram, projection: ConeDerivative) -> Core:
        elimination = program.structure.elimination
        if elimination is None:
            condensed = Condensed.of(program.dense_P, program.dense_A, projection)
            return cls(condensed, projection, None)
        parts = Parts.of(program)
        remaining = projection.without(len(elimination.E), elimination.places.R)
        condensed = Condensed.of(parts.P, parts.A_R, remaining)
        places, order = elimination.in_systems
        return cls(condensed, projection, parts, places, order)

    def belongs_to(self, projection: ConeDerivative) -> bool:
        """Whether this is the factorised Jacobian for a DΠ, of which only 0 and 1 recur."""
        if self.projection is projection:
            return True
        return not projection.parts and torch.equal(projection.diagonal, self.projection.diagonal)

    @property
    def free(self) -> Tensor:
        """The free variables of the whole system, bool, shape (batch, n)."""
        free = self.condensed.free
        if self.parts is None:
            return free
        T, X = self.places[1:3]
        out = free.new_zeros((len(free), len(T.numbers) + len(X.numbers)))
        return out.index_copy(1, X.on(free.device), free)

    def solve(self, rhs: Tensor, transpose: bool = False) -> Tensor:
        """Solutions for rhs (batch, n + m, columns); NaN or meaningless for singular matrices."""
        if self.parts is None or self.order is None:
            return self.condensed.solve(rhs, transpose)
        E, T, X, R = (place.take(rhs) for place in self.places)
        A, p, c = self.parts.A_E, self.parts.p[:, :, None], self.parts.c[:, :, None]
        sign = -1.0 if transpose else 1.0
        top = X + sign * product(A.mT, (p * E / c - sign * T) / c)
        inner = self.condensed.solve(torch.cat([top, R], 1), transpose)
        x, z = inner[:, : X.shape[1]], inner[:, X.shape[1] :]
        t = (sign * E - product(A, x)) / c
        multiplier = sign * (p * t - T) / c
        return self.order.take(torch.cat([t, x, multiplier, z], 1))
