"""The program that is left when variables are substituted, with squares in its objective.

Notation as in `declarative_cvx.elimination`: T are the variables that were substituted and E the
rows that define them, X and R the variables and rows that remain.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from declarative_cvx.program import Arrangement, ConeProgram
from declarative_cvx.sparsity import image, product


def with_squares(P: Tensor | None, A_E: Tensor, w: Tensor) -> Tensor:
    """P over X, (batch or 1, X, X), with the quadratic terms of T."""
    squares = product(A_E.mT, w.unsqueeze(2) * A_E)
    return squares if P is None else squares + P


@dataclass(frozen=True, eq=False)
class Squares:
    """What the objective says of T: 1/2 p't^2 + r't, with c t = d - A_E x; and of X, P and q.

    With u = d - A_E x the variables are t = u / c, and the multipliers of E are v - w u.

    Attributes
    ----------
    A_E : Tensor, shape (batch or 1, E, X)
    c, w : Tensor, shape (batch or 1, E)
        w = p / c^2.
    d, v : Tensor, shape (batch, E)
        v = -r / c.
    P : Tensor, shape (batch or 1, X, X), or None where it is zero
    q : Tensor, shape (batch, X)
    """

    A_E: Tensor
    c: Tensor
    w: Tensor
    d: Tensor
    v: Tensor
    P: Tensor | None
    q: Tensor

    @classmethod
    def of(cls, program: ConeProgram, A_E: Tensor, places: Arrangement) -> Squares:
        (p, P), c = program.curvature, program.structure.blocks.c.read(program.A)
        d, r = places.E.take(program.b), places.T.take(program.q)
        return cls(A_E, c, p / (c * c), d, r / -c, P, places.X.take(program.q))

    def formed(self) -> tuple[Tensor, Tensor]:
        """P, shape (batch or 1, X, X), and q, (batch, X), with what T adds to them."""
        P = with_squares(self.P, self.A_E, self.w)
        return P, self.q + self.back(self.multipliers(self.d))

    def multipliers(self, u: Tensor) -> Tensor:
        """Those of E, shape (batch, E)."""
        return torch.addcmul(self.v, self.w, u, value=-1)

    def back(self, v: Tensor) -> Tensor:
        """A_E'v."""
        return image(self.A_E.mT, v)

    def multiply(self, v: Tensor) -> Tensor:
        """P v with what T adds, for v of shape (batch, X, columns)."""
        out = product(self.A_E.mT, self.w.unsqueeze(2) * product(self.A_E, v))
        return out if self.P is None else out + product(self.P, v)

    def select(self, index: Tensor) -> Squares:
        """Those of the elements named by an index."""
        values = (getattr(self, field.name) for field in fields(self))
        return Squares(*(v if v is None or v.shape[0] == 1 else v[index] for v in values))


class _Image(NamedTuple):
    """What a point (x, y) is for the whole program: u, the multipliers of (E, R), and A x."""

    u: Tensor
    y: Tensor
    Ax: Tensor


@dataclass(frozen=True, eq=False)
class ReducedProgram(ConeProgram):
    """The program over X and R.

    Its P and q are formed for those who factorise. Products with P, the optimality conditions and
    their terms are made of the parts of P and q, so that squares cost no accuracy.

    Attributes
    ----------
    squares : Squares
    joined : Tensor, shape (batch or 1, E + R, X), or None
        A_E and A_R as one matrix, where they are stored so.
    """

    squares: Squares
    joined: Tensor | None

    @cached_property
    def absolute(self) -> ReducedProgram:
        """With the absolute values of q, A, b and of the parts of P."""
        squares, P, q = self.squares, self.squares.P, self.squares.q.abs()
        count = squares.A_E.shape[1]
        if self.joined is None:
            joined, A_E, A = None, squares.A_E.abs(), self.A.abs()
        else:
            joined = self.joined.abs()
            A_E, A = joined[:, :count], joined[:, count:].flatten(1)
        squares = replace(squares, A_E=A_E, P=None if P is None else P.abs(), q=q)
        return replace(self, q=q, A=A, b=self.b.abs(), squares=squares, joined=joined)

    def P_matmul(self, v: Tensor) -> Tensor:
        return self.squares.multiply(v)

    def conditions(self, x: Tensor, y: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
        squares, known = self.squares, self.image(x, y)
        dual = squares.q + self._back(known.y)
        if squares.P is not None:
            dual = dual + image(squares.P, x)
        return dual, known.Ax + s - self.b

    def terms(
        self, x: Tensor, y: Tensor, s: Tensor, size: Callable[[Tensor], Tensor]
    ) -> tuple[Tensor, Tensor]:
        sizes, x_size = self.absolute, size(x)
        dual = torch.maximum(sizes._back(size(self.image(x, y).y)), sizes.squares.q)
        if sizes.squares.P is not None:
            dual = torch.maximum(dual, image(sizes.squares.P, x_size))
        return dual, torch.maximum(torch.maximum(sizes.A_times(x_size), s.abs()), sizes.b)

    def image(self, x: Tensor, y: Tensor) -> _Image:
        """What belongs to a point, kept for the next that asks at the same one."""
        known = self.__dict__.get("_image")
        if known is None or known[0] is not x or known[1] is not y:
            known = self.__dict__["_image"] = (x, y, self._image_of(x, y))
        return known[2]

    def _image_of(self, x: Tensor, y: Tensor) -> _Image:
        if self.joined is None:
            defined, Ax = image(self.squares.A_E, x), self.A_times(x)
        else:
            sizes = (self.squares.A_E.shape[1], y.shape[1])
            defined, Ax = image(self.joined, x).split(sizes, 1)
        u = self.squares.d - defined
        return _Image(u, torch.cat([self.squares.multipliers(u), y], 1), Ax)

    def _back(self, y: Tensor) -> Tensor:
        """(A_E, A_R)'y."""
        if self.joined is not None:
            return image(self.joined.mT, y)
        E, R = y.split((self.squares.A_E.shape[1], self.b.shape[1]), 1)
        return self.squares.back(E) + self.At_times(R)

    def select(self, index: Tensor) -> ConeProgram:
        part = super().select(index)
        if part is self:
            return self
        return replace(part, squares=self.squares.select(index), joined=None)  # type: ignore[call-arg]
