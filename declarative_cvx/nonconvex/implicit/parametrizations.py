"""The sets of well-posed matrices that a model's A can be kept in (IDL 3)."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from declarative_cvx.errors import ParameterError, SpecificationError
from declarative_cvx.nonconvex.implicit.activations import ActivationLike, as_activation
from declarative_cvx.nonconvex.implicit.certificate import Certificate
from declarative_cvx.nonconvex.implicit.perron_frobenius import (
    ON_BOUNDARY,
    least_scaling,
    perron_scaling,
    project_onto_weighted_l1_ball,
)
from declarative_cvx.nonconvex.implicit.spectral_ball import project_onto_spectral_ball
from declarative_cvx.nonconvex.implicit.well_posed_set import WellPosed
from declarative_cvx.nonconvex.kernels.projection import project


@dataclass(frozen=True)
class Unconstrained(WellPosed):
    """All matrices. Nothing is guaranteed: watch the status of every solution."""

    def certificate(self) -> str:
        return "none"

    def _project(self, raw: Tensor) -> Tensor:
        return raw


class _NormBall(WellPosed):
    """Matrices of a norm of at most `kappa`."""

    kappa: float
    p: ClassVar[float]
    proof: ClassVar[Certificate]

    def __post_init__(self) -> None:
        if not 0 < self.kappa < math.inf:
            raise SpecificationError(f"kappa is {self.kappa!r}; it must be positive and finite.")

    def certificate(self) -> str:
        return self.proof

    def check(self, activation: ActivationLike) -> None:
        phi = as_activation(activation)
        if self.p not in phi.norms:
            raise self._refuse(f"{phi.name} has a Lipschitz constant in the norms {phi.norms} only")
        if not self.kappa * phi.lipschitz < 1:
            raise self._refuse(
                f"kappa must be below {1 / phi.lipschitz:g}, for {phi.name} has the Lipschitz "
                f"constant {phi.lipschitz:g}"
            )

    def _shrunk(self, drawn: Tensor) -> Tensor:
        return drawn * (self.kappa / 2 / torch.linalg.matrix_norm(drawn, self.p))


@dataclass(frozen=True)
class InfinityNorm(_NormBall):
    """max_i sum_j abs(A_ij) <= kappa: every row in an l1 ball (IDL eq. 2 and 5).

    Parameters
    ----------
    kappa : float
        Below 1 / l for activations with Lipschitz constant l; times l the rate at which Picard's
        iteration converges.
    """

    kappa: float = 0.95
    p = math.inf
    proof = Certificate.INFINITY_NORM

    def _project(self, raw: Tensor) -> Tensor:
        return _in_l1_ball(raw, self.kappa, -1)


@dataclass(frozen=True)
class OneNorm(_NormBall):
    """max_j sum_i abs(A_ij) <= kappa: every column in an l1 ball (IDL eq. 2).

    Parameters
    ----------
    kappa : float
        As in `InfinityNorm`.
    """

    kappa: float = 0.95
    p = 1
    proof = Certificate.ONE_NORM

    def _project(self, raw: Tensor) -> Tensor:
        return _in_l1_ball(raw, self.kappa, -2)


@dataclass(frozen=True)
class SpectralNorm(_NormBall):
    """Singular values of at most kappa (IDL eq. 2); costs a singular value decomposition.

    Parameters
    ----------
    kappa : float
        As in `InfinityNorm`.
    """

    kappa: float = 0.95
    p = 2
    proof = Certificate.SPECTRAL_NORM

    def _project(self, raw: Tensor) -> Tensor:
        return project_onto_spectral_ball(raw, self.kappa)


@dataclass(frozen=True)
class LowRank(_NormBall):
    """A = L R' of given rank, with singular values of L and R of at most sqrt(kappa) (IDL 6.3).

    Every A of that rank with ||A||_2 <= kappa is such a product. The weight has shape (2, n, rank):
    L and R, each projected; with the `factors`, x = phi(A x + b) is an equation in R^rank.

    Parameters
    ----------
    rank : int
    kappa : float
        As in `InfinityNorm`.
    """

    rank: int
    kappa: float = 0.95
    p = 2
    proof = Certificate.SPECTRAL_NORM
    _states = -2

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.rank, bool) or not isinstance(self.rank, int) or self.rank < 1:
            raise SpecificationError(f"rank is {self.rank!r}; it must be an integer > 0.")

    def factors(self, raw: Tensor) -> tuple[Tensor, Tensor]:
        """L and R, (..., n, rank) each, with A = L R'."""
        left, right = self.project(raw).unbind(-3)
        return left, right

    def matrix(self, raw: Tensor) -> Tensor:
        left, right = self.factors(raw)
        return left @ right.mT

    def _project(self, raw: Tensor) -> Tensor:
        return project_onto_spectral_ball(raw, math.sqrt(self.kappa))

    def _shape(self, n: int) -> tuple[int, ...]:
        if self.rank > n:
            raise ParameterError(f"A has {n} states and so no rank of {self.rank}.")
        return 2, n, self.rank

    def _shrunk(self, drawn: Tensor) -> Tensor:
        norms = torch.linalg.matrix_norm(drawn, 2, keepdim=True)
        return drawn * (math.sqrt(self.kappa / 2) / norms)

    def _encode(self, A: Tensor) -> Tensor:
        U, values, Vh = torch.linalg.svd(A, full_matrices=False)
        root = values[..., None, : self.rank].sqrt()
        return torch.stack([U[..., : self.rank] * root, Vh.mT[..., : self.rank] * root], -3)


@dataclass(frozen=True)
class PerronFrobenius(_NormBall):
    """||diag(d) A diag(d)^-1||_inf <= kappa for a positive vector d, so that rho(``|A|``) <= kappa.

    Every row is projected onto a weighted l1 ball. Without a given scaling d is learned: the weight
    then has the shape (n + 1, n), its last row being log d, held within `SPREAD`; d is fixed as far
    as the projection of A is concerned (IDL 3.2).

    Parameters
    ----------
    kappa : float
        As in `InfinityNorm`.
    scaling : sequence of n positive numbers, optional
        d; a common factor does not matter.
    """

    kappa: float = 0.95
    scaling: Sequence[float] | None = None
    p = math.inf
    proof = Certificate.PERRON_FROBENIUS

    # Largest abs(log d) that is learned: d then spans a factor of a million at most.
    SPREAD: ClassVar[float] = math.log(1e3)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.scaling is None:
            return
        found = tuple(float(value) for value in self.scaling)
        for index, value in enumerate(found):
            if not 0 < value < math.inf:
                raise SpecificationError(f"scaling[{index}] is {value}; it must be positive.")
        object.__setattr__(self, "scaling", found)

    def check(self, activation: ActivationLike) -> None:
        super().check(activation)
        phi = as_activation(activation)
        if not phi.componentwise:
            raise self._refuse(f"{phi.name} is not componentwise, so states cannot be scaled")

    def matrix(self, raw: Tensor) -> Tensor:
        projected = self.project(raw)
        return projected if self.scaling is not None else projected[..., :-1, :]

    def log_scaling(self, raw: Tensor) -> Tensor:
        """Log d, shape (..., n)."""
        if self.scaling is not None:
            return raw.new_tensor(self.scaling).log()
        return raw[..., -1, :].clamp(-self.SPREAD, self.SPREAD)

    def _project(self, raw: Tensor) -> Tensor:
        scale = self.log_scaling(raw)
        weight = torch.exp(scale[..., :, None] - scale[..., None, :])
        if self.scaling is not None:
            return project_onto_weighted_l1_ball(raw, weight, self.kappa)
        A = project_onto_weighted_l1_ball(raw[..., :-1, :], weight, self.kappa)
        return torch.cat([A, scale[..., None, :]], -2)

    def _shape(self, n: int) -> tuple[int, ...]:
        if self.scaling is None:
            return n + 1, n
        if len(self.scaling) != n:
            raise ParameterError(f"scaling has {len(self.scaling)} entries for {n} states.")
        return n, n

    def _shrunk(self, drawn: Tensor) -> Tensor:
        n = drawn.shape[-1]
        scale = self.log_scaling(torch.zeros_like(drawn))
        rows = torch.exp(scale[:, None] - scale) * drawn[:n].abs()
        shrunk = drawn[:n] * (self.kappa / 2 / rows.sum(-1).max())
        return shrunk if self.scaling is not None else torch.cat([shrunk, scale[None]])

    def _encode(self, A: Tensor) -> Tensor:
        if self.scaling is not None:
            return A.clone()
        rounding = 1 + torch.finfo(A.dtype).eps
        d, widest = perron_scaling(A.double(), self.kappa), rounding * math.exp(2 * self.SPREAD)
        if d is None or d.max() > widest * d.min():  # on the boundary, or close to it
            d = least_scaling(A.double(), self.kappa * rounding, widest)
        if d is None:
            raise ParameterError(
                f"A is not in the set {self}: the spectral radius of abs(A) is above kappa, or it "
                "takes a d with entries that are more than a factor of a million apart."
            )
        return torch.cat([A, (d / d.max().sqrt() / d.min().sqrt()).log()[None].to(A)])


@dataclass(frozen=True)
class StrictlyTriangular(WellPosed):
    """A feedforward net: strictly (block) triangular, solved by substitution (IDL 2.2, 3.1).

    Parameters
    ----------
    blocks : sequence of int, optional
        Sizes of the blocks of states, the layers of a net; single states unless given.
    upper : bool
        Upper triangular as in IDL, where the last layer comes first, or lower.
    """

    blocks: Sequence[int] | None = None
    upper: bool = True

    def __post_init__(self) -> None:
        if self.blocks is None:
            return
        for index, size in enumerate(self.blocks):
            if isinstance(size, bool) or not isinstance(size, int) or size < 1:
                raise SpecificationError(f"blocks[{index}] is {size!r}; expected an integer > 0.")
        object.__setattr__(self, "blocks", tuple(self.blocks))

    def certificate(self) -> str:
        return Certificate.STRICTLY_TRIANGULAR

    def check(self, activation: ActivationLike) -> None:
        phi = as_activation(activation)
        if phi.componentwise:
            return
        ends = set(itertools.accumulate(self.blocks or ()))
        groups = phi.groups(max(ends)) if ends else ()
        if not ends or not ends <= set(itertools.accumulate(groups)):
            raise self._refuse(
                f"{phi.name} maps states together that are in different blocks; blocks must be "
                "unions of its groups"
            )

    def _shape(self, n: int) -> tuple[int, ...]:
        if self.blocks is not None and sum(self.blocks) != n:
            raise ParameterError(f"Blocks of {list(self.blocks)} do not make up {n} states.")
        return n, n

    def _project(self, raw: Tensor) -> Tensor:
        if self.blocks is None:
            return raw.triu(1) if self.upper else raw.tril(-1)
        sizes = torch.tensor(self.blocks, device=raw.device)
        block = torch.arange(len(sizes), device=raw.device).repeat_interleave(sizes)
        gap = block - block[:, None]
        return torch.where(gap > 0 if self.upper else gap < 0, raw, 0.0)


@dataclass(frozen=True)
class TriangularReLU(WellPosed):
    """Triangular with a diagonal of at most 1 - margin (IDL 3.1).

    For ReLU, x_i = max(b_i + sum_{j > i} A_ij x_j, 0) / (1 - A_ii), by substitution; likewise for
    other homogeneous activations. The diagonal may be as negative as it will.

    Parameters
    ----------
    margin : float
        Positive.
    upper : bool
    """

    margin: float = 0.05
    upper: bool = True

    def __post_init__(self) -> None:
        if not 0 < self.margin < math.inf:
            raise SpecificationError(f"margin is {self.margin!r}; it must be positive and finite.")

    def certificate(self) -> str:
        return Certificate.TRIANGULAR

    def check(self, activation: ActivationLike) -> None:
        phi = as_activation(activation)
        if not (phi.monotone and phi.positively_homogeneous and phi.lipschitz <= 1):
            raise self._refuse(
                f"{phi.name} is not ReLU, nor a componentwise, nondecreasing, homogeneous "
                "activation with slopes of at most 1"
            )

    def _project(self, raw: Tensor) -> Tensor:
        rest = raw.triu(1) if self.upper else raw.tril(-1)
        diagonal = raw.diagonal(dim1=-2, dim2=-1).clamp(max=1 - self.margin)
        return rest + torch.diag_embed(diagonal)


def _in_l1_ball(raw: Tensor, radius: float, dim: int) -> Tensor:
    """Rows or columns in l1 balls; on the boundary with the derivative from inside."""
    norms = raw.detach().abs().sum(dim, keepdim=True)
    inside = norms <= radius * (1 + ON_BOUNDARY * torch.finfo(raw.dtype).eps)
    return torch.where(inside, raw, project(raw, "ball", 1, radius, dim))
