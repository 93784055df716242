"""Activations by name, and blocks of states with different ones."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from declarative_cvx.errors import ParameterError, SpecificationError, nearest
from declarative_cvx.nonconvex.implicit.activation import Activation, Componentwise
from declarative_cvx.nonconvex.implicit.componentwise import (
    Identity,
    LeakyReLU,
    ReLU,
    Sigmoid,
    Tanh,
)
from declarative_cvx.nonconvex.implicit.whole_vector import (
    LayerNormalisation,
    MaxPool,
    Normalisation,
    Softmax,
    Sort,
)

__all__ = [
    "ACTIVATIONS",
    "Activation",
    "ActivationLike",
    "Blocks",
    "Componentwise",
    "Identity",
    "LayerNormalisation",
    "LeakyReLU",
    "MaxPool",
    "Normalisation",
    "ReLU",
    "Sigmoid",
    "Softmax",
    "Sort",
    "Tanh",
    "activation_named",
    "as_activation",
]


# What `as_activation` understands.
ActivationLike = Activation | str | nn.Module | Sequence[tuple[Activation | str, int]]


@dataclass(frozen=True)
class Blocks(Activation):
    """Different activations of consecutive blocks of states.

    Parameters
    ----------
    parts : sequence of pairs (activation or its name, number of states)

    Examples
    --------
    >>> phi = Blocks([("relu", 2), ("tanh", 3)])
    >>> phi(torch.full((5,), -1.0))
    tensor([ 0.0000,  0.0000, -0.7616, -0.7616, -0.7616])
    """

    parts: Sequence[tuple[ActivationLike, int]]

    name = "blocks"

    def __post_init__(self) -> None:
        parts = tuple(itertools.chain.from_iterable(map(_flat, self.parts)))
        if not parts:
            raise SpecificationError("Blocks needs at least one pair (activation, size).")
        object.__setattr__(self, "parts", parts)

    @property
    def activations(self) -> tuple[Activation, ...]:
        return tuple(as_activation(phi) for phi, _ in self.parts)

    @property
    def sizes(self) -> tuple[int, ...]:
        return tuple(size for _, size in self.parts)

    @property
    def lipschitz(self) -> float:
        return max(phi.lipschitz for phi in self.activations)

    @property
    def norms(self) -> tuple[float, ...]:  # type: ignore[override]
        return tuple(p for p in Activation.norms if all(p in phi.norms for phi in self.activations))

    @property
    def componentwise(self) -> bool:
        return all(phi.componentwise for phi in self.activations)

    @property
    def monotone(self) -> bool:
        return all(phi.monotone for phi in self.activations)

    @property
    def piecewise_linear(self) -> bool:
        return all(phi.piecewise_linear for phi in self.activations)

    @property
    def positively_homogeneous(self) -> bool:
        return all(phi.positively_homogeneous for phi in self.activations)

    @property
    def domain(self) -> tuple[float, float]:
        lower, upper = zip(*(phi.domain for phi in self.activations), strict=True)
        return min(lower), max(upper)

    def __call__(self, z: Tensor) -> Tensor:
        return self._each(lambda phi, part: phi(part), z)

    def slope(self, z: Tensor) -> Tensor:
        return self._each(lambda phi, part: phi.slope(part), z)

    def potential(self, z: Tensor) -> Tensor:
        return self._each(lambda phi, part: phi.potential(part), z)

    def conjugate(self, x: Tensor) -> Tensor:
        return self._each(lambda phi, part: phi.conjugate(part), x)

    def inverse(self, x: Tensor) -> Tensor:
        return self._each(lambda phi, part: phi.inverse(part), x)

    def divergence(self, x: Tensor, z: Tensor) -> Tensor:
        return self._each(lambda phi, *parts: phi.divergence(*parts), x, z)

    def clamp(self, x: Tensor) -> Tensor:
        return self._each(lambda phi, part: phi.clamp(part), x)

    def lipschitz_constants(self, like: Tensor) -> Tensor:
        return self._each(lambda phi, part: phi.lipschitz_constants(part), like)

    def bounds(self, like: Tensor) -> tuple[Tensor, Tensor]:
        lower = self._each(lambda phi, part: phi.bounds(part)[0], like)
        return lower, self._each(lambda phi, part: phi.bounds(part)[1], like)

    def check(self, n: int) -> None:
        if n != sum(self.sizes):
            raise ParameterError(
                f"The activation has blocks of {list(self.sizes)} states, {sum(self.sizes)} in "
                f"all, but there are {n} states."
            )

    def groups(self, n: int) -> tuple[int, ...]:
        self.check(n)
        pairs = zip(self.activations, self.sizes, strict=True)
        return tuple(itertools.chain.from_iterable(phi.groups(size) for phi, size in pairs))

    def take(self, index: Sequence[int]) -> Activation:
        block_of = [(k, i) for k, size in enumerate(self.sizes) for i in range(size)]
        runs = itertools.groupby((block_of[i] for i in index), key=lambda place: place[0])
        taken = [self._part(k, [i for _, i in run]) for k, run in runs]
        return _joined(taken)

    def _part(self, k: int, places: list[int]) -> tuple[Activation, int]:
        """The states `places` of block k."""
        phi, size = self.activations[k], self.sizes[k]
        if not phi.componentwise and not _complete(phi.groups(size), places):
            raise SpecificationError(
                f"Block {k} ({phi.name}) acts on groups of {phi.groups(size)[0]} states; they must "
                f"stay together and in order, but states {places[:8]} of it were taken."
            )
        return phi, len(places)

    def _each(self, function: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
        for tensor in tensors:
            self.check(tensor.shape[-1])
        parts = zip(*(tensor.split(self.sizes, -1) for tensor in tensors), strict=True)
        pairs = zip(self.activations, parts, strict=True)
        return torch.cat([function(phi, *part) for phi, part in pairs], -1)


def _flat(part: tuple[ActivationLike, int]) -> tuple[tuple[Activation, int], ...]:
    """A pair (activation, size), checked; blocks within blocks are taken apart."""
    phi, size = as_activation(part[0]), part[1]
    if isinstance(size, bool) or not isinstance(size, int) or size < 1:
        raise SpecificationError(
            f"The block {phi.name} has size {size!r}; expected an integer > 0."
        )
    phi.check(size)
    if isinstance(phi, Blocks):
        return tuple(zip(phi.activations, phi.sizes, strict=True))
    return ((phi, size),)


def _complete(groups: Sequence[int], places: list[int]) -> bool:
    """Whether the places are those of some of the groups, one complete group after the other."""
    starts = dict(zip(itertools.accumulate(groups, initial=0), groups, strict=False))
    while places:
        first = places[0]
        size = starts.get(first, 0)
        if size == 0 or places[:size] != list(range(first, first + size)):
            return False
        places = places[size:]
    return True


def _joined(parts: Iterable[tuple[Activation, int]]) -> Activation:
    """Blocks in which neighbours of the same componentwise activation are one."""
    merged: list[tuple[Activation, int]] = []
    for phi, size in parts:
        if merged and phi.componentwise and merged[-1][0] == phi:
            merged[-1] = (phi, merged[-1][1] + size)
        else:
            merged.append((phi, size))
    return merged[0][0] if len(merged) == 1 else Blocks(tuple(merged))


ACTIVATIONS: dict[str, type[Activation]] = {
    kind.name: kind
    for kind in (
        ReLU,
        LeakyReLU,
        Tanh,
        Sigmoid,
        Identity,
        Softmax,
        Normalisation,
        LayerNormalisation,
        MaxPool,
        Sort,
    )
}


def activation_named(name: str) -> Activation:
    """The activation of that name, with its default parameters.

    Raises
    ------
    SpecificationError
        If there is none.
    """
    if name not in ACTIVATIONS:
        raise SpecificationError(f"Unknown activation {name!r}. {nearest(name, ACTIVATIONS)}")
    return ACTIVATIONS[name]()


def as_activation(choice: ActivationLike) -> Activation:
    """The activation that is meant.

    Parameters
    ----------
    choice : Activation, str, nn.Module or sequence of pairs (activation, size)
        An `Activation` is returned as it is; a name is looked up; torch's own modules for these
        functions (`nn.ReLU`, `nn.LeakyReLU`, `nn.Tanh`, `nn.Sigmoid`, `nn.Identity`) are
        understood; pairs make `Blocks`.

    Raises
    ------
    SpecificationError
        If it is none of these.
    """
    if isinstance(choice, Activation):
        return choice
    if isinstance(choice, str):
        return activation_named(choice)
    if isinstance(choice, nn.Module):
        return _of_module(choice)
    if isinstance(choice, list | tuple):
        return Blocks(choice)
    raise SpecificationError(
        f"activation is {choice!r}; expected a name, an Activation, or pairs (activation, size)."
    )


def _of_module(module: nn.Module) -> Activation:
    if isinstance(module, nn.LeakyReLU):
        return LeakyReLU(module.negative_slope)
    kinds: dict[type[nn.Module], type[Activation]]
    kinds = {nn.ReLU: ReLU, nn.Tanh: Tanh, nn.Sigmoid: Sigmoid, nn.Identity: Identity}
    if type(module) in kinds:
        return kinds[type(module)]()
    known = ", ".join(["LeakyReLU", *(kind.__name__ for kind in kinds)])
    raise SpecificationError(f"No activation for the module {module}. Known: {known}.")
