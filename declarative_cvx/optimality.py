"""The optimality conditions of a cone program as one equation, and its Jacobian.

With z = s - y, so that s = Π(z) and y = Π(z) - z for the projection Π onto K (Moreau), a solution
is a zero of (Busseti, Moursi and Boyd 2019)

    R(x, z) = [P x + q + A'(Π(z) - z);  A x + Π(z) - b],
    J = dR/d(x, z) = [[P, A'(DΠ - I)], [A, DΠ]].

For the zero cone and the nonnegative orthant DΠ is 0 or 1, and J is the KKT matrix of the active
set (DDN Prop. 4.6).
"""

from __future__ import annotations

import torch
from torch import Tensor

from declarative_cvx.cones import ConeDerivative
from declarative_cvx.program import ConeProgram, to_dense


def residual_map(program: ConeProgram, x: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
    """The two parts of R(x, z), shapes (batch, n) and (batch, m)."""
    s = program.structure.cone.project(z)
    dual = program.P_times(x) + program.q + program.At_times(s - z)
    return dual, program.A_times(x) + s - program.b


def jacobian(program: ConeProgram, projection: ConeDerivative) -> Tensor:
    """J, shape (batch, n + m, n + m), for the derivative DΠ at z."""
    P = to_dense(program.P, program.structure.P).expand(program.batch, -1, -1)
    A = to_dense(program.A, program.structure.A).expand(program.batch, -1, -1)
    top = torch.cat([P, (projection.matmul(A) - A).mT], 2)
    return torch.cat([top, torch.cat([A, projection.dense()], 2)], 1)
