"""Whether the solution map has a derivative at a solution, and why not (DDN 4.7.3-4.7.4)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from declarative_cvx.derivative.base import Derivative
from declarative_cvx.kkt import derivative_at, free_variables, kkt_times, solve_kkt
from declarative_cvx.program import ConeProgram, Point
from declarative_cvx.sparsity import columns

# Relative residual of the adjoint system, or relative difference between the derivatives on the
# two sides of a kink, above which an element is irregular.
REGULAR = 1e-6
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

    def probe(self, point: Point) -> Point:
        """Fixed, random gradients with respect to the outputs."""
        x, y, s = point
        generator = np.random.default_rng(0)
        weights = torch.as_tensor(
            generator.uniform(0.5, 1.5, len(self.x) + len(self.y)), device=x.device
        )
        grad_x = (weights[: len(self.x)] * self.x).expand_as(x)
        grad_y = (weights[len(self.x) :] * self.y).expand_as(y)
        return grad_x, grad_y, torch.zeros_like(s)


def assess(
    program: ConeProgram, point: Point, derivative: Derivative, outputs: Outputs
) -> DerivativeReport:
    """Probe the derivative of the outputs at a solution, on both sides of a kink.

    Parameters
    ----------
    program : ConeProgram
        In units of size one.
    point : (x, y, s)
    derivative : Derivative
    outputs : Outputs

    Returns
    -------
    DerivativeReport
    """
    adjoint = derivative.adjoint(program, point, outputs.probe(point))
    weak = weakly_active(program, point, derivative, outputs)
    return DerivativeReport(
        adjoint.residual, weak, ambiguous(program, point, adjoint.singular, outputs)
    )


def ambiguous(
    program: ConeProgram, point: Point, singular: Tensor | None, outputs: Outputs
) -> Tensor:
    """Elements whose adjoint system has several solutions with different gradients.

    Constraints that hold together at the solution, and depend on each other, but move apart with
    the parameters: beyond the solution one of them gives way, which one depends on the direction.

    Parameters
    ----------
    program : ConeProgram
    point : (x, y, s)
    singular : Tensor of bool or int64, shape (batch,), or None
        Where the matrix is singular and, if this is known, how (`kkt.solve_kkt_and_rank`); None is
        anywhere.
    outputs : Outputs

    Returns
    -------
    Tensor of bool, shape (batch,)
    """
    x, y, s = point
    if singular is None:
        singular = torch.ones(len(x), dtype=torch.bool, device=x.device)
    found = torch.zeros(len(x), dtype=torch.bool, device=x.device)
    if not bool(singular.any()):
        return found
    at = torch.where(singular)[0]
    known = singular is not None and singular.dtype != torch.bool
    if known and bool((singular <= 1).all()):  # type: ignore[operator, union-attr]
        return _differ(program, point, outputs, only_free=True)
    part = (x[at], y[at], s[at])
    return found.index_copy(0, at, _differ(program.select(at), part, outputs, only_free=False))


def _differ(program: ConeProgram, point: Point, outputs: Outputs, only_free: bool) -> Tensor:
    """Whether a random solution of J'w = 0 changes the gradient, bool, shape (batch,)."""
    x, y, s = point
    projection = derivative_at(program, s - y)
    numbers = np.random.default_rng(0).uniform(-1, 1, x.shape[1] + y.shape[1])
    random = torch.as_tensor(numbers, device=x.device).expand(len(x), -1)
    if only_free:
        null = torch.cat([random[:, : x.shape[1]] * free_variables(program, projection), 0 * y], 1)
    else:
        image = kkt_times(program, projection, random[:, :, None], transpose=True)
        null = random - solve_kkt(program, projection, image, transpose=True)[0][:, :, 0]
    sizes = []
    for w in (null, random):
        q, b = -w[:, : x.shape[1]], w[:, x.shape[1] :]
        sizes.append(outputs.pull_back(*data_gradients(program, x, y, q, b)).abs().amax(1))
    return sizes[0] > REGULAR * sizes[1]


def weakly_active(
    program: ConeProgram, point: Point, derivative: Derivative, outputs: Outputs
) -> Tensor:
    """Elements on a kink across which the gradient of the parameters jumps, bool, (batch,)."""
    _, y, s = point
    cone = program.structure.cone
    kinked = cone.kinked(s - y, derivative_at(program, s - y))
    if not bool(kinked.any()):
        return kinked
    at = torch.where(kinked)[0]
    part = program.select(at)
    x, y, s = (v[at] for v in point)
    grads = outputs.probe((x, y, s))
    shift = 2 * cone.kink_margin(s - y) * cone.centre(s)
    sides = [derivative.adjoint(part, (x, y, side), grads) for side in (s + shift, s - shift)]
    above, below = (
        outputs.pull_back(*data_gradients(part, x, y, side.q, side.b)) for side in sides
    )
    # A gradient that is zero to rounding is measured by what one of this size could have been.
    norm = torch.cat([torch.cat([side.q, side.b], 1) for side in sides], 1).abs().amax(1)[:, None]
    full = outputs.pull_back(*data_gradients(part, x, y, norm.expand_as(x), norm.expand_as(y)))
    size = torch.maximum(above.abs(), below.abs()).amax(1)
    size = torch.maximum(size, NOTICEABLE * full.abs().amax(1))
    jumps = ~((above - below).abs().amax(1) <= REGULAR * size)
    return kinked.index_copy(0, at, jumps)


def data_gradients(
    program: ConeProgram, x: Tensor, y: Tensor, q: Tensor, b: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients with respect to P, q, A, b, per element, from those with respect to q and b."""
    structure = program.structure
    rows, cols = structure.P.index(x.device)
    P = columns(q, rows) * columns(x, cols)
    y, b, q, x = (v.expand(len(q), -1) for v in (y, b, q, x))
    if structure.has_whole_lines:
        places = structure.elimination.places  # type: ignore[union-attr]
        E, R = places.E.take, places.R.take
        T, X = places.T.take, places.X.take
        own = E(y) * T(q) - E(b) * T(x)  # of the coefficients of T
        lines = torch.cat([own[:, :, None], _outer(E(y), X(q), E(b), X(x))], 2)
        A = torch.cat([lines.flatten(1), _outer(R(y), X(q), R(b), X(x)).flatten(1)], 1)
    elif structure.A.is_dense:
        A = structure.A.places.take(_outer(y, q, b, x).flatten(1))
    else:
        rows, cols = structure.A.index(x.device)
        A = columns(y, rows) * columns(q, cols) - columns(b, rows) * columns(x, cols)
    return P, q, A, b


def _outer(y: Tensor, q: Tensor, b: Tensor, x: Tensor) -> Tensor:
    """Y q' - b x' for each element."""
    return torch.addcmul(y[:, :, None] * q[:, None, :], b[:, :, None], x[:, None, :], value=-1)
