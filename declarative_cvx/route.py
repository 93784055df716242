"""How the problems of one kind are solved: what `DeclarativeLayer` hands its work to."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from declarative_cvx.errors import ParameterError
from declarative_cvx.parameters import Arguments
from declarative_cvx.solution import Solution


class Route(ABC):
    """A problem, prepared once, that is solved for batches of parameter values."""

    @property
    @abstractmethod
    def solvers(self) -> tuple[str, ...]:
        """Names of what solves, in the order in which they are tried."""

    @abstractmethod
    def solve(
        self, arguments: Arguments, options: Mapping[str, Any] | None, start: Any
    ) -> Solution:
        """Solve for each element.

        Parameters
        ----------
        arguments : Arguments
            Checked.
        options : mapping or None
            Options of the solver for this call.
        start : object or None
            `Solution.state` of an earlier call.

        Returns
        -------
        Solution
            Differentiable in the parameters.
        """


def batch_of(arguments: Arguments) -> int:
    """Number of elements of a call, at least one: torch.func cannot map over none.

    Raises
    ------
    ParameterError
        If the batch is empty.
    """
    if arguments.batch == 0:
        raise ParameterError("The batch is empty: a batched parameter has first dimension 0.")
    return 1 if arguments.batch is None else arguments.batch


def shape_output(arguments: Arguments, value: Tensor) -> Tensor:
    """A value (batch, ...) in the dtype of the call, without the batch if the call has none."""
    value = value.to(arguments.dtype)
    return value[0] if arguments.batch is None else value
