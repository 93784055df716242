"""Linear systems ``w = s (w M) + h`` (s, h, w rows; s times the row elementwise), differentiated.

They are what implicit differentiation of ``x = phi(x A' + c)`` consists of, in either mode and any
number of times: with s = phi'(z), M = A' for tangents and M = A for gradients (IDL Sec. 3).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from declarative_cvx.irregular import complain
from declarative_cvx.kkt import fold
from declarative_cvx.nonconvex.fixed_points.map import (
    FixedPointMap,
    relative_to_norm,
    relative_to_terms,
)
from declarative_cvx.nonconvex.fixed_points.settings import Settings
from declarative_cvx.nonconvex.fixed_points.solution import SINGULAR
from declarative_cvx.nonconvex.fixed_points.structure import Structure, substitute
from declarative_cvx.nonconvex.implicit.product import (
    Matrices,
    bilinear_change,
    bilinear_gradient,
    sizes_of_terms,
    solve_scaled,
    times,
    transposed,
)
from declarative_cvx.transforms import apply_function


@dataclass(frozen=True, eq=False)
class _Scaled(FixedPointMap):
    """w -> s (w M) + h."""

    slope: Tensor
    rhs: Tensor
    matrices: Matrices
    norm: float | None  # in which it contracts, if known
    direct = widens = True

    def inner(self, x: Tensor) -> Tensor:
        return times(x, self.matrices)

    def outer(self, q: Tensor) -> Tensor:
        return torch.addcmul(self.rhs, self.slope, q)

    def outer_changes(self, q: Tensor, changes: Tensor) -> Tensor:
        return self.slope[:, None] * changes

    @property
    def contracts(self) -> bool:  # type: ignore[override]
        return self.norm is not None

    def relative(self, x: Tensor, f: Tensor, floor: Tensor | float) -> Tensor:
        if self.norm is not None:
            return relative_to_norm(x, f, self.norm, floor)
        terms = torch.addcmul(self.rhs.abs(), self.slope.abs(), sizes_of_terms(x, self.matrices))
        return relative_to_terms(x, f, terms, floor)

    def newton(self, x: Tensor, q: Tensor, r: Tensor) -> Tensor:
        return solve_scaled(self.slope, self.matrices, r)

    def select(self, index: Tensor) -> _Scaled:
        return replace(self, slope=self.slope[index], rhs=self.rhs[index])

    def double(self) -> _Scaled:
        return _Scaled(
            self.slope.double(),
            self.rhs.double(),
            tuple(matrix.double() for matrix in self.matrices),
            self.norm,
        )


def solve_linear(
    slope: Tensor, rhs: Tensor, settings: Settings, matrices: Sequence[Tensor]
) -> Tensor:
    """The solution of ``w = s (w M) + h``, differentiable in s, h and the factors of M.

    Parameters
    ----------
    slope, rhs : Tensor, shape (batch, n)
    settings : Settings
    matrices : sequence of Tensor
        One or two, whose product is M.
    """
    return apply_function(_Solve, slope, rhs, settings, *matrices)


class _Solve(torch.autograd.Function):
    @staticmethod
    def forward(slope: Tensor, rhs: Tensor, settings: Settings, *matrices: Tensor) -> Tensor:
        if settings.structure.triangular and len(matrices) == 1:
            return _by_substitution(slope, rhs, matrices[0], settings.structure)
        problem = _Scaled(slope, rhs, matrices, settings.structure.norm)
        found = settings.solve(problem, rhs)
        if not found.slow:
            return found.x
        singular = ~(found.residual <= settings.tol)
        if not bool(singular.any()):
            return found.x
        at = torch.nonzero(singular)[:, 0]
        complain(at.tolist(), [SINGULAR] * len(at), settings.on_irregular)
        least = solve_scaled(slope[at], matrices, rhs[at], exact=False)
        return found.x.index_copy(0, at, least)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        slope, _, ctx.settings, *matrices = inputs
        ctx.save_for_backward(slope, output, *matrices)
        ctx.save_for_forward(slope, output, *matrices)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        slope, w, *matrices = ctx.saved_tensors
        back = transposed(matrices)
        u = solve_linear(slope, slope * grad, ctx.settings.transposed(), back)
        by_rhs = grad + times(u, back)
        return by_rhs * times(w, matrices), by_rhs, None, *bilinear_gradient(w, matrices, u)

    @staticmethod
    def jvp(ctx: Any, dslope: Any, drhs: Any, _: Any, *changes: Any) -> Any:
        slope, w, *matrices = ctx.saved_tensors
        moved = bilinear_change(w, matrices, changes)
        terms = [
            drhs,
            None if dslope is None else dslope * times(w, matrices),
            None if moved is None else slope * moved,
        ]
        forced = sum(term for term in terms if term is not None)
        return solve_linear(slope, forced, ctx.settings, matrices)

    @staticmethod
    def vmap(info: Any, in_dims: Any, slope: Any, rhs: Any, settings: Any, *matrices: Any) -> Any:
        size, batch = info.batch_size, rhs.shape[1 if in_dims[1] == 0 else 0]
        if any(dim is not None for dim in in_dims[3:]):
            each = each_slice(size, in_dims, slope, rhs, settings, *matrices)
            return torch.stack([apply_function(_Solve, *one) for one in each]), 0
        folded = [fold(v, dim, size, batch) for v, dim in zip((slope, rhs), in_dims, strict=False)]
        w = apply_function(_Solve, *folded, settings, *matrices)
        return w.unflatten(0, (size, batch)), 0


def each_slice(size: int, in_dims: Sequence[int | None], *inputs: Any) -> list[list[Any]]:
    """The inputs of each slice of a vmapped call: for different matrices there is no batch."""
    return [
        [v if dim is None else v.select(dim, i) for v, dim in zip(inputs, in_dims, strict=True)]
        for i in range(size)
    ]


def _by_substitution(s: Tensor, h: Tensor, M: Tensor, structure: Structure) -> Tensor:
    def entry(i: int, known: Tensor) -> Tensor:
        return (h[:, i] + s[:, i] * known) / (1 - s[:, i] * M[i, i])

    return substitute(M, torch.zeros_like(h), structure, entry)
