"""Euclidean projection onto spheres, balls, the simplex and boxes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Real

import torch
from torch import Tensor, nn

from declarative_cvx.errors import ParameterError, SpecificationError, nearest
from declarative_cvx.nonconvex.kernels.projection.map import nearest_point
from declarative_cvx.nonconvex.kernels.projection.sets import SETS
from declarative_cvx.nonconvex.kernels.report import KernelSolution
from declarative_cvx.status import Status

Bound = float | Tensor
Dims = int | Sequence[int]

NORMS = (1, 2, math.inf)
KINDS = ("sphere", "ball", "simplex", "box")
DERIVATIVES = ("exact", "unmasked")

# Residual that counts as a solution, in units of the rounding of the point's type.
ACCEPTED = 1e3


def project(
    x: Tensor,
    onto: str = "sphere",
    p: float | None = None,
    radius: Bound | None = None,
    dim: Dims = -1,
    *,
    lower: Bound | None = None,
    upper: Bound | None = None,
    derivative: str = "exact",
) -> Tensor:
    """The nearest point y of a set to each point of x, least in ||u - x||_2^2 / 2.

    ============  =============================  ==========================================
    ``onto``      set                            takes
    ============  =============================  ==========================================
    ``sphere``    ||u||_p = radius               p in 1, 2 (default), inf; radius
    ``ball``      ||u||_p <= radius              p in 1, 2 (default), inf; radius
    ``simplex``   u >= 0, sum u_i = radius       radius
    ``box``       lower <= u <= upper            lower, upper, or one of them
    ============  =============================  ==========================================

    Parameters
    ----------
    x : Tensor, any shape
        Points; `dim` says which dimensions make up one, all others are the batch.
    onto : str
        See the table.
    p : float, optional
        Which norm.
    radius : float or Tensor, optional
        Positive, 1 by default; a tensor broadcasts to the batch, which is the shape of x without
        `dim`. Differentiable.
    dim : int or sequence of int
        Dimensions of x that make up one point.
    lower, upper : float or Tensor, optional
        Broadcast to the shape of x; infinite where not given. Differentiable.
    derivative : {"exact", "unmasked"}
        Which matrix stands for Dy(x). With a the gradient of the constraint at y, that is sign(y)
        for p = 1 and, for p = inf, sign(y_i) at the entries that are held at the radius and else 0:

        ============  ===============================  ============================
        Dy(x)         "exact"                          "unmasked"
        ============  ===============================  ============================
        p = 1         diag(abs(a)) - a a' / (a'a)      I - a a' / (a'a)
        p = inf       I - diag(abs(a))                 I - a a' / (a'a)
        p = 2         (I - y y' / r^2) r / ||x||       the same
        ============  ===============================  ============================

        Inside a ball both are I. "exact" is the derivative of the projection wherever it has one.
        In DDN it is the masked form D^z y, with a zero gradient in "plateau" dimensions, those that
        a face of the set holds fixed. "unmasked" is DDN's Dy, from Prop. 4.5 with one equality
        constraint: it moves along the hyperplane a'u = const, lets gradients through to entries
        that are zero (p = 1) or clipped (p = inf), and does not agree with finite differences
        there. The two coincide where y has no zero entry (p = 1) or one entry at the radius
        (p = inf). Both have the same derivative in the radius. The simplex has the derivative of
        p = 1, the box that of p = inf; they know the exact one only.

    Returns
    -------
    Tensor, shape and dtype of x
        Differentiable any number of times, in forward and reverse mode, in x, radius and bounds.

    Raises
    ------
    SpecificationError
        If the arguments do not go together.
    ParameterError
        If a tensor has the wrong shape or type, or holds numbers that cannot be used: entries that
        are not finite, a radius that is not positive, lower > upper; the message names the index.

    Notes
    -----
    Where there are several nearest points one is chosen, always the same: a zero is given a
    positive sign; of several largest entries the first is moved to the L-inf sphere; zero goes to
    the point of the L2 sphere with equal entries. Where the projection has no derivative it is
    that from outside the set or, for entries at a threshold, that of the entries held; that of the
    L2 sphere at zero is zero. `Projection.solve` says where this is so.

    The cost is linear for p = 2, p = inf and the box. The threshold for p = 1 and the simplex
    comes from Newton's method: about five passes over the data, O(log n) at most.

    Sources: DDN Sec. 5.2 and Table 1; Duchi et al. 2008. Unlike in DDN the derivative inside a ball
    is the identity, not zero: there y = x.
    """
    target = _Target(onto, p, radius, lower, upper, derivative)
    points = _Points(x, dim)
    y, _ = nearest_point(points.rows, target.name, target.bounds(points))
    return points.restore(y)


class Projection(nn.Module):
    """`project` as a module; the arguments are the same.

    A radius or bound that is a tensor becomes a buffer, one that is an `nn.Parameter` is learned.

    Examples
    --------
    >>> layer = Projection("ball", p=1, radius=250.0)
    >>> features = layer(torch.randn(32, 512))
    >>> bool((features.abs().sum(-1) <= 250.001).all())
    True
    """

    radius: Bound | None
    lower: Bound | None
    upper: Bound | None

    def __init__(
        self,
        onto: str = "sphere",
        p: float | None = None,
        radius: Bound | None = None,
        dim: Dims = -1,
        *,
        lower: Bound | None = None,
        upper: Bound | None = None,
        derivative: str = "exact",
    ) -> None:
        super().__init__()
        _Target(onto, p, radius, lower, upper, derivative)
        self.onto, self.p, self.dim, self.derivative = onto, p, dim, derivative
        for name, bound in (("radius", radius), ("lower", lower), ("upper", upper)):
            if isinstance(bound, Tensor) and not isinstance(bound, nn.Parameter):
                self.register_buffer(name, bound)
            else:
                setattr(self, name, bound)

    def forward(self, x: Tensor) -> Tensor:
        """The nearest points, shape and dtype of x."""
        points, target = _Points(x, self.dim), self._target()
        y, _ = nearest_point(points.rows, target.name, target.bounds(points))
        return points.restore(y)

    def solve(self, x: Tensor) -> KernelSolution:
        """The nearest points with a report on each of them.

        Returns
        -------
        KernelSolution
            `value` is what the module returns, `objective` is ||y - x||_2^2 / 2, `residual`
            measures the conditions for a global minimum relative to their terms, and `gap` is 0
            where they hold, for the methods are exact.
        """
        points, target = _Points(x, self.dim), self._target()
        return _report(target.name, points, target.bounds(points))

    def extra_repr(self) -> str:
        given = {name: getattr(self, name) for name in ("p", "radius", "lower", "upper")}
        shown = [f"{name}={value!r}" for name, value in given.items() if value is not None]
        return ", ".join(
            [repr(self.onto), *shown, f"dim={self.dim}", f"derivative={self.derivative!r}"]
        )

    def _target(self) -> _Target:
        return _Target(self.onto, self.p, self.radius, self.lower, self.upper, self.derivative)


@dataclass(frozen=True, eq=False)
class _Target:
    """A set as the caller describes it."""

    onto: str
    p: float | None
    radius: Bound | None
    lower: Bound | None
    upper: Bound | None
    derivative: str

    def __post_init__(self) -> None:
        if self.onto not in KINDS:
            raise SpecificationError(f"Unknown set {self.onto!r}. {nearest(str(self.onto), KINDS)}")
        if self.derivative not in DERIVATIVES:
            raise SpecificationError(
                "derivative must be 'exact' (the masked or plateau form of DDN's Table 1) or "
                f"'unmasked' (its Dy), got {self.derivative!r}."
            )
        if self.p not in (None, *NORMS):
            raise SpecificationError(f"p must be 1, 2 or inf, got {self.p!r}.")
        self._check_use()
        self._check_types()

    def _check_types(self) -> None:
        for name in ("radius", "lower", "upper"):
            value = getattr(self, name)
            if not isinstance(value, Tensor | Real | None):
                raise SpecificationError(
                    f"{name} must be a number or a tensor, got {type(value).__name__}. "
                    "Use torch.as_tensor."
                )
        if isinstance(self.radius, Real) and not 0 < self.radius < math.inf:
            raise ParameterError(f"radius is {self.radius!r}; it must be positive and finite.")

    def _check_use(self) -> None:
        """Refuse arguments that the set has no use for, rather than ignore them."""
        box, normed = self.onto == "box", self.onto in ("sphere", "ball")
        useless = {
            "p": self.p is not None and not normed,
            "radius": self.radius is not None and box,
            "lower": self.lower is not None and not box,
            "upper": self.upper is not None and not box,
            "derivative='unmasked'": self.derivative != "exact" and not normed,
        }
        for argument, found in useless.items():
            if found:
                raise SpecificationError(f"{argument} has no meaning for onto={self.onto!r}.")
        if box and self.lower is None and self.upper is None:
            raise SpecificationError("onto='box' needs lower, upper or both.")

    @property
    def name(self) -> str:
        """The key of the set in `SETS`."""
        if self.onto not in ("sphere", "ball"):
            return self.onto
        return f"{self.onto} {2 if self.p is None else self.p:g} {self.derivative}"

    def bounds(self, points: _Points) -> tuple[Tensor, ...]:
        """The tensors that describe the set, in the layout of the points."""
        if self.onto != "box":
            radius = 1.0 if self.radius is None else self.radius
            return (_broadcast("radius", radius, points.rows, points.batch).unsqueeze(-1),)
        lower = -math.inf if self.lower is None else self.lower
        upper = math.inf if self.upper is None else self.upper
        return tuple(
            points.arrange(_broadcast(name, bound, points.rows, points.shape))
            for name, bound in (("lower", lower), ("upper", upper))
        )


class _Points:
    """A tensor seen as points: its dimensions `dim` moved to the end and made one."""

    def __init__(self, x: Tensor, dim: Dims) -> None:
        _check_points(x)
        self.shape, self.dtype = x.shape, x.dtype
        self._dims = _positive_dims(dim, x.dim())
        self.batch = tuple(size for axis, size in enumerate(x.shape) if axis not in self._dims)
        # Sums in half precision would not be worth having.
        work = torch.float32 if x.dtype in (torch.float16, torch.bfloat16) else x.dtype
        self.rows = self.arrange(x.to(work))
        if self.rows.shape[-1] == 0:
            raise ParameterError(
                f"dim {dim} of x, of shape {tuple(x.shape)}, is empty: there is no point to "
                "project. Leave out tensors without entries."
            )

    def arrange(self, x: Tensor) -> Tensor:
        """A tensor of the shape of x as points, (*batch, n)."""
        if self._dims == (x.dim() - 1,):
            return x
        last = tuple(range(-len(self._dims), 0))
        return x.movedim(self._dims, last).flatten(-len(last))

    def restore(self, rows: Tensor) -> Tensor:
        """Points, (*batch, n), as a tensor of the shape of x."""
        if self._dims != (len(self.shape) - 1,):
            last = tuple(range(-len(self._dims), 0))
            sizes = [self.shape[axis] for axis in self._dims]
            rows = rows.unflatten(-1, sizes).movedim(last, self._dims)
        return rows.to(self.dtype)


def _broadcast(name: str, value: Bound, like: Tensor, shape: tuple[int, ...]) -> Tensor:
    if not isinstance(value, Tensor):
        return torch.full((), value, dtype=like.dtype, device=like.device).expand(shape)
    try:
        return value.to(like).expand(shape)
    except RuntimeError:
        raise ParameterError(
            f"{name} has shape {tuple(value.shape)}, which does not broadcast to {tuple(shape)}"
            + (", the shape of x without dim." if name == "radius" else ", the shape of x.")
        ) from None


def _report(name: str, points: _Points, bounds: tuple[Tensor, ...]) -> KernelSolution:
    y, norm = nearest_point(points.rows, name, bounds)
    x, found, *known = (tensor.detach() for tensor in (points.rows, y, norm, *bounds))
    residual = SETS[name].residual(x, found, *known).squeeze(-1)
    accepted = residual <= ACCEPTED * torch.finfo(x.dtype).eps
    return KernelSolution(
        value=points.restore(y),
        objective=(found - x).square().sum(-1) / 2,
        status=torch.where(accepted, int(Status.OPTIMAL), int(Status.INACCURATE)),
        residual=residual,
        gap=torch.zeros_like(residual),
        regular=SETS[name].regular(x, found, *known).squeeze(-1),
    )


def _check_points(x: Tensor) -> None:
    if not isinstance(x, Tensor):
        raise ParameterError(f"x must be a tensor, got {type(x).__name__}. Use torch.as_tensor.")
    if not x.is_floating_point():
        raise ParameterError(f"x has dtype {x.dtype}; it must be real floating point: x.float().")


def _positive_dims(dim: Dims, rank: int) -> tuple[int, ...]:
    """Dimensions counted from the front, in the order given."""
    dims = (dim,) if isinstance(dim, int) else tuple(dim)
    if not dims:
        raise SpecificationError("dim is empty; name at least one dimension of x.")
    for axis in dims:
        if not -rank <= axis < rank:
            raise ParameterError(f"dim {axis} does not exist: x has {rank} dimensions.")
    found = tuple(axis % rank for axis in dims)
    if len(set(found)) < len(found):
        raise SpecificationError(f"dim {dims} names a dimension of x twice.")
    return found
