"""What a derivative of the solution map is, whoever found the solution.

At a solution (x, y) a change of P acts like the change dP x of q, and a change of A like the
changes dA'y of q and -dA x of b. So q and b are all that a derivative has to deal with.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from declarative_cvx.errors import DerivativeModeError
from declarative_cvx.program import ConeProgram, Point, Structure


@dataclass(frozen=True)
class Adjoint:
    """Gradients of a loss with respect to q and b.

    Attributes
    ----------
    q : Tensor, shape (batch, n)
    b : Tensor, shape (batch, m)
    residual : Tensor, shape (batch,)
        Relative residual of the linear system that was solved: the accuracy of the gradient.
    singular : Tensor of int64, shape (batch,), or None
        How singular the matrix of that system is (`kkt.solve_kkt_and_rank`), if this is known.
    """

    q: Tensor
    b: Tensor
    residual: Tensor
    singular: Tensor | None = None


class Derivative(ABC):
    """A way to differentiate the solution of a cone program with respect to its data."""

    name: ClassVar[str]

    def obstacle(self, structure: Structure) -> str | None:
        """Why programs of this structure cannot be differentiated; None if they can."""
        return None

    @abstractmethod
    def adjoint(self, program: ConeProgram, point: Point, grads: Point) -> Adjoint:
        """Apply the transposed derivative.

        Parameters
        ----------
        program : ConeProgram
        point : (x, y, s)
            Solution, shapes (batch, n), (batch, m), (batch, m).
        grads : (grad_x, grad_y, grad_s)
            Gradients of a loss with respect to the solution, same shapes.

        Returns
        -------
        Adjoint
        """

    def tangent(self, program: ConeProgram, point: Point, dq: Tensor, db: Tensor) -> Point:
        """Apply the derivative itself: the change of (x, y, s) for changes of q and b."""
        raise DerivativeModeError(
            f"derivative={self.name!r} has no forward mode; use reverse mode (backward, jacrev, "
            'vjp) or derivative="implicit".'
        )
