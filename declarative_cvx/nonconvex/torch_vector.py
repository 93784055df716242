"""The variables of a torch problem as one vector, and values for it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from declarative_cvx.errors import SpecificationError
from declarative_cvx.nonconvex.minimization.program import Parameters


class Vector:
    """Where the entries of variables stand in one vector x.

    Parameters
    ----------
    shapes : mapping of str to tuple of int

    Attributes
    ----------
    shapes : dict
    size : int
        Number n of entries.
    """

    def __init__(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        self.shapes = dict(shapes)
        self._sizes = [torch.Size(shape).numel() for shape in shapes.values()]
        self.size = sum(self._sizes)

    def split(self, x: Tensor) -> dict[str, Tensor]:
        """Values of the variables, each (..., *shape), from x, (..., n)."""
        parts = x.split(self._sizes, -1)
        return {
            name: part.reshape((*x.shape[:-1], *shape))
            for (name, shape), part in zip(self.shapes.items(), parts, strict=True)
        }

    def join(self, values: Mapping[str, Tensor]) -> Tensor:
        """The vectors, (batch or 1, n), of values that are each (batch or 1, *shape)."""
        parts = [values[name].reshape(len(values[name]), -1) for name in self.shapes]
        batch = max(len(part) for part in parts)
        return torch.cat([part.expand(max(batch, 1), -1) for part in parts], 1)


class Entries:
    """A value for every entry of the vector: constants, or functions of the parameters.

    Parameters
    ----------
    what : str
        The option that says so, for messages.
    given : number, array, tensor, callable or mapping of str to these
        For one variable, or a number for all of several, or by the variables' names.
    vector : Vector
    default : float
        Of variables for which there is none.
    over_batch : callable
        From a function of one element's parameters (or of a batch's, as the problem's are) and
        their values to what it returns for a batch.
    """

    def __init__(
        self,
        what: str,
        given: Any,
        vector: Vector,
        default: float,
        over_batch: Callable[[Callable[..., Tensor], Parameters], Tensor],
    ) -> None:
        self._what, self._vector, self._over_batch = what, vector, over_batch
        by_name = _by_name(what, given, vector)
        self.given = bool(by_name)
        self._values: dict[str, Any] = {}
        for name, shape in vector.shapes.items():
            value = by_name.get(name)
            if value is None:
                value = torch.full((1, *shape), default, dtype=torch.float64, device="cpu")
            elif not callable(value):
                value = self._constant(name, value)
            self._values[name] = value

    def at(self, parameters: Parameters, device: torch.device) -> Tensor:
        """The values, float64, shape (batch or 1, n)."""
        found = {}
        for name, value in self._values.items():
            if callable(value):
                value = self._fitted(name, self._called(name, value, parameters), batched=True)
            found[name] = value.to(device, torch.float64)
        return self._vector.join(found)

    def _called(self, name: str, function: Callable[..., Tensor], parameters: Parameters) -> Tensor:
        try:
            found = self._over_batch(function, parameters)
            if not isinstance(found, Tensor):
                raise TypeError(f"it returns a {type(found).__name__} instead of a tensor")
        except Exception as error:
            raise SpecificationError(
                f"the {self._what} function of {name!r} fails. {type(error).__name__}: {error}"
            ) from error
        return found

    def _constant(self, name: str, value: Any) -> Tensor:
        if isinstance(value, Tensor) and value.requires_grad:
            raise SpecificationError(
                f"{self._what} of {name!r} requires a gradient: make it a parameter of the "
                f"problem, and pass {self._what}= as a function of the parameters."
            )
        try:
            device = value.device if isinstance(value, Tensor) else "cpu"
            tensor = torch.as_tensor(value, dtype=torch.float64, device=device).clone()
        except (TypeError, ValueError, RuntimeError) as error:
            kind = type(value).__name__
            raise SpecificationError(
                f"{self._what} of {name!r} must be a number, an array, a tensor or a function of "
                f"the parameters, got a {kind}."
            ) from error
        if bool(torch.isnan(tensor).any()):
            raise SpecificationError(f"{self._what} of {name!r} contains NaN.")
        return self._fitted(name, tensor[None], batched=False)

    def _fitted(self, name: str, value: Tensor, batched: bool) -> Tensor:
        """A value, (batch or 1, ...), broadcast to its variable's shape."""
        shape = self._vector.shapes[name]
        own = tuple(value.shape[1:])
        try:
            if torch.broadcast_shapes(own, shape) != shape:
                raise RuntimeError
        except RuntimeError:
            kind = "a function that returns shape" if batched else "a value of shape"
            raise SpecificationError(
                f"{self._what} of {name!r} is {kind} {own}, but the variable has shape {shape}."
            ) from None
        leading = (1,) * (len(shape) - len(own))
        return value.reshape((len(value), *leading, *own)).expand((len(value), *shape))


def _by_name(what: str, given: Any, vector: Vector) -> dict[str, Any]:
    """The values by the variables' names."""
    names = list(vector.shapes)
    if given is None:
        return {}
    if isinstance(given, Mapping):
        unknown = [name for name in given if name not in names]
        if unknown:
            raise SpecificationError(
                f"{what} names {unknown[0]!r}, but the variables are {', '.join(names)}."
            )
        return dict(given)
    if len(names) > 1 and not isinstance(given, (int, float)):
        raise SpecificationError(
            f"{what} is {given!r}, but for several variables a number, or a mapping from their "
            f"names ({', '.join(names)}) to values, is expected."
        )
    return dict.fromkeys(names, given)
