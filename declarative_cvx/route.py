"""How the problems of one kind are solved: what `DeclarativeLayer` hands its work to."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from declarative_cvx.errors import BackendError, ParameterError
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

    def outputs(self, arguments: Arguments) -> tuple[Tensor, ...] | None:
        """Values of the outputs by a shorter way, differentiable, at default options.

        None where there is none, or it does not settle all elements beyond doubt (or a value is
        not finite): then `solve`.
        """
        return None

    def state_at(self, arguments: Arguments, values: Mapping[Any, Tensor]) -> Any:
        """What `solve` takes as its start, for given values of variables.

        Parameters
        ----------
        arguments : Arguments
        values : mapping
            From variables, or their names, to values ``(*shape)`` or ``(batch, *shape)``.

        Raises
        ------
        BackendError
            If the way the problem is solved does not depend on a start.
        SpecificationError, ParameterError
            For a variable, or a value, that does not fit.
        """
        raise BackendError(
            f"start= is for problems that are minimised in torch; {', '.join(self.solvers)} finds "
            "the same solution from anywhere. (warm_start=True saves iterations.)"
        )


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


def check_value(name: str, shape: tuple[int, ...], value: Any, arguments: Arguments) -> Tensor:
    """A value given for a variable, float64, ``(batch or 1, *shape)``, on the call's device.

    Raises
    ------
    ParameterError
        If it does not fit.
    """
    if not isinstance(value, Tensor) or not value.is_floating_point():
        raise ParameterError(
            f"start of {name!r} is no tensor of floating-point numbers: {value!r}."
        )
    batch = batch_of(arguments)
    fits = {shape: value[None]} | {(size, *shape): value for size in (1, batch)}
    if tuple(value.shape) not in fits:
        raise ParameterError(
            f"start of {name!r} has shape {tuple(value.shape)}; expected {shape}, or "
            f"{(batch, *shape)} for the batch."
        )
    if not bool(torch.isfinite(value).all()):
        raise ParameterError(f"start of {name!r} has entries that are not finite.")
    return fits[tuple(value.shape)].detach().to(arguments.device, torch.float64)


def shape_output(arguments: Arguments, value: Tensor) -> Tensor:
    """A value (batch, ...) in the dtype of the call, without the batch if the call has none."""
    value = value.to(arguments.dtype)
    return value[0] if arguments.batch is None else value
