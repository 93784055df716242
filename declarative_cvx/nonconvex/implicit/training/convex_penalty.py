"""Any convex function of the parameters, written in CVXPY, as a penalty."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from typing import ClassVar

import cvxpy as cp
import torch
from torch import Tensor

from declarative_cvx.errors import SpecificationError
from declarative_cvx.layer import DeclarativeLayer
from declarative_cvx.nonconvex.implicit.training.parameter_matrix import REGIONS
from declarative_cvx.nonconvex.implicit.training.penalty_terms import PenaltyTerm

Declared = Callable[..., cp.Expression]
Constraints = Callable[..., Sequence[cp.Constraint]]

# Violation of the constraints, relative, that is a solver's tolerance.
_SLACK = 1e-6


class ConvexPenalty(PenaltyTerm):
    """A convex CVXPY expression of one block A, B, C or D, with constraints if need be.

    Its prox, argmin ||V - W||^2 / 2 + step * expression(V), is a convex problem, solved by this
    library's `DeclarativeLayer`. That is much slower than the penalties in closed form.

    Parameters
    ----------
    expression : callable
        From a CVXPY variable, named "A", "B", "C" or "D", to a convex expression.
    constraints : callable, optional
        From the same variable to a list of constraints.
    on : str, optional
        Which region the variable is; by default the name of the callable's argument.

    Raises
    ------
    SpecificationError
        If the expression is not convex, or the region is unknown.

    Examples
    --------
    >>> import cvxpy as cp
    >>> ConvexPenalty(lambda B: 0.1 * cp.normNuc(B)).on
    'B'
    """

    by_row: ClassVar[bool] = False

    def __init__(
        self,
        expression: Declared,
        constraints: Constraints | None = None,
        on: str | None = None,
    ) -> None:
        if on is None:
            on = next(iter(inspect.signature(expression).parameters), "")
            if on not in REGIONS:
                raise SpecificationError(
                    f"The penalty's argument is named {on!r}; name it after its region (one of "
                    f"{', '.join(REGIONS)}) or pass on=."
                )
        self.on = on
        super().__post_init__()
        self.expression, self.constraints = expression, constraints
        self._declared: dict[tuple[int, ...], _Declaration] = {}

    def values(self, W: Tensor) -> Tensor:
        return W.new_tensor([self._of(W).value(W)])

    def prox(self, W: Tensor, step: Tensor) -> Tensor:
        (found,) = self._of(W).layer(W, step[0, 0])
        return found.to(W.dtype)

    def _of(self, W: Tensor) -> _Declaration:
        """Declared once for each shape."""
        shape = tuple(W.shape)
        if shape not in self._declared:
            self._declared[shape] = _Declaration(self, shape)
        return self._declared[shape]

    def __repr__(self) -> str:
        return f"ConvexPenalty(on={self.on!r})"


class _Declaration:
    """The prox of a penalty as a layer, for a shape."""

    def __init__(self, penalty: ConvexPenalty, shape: tuple[int, ...]) -> None:
        V, W = cp.Variable(shape, name=penalty.on), cp.Parameter(shape)
        step = cp.Parameter(nonneg=True)
        self.variable, self.expression = V, penalty.expression(V)
        self.constraints = list(penalty.constraints(V)) if penalty.constraints else []
        if not self.expression.is_convex() or not self.expression.is_scalar():
            raise SpecificationError(
                f"{penalty}: {self.expression} is not a convex number (CVXPY says "
                f"{self.expression.curvature.lower()}, shape {self.expression.shape})."
            )
        objective = cp.sum_squares(V - W) / 2 + step * self.expression
        problem = cp.Problem(cp.Minimize(objective), self.constraints)
        self.layer = DeclarativeLayer(problem, parameters=[W, step], variables=[V])

    def value(self, W: Tensor) -> float:
        """Infinite where a constraint is violated by more than a solver's tolerance."""
        self.variable.value = W.detach().cpu().numpy()
        size = 1 + float(torch.linalg.vector_norm(W))
        for constraint in self.constraints:
            if (constraint.violation() > _SLACK * size).any():
                return math.inf
        return float(self.expression.value)
