"""What has to be known of an activation phi of an implicit model x = phi(A x + b).

An activation of the user's own is a subclass of `Componentwise` (or of `Activation`, if it acts on
the vector as a whole) that states its Lipschitz constant; with a potential and its conjugate it can
be trained by block coordinate descent as well::

    @dataclass(frozen=True)
    class Softplus(Componentwise):
        name = "softplus"
        monotone = True

        def __call__(self, z):
            return torch.nn.functional.softplus(z)

        def slope(self, z):
            return torch.sigmoid(z)
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence

from torch import Tensor

from declarative_cvx.errors import ParameterError, SpecificationError


class Activation(ABC):
    """A map phi from R^n to R^n, applied along the last dimension.

    Attributes
    ----------
    name : str
    lipschitz : float
        Least known l with ||phi(z) - phi(z')||_p <= l ||z - z'||_p for each p in `norms`.
    norms : tuple of float
        Those of 1, 2 and inf for which `lipschitz` holds.
    componentwise : bool
        Whether entry i of phi(z) depends on z_i alone.
    monotone : bool
        Whether phi is componentwise and nondecreasing.
    piecewise_linear : bool
    positively_homogeneous : bool
        Whether phi(t z) = t phi(z) for t > 0.
    domain : pair of float
        Least interval that holds every entry of every phi(z), ends included.
    """

    name: str = ""
    norms: tuple[float, ...] = (1, 2, math.inf)

    @property
    def lipschitz(self) -> float:
        return 1.0

    @property
    def componentwise(self) -> bool:
        return False

    @property
    def monotone(self) -> bool:
        return False

    @property
    def piecewise_linear(self) -> bool:
        return False

    @property
    def positively_homogeneous(self) -> bool:
        return False

    @property
    def domain(self) -> tuple[float, float]:
        return -math.inf, math.inf

    @abstractmethod
    def __call__(self, z: Tensor) -> Tensor:
        """phi(z), (..., n); plain differentiable torch operations."""

    def slope(self, z: Tensor) -> Tensor:
        """phi'(z), elementwise; at a kink that from the left, as torch has it for ReLU."""
        raise self._lacking("elementwise slope")

    def potential(self, z: Tensor) -> Tensor:
        """Psi(z), elementwise: the convex function with Psi' = phi."""
        raise self._lacking("elementwise potential, as Fenchel divergences need it")

    def conjugate(self, x: Tensor) -> Tensor:
        """Psi*(x) = sup_z x z - Psi(z), elementwise; +inf outside `domain`."""
        raise self._lacking("elementwise potential, as Fenchel divergences need it")

    def inverse(self, x: Tensor) -> Tensor:
        """(Psi*)'(x), elementwise: a z with phi(z) = x; where there are several, the largest at the
        lower end of `domain`. NaN outside `domain`.
        """
        raise self._lacking("elementwise inverse, as Fenchel divergences need it")

    def divergence(self, x: Tensor, z: Tensor) -> Tensor:
        """Psi*(x) + Psi(z) - x z, elementwise, as accurately as it can be had; see
        `declarative_cvx.nonconvex.implicit.divergence`, which also knows its derivatives.
        """
        return self.conjugate(x) + self.potential(z) - x * z

    def check(self, n: int) -> None:
        """Refuse a number of states that the map cannot act on.

        Raises
        ------
        ParameterError
        """
        if n < 1:
            raise ParameterError(f"There are {n} states; expected at least one.")

    def take(self, index: Sequence[int]) -> Activation:
        """The activation of the states `index` in that order, as when states are permuted.

        Raises
        ------
        SpecificationError
            If this would take a map of several states apart, or might: how many there are, only
            `Blocks` know.
        """
        if self.componentwise:
            return self
        raise SpecificationError(
            f"{self.name} acts on states together, in order; states {list(index)[:8]}... cannot be "
            f"taken out or exchanged. Blocks([({self.name!r}, n)]) of n states can take those of "
            "complete groups."
        )

    def groups(self, n: int) -> tuple[int, ...]:
        """Sizes of the runs of states that phi maps together, n in all; 1 where componentwise."""
        return (1,) * n if self.componentwise else (n,)

    def lipschitz_constants(self, like: Tensor) -> Tensor:
        """The Lipschitz constant of each state, shape (n,), type of `like`, (..., n)."""
        return like.new_full(like.shape[-1:], self.lipschitz)

    def bounds(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """`domain` of each state as two tensors (n,), of the type of `like`, (..., n)."""
        lower, upper = (like.new_full(like.shape[-1:], end) for end in self.domain)
        return lower, upper

    def clamp(self, x: Tensor) -> Tensor:
        """The nearest point of `domain`, elementwise."""
        return x.clamp(*self.domain)

    def _lacking(self, what: str) -> SpecificationError:
        return SpecificationError(
            f"{self.name or self} has no {what}. The activations relu, leaky_relu, tanh, sigmoid "
            "and identity have one; of your own, implement the method."
        )


class Componentwise(Activation):
    """An activation that maps every entry by itself: the same function for all."""

    @property
    def componentwise(self) -> bool:
        return True
