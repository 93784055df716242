"""Whether the solution map has a derivative at a solution, and why not (DDN 4.7.3-4.7.4)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from declarative_cvx.derivative.base import Derivative
from declarative_cvx.elimination import (
    extend_data_gradients,
    reduce,
    restrict,
    restrict_gradients,
)
from declarative_cvx.kkt import derivative_at, free_variables, kkt_times, solve_kkt
from declarative_cvx.program import ConeProgram, Point, Structure
from declarative_cvx.residuals import conditions
from declarative_cvx.scaling import INFINITE
from declarative_cvx.sparsity import columns

# Relative residual of the adjoint system, or relative difference between the derivatives on the
# two sides of a kink, above which an element is irregular.
REGULAR = 1e-6
# Relative residual above which it is asked how far from the solution a point may be.
EXACT = 1e-13
# Share of the largest possible gradient below which a difference between two does not count.
NOTICEABLE = 1e-3

WEAKLY_ACTIVE = (
    "a constraint is active with a zero multiplier (or lies on another kink of its cone), so that "
    "the derivatives on its two sides differ; one of them is returned"
)
AMBIGUOUS = (
    "constraints that depend on each other hold together, and would move apart with the "
    "parameters; a mean of the derivatives on the sides is returned"
)
INCONSISTENT = (
    "the adjoint system has no solution, as where the solution or a multiplier asked for is not "
    "unique; its least-squares solution is returned"
)
DEGENERATE = (
    "the curvature vanishes at the solution, which is a minimum of higher order, so that there is "
    "no derivative in general; that of a nearly singular system is returned"
)


@dataclass(frozen=True, eq=False)
class DerivativeReport:
    """What is known of the derivative at each element of a batch.

    Attributes
    ----------
    residual : Tensor, shape (batch,)
        Relative residual of the adjoint system: the accuracy of the gradient. NaN for elements
        that were not solved.
    weakly_active : Tensor of bool, shape (batch,)
        Elements on a kink across which the gradient jumps.
    ambiguous : Tensor of bool, shape (batch,)
        Elements where dependent constraints move apart with the parameters.
    kink : str
        What is said of the elements on a kink.
    """

    residual: Tensor
    weakly_active: Tensor
    ambiguous: Tensor
    kink: str = WEAKLY_ACTIVE
    degenerate: Tensor | None = None

    @property
    def regular(self) -> Tensor:
        """Whether each element has a derivative, bool, shape (batch,)."""
        return (self.residual <= REGULAR) & ~self.weakly_active & ~self.ambiguous & ~self._flat

    @property
    def reason(self) -> tuple[str, ...]:
        """Why each element has none; empty where it has one."""
        columns = (self.residual, self.weakly_active, self._flat, self.ambiguous)
        return tuple(
            "not solved" if residual != residual
            else self.kink if weak
            else DEGENERATE if flat
            else INCONSISTENT if not residual <= REGULAR
            else AMBIGUOUS if several
            else ""
            for residual, weak, flat, several in zip(*(c.tolist() for c in columns), strict=True)
        )  # fmt: skip

    @property
    def _flat(self) -> Tensor:
        none = torch.zeros_like(self.weakly_active)
        return none if self.degenerate is None else self.degenerate


@dataclass(frozen=True, eq=False)
class Outputs:
    """What the layer's outputs and inputs are in terms of a cone program.

    Attributes
    ----------
    x, y : Tensor, shapes (n,) and (m,)
        1 where an entry is (part of) an output, 0 elsewhere.
    pull_back : callable
        From gradients with respect to P, q, A, b, each (batch, entries), to those with respect
        to the parameters, (batch, entries), as far as they are wanted.
    """

    x: Tensor
    y: Tensor
    pull_back: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]

    def probe(self, program: ConeProgram) -> Point:
        """Fixed, random gradients of the outputs, as those for x, y and s of the reduced one."""
        generator = np.random.default_rng(0)
        weights = torch.as_tensor(
            generator.uniform(0.5, 1.5, len(self.x) + len(self.y)), device=self.x.device
        )
        grad_x = (weights[: len(self.x)] * self.x).expand_as(program.q)
        grad_y = (weights[len(self.x) :] * self.y).expand_as(program.b)
        grad_x, grad_y = restrict_gradients(program, grad_x, grad_y)
        return grad_x, grad_y, torch.zeros_like(grad_y)


@dataclass(frozen=True, eq=False)
class Solved:
    """A batch of programs in units of size one, and their solutions (x, y, s)."""

    program: ConeProgram
    whole: Point

    @property
    def reduced(self) -> ConeProgram:
        """What derivatives work with."""
        return reduce(self.program)

    @cached_property
    def point(self) -> Point:
        """The solution of the reduced program."""
        return restrict(self.program, self.whole)

    @cached_property
    def z(self) -> Tensor:
        """S - y of the reduced program."""
        _, y, s = self.point
        return s - y

    def select(self, at: Tensor) -> Solved:
        """Those of the elements named by an increasing index tensor."""
        x, y, s = (v[at] for v in self.whole)
        return Solved(self.program.select(at), (x, y, s))

    def pull_back(self, outputs: Outputs, q: Tensor, b: Tensor) -> Tensor:
        """Gradients for the parameters, from those for q and b of the reduced program."""
        q, b = extend_data_gradients(self.program, q, b)
        return outputs.pull_back(*data_gradients(self.program, *self.whole[:2], q, b))


def suspect(solved: Solved, found: Tensor, residual: Tensor, singular: Tensor) -> Tensor:
    """Elements whose derivative has to be looked at more closely, bool, shape (batch,).

    Their solutions have residuals `found`, their derivatives `residual`.
    """
    return _kinked(solved, found)[0] | (singular > 0) | ~(residual <= REGULAR)


def assess(
    solved: Solved, found: Tensor, derivative: Derivative, outputs: Outputs
) -> DerivativeReport:
    """Probe the derivative of the outputs at a solution, on both sides of a kink.

    Parameters
    ----------
    solved : Solved
    found : Tensor, shape (batch,)
        Residual of the optimality conditions there.
    derivative : Derivative
    outputs : Outputs

    Returns
    -------
    DerivativeReport
    """
    grads = outputs.probe(solved.program)
    adjoint = derivative.adjoint(solved.reduced, solved.point, grads)
    weak = weakly_active(solved, found, derivative, outputs)
    return DerivativeReport(adjoint.residual, weak, ambiguous(solved, adjoint.singular, outputs))


def ambiguous(solved: Solved, singular: Tensor | None, outputs: Outputs) -> Tensor:
    """Elements whose adjoint system has several solutions with different gradients.

    Constraints that hold together at the solution, and depend on each other, but move apart with
    the parameters: beyond the solution one of them gives way, which one depends on the direction.

    Parameters
    ----------
    solved : Solved
    singular : Tensor of bool or int64, shape (batch,), or None
        Where the matrix is singular and, if this is known, how (`kkt.solve_kkt_and_rank`); None is
        anywhere.
    outputs : Outputs

    Returns
    -------
    Tensor of bool, shape (batch,)
    """
    found = torch.zeros(len(solved.z), dtype=torch.bool, device=solved.z.device)
    if singular is None:
        singular = ~found
    if not bool(singular.any()):
        return found
    at = torch.where(singular)[0]
    known = singular.dtype != torch.bool
    if known and bool((singular <= 1).all()):
        return _differ(solved, outputs, only_free=True)
    return found.index_copy(0, at, _differ(solved.select(at), outputs, only_free=False))


def _differ(solved: Solved, outputs: Outputs, only_free: bool) -> Tensor:
    """Whether a random solution of J'w = 0 changes the gradient, bool, shape (batch,)."""
    program, z = solved.reduced, solved.z
    n, projection = program.structure.variables, derivative_at(program, z)
    numbers = np.random.default_rng(0).uniform(-1, 1, n + z.shape[1])
    random = torch.as_tensor(numbers, device=z.device).expand(len(z), -1)
    if only_free:
        null = torch.cat([random[:, :n] * free_variables(program, projection), 0 * z], 1)
    else:
        image = kkt_times(program, projection, random[:, :, None], transpose=True)
        null = random - solve_kkt(program, projection, image, transpose=True)[0][:, :, 0]
    moved = _size_of_gradient(solved, outputs, null)
    if not bool(moved.any()):
        return moved > 0
    return moved > REGULAR * _size_of_gradient(solved, outputs, random)


def _size_of_gradient(solved: Solved, outputs: Outputs, w: Tensor) -> Tensor:
    """Largest gradient of a parameter for a solution w of the adjoint system, shape (batch,)."""
    n = solved.reduced.structure.variables
    return solved.pull_back(outputs, -w[:, :n], w[:, n:]).abs().amax(1)


def weakly_active(
    solved: Solved, found: Tensor, derivative: Derivative, outputs: Outputs
) -> Tensor:
    """Elements on a kink across which the gradient of the parameters jumps, bool, (batch,).

    Also elements whose solution is not known well enough to tell. `found` (batch,) is the residual
    of the optimality conditions: where it is not at rounding level, a point is on every kink that
    is no farther away than the solution may be.
    """
    kinked, margin = _kinked(solved, found)
    if not bool(kinked.any()):
        return kinked
    at = torch.where(kinked)[0]
    part, cone = solved.select(at), solved.reduced.structure.cone
    x, y, s = part.point
    grads = outputs.probe(part.program)
    shift = 2 * margin[at] * cone.centre(s)
    sides = [derivative.adjoint(part.reduced, (x, y, v), grads) for v in (s + shift, s - shift)]
    above, below = (part.pull_back(outputs, side.q, side.b) for side in sides)
    # A gradient that is zero to rounding is measured by what one of this size could have been.
    norm = torch.cat([torch.cat([side.q, side.b], 1) for side in sides], 1).abs().amax(1)[:, None]
    full = part.pull_back(outputs, norm.expand_as(x), norm.expand_as(y))
    size = torch.maximum(above.abs(), below.abs()).amax(1)
    size = torch.maximum(size, NOTICEABLE * full.abs().amax(1))
    jumps = ~((above - below).abs().amax(1) <= REGULAR * size)
    # Nor is there a derivative where the solution is not unique on one of the sides.
    jumps |= torch.maximum(*(side.residual for side in sides)) > REGULAR
    unknown = margin[at, 0] > REGULAR * part.z.abs().amax(1)  # which side it is
    return kinked.index_copy(0, at, jumps | unknown)


def _kinked(solved: Solved, found: Tensor) -> tuple[Tensor, Tensor]:
    """Elements that may be on a kink, bool, shape (batch,), and what counts as near, (batch, 1)."""
    known = solved.__dict__.get("_kinked")
    if known is None or known[0] is not found:
        known = solved.__dict__["_kinked"] = (found, _look_for_kinks(solved, found))
    return known[1]


def _look_for_kinks(solved: Solved, found: Tensor) -> tuple[Tensor, Tensor]:
    cone = solved.reduced.structure.cone
    if not cone.rows:
        return torch.zeros_like(found, dtype=torch.bool), found[:, None]
    margin = _margin(solved, found)
    return cone.kinked(solved.z, derivative_at(solved.reduced, solved.z), margin), margin


def _margin(solved: Solved, found: Tensor) -> Tensor:
    """Distance from s - y that counts as near, shape (batch, 1).

    Where the residual is not at rounding level, twice the length of a Newton step.
    """
    z, program, infinite = solved.z, solved.reduced, solved.point[2] >= INFINITE
    margin = program.structure.cone.kink_margin(z.masked_fill(infinite, 0.0))
    inexact = (found > EXACT)[:, None]
    if not bool(inexact.any()):
        return margin
    # All elements at once, with the factors that there are.
    rhs = torch.cat(conditions(program, *solved.point), 1).masked_fill(~inexact, 0.0)
    step = solve_kkt(program, derivative_at(program, z), rhs[:, :, None])[0]
    step = step[:, program.structure.variables :, 0].masked_fill(infinite, 0.0)
    return torch.maximum(margin, 2 * step.abs().amax(1, keepdim=True))


def data_gradients(
    program: ConeProgram,
    x: Tensor,
    y: Tensor,
    q: Tensor,
    b: Tensor,
    wanted: Sequence[bool] = (True,) * 4,
) -> list[Any]:
    """Gradients with respect to P, q, A, b, per element, from those with respect to q and b.

    None for those that are not wanted.
    """
    P = _of_P(program.structure, x, q) if wanted[0] else None
    A = _of_A(program.structure, x, y, q, b) if wanted[2] else None
    return [P, q, A, b]


def _of_P(structure: Structure, x: Tensor, q: Tensor) -> Tensor:
    rows, cols = structure.P.index(x.device)
    return columns(q, rows) * columns(x, cols)


def _of_A(structure: Structure, x: Tensor, y: Tensor, q: Tensor, b: Tensor) -> Tensor:
    """The stored entries of y q' - b x'."""
    if not structure.has_joined_blocks and not structure.A.is_dense:
        rows, cols = structure.A.index(x.device)
        return columns(y, rows) * columns(q, cols) - columns(b, rows) * columns(x, cols)
    x, y = (v if v.shape[0] == q.shape[0] else v.expand(q.shape[0], -1) for v in (x, y))
    left, right = torch.stack((y, -b), 1).mT, torch.stack((q, x), 1)
    if not structure.has_joined_blocks:
        return structure.A.places.take(torch.bmm(left, right).flatten(1))
    count = structure.elimination.T.size  # type: ignore[union-attr]
    own = (left[:, :count] * right[:, :, :count].mT).sum(2)  # of the coefficients of T
    return torch.cat([torch.bmm(left, right[:, :, count:]).flatten(1), own], 1)
