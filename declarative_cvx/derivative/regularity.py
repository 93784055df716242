"""Whether the solution map has a derivative at a solution, and why not (DDN 4.7.3-4.7.4)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from declarative_cvx.derivative.base import Derivative
from declarative_cvx.program import ConeProgram, Point
from declarative_cvx.sparsity import columns

# Relative residual of the adjoint system, or relative difference between the derivatives on the
# two sides of a kink, above which an element is irregular.
REGULAR = 1e-6

WEAKLY_ACTIVE = (
    "a constraint is active with a zero multiplier (or lies on another kink of its cone), so that "
    "the derivatives on its two sides differ; one of them is returned"
)
INCONSISTENT = (
    "the adjoint system has no solution, as where the solution or a multiplier asked for is not "
    "unique; its least-squares solution is returned"
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
    """

    residual: Tensor
    weakly_active: Tensor

    @property
    def regular(self) -> Tensor:
        """Whether each element has a derivative, bool, shape (batch,)."""
        return (self.residual <= REGULAR) & ~self.weakly_active

    @property
    def reason(self) -> tuple[str, ...]:
        """Why each element has none; empty where it has one."""
        return tuple(
            "not solved" if residual != residual
            else WEAKLY_ACTIVE if weak
            else INCONSISTENT if not residual <= REGULAR
            else ""
            for residual, weak in zip(
                self.residual.tolist(), self.weakly_active.tolist(), strict=True
            )
        )  # fmt: skip


@dataclass(frozen=True, eq=False)
class Outputs:
    """What the layer's outputs and inputs are in terms of a cone program.

    Attributes
    ----------
    x, y : Tensor, shapes (n,) and (m,)
        1 where an entry is (part of) an output, 0 elsewhere.
    pull_back : callable
        From gradients with respect to P, q, A, b, each (batch, entries), to those with respect
        to the parameters, (batch, entries).
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
    grads = outputs.probe(point)
    residual = derivative.adjoint(program, point, grads).residual
    return DerivativeReport(residual, weakly_active(program, point, derivative, outputs))


def weakly_active(
    program: ConeProgram, point: Point, derivative: Derivative, outputs: Outputs
) -> Tensor:
    """Elements on a kink across which the gradient of the parameters jumps, bool, (batch,)."""
    _, y, s = point
    cone = program.structure.cone
    kinked = cone.kinked(s - y)
    at = torch.where(kinked)[0]
    if not len(at):
        return kinked
    part = program.select(at)
    x, y, s = (v[at] for v in point)
    grads = outputs.probe((x, y, s))
    shift = 2 * cone.kink_margin(s - y) * cone.centre(s)
    sides = [derivative.adjoint(part, (x, y, side), grads) for side in (s + shift, s - shift)]
    above, below = (
        outputs.pull_back(*data_gradients(part, x, y, side.q, side.b)) for side in sides
    )
    size = torch.maximum(above.abs(), below.abs()).amax(1).clamp(min=torch.finfo(x.dtype).tiny)
    jumps = ~((above - below).abs().amax(1) <= REGULAR * size)
    return kinked.index_copy(0, at, jumps)


def data_gradients(
    program: ConeProgram, x: Tensor, y: Tensor, q: Tensor, b: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients with respect to P, q, A, b, per element, from those with respect to q and b."""
    rows, cols = program.structure.A.index(x.device)
    P_rows, P_cols = program.structure.P.index(x.device)
    P = columns(q, P_rows) * columns(x, P_cols)
    A = columns(y, rows) * columns(q, cols) - columns(b, rows) * columns(x, cols)
    return P, q, A, b
