"""Implicit differentiation of the optimality conditions of a cone program."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from declarative_cvx.derivative.base import Adjoint, Derivative
from declarative_cvx.kkt import derivative_at, solve_kkt, solve_kkt_and_rank
from declarative_cvx.program import ConeProgram, Point
from declarative_cvx.transforms import recording


@dataclass(frozen=True)
class Implicit(Derivative):
    """Batched factorisation; rank-revealing least squares where that fails.

    The Jacobian J of the optimality conditions (see `declarative_cvx.optimality`) is often
    singular although the derivative exists (epigraph variables of inactive constraints, dependent
    rows). The adjoint system J'w = v is then consistent and its minimum-norm solution exact.
    Where it is inconsistent the derivative does not exist, the least-squares solution is
    returned, and the residual says so. It can be differentiated any number of times.
    """

    name: ClassVar[str] = "implicit"

    def adjoint(self, program: ConeProgram, point: Point, grads: Point) -> Adjoint:
        _, y, s = point
        grad_x, grad_y, grad_s = grads
        n = program.structure.variables
        projection = derivative_at(program, s - y)
        grad_z = grad_y + grad_s
        if recording(grad_z) or not projection.parts or bool(grad_z.any()):
            grad_z = projection.matvec(grad_z)
        rhs = torch.cat([grad_x, grad_z - grad_y], 1)
        w, residual, singular = solve_kkt_and_rank(
            program, projection, rhs[:, :, None], transpose=True
        )
        return Adjoint(-w[:, :n, 0], w[:, n:, 0], residual[:, 0], singular)

    def tangent(self, program: ConeProgram, point: Point, dq: Tensor, db: Tensor) -> Point:
        _, y, s = point
        n = program.structure.variables
        projection = derivative_at(program, s - y)
        rhs = torch.cat([-dq, db], 1)[:, :, None]
        change = solve_kkt(program, projection, rhs)[0][:, :, 0]
        dz = change[:, n:]
        ds = projection.matvec(dz)
        return change[:, :n], ds - dz, ds
