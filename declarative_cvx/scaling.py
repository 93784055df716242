"""Units in which the data of every element are of size one.

Solvers stop at absolute tolerances, so that returns of 1e-3 and covariances of 1e-4 look solved to
them before they are. Every element is therefore solved, refined and verified in units of its own.
The factors are powers of two: nothing is rounded on the way there and back.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from declarative_cvx.program import ConeProgram, Point
from declarative_cvx.transforms import transforming

# Above this, data are taken to mean that there is no bound.
INFINITE = 1e15
# Entries that are not more than so many roundings of the largest are zeros that were computed.
NOISE = 1e3
# An element is left in its own units if the largest entries of its data are in this range.
ORDINARY = (2.0**-3, 2.0**3)


@dataclass(frozen=True)
class Scaling:
    """x = primal * x', s = slack * s', y = y' / (objective * slack), each of shape (batch, 1).

    The scaled program has P' = objective * primal^2 * P, q' = objective * primal * q,
    A' = primal / slack * A and b' = b / slack.
    """

    primal: Tensor
    slack: Tensor
    objective: Tensor
    trivial: bool = False  # whether all factors are 1

    @classmethod
    def units(cls, program: ConeProgram) -> Scaling:
        """Factors that bring all elements to size one which are not about so as they are."""
        ordinary = _is_ordinary(program)
        if not transforming() and bool(ordinary.all()):
            one = program.q.new_ones((1, 1))
            return cls(one, one, one, trivial=True)
        found = cls.of(program)
        factors = (found.primal, found.slack, found.objective)
        ordinary = ordinary.all(0)[:, None]
        primal, slack, objective = (torch.where(ordinary, 1.0, f) for f in factors)
        return cls(primal, slack, objective)

    @classmethod
    def of(cls, program: ConeProgram, largest: bool = False) -> Scaling:
        """Factors that bring b and A, and the larger of P and q, to size one.

        The size of data is the geometric mean of their entries or, with `largest`, the largest.
        """
        size = _largest_entry if largest else _size
        P, q, A, b = (size(v) for v in (program.P, program.q, program.A, program.b))
        both = (P > 0) & (q > 0)
        natural = torch.where(both, q / torch.where(both, P, 1.0), 1.0)
        A = torch.where(A > 0, A, 1.0)
        slack = torch.where(b > 0, b, natural * A)
        primal = slack / A
        objective = torch.maximum(P * primal**2, q * primal)
        return cls(
            _power(primal), _power(slack), _power(1 / torch.where(objective > 0, objective, 1.0))
        )

    @classmethod
    def scaled(cls, program: ConeProgram) -> tuple[Scaling, ConeProgram]:
        """The factors and the program in these units, computed once."""
        if "_scaled" not in program.__dict__:
            scaling = cls.units(program)
            scaled, absolute = scaling.apply(program), program.__dict__.pop("absolute")
            if scaling.trivial:
                scaled.__dict__["absolute"] = absolute
            program.__dict__["_scaled"] = (scaling, scaled)
        return program.__dict__["_scaled"]

    def apply(self, program: ConeProgram) -> ConeProgram:
        """The program in these units."""
        if self.trivial:
            return replace(program)
        q, b = self.data(program.q, program.b)
        return ConeProgram(
            program.structure,
            P=program.P * (self.objective * self.primal**2) if program.P.shape[1] else program.P,
            q=q,
            A=program.A * (self.primal / self.slack) if program.A.shape[1] else program.A,
            b=b,
        )

    def point(self, x: Tensor, y: Tensor, s: Tensor) -> Point:
        """A point of the original program in these units."""
        if self.trivial:
            return x, y, s
        return x / self.primal, y * (self.objective * self.slack), s / self.slack

    def restore(self, x: Tensor, y: Tensor, s: Tensor) -> Point:
        """A point in these units, or a change of it, as one of the original program.

        Also takes gradients with respect to an original point to those with respect to it in
        these units: the factors are the same.
        """
        if self.trivial:
            return x, y, s
        return x * self.primal, y / (self.objective * self.slack), s * self.slack

    def data(self, q: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        """Values, or changes, of q and b in these units.

        Also takes gradients with respect to q and b in these units to those with respect to the
        original ones: the factors are the same.
        """
        if self.trivial:
            return q, b
        return q * (self.objective * self.primal), b / self.slack


def _is_ordinary(program: ConeProgram) -> Tensor:
    """Whether the largest P, q, A and b of each element is zero or about one, (4, batch)."""
    sizes = program.absolute
    largest = [v.amax(1) for v in (sizes.P, sizes.q, sizes.A, sizes.b) if v.shape[1]]
    both = torch.stack(torch.broadcast_tensors(*largest))
    return (both.clamp(*ORDINARY) == both) | (both == 0)


def _size(values: Tensor) -> Tensor:
    """Geometric mean of the nonzero entries' sizes, shape (batch or 1, 1); 0 if there are none.

    Those that are nothing but rounding beside the largest do not count, such as zeros that come
    out of an earlier computation as 1e-15; nor do those that mean infinity.
    """
    sizes = _finite(values.abs())
    nonzero = sizes > NOISE * torch.finfo(values.dtype).eps * _largest(sizes)
    count = nonzero.sum(1, keepdim=True)
    logs = torch.where(nonzero, sizes, 1.0).log().sum(1, keepdim=True)
    return torch.where(count > 0, (logs / count.clamp(min=1)).exp(), 0.0)


def _largest_entry(values: Tensor) -> Tensor:
    """Largest absolute entry of each element that does not mean infinity, (batch or 1, 1)."""
    return _largest(_finite(values.abs()))


def _largest(sizes: Tensor) -> Tensor:
    """Largest of the absolute values, shape (batch or 1, 1)."""
    if sizes.shape[1] == 0:
        return sizes.new_zeros((sizes.shape[0], 1))
    return sizes.amax(1, keepdim=True)


def _finite(sizes: Tensor) -> Tensor:
    """The sizes, those zero that mean infinity, unless all others are zero."""
    finite = torch.where(sizes > INFINITE, 0.0, sizes)
    return torch.where(finite.any(1, keepdim=True), finite, sizes)


def _power(values: Tensor) -> Tensor:
    """The nearest powers of two."""
    return torch.exp2(torch.round(torch.log2(values)))
