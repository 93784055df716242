"""The optimality conditions of a cone program as one equation.

With z = s - y, so that s = Π(z) and y = Π(z) - z for the projection Π onto K (Moreau), a solution
is a zero of (Busseti, Moursi and Boyd 2019)

    R(x, z) = [P x + q + A'(Π(z) - z);  A x + Π(z) - b],
    J = dR/d(x, z) = [[P, A'(DΠ - I)], [A, DΠ]].

For the zero cone and the nonnegative orthant DΠ is 0 or 1, and J is the KKT matrix of the active
set (DDN Prop. 4.6).
"""

from __future__ import annotations

from torch import Tensor

from declarative_cvx.program import ConeProgram
from declarative_cvx.residuals import conditions


def residual_map(program: ConeProgram, x: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
    """The two parts of R(x, z), shapes (batch, n) and (batch, m)."""
    s = program.structure.cone.project(z)
    return conditions(program, x, s - z, s)
