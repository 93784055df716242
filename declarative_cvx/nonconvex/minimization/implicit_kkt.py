"""Derivative of a minimum by the implicit function theorem (DDN Props. 4.4-4.6).

With L(x, y, p) = f + y'h~ (h~ the active constraints), everything follows from two things: linear
systems with the second derivative of L by (x, y), and products with its mixed derivative by
(x, y) and p, each taken as the gradient of a directional derivative of L. The matrices called B
and C in DDN are never formed (DDN Sec. 6.1).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from declarative_cvx.kkt import fold
from declarative_cvx.least_squares import FACTORED
from declarative_cvx.nonconvex.minimization.active_set import MEANINGFUL, ActiveSet
from declarative_cvx.nonconvex.minimization.conjugate_gradients import conjugate_gradients, is_large
from declarative_cvx.nonconvex.minimization.evaluation import (
    evaluate,
    flat_parameters,
    graph,
    hessian_product,
    row_values,
)
from declarative_cvx.nonconvex.minimization.program import NonlinearProgram, Parameters
from declarative_cvx.nonconvex.minimization.scalars.separated import Separated
from declarative_cvx.nonconvex.minimization.sparsity_rule import sparse_is_faster
from declarative_cvx.transforms import apply_function, recording

Record = Callable[[Tensor, Tensor], None]  # of residual and singularity, each (batch,)


@dataclass(frozen=True, eq=False)
class Minimum:
    """A minimum as a function of the parameters.

    Attributes
    ----------
    program : NonlinearProgram
        For its functions.
    x : Tensor, shape (batch, n)
    y : Tensor, shape (batch, k + l)
        Multipliers of the constraints, 0 of inactive ones.
    parameters : tuple of Tensor
    free, active : Tensor, shapes (batch, n) and (batch, k + l)
        1 for variables at no bound and for constraints that hold with equality, else 0.
    """

    program: NonlinearProgram
    x: Tensor
    y: Tensor
    parameters: Parameters
    free: Tensor
    active: Tensor

    def lagrangian(self, x: Tensor, y: Tensor, parameters: Parameters) -> Tensor:
        """The sum of the batch's Lagrangians."""
        rows = row_values(self.program, x, parameters)
        return rows[:, 0].sum() + (rows[:, 1:] * y).sum()

    def slope(self, w: Tensor, x: Tensor, y: Tensor, parameters: Parameters) -> Tensor:
        """Derivative of the Lagrangian in the direction w of (x, y), summed over the batch."""
        parts = torch.func.grad(self.lagrangian, (0, 1))(x, y, parameters)
        return (torch.cat(parts, 1) * w).sum()

    def pull_back(self, w: Tensor, value: Tensor | None = None) -> tuple[Tensor, Parameters]:
        """Products w'M, M the second derivative of L: by (x, y), and by p.

        Parameters
        ----------
        w : Tensor, shape (batch, n + k + l)
        value : Tensor, shape (batch,), or None
            A multiple of L's own derivative by p that is added.
        """
        if not recording(w, value, self.x, self.y, *self.parameters):
            return self._pull_back_once(w, value)

        def total(x: Tensor, y: Tensor, parameters: Parameters) -> Tensor:
            return self.slope(w, x, y, parameters)

        def own(parameters: Parameters) -> Tensor:
            assert value is not None
            rows = row_values(self.program, self.x, parameters)
            return (value * (rows[:, 0] + (rows[:, 1:] * self.y).sum(1))).sum()

        by_x, by_y, by_p = torch.func.grad(total, (0, 1, 2))(self.x, self.y, self.parameters)
        if value is not None:
            more = torch.func.grad(own)(self.parameters)
            by_p = tuple(a + b for a, b in zip(by_p, more, strict=True))
        return torch.cat([by_x, by_y], 1), by_p

    def _pull_back_once(self, w: Tensor, value: Tensor | None) -> tuple[Tensor, Parameters]:
        """The same without a graph."""
        if self.program.separated is not None:
            return self._pull_back_scalars(self.program.separated, w, value)
        with graph():
            leaves = [v.detach().requires_grad_() for v in (self.x, self.y, *self.parameters)]
            x, y, parameters = leaves[0], leaves[1], leaves[2:]
            rows = row_values(self.program, x, tuple(parameters))
            each = rows[:, 0] + (rows[:, 1:] * y).sum(1)
            parts = _gradients(each.sum(), [x, y], create_graph=True)
            total = (torch.cat(parts, 1) * w.detach()).sum()
            by_x, by_y, *by_p = _gradients(total, leaves, retain_graph=value is not None)
            if value is not None:
                own = _gradients((value.detach() * each).sum(), parameters)
                by_p = [a + b for a, b in zip(by_p, own, strict=True)]
        return torch.cat([by_x, by_y], 1).detach(), tuple(v.detach() for v in by_p)

    def _pull_back_scalars(
        self, separated: Separated, w: Tensor, value: Tensor | None
    ) -> tuple[Tensor, Parameters]:
        batch = len(self.x)
        factor = torch.zeros_like(self.x[:, :1]) if value is None else value.detach()[:, None]
        inputs = (v.detach() for v in (self.x, self.y, w))
        rest = flat_parameters(self.parameters)
        by_x, by_y, *by_p = separated.pulled_back(batch, *inputs, factor, *rest)
        summed = (
            (g if len(v) == batch else g.sum(0)).reshape(v.shape)
            for g, v in zip(by_p, self.parameters, strict=True)
        )
        return torch.cat([by_x, by_y], 1), tuple(summed)

    def push(self, changes: tuple[Tensor | None, ...]) -> tuple[Tensor, Tensor]:
        """Changes of L's derivative by (x, y), (batch, n + k + l), and of L, (batch,)."""

        def change(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
            values = partial(row_values, self.program, x)
            rows, pull = torch.func.vjp(values, self.parameters)[:2]
            moved = _transpose(pull, rows, changes)
            each = moved[:, 0] + (moved[:, 1:] * y).sum(1)
            return each.sum(), each

        parts, each = torch.func.grad(change, (0, 1), has_aux=True)(self.x, self.y)
        return torch.cat(parts, 1), each

    def solve(self, rhs: Tensor, record: Record | None = None) -> Tensor:
        """Solve for the free variables and active rows, rhs and result (batch, n + k + l)."""
        found = apply_function(
            _Solve, rhs[:, :, None], self.x, self.y, self.free, self.active,
            _Kind(self.program, record), *self.parameters,
        )  # fmt: skip
        return found[:, :, 0]


def _gradients(
    total: Tensor, of: list[Tensor], create_graph: bool = False, retain_graph: bool = False
) -> tuple[Tensor, ...]:
    """Gradients, zero where there is no dependence."""
    if not total.requires_grad:
        return tuple(torch.zeros_like(v) for v in of)
    return torch.autograd.grad(
        total,
        of,
        create_graph=create_graph,
        retain_graph=create_graph or retain_graph,
        materialize_grads=True,
        allow_unused=True,
    )


def _transpose(pull: Any, like: Tensor, changes: tuple[Tensor | None, ...]) -> Tensor:
    """The Jacobian that `pull` is the transpose of, times changes."""

    def paired(cotangent: Tensor) -> Tensor:
        (grads,) = pull(cotangent)
        pairs = [(g, d) for g, d in zip(grads, changes, strict=True) if d is not None]
        return sum((g * d).sum() for g, d in pairs) if pairs else cotangent.sum() * 0

    return torch.func.grad(paired)(torch.zeros_like(like))


@dataclass(frozen=True, eq=False)
class _Kind:
    """What is no tensor about a system."""

    program: NonlinearProgram
    record: Record | None

    def minimum(
        self, x: Tensor, y: Tensor, free: Tensor, active: Tensor, parameters: Parameters
    ) -> Minimum:
        return Minimum(self.program, x, y, parameters, free, active)


class _Solve(torch.autograd.Function):
    """Linear systems with the second derivative of L; its matrix needs no graph.

    The derivative of M w = r is M dw = dr - dM w, and u'dM w is the second directional derivative
    of L, whose gradient is taken: so this differentiates any number of times.
    """

    @staticmethod
    def forward(
        rhs: Tensor,  # (batch, n + r, columns)
        x: Tensor,
        y: Tensor,
        free: Tensor,
        active: Tensor,
        kind: _Kind,
        *parameters: Tensor,
    ) -> Tensor:
        none = torch.zeros_like(free, dtype=torch.bool)
        kept = torch.cat([free, active], 1)[:, :, None]
        program = replace(kind.program, parameters=parameters, batch=len(x))
        program = replace(program, sparse=sparse_is_faster(program, len(x)))
        if is_large(program):
            w, residual, singular = _iteratively(program, x, y, rhs, free)
        else:
            weights = torch.cat([torch.ones_like(x[:, :1]), y], 1)
            at, active_set = evaluate(program, x, weights), ActiveSet(active > 0, free == 0, none)
            w, residual, singular = active_set.solve(at, rhs * kept, MEANINGFUL)
        if kind.record is not None:
            kind.record(residual.amax(1), singular)
        return w * kept

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        _, x, y, free, active, ctx.kind, *parameters = inputs
        ctx.save_for_backward(x, y, free, active, output, *parameters)
        ctx.save_for_forward(x, y, free, active, output, *parameters)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        x, y, free, active, w, *parameters = ctx.saved_tensors
        kind = _Kind(ctx.kind.program, None)
        u = apply_function(_Solve, grad, x, y, free, active, kind, *parameters)
        if not any(ctx.needs_input_grad[1:]):
            return u, None, None, None, None, None, *(None for _ in parameters)
        minimum = kind.minimum(x, y, free, active, tuple(parameters))
        by_x, by_y, by_p = _bilinear(minimum, u, w)
        return u, -by_x, -by_y, None, None, None, *(-g for g in by_p)

    @staticmethod
    def jvp(ctx: Any, drhs: Any, dx: Any, dy: Any, _f: Any, _a: Any, _k: Any, *changes: Any) -> Any:
        x, y, free, active, w, *parameters = ctx.saved_tensors
        kind = _Kind(ctx.kind.program, None)
        minimum = kind.minimum(x, y, free, active, tuple(parameters))
        rhs = torch.zeros_like(w) if drhs is None else drhs

        def moved(u: Tensor) -> Tensor:
            grads = _bilinear(minimum, u, w)
            flat = (*grads[:2], *grads[2])
            pairs = [(g, d) for g, d in zip(flat, (dx, dy, *changes), strict=True) if d is not None]
            return sum((g * d).sum() for g, d in pairs) if pairs else (u * 0).sum()

        rhs = rhs - torch.func.grad(moved)(torch.zeros_like(w))
        return apply_function(_Solve, rhs, x, y, free, active, kind, *parameters)

    @staticmethod
    def vmap(info: Any, in_dims: Any, *inputs: Any) -> Any:
        rhs, x, y, free, active, kind, *parameters = inputs
        if all(dim is None for dim in (*in_dims[1:5], *in_dims[6:])):
            columns = rhs.movedim(in_dims[0], -1)  # one factorisation, more columns
            flat = columns.flatten(2)
            w = apply_function(_Solve, flat, x, y, free, active, kind, *parameters)
            return w.unflatten(2, columns.shape[2:]), 3
        size, batch = info.batch_size, x.shape[1 if in_dims[1] == 0 else 0]
        tensors, dims = (rhs, x, y, free, active, *parameters), (*in_dims[:5], *in_dims[6:])
        values = [fold(v, dim, size, batch) for v, dim in zip(tensors, dims, strict=True)]
        w = apply_function(_Solve, *values[:5], kind, *values[5:])
        return w.unflatten(0, (size, batch)), 0


def _iteratively(
    program: NonlinearProgram, x: Tensor, y: Tensor, rhs: Tensor, free: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """By conjugate gradients, column by column; a singular matrix shows in the residual."""
    product = hessian_product(program, x, y)
    found = [conjugate_gradients(product, column, free) for column in rhs.unbind(2)]
    residual = torch.stack([v.residual for v in found], 1)
    return torch.stack([v.solution for v in found], 2), residual, (residual > FACTORED).any(1)


def _bilinear(minimum: Minimum, u: Tensor, w: Tensor) -> tuple[Tensor, Tensor, Parameters]:
    """Gradient by x, y, p of the sum of u'M w over columns, each (batch, n + r, columns)."""

    def total(x: Tensor, y: Tensor, parameters: Parameters) -> Tensor:
        def column(u: Tensor, w: Tensor) -> Tensor:
            by = torch.func.grad(lambda x, y: minimum.slope(w, x, y, parameters), (0, 1))(x, y)
            return (torch.cat(by, 1) * u).sum()

        if u.shape[2] == 1:
            return column(u[:, :, 0], w[:, :, 0])
        return torch.func.vmap(column, (2, 2))(u, w).sum()

    return torch.func.grad(total, (0, 1, 2))(minimum.x, minimum.y, minimum.parameters)
