"""Sets of well-posed matrices, and weights that stay in them whatever an optimiser does.

The weight that is trained is free; the matrix that a model uses is its Euclidean projection onto
the set, and the derivative of the projection is part of the gradient. So the constraint holds after
every step, of any optimiser, with no clipping afterwards.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from torch import Tensor

from declarative_cvx.errors import ParameterError, SpecificationError
from declarative_cvx.nonconvex.implicit.activations import ActivationLike, as_activation
from declarative_cvx.nonconvex.kernels.arguments import require

# Distance of a matrix from the set, relative to its largest entry and in units of rounding times
# its order, up to which it counts as an element.
MEMBER = 64.0


class WellPosed(ABC):
    """A set of matrices A for which x = phi(A x + b) has one solution for every b.

    A set of the user's own implements `certificate` and `_project`, and `check` if it serves some
    activations only.
    """

    def initial(
        self,
        n: int,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """A random weight for n states, well inside the set, where gradients are not projected."""
        shape = self._shape(n)
        drawn = torch.randn(shape, dtype=dtype, device=device, generator=generator)
        return self._project(self._shrunk(drawn))

    def project(self, raw: Tensor) -> Tensor:
        """The weight of the set that is nearest to `raw` in the Frobenius norm, ``(..., *shape)``.

        Twice differentiable. On the boundary of a norm ball the derivative is the identity, that
        from inside, so that weights that were loaded there can be trained further.

        Raises
        ------
        ParameterError
            If the shape does not fit, or an entry is not finite.
        """
        if not raw.is_floating_point():
            raise ParameterError(f"The weight has type {raw.dtype}; expected floating point.")
        n = raw.shape[self._states] if raw.ndim >= 2 else 0
        expected = self._shape(n)
        if tuple(raw.shape[-len(expected) :]) != expected:
            raise ParameterError(
                f"The weight has shape {tuple(raw.shape)}; for {self} expected (..., "
                f"{', '.join(map(str, expected))})."
            )
        require("weight", raw)
        return self._project(raw)

    def matrix(self, raw: Tensor) -> Tensor:
        """A, shape (..., n, n), for a weight as `initial` returns it."""
        return self.project(raw)

    def right_inverse(self, A: Tensor) -> Tensor:
        """A weight for which `matrix` returns A, up to rounding: how a known A is loaded.

        Raises
        ------
        ParameterError
            If A is not in the set.
        """
        require("A", A)
        raw = self._encode(A)
        distance = float((self.matrix(raw) - A).abs().max())
        if distance > MEMBER * A.shape[-1] * torch.finfo(A.dtype).eps * float(A.abs().max()):
            raise ParameterError(
                f"A is not in the set {self}: the nearest matrix of it differs by {distance:.3g}. "
                "Project A first, or choose another set; is_well_posed(A, activation) may name one."
            )
        return raw

    def check(self, activation: ActivationLike) -> None:
        """Refuse an activation for which the set guarantees nothing.

        Raises
        ------
        SpecificationError
        """
        as_activation(activation)

    @abstractmethod
    def certificate(self) -> str:
        """Which condition for well-posedness every matrix of the set satisfies."""

    @abstractmethod
    def _project(self, raw: Tensor) -> Tensor: ...

    # Dimension of a weight that counts the states.
    _states: ClassVar[int] = -1

    def _shape(self, n: int) -> tuple[int, ...]:
        """The shape of a weight for n states, which is refused if there can be none."""
        return n, n

    def _shrunk(self, drawn: Tensor) -> Tensor:
        """Standard normal numbers, scaled to a weight inside the set."""
        return drawn / (2 * math.sqrt(drawn.shape[self._states]))

    def _encode(self, A: Tensor) -> Tensor:
        """A weight for A, if A is in the set."""
        return A.clone()

    def _refuse(self, reason: str) -> SpecificationError:
        return SpecificationError(f"{self} does not make x = phi(A x + b) well-posed: {reason}")
