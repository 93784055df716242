"""A product of cones: its dimensions, row order, projection and the derivative of that."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import torch
from torch import Tensor

from declarative_cvx.cones import compiled, exponential, power, second_order, semidefinite
from declarative_cvx.cones.rows import join, polyhedral, split
from declarative_cvx.cones.spectrum import Spectrum, blockwise
from declarative_cvx.transforms import outside_transforms, recording

# How close to a kink counts as on it, relative to the largest entry, and how large a change of an
# entry of DΠ across that distance counts as a jump.
KINK_MARGIN = 1e-9
KINK_JUMP = 0.1

KINDS = ("zero", "nonneg", "soc", "psd", "exp", "power")
POLYHEDRAL = frozenset(("zero", "nonneg"))


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
        if self.kinds - POLYHEDRAL and not recording(z):
            return self.decompose(z)[0]
        order = _order(self, z.device)
        return self._joined(z, [group.project(v) for group, v in self._split(z, order)], order)

    def decompose(self, z: Tensor) -> tuple[Tensor, ConeDerivative]:
        """Projection of z (batch, m) and its derivative, not differentiable themselves."""
        z, order = z.detach(), _order(self, z.device)
        split = self._split(z, order)
        second_orders = [v for group, v in split if group.kind == "soc"]
        found = second_order.decompose_all(second_orders) if second_orders else []
        found += [group.decompose(v) for group, v in split[len(found) :]]
        projection = self._joined(z, [piece for piece, _ in found], order)
        parts: list[Part] = [
            (group.index, part) for (group, _), (_, part) in zip(split, found, strict=True)
        ]
        return projection, ConeDerivative(self._diagonal(z), parts, order)

    def _split(self, z: Tensor, order: Tensor | None) -> list[tuple[_Group, Tensor]]:
        """The groups of cones that are not polyhedral, and their rows (batch, cones, dim)."""
        groups = _groups(self, z.device)
        pieces = split(z, [group.index for group in groups], order)
        return [
            (group, piece.unflatten(1, group.index.shape))
            for group, piece in zip(groups, pieces, strict=True)
        ]

    def _joined(self, z: Tensor, pieces: list[Tensor], order: Tensor | None) -> Tensor:
        """The projection, from those onto the cones that are not polyhedral."""
        first = self.zero + self.nonneg
        if first:
            z = z.masked_fill(z <= _limits(self, z.device, z.dtype), 0.0)
        return join(z[:, :first], (v.flatten(1) for v in pieces), order) if pieces else z

    def _diagonal(self, z: Tensor) -> Tensor:
        """The derivative at the polyhedral rows."""
        return (z > _limits(self, z.device, z.dtype)).to(z.dtype)

    def project_dual(self, y: Tensor) -> Tensor:
        """Projection onto the dual cone K*, by Moreau's decomposition. y: (batch, m)."""
        return y + self.project(-y)

    def derivative(self, z: Tensor) -> ConeDerivative:
        """Derivative DΠ of the projection at z: (batch, m).

        At a kink an element of the generalised Jacobian is chosen; for the nonnegative orthant
        the entry is 1 where z > 0 and 0 where z <= 0.
        """
        if not recording(z):
            return self.decompose(z)[1]
        order = _order(self, z.device)
        parts: list[Part] = [
            (group.index, group.derivative(v)) for group, v in self._split(z, order)
        ]
        return ConeDerivative(self._diagonal(z), parts, order)

    def centre(self, like: Tensor) -> Tensor:
        """A point in the interior of K and of K* (zero on the zero cone), shape (m,)."""
        out = torch.zeros(self.rows, dtype=like.dtype, device=like.device)
        out[self.slice_of("nonneg")] = 1.0
        for group in _groups(self, like.device):
            out[group.index] = group.centre(like)
        return out

    def kinked(
        self, z: Tensor, known: ConeDerivative | None = None, margin: Tensor | None = None
    ) -> Tensor:
        """Whether the projection has a kink near z, where DΠ jumps: bool, shape (batch,).

        Near means within `margin` (batch, 1) along the line through the centre, by default
        `KINK_MARGIN` of the size of z. `known` is the derivative at z, if there is one already.
        """
        if not self.rows:
            return torch.zeros(z.shape[0], dtype=torch.bool, device=z.device)
        margin = self.kink_margin(z) if margin is None else margin
        near = (z[:, self.slice_of("nonneg")].abs() <= margin).any(1)
        if not self.kinds - POLYHEDRAL:
            return near
        known = known if known is not None and known.is_constant else self.decompose(z)[1]
        for group, (_, part) in zip(_groups(self, z.device), known.parts, strict=True):
            suspect = part.kink <= margin  # type: ignore[union-attr]
            if group.kind not in ("soc", "psd") and bool(suspect.any()):
                suspect = suspect & self._jumps(group, z, margin)
            near = near | suspect.any(1)
        return near

    @staticmethod
    def _jumps(group: _Group, z: Tensor, margin: Tensor) -> Tensor:
        """Whether DΠ of each cone differs between the two sides, bool, shape (batch, cones)."""
        shift = margin[:, :, None] * group.centre(z)
        v = z[:, group.index]
        above, below = (group.derivative(side) for side in (v + shift, v - shift))
        return ((above - below).abs() > KINK_JUMP).flatten(2).any(2)

    @staticmethod
    def kink_margin(z: Tensor) -> Tensor:
        """Distance from z that counts as near, shape (batch, 1)."""
        return (KINK_MARGIN * z.abs().amax(1, keepdim=True)).clamp(min=KINK_MARGIN**2)


@dataclass(frozen=True)
class _Group:
    """All cones of one kind and one dimension, handled in one vectorised call."""

    kind: str
    index: Tensor  # (cones, dim) rows
    alpha: Tensor | None = None  # (cones,) exponents of power cones

    def project(self, v: Tensor) -> Tensor:  # of (batch, cones, dim)
        return self._module.project(v, *self._exponents)

    def decompose(self, v: Tensor) -> tuple[Tensor, Spectrum]:
        if self.kind == "exp" and compiled.suits(v):
            return compiled.exponential(v)
        return self._module.decompose(v, *self._exponents)

    def derivative(self, v: Tensor) -> Tensor:  # -> (batch, cones, dim, dim)
        return self._module.derivative(v, *self._exponents)

    @property
    def _module(self) -> Any:
        return _MODULES[self.kind]

    @property
    def _exponents(self) -> tuple[Tensor, ...]:
        return () if self.alpha is None else (self.alpha,)

    def centre(self, like: Tensor) -> Tensor:  # -> (dim,)
        dim = self.index.shape[1]
        if self.kind == "psd":
            eye = torch.eye(semidefinite.order_of(dim), dtype=like.dtype, device=like.device)
            return semidefinite.to_vector(eye)
        values = {"soc": [1.0] + [0.0] * (dim - 1), "exp": [-1.0, 1.0, 1.0]}
        return like.new_tensor(values.get(self.kind, [1.0, 1.0, 0.0]))


_MODULES = {"soc": second_order, "psd": semidefinite, "exp": exponential, "power": power}


@lru_cache(maxsize=256)
def _limits(cone: Cone, device: torch.device, dtype: torch.dtype) -> Tensor:
    """What z has to exceed for a derivative of 1: 0 in the orthant, infinity in all other rows."""
    with outside_transforms():
        limits = torch.full((cone.rows,), torch.inf, dtype=dtype, device=device)
        limits[cone.slice_of("nonneg")] = 0.0
    return limits


@lru_cache(maxsize=256)
def _order(cone: Cone, device: torch.device) -> Tensor | None:
    """Where each row stands among those of the polyhedral cones and the groups; None: in order."""
    groups = _groups(cone, device)
    with outside_transforms():
        rows = torch.arange(cone.zero + cone.nonneg, device=device)
        rows = torch.cat([rows, *(group.index.flatten() for group in groups)])
        in_order = bool((rows[1:] > rows[:-1]).all())
        return None if in_order else rows.argsort()


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
    alpha = torch.tensor(cone.power, dtype=torch.float64, device=device)
    return _Group(kind, index, alpha if kind == "power" else None)


Part = tuple[Tensor, Tensor | Spectrum]


@dataclass(frozen=True, eq=False)
class ConeDerivative:
    """Block-diagonal, symmetric linear map DΠ(z), one per batch element.

    Attributes
    ----------
    diagonal : Tensor, shape (batch, m)
        Entries of the polyhedral rows; zero elsewhere.
    parts : list of (Tensor, Tensor or Spectrum)
        Rows (cones, dim) and blocks of the other cones: dense and perhaps differentiable ones,
        shape (batch, cones, dim, dim), or constant ones by their eigenvectors.
    order : Tensor or None
        Where each row stands when the polyhedral ones and those of the parts follow each other;
        None if they do.
    """

    diagonal: Tensor
    parts: list[Part]
    order: Tensor | None = None

    @cached_property
    def blocks(self) -> list[tuple[Tensor, Tensor]]:
        """Rows (cones, dim) and dense blocks (batch, cones, dim, dim)."""
        return [
            (index, part if isinstance(part, Tensor) else part.matrices)
            for index, part in self.parts
        ]

    @property
    def is_constant(self) -> bool:
        """Whether no block is given as a tensor that may be differentiated."""
        return not any(isinstance(part, Tensor) for _, part in self.parts)

    def matmul(self, v: Tensor) -> Tensor:
        """DΠ @ v for v of shape (batch, m, columns)."""
        groups = [index for index, _ in self.parts]
        first = polyhedral(v.shape[1], groups)
        head = self.diagonal[:, :first, None] * v[:, :first]
        pieces = [
            blockwise(part, piece) if isinstance(part, Tensor) else part.matmul(piece)
            for (_, part), piece in zip(self.parts, split(v, groups, self.order), strict=True)
        ]
        return join(head, pieces, self.order) if pieces else head

    def minus_identity(self, v: Tensor) -> Tensor:
        """(DΠ - I) @ v for v of shape (batch, m, columns)."""
        return self.matmul(v) - v if self.parts else (self.diagonal - 1)[:, :, None] * v

    def matvec(self, v: Tensor) -> Tensor:
        """DΠ v for v of shape (batch, m)."""
        return self.matmul(v[:, :, None])[:, :, 0]

    def select(self, index: Tensor) -> ConeDerivative:
        """Those of the elements of the batch named by an index."""
        parts: list[Part] = [
            (rows, part[index] if isinstance(part, Tensor) else part.select(index))
            for rows, part in self.parts
        ]
        return ConeDerivative(self.diagonal[index], parts, self.order)

    def write(self, out: Tensor) -> None:
        """Write the matrices into zeros of shape (batch, m, m)."""
        out.diagonal(dim1=1, dim2=2).copy_(self.diagonal)
        for index, block in self.blocks:
            out[:, index[:, :, None], index[:, None, :]] = block
