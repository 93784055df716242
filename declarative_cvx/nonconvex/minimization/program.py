"""A batch of smooth nonlinear programs with one form.

minimise   f(x, p)   subject to   h(x, p) = 0,   g(x, p) <= 0,   lower <= x <= upper
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from torch import Tensor

Parameters = tuple[Tensor, ...]
# Of one element: x of shape (n,) and its parameters, without a batch dimension.
Function = Callable[[Tensor, Parameters], Tensor]


@dataclass(frozen=True, eq=False)
class NonlinearProgram:
    """Functions of one element, and the parameter values of a batch.

    Attributes
    ----------
    variables : int
        Number n of variables.
    objective : callable
        f(x, p), of shape ().
    equality, inequality : callable or None
        h(x, p) and g(x, p), of shapes (k,) and (l,); None if there are none.
    lower, upper : Tensor or None
        Bounds, shape (batch or 1, n), infinite where there are none.
    parameters : tuple of Tensor
        Each (batch or 1, ...): a value for every element, or one that all share.
    batch : int
    """

    variables: int
    objective: Function
    equality: Function | None
    inequality: Function | None
    lower: Tensor | None
    upper: Tensor | None
    parameters: Parameters
    batch: int

    def select(self, index: Tensor) -> NonlinearProgram:
        """The elements of the batch named by an index tensor."""

        def pick(value: Tensor) -> Tensor:
            return value if value.shape[0] == 1 else value[index]

        return replace(
            self,
            lower=None if self.lower is None else pick(self.lower),
            upper=None if self.upper is None else pick(self.upper),
            parameters=tuple(pick(value) for value in self.parameters),
            batch=len(index),
        )
