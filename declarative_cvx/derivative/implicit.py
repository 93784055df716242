"""Implicit differentiation of the optimality conditions of a cone program.

With z = s - y, so that s = Π(z) and y = Π(z) - z for the projection Π onto K, a solution is a
zero of (Busseti, Moursi and Boyd 2019)

    R(x, z) = [P x + q + A'(Π(z) - z);  A x + Π(z) - b],
    J = dR/d(x, z) = [[P, A'(DΠ - I)], [A, DΠ]].

The adjoint system is J'w = v. For the zero cone and the nonnegative orthant DΠ is 0 or 1 and this
is the KKT system of the active set (DDN Prop. 4.6).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from declarative_cvx.derivative.base import Adjoint, Derivative
from declarative_cvx.program import ConeProgram, to_dense

# Residual, relative to the right-hand side, up to which a factorisation's answer is taken.
FACTORED = 1e-9
# Singular values below this multiple of the largest count as zero.
RANK_TOLERANCE = 1e-11


@dataclass(frozen=True)
class Implicit(Derivative):
    """Batched dense factorisation; rank-revealing least squares where that fails.

    J is often singular although the derivative exists (epigraph variables of inactive
    constraints, dependent rows). The system is then consistent and its minimum-norm solution
    exact. Where it is inconsistent the derivative does not exist, the least-squares solution is
    returned, and the residual says so.
    """

    name: ClassVar[str] = "implicit"

    def adjoint(
        self,
        program: ConeProgram,
        point: tuple[Tensor, Tensor, Tensor],
        grads: tuple[Tensor, Tensor, Tensor],
    ) -> Adjoint:
        n = program.structure.variables
        matrix, rhs = _adjoint_system(program, point, grads)
        w, residual = solve_consistent(matrix, rhs)
        return Adjoint(q=-w[:, :n], b=w[:, n:], residual=residual)


def _adjoint_system(
    program: ConeProgram,
    point: tuple[Tensor, Tensor, Tensor],
    grads: tuple[Tensor, Tensor, Tensor],
) -> tuple[Tensor, Tensor]:
    """J', shape (batch, n + m, n + m), and v, shape (batch, n + m)."""
    _, y, s = point
    grad_x, grad_y, grad_s = grads
    batch, structure = program.batch, program.structure
    projection = structure.cone.derivative(s - y)
    P = to_dense(program.P, structure.P).expand(batch, -1, -1)
    A = to_dense(program.A, structure.A).expand(batch, -1, -1)
    top = torch.cat([P, A.mT], 2)
    bottom = torch.cat([projection.matmul(A) - A, projection.dense()], 2)
    rhs = torch.cat([grad_x, projection.matvec(grad_y + grad_s) - grad_y], 1)
    return torch.cat([top, bottom], 1), rhs


def solve_consistent(matrix: Tensor, rhs: Tensor) -> tuple[Tensor, Tensor]:
    """Solve square systems that may be singular.

    Parameters
    ----------
    matrix : Tensor, shape (batch, k, k)
    rhs : Tensor, shape (batch, k)

    Returns
    -------
    solution : Tensor, shape (batch, k)
        The solution; the one of least norm where there are many, the least-squares one where
        there is none.
    residual : Tensor, shape (batch,)
        Relative to the right-hand side.
    """
    # In units of the right-hand side, so that gradients of 1e-12 and of 1e+12 are treated alike.
    unit = rhs.detach().abs().amax(1, keepdim=True)
    unit = torch.where(unit > 0, unit, 1.0)
    scaled = rhs / unit
    w, residual = _by_factorisation(matrix, scaled)
    failed = torch.where(~(residual <= FACTORED))[0]
    if len(failed):
        part = _least_squares(matrix[failed], scaled[failed])
        found = _residual(matrix[failed], part, scaled[failed])
        worse = found > residual[failed]  # False where the factorisation gave NaN
        part = torch.where(worse[:, None], w[failed], part)
        w = w.index_copy(0, failed, part)
        residual = residual.index_copy(0, failed, torch.fmin(found, residual[failed]))
    return w * unit, residual


def _by_factorisation(matrix: Tensor, rhs: Tensor) -> tuple[Tensor, Tensor]:
    """LU for the elements without a zero pivot; the others get zero and an infinite residual.

    Leaving them out, rather than overwriting their NaN, keeps NaN out of second derivatives.
    """
    factors, pivots, info = torch.linalg.lu_factor_ex(matrix)
    if not info.any():
        w = torch.linalg.lu_solve(factors, pivots, rhs[:, :, None])[:, :, 0]
        return w, _residual(matrix, w, rhs)
    regular = torch.where(info == 0)[0]
    part = torch.linalg.solve(matrix[regular], rhs[regular])
    found = _residual(matrix[regular], part, rhs[regular])
    w = torch.zeros_like(rhs).index_copy(0, regular, part)
    return w, torch.full_like(rhs[:, 0], torch.inf).index_copy(0, regular, found)


def _residual(matrix: Tensor, w: Tensor, rhs: Tensor) -> Tensor:
    """Largest error of each system, shape (batch,)."""
    error = (matrix.detach() @ w.detach()[:, :, None])[:, :, 0] - rhs.detach()
    return error.abs().amax(1)


def _least_squares(matrix: Tensor, rhs: Tensor) -> Tensor:
    return (torch.linalg.pinv(matrix, rtol=RANK_TOLERANCE) @ rhs[:, :, None])[:, :, 0]
