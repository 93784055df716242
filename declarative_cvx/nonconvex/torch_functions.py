"""The functions of a torch problem as functions of one vector and all parameters."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from declarative_cvx.errors import SpecificationError
from declarative_cvx.nonconvex.minimization.program import Parameters
from declarative_cvx.nonconvex.torch_problem import TorchProblem
from declarative_cvx.nonconvex.torch_vector import Vector


class Weights:
    """Tensors of the functions that are modules, as parameters that all elements share."""

    def __init__(self, modules: Mapping[str, nn.Module]) -> None:
        self._modules = dict(modules)

    def values(self) -> list[Tensor]:
        """All of them, each (1, ...)."""
        return [v[None] for module in self._modules.values() for v in _state(module).values()]

    def places(self, function: str) -> dict[str, int]:
        """Where among the values those of one function are, by their names in its module."""
        at = 0
        for name, module in self._modules.items():
            places = {key: at + i for i, key in enumerate(_state(module))}
            if name == function:
                return places
            at += len(places)
        return {}


def _state(module: nn.Module) -> dict[str, Tensor]:
    """The floating-point parameters and buffers."""
    state = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    return {name: value for name, value in state.items() if value.is_floating_point()}


class Function:
    """A function of the problem, as one of the vector and all parameters.

    Attributes
    ----------
    shape : tuple of int
        Of one element's value, once it has been called.
    """

    def __init__(self, problem: TorchProblem, name: str, vector: Vector, weights: Weights) -> None:
        self._name, self._function = name, getattr(problem, name)
        self._count, self._batched = len(problem.parameter_shapes), problem.batched
        self._vector, self._places = vector, weights.places(name)
        self.shape: tuple[int, ...] = ()

    def __call__(self, x: Tensor, parameters: Parameters) -> Tensor:
        found = self._of_batch(x, parameters) if self._batched else self._value(x, parameters)
        if not isinstance(found, Tensor):
            raise SpecificationError(
                f"the {self._name} function returns a {type(found).__name__}, but a tensor is "
                "expected."
            )
        if self._name == "objective":
            return found
        leading = int(self._batched)
        self.shape = tuple(found.shape[leading:])
        return found.flatten(leading) if found.dim() > leading else found[..., None]

    def _of_batch(self, x: Tensor, parameters: Parameters) -> Tensor:
        own, weights = parameters[: self._count], parameters[self._count :]
        if all(len(value) == 1 for value in weights):
            expanded = (value.expand(len(x), *value.shape[1:]) for value in own)
            return self._value(x, (*expanded, *(value[0] for value in weights)))
        # A transform has given every element weights of its own.
        dims = tuple(0 if len(value) > 1 else None for value in parameters)
        values = tuple(v if len(v) > 1 else v[0] for v in parameters)

        def one(x: Tensor, p: Parameters) -> Tensor:
            mine = (value[None] for value in p[: self._count])
            return self._value(x[None], (*mine, *p[self._count :]))[0]

        return torch.func.vmap(one, (0, dims))(x, values)

    def _value(self, x: Tensor, parameters: Parameters) -> Tensor:
        arguments = (*self._vector.split(x).values(), *parameters[: self._count])
        if not isinstance(self._function, nn.Module):
            return self._function(*arguments)
        weights = parameters[self._count :]
        state = {name: weights[place] for name, place in self._places.items()}
        return torch.func.functional_call(self._function, state, arguments)
