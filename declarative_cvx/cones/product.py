"""A product of cones: its dimensions, row order, projection and the derivative of that."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache

import torch
from torch import Tensor

from declarative_cvx.cones import exponential, power, second_order, semidefinite
from declarative_cvx.transforms import outside_transforms

# How close to a kink counts as on it, relative to the largest entry, and how large a change of an
# entry of DΠ across that distance counts as a jump.
KINK_MARGIN = 1e-9
KINK_JUMP = 0.1

KINDS = ("zero", "nonneg", "soc", "psd", "exp", "power")


@dataclass(frozen=True)
class Cone:
    """Product cone K, in the row order in which its fields are listed (that of SCS).

    Attributes
    ----------
    zero, nonneg : int
        Number of rows of the zero cone and of the nonnegative orthant.
    soc : tuple of int
        Dimensions of the second-order cones {(t, x): ||x||_2 <= t}, each at least 1.
    psd : tuple of int
        Orders k of the semidefinite cones. A matrix is stored as its lower triangle stacked by
        columns, off-diagonal entries times sqrt(2): k (k + 1) / 2 rows.
    exp : int
        Number of exponential cones cl{(x, y, z): y exp(x / y) <= z, y > 0}, three rows each.
    power : tuple of float
        Exponents a of the power cones {(x, y, z): x^a y^(1 - a) >= |z|}, three rows each.
    """

    zero: int = 0
    nonneg: int = 0
    soc: tuple[int, ...] = ()
    psd: tuple[int, ...] = ()
    exp: int = 0
    power: tuple[float, ...] = ()

    @cached_property
    def sizes(self) -> dict[str, int]:
        """Number of rows of each kind of cone, in row order."""
        return {
            "zero": self.zero,
            "nonneg": self.nonneg,
            "soc": sum(self.soc),
            "psd": sum(k * (k + 1) // 2 for k in self.psd),
            "exp": 3 * self.exp,
            "power": 3 * len(self.power),
        }

    @cached_property
    def rows(self) -> int:
        """Total number of rows m."""
        return sum(self.sizes.values())

    @cached_property
    def kinds(self) -> frozenset[str]:
        """The kinds of cone that occur."""
        return frozenset(kind for kind, size in self.sizes.items() if size)

    def slice_of(self, kind: str) -> slice:
        """Rows of one kind of cone."""
        start = 0
        for name, size in self.sizes.items():
            if name == kind:
                return slice(start, start + size)
            start += size
        raise KeyError(kind)

    def project(self, z: Tensor) -> Tensor:
        """Euclidean projection onto K.

        Parameters
        ----------
        z : Tensor, shape (batch, m)

        Returns
        -------
        Tensor, shape (batch, m)
        """
        pieces = [torch.zeros_like(z[:, : self.zero])]
        pieces.append(z[:, self.slice_of("nonneg")].clamp(min=0))
        if len(self.kinds - {"zero", "nonneg"}) == 0:
            return torch.cat(pieces, dim=1)
        out = torch.cat([*pieces, z[:, self.zero + self.nonneg :]], dim=1)
        for group in self._groups(z.device):
            out = out.index_copy(1, group.index.flatten(), group.project(z).flatten(1))
        return out

    def project_dual(self, y: Tensor) -> Tensor:
        """Projection onto the dual cone K*, by Moreau's decomposition. y: (batch, m)."""
        return y + self.project(-y)

    def derivative(self, z: Tensor) -> ConeDerivative:
        """Derivative DΠ of the projection at z: (batch, m).

        At a kink an element of the generalised Jacobian is chosen; for the nonnegative orthant
        the entry is 1 where z > 0 and 0 where z <= 0.
        """
        diagonal = torch.zeros_like(z)
        rows = self.slice_of("nonneg")
        diagonal[:, rows] = (z.detach()[:, rows] > 0).to(z.dtype)
        blocks = [(group.index, group.derivative(z)) for group in self._groups(z.device)]
        return ConeDerivative(diagonal, blocks)

    def centre(self, like: Tensor) -> Tensor:
        """A point in the interior of K and of K* (zero on the zero cone), shape (m,)."""
        out = torch.zeros(self.rows, dtype=like.dtype, device=like.device)
        out[self.slice_of("nonneg")] = 1.0
        for group in self._groups(like.device):
            out[group.index] = group.centre(like)
        return out

    def kinked(self, z: Tensor) -> Tensor:
        """Whether the projection has a kink near z, where DΠ jumps: bool, shape (batch,).

        Near means within `KINK_MARGIN` of the size of z, along the line through the centre.
        """
        if not self.rows:
            return torch.zeros(z.shape[0], dtype=torch.bool, device=z.device)
        margin = self.kink_margin(z)
        rows = self.slice_of("nonneg")
        near = (z[:, rows].abs() <= margin).any(1)
        groups = self._groups(z.device)
        if not groups:
            return near
        shift = margin * self.centre(z)
        both = torch.cat([z + shift, z - shift])
        for group in groups:
            above, below = group.derivative(both).chunk(2)
            near = near | ((above - below).abs() > KINK_JUMP).flatten(1).any(1)
        return near

    @staticmethod
    def kink_margin(z: Tensor) -> Tensor:
        """Distance from z that counts as near, shape (batch, 1)."""
        return (KINK_MARGIN * z.abs().amax(1, keepdim=True)).clamp(min=KINK_MARGIN**2)

    def _groups(self, device: torch.device) -> tuple[_Group, ...]:
        return _groups(self, device)


@dataclass(frozen=True)
class _Group:
    """All cones of one kind and one dimension, handled in one vectorised call."""

    kind: str
    index: Tensor  # (cones, dim) rows
    alpha: Tensor | None = None  # (cones,) exponents of power cones

    def project(self, z: Tensor) -> Tensor:  # (batch, m) -> (batch, cones, dim)
        return _project(self.kind, z[:, self.index], self.alpha)

    def derivative(self, z: Tensor) -> Tensor:  # (batch, m) -> (batch, cones, dim, dim)
        return _derivative(self.kind, z[:, self.index], self.alpha)

    def centre(self, like: Tensor) -> Tensor:  # -> (dim,)
        dim = self.index.shape[1]
        if self.kind == "psd":
            eye = torch.eye(semidefinite.order_of(dim), dtype=like.dtype, device=like.device)
            return semidefinite.to_vector(eye)
        values = {"soc": [1.0] + [0.0] * (dim - 1), "exp": [-1.0, 1.0, 1.0]}
        return like.new_tensor(values.get(self.kind, [1.0, 1.0, 0.0]))


def _project(kind: str, v: Tensor, alpha: Tensor | None) -> Tensor:
    if alpha is not None:
        return power.project(v, alpha)
    return _MODULES[kind].project(v)


def _derivative(kind: str, v: Tensor, alpha: Tensor | None) -> Tensor:
    if alpha is not None:
        return power.derivative(v, alpha)
    return _MODULES[kind].derivative(v)


_MODULES = {"soc": second_order, "psd": semidefinite, "exp": exponential}


@lru_cache(maxsize=256)
def _groups(cone: Cone, device: torch.device) -> tuple[_Group, ...]:
    """Rows of the cones that are not polyhedral, grouped by kind and dimension."""
    groups = []
    for kind, dims in (
        ("soc", cone.soc),
        ("psd", tuple(k * (k + 1) // 2 for k in cone.psd)),
        ("exp", (3,) * cone.exp),
        ("power", (3,) * len(cone.power)),
    ):
        start = cone.slice_of(kind).start
        starts: dict[int, list[int]] = {}
        for dim in dims:
            starts.setdefault(dim, []).append(start)
            start += dim
        for dim, first in starts.items():
            with outside_transforms():
                groups.append(_group(kind, first, dim, cone, device))
    return tuple(groups)


def _group(kind: str, first: list[int], dim: int, cone: Cone, device: torch.device) -> _Group:
    """The cones of one kind and dimension whose first rows are given."""
    index = torch.tensor(first, device=device)[:, None] + torch.arange(dim, device=device)
    if kind != "power":
        return _Group(kind, index)
    return _Group(kind, index, torch.tensor(cone.power, dtype=torch.float64, device=device))


@dataclass(frozen=True)
class ConeDerivative:
    """Block-diagonal, symmetric linear map DΠ(z), one per batch element.

    Attributes
    ----------
    diagonal : Tensor, shape (batch, m)
        Entries of the polyhedral rows; zero elsewhere.
    blocks : list of (Tensor, Tensor)
        Rows (cones, dim) and dense blocks (batch, cones, dim, dim) of the other cones.
    """

    diagonal: Tensor
    blocks: list[tuple[Tensor, Tensor]]

    def matmul(self, v: Tensor) -> Tensor:
        """DΠ @ v for v of shape (batch, m, columns)."""
        out = self.diagonal[:, :, None] * v
        for index, block in self.blocks:
            piece = block @ v[:, index]  # (batch, cones, dim, columns)
            out = out.index_copy(1, index.flatten(), piece.flatten(1, 2))
        return out

    def matvec(self, v: Tensor) -> Tensor:
        """DΠ v for v of shape (batch, m)."""
        return self.matmul(v[:, :, None])[:, :, 0]

    def without(self, removed: int, kept: Tensor) -> ConeDerivative:
        """The map over the rows `kept`, when `removed` rows of the zero cone are left out."""
        blocks = [(index - removed, block) for index, block in self.blocks]
        return ConeDerivative(self.diagonal[:, kept], blocks)

    def write(self, out: Tensor) -> None:
        """Write the matrices into zeros of shape (batch, m, m)."""
        out.diagonal(dim1=1, dim2=2).copy_(self.diagonal)
        for index, block in self.blocks:
            out[:, index[:, :, None], index[:, None, :]] = block
