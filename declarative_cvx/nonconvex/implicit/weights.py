"""The numbers of an implicit model, and nothing else."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from declarative_cvx.errors import ParameterError
from declarative_cvx.nonconvex.implicit.activations import Activation, as_activation

_SHAPES = {"A": "nn", "B": "np", "C": "qn", "D": "qp", "b": "n", "c": "q"}


@dataclass(frozen=True, eq=False)
class ImplicitWeights:
    """Weights of ``x = phi(A x + B u + b)``, ``y = C x + D u + c`` (IDL eq. 1, with biases).

    A plain record: what the algebra of models makes and takes, and what training hands over.

    Parameters
    ----------
    A : Tensor, shape (n, n)
    B : Tensor, shape (n, p)
    C : Tensor, shape (q, n)
    D : Tensor, shape (q, p)
        Dense, or all of them sparse (COO).
    b : Tensor, shape (n,)
    c : Tensor, shape (q,)
        Always dense.
    activation : Activation or str
        Of all n states; several activations are `Blocks`.

    Raises
    ------
    ParameterError
        If shapes, types or devices do not fit together.
    """

    A: Tensor
    B: Tensor
    C: Tensor
    D: Tensor
    b: Tensor
    c: Tensor
    activation: Activation

    def __post_init__(self) -> None:
        object.__setattr__(self, "activation", as_activation(self.activation))
        _check(self)

    @property
    def state_features(self) -> int:
        """Number n of states."""
        return self.A.shape[0]

    @property
    def in_features(self) -> int:
        """Number p of inputs."""
        return self.D.shape[1]

    @property
    def out_features(self) -> int:
        """Number q of outputs."""
        return self.D.shape[0]

    @property
    def is_sparse(self) -> bool:
        """Whether A, B, C and D are sparse tensors."""
        return self.A.is_sparse

    def dense(self) -> ImplicitWeights:
        """The same weights as dense tensors."""
        return self._map(lambda value: value.to_dense() if value.is_sparse else value)

    def sparse(self) -> ImplicitWeights:
        """The same weights with A, B, C and D as sparse tensors (COO)."""
        return self._map(lambda value: value.to_sparse().coalesce() if value.ndim == 2 else value)

    def to(
        self, dtype: torch.dtype | None = None, device: torch.device | str | None = None
    ) -> ImplicitWeights:
        """The same weights with another type, on another device, or both."""
        return self._map(lambda value: value.to(dtype=dtype, device=device))

    def detach(self) -> ImplicitWeights:
        """The same weights without their history."""
        return self._map(Tensor.detach)

    def _map(self, change: Callable[[Tensor], Tensor]) -> ImplicitWeights:
        values = {name: change(getattr(self, name)) for name in _SHAPES}
        return ImplicitWeights(activation=self.activation, **values)


def _check(weights: ImplicitWeights) -> None:
    """Refuse tensors that do not fit together."""
    values = {name: getattr(weights, name) for name in _SHAPES}
    for name, value in values.items():
        if not isinstance(value, Tensor) or not value.is_floating_point():
            raise ParameterError(f"{name} must be a real floating tensor, got {value!r}.")
        if value.ndim != len(_SHAPES[name]):
            raise ParameterError(
                f"{name} must have {len(_SHAPES[name])} dimensions ({', '.join(_SHAPES[name])}), "
                f"got shape {tuple(value.shape)}."
            )
    sizes = {"n": weights.A.shape[0], "q": weights.D.shape[0], "p": weights.D.shape[1]}
    for name, value in values.items():
        wanted = tuple(sizes[letter] for letter in _SHAPES[name])
        if tuple(value.shape) != wanted:
            raise ParameterError(
                f"{name} must have shape {wanted}, got {tuple(value.shape)}: A has {sizes['n']} "
                f"rows (states), D is {sizes['q']} by {sizes['p']} (outputs, inputs)."
            )
        if (value.dtype, value.device) != (weights.A.dtype, weights.A.device):
            raise ParameterError(
                f"{name} is {value.dtype} on {value.device}, but A is {weights.A.dtype} on "
                f"{weights.A.device}: convert them with `.to(...)` first."
            )
        if value.is_sparse != (weights.is_sparse and value.ndim == 2):
            raise ParameterError(
                "A, B, C and D must be all dense or all sparse (COO), and b and c dense; "
                f"{name} is {value.layout}, A is {weights.A.layout}."
            )
