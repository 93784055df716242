"""A batch of smooth nonlinear programs with one form.

minimise   f(x, p)   subject to   h(x, p) = 0,   g(x, p) <= 0,   lower <= x <= upper
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from declarative_cvx.nonconvex.minimization.scalars.separated import Separable, Separated

Parameters = tuple[Tensor, ...]
# Of one element: x of shape (n,) and its parameters, without a batch dimension. Or, where
# `NonlinearProgram.batched` says so, of a batch: x (batch, n) and parameters (batch or 1, ...).
Function = Callable[[Tensor, Parameters], Tensor]


@dataclass(frozen=True, eq=False)
class NonlinearProgram:
    """Functions of an element, and the parameter values of a batch.

    Attributes
    ----------
    variables : int
        Number n of variables.
    objective : callable
        f(x, p), of shape ().
    equality, inequality : callable or None
        h(x, p) and g(x, p), of shapes (k,) and (l,); None if there are none. Gradients reach
        what is in p, and nothing else: a tensor that requires a gradient belongs there.
    lower, upper : Tensor or None
        Bounds, shape (batch or 1, n), infinite where there are none.
    parameters : tuple of Tensor
        Each (batch or 1, ...): a value for every element, or one that all share.
    batch : int
    batched : bool
        Whether the functions take a batch, x (batch, n) and parameters (batch or 1, ...), and
        return a value for each of its elements, which may not depend on the others. Functions
        of one element are mapped by torch.func.vmap.
    equalities : int or None
        Number k of equalities; None: found by evaluating them.
    separable : Separable or None
        The same functions, to be taken apart, if that can be kept from call to call.
    sparse : bool
        Whether derivatives are sparse matrices; only where the functions can be taken apart.
    """

    variables: int
    objective: Function
    equality: Function | None
    inequality: Function | None
    lower: Tensor | None
    upper: Tensor | None
    parameters: Parameters
    batch: int
    batched: bool = False
    equalities: int | None = None
    separable: Separable | None = None
    sparse: bool = False

    @property
    def device(self) -> torch.device:
        """That of the parameters and bounds; the CPU if there are none."""
        tensors = (*self.parameters, self.lower, self.upper)
        return next((t.device for t in tensors if t is not None), torch.device("cpu"))

    @property
    def crossing(self) -> Tensor:
        """How far a lower bound is above its upper one, shape (batch,), infinite at NaN."""
        if self.lower is None or self.upper is None:
            return torch.zeros(self.batch, device=self.device)
        gaps = torch.nn.functional.pad((self.lower - self.upper).clamp(min=0), (0, 1)).amax(1)
        return torch.nan_to_num(gaps, nan=torch.inf).expand(self.batch)

    @property
    def separated(self) -> Separated | None:
        """The functions taken apart into scalars, if that is possible."""
        return None if self.separable is None else self.separable.separated

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
