"""The projection as one differentiable operation, for every mode of differentiation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from declarative_cvx.nonconvex.kernels.projection.sets import SETS

_Batched = tuple[int | None, ...]


@torch.library.custom_op(
    "declarative_cvx::nearest_point",
    mutates_args=(),
    schema="(Tensor x, str onto, Tensor[] bounds) -> (Tensor, Tensor)",
)
def _nearest_point(x: Tensor, onto: str, bounds: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """An operation that torch.compile does not look into, for its work depends on the data."""
    return SETS[onto].nearest(x.contiguous(), *bounds)


@_nearest_point.register_fake
def _(x: Tensor, onto: str, bounds: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty((*x.shape[:-1], 1))


def nearest_point(
    x: Tensor,  # (*batch, n)
    onto: str,
    bounds: Sequence[Tensor],  # (*batch, 1) or (*batch, n) each
) -> tuple[Tensor, Tensor]:
    """The nearest points of the set of that name in `SETS`, and the norms of x, (*batch, 1)."""
    rule = NearestPoint if torch.compiler.is_compiling() else _ForwardModeToo
    return rule.apply(x, onto, *bounds)


class NearestPoint(torch.autograd.Function):
    """The nearest point of a set and the norm of x, differentiable any number of times.

    What is kept for the backward pass is the result and one number for each point.
    """

    @staticmethod
    def forward(x: Tensor, onto: str, *bounds: Tensor) -> tuple[Tensor, Tensor]:
        return _nearest_point(x, onto, bounds)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        _, onto, *bounds = inputs
        ctx.set = SETS[onto]
        if not ctx.set.smooth_norm:
            ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*output, *bounds)
        ctx.save_for_forward(*output, *bounds)

    @staticmethod
    def backward(ctx: Any, by_y: Tensor | None, by_norm: Tensor | None) -> tuple[Any, ...]:
        saved = ctx.saved_tensors
        by_x = None if by_y is None else ctx.set.times(by_y, *saved)
        if ctx.set.smooth_norm and by_norm is not None:
            change = by_norm * ctx.set.norm_slope(*saved)
            by_x = change if by_x is None else by_x + change
        return by_x, None, *_by_bounds(ctx, by_y)

    @staticmethod
    def vmap(
        info: Any, in_dims: _Batched, x: Tensor, onto: str, *bounds: Tensor
    ) -> tuple[tuple[Tensor, Tensor], tuple[int, int]]:
        """Points are rows of a batch already, so one more batch dimension goes in front."""
        pairs = zip((x, *bounds), (in_dims[0], *in_dims[2:]), strict=True)
        points, *parts = (
            tensor.expand(info.batch_size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)
            for tensor, dim in pairs
        )
        return nearest_point(points, onto, parts), (0, 0)


class _ForwardModeToo(NearestPoint):
    """The same with a rule for forward mode, which torch.compile refuses to see."""

    @staticmethod
    def jvp(ctx: Any, x: Tensor | None, _: None, *bounds: Tensor | None) -> tuple[Tensor, Any]:
        y, *_ = saved = ctx.saved_tensors
        moved = torch.zeros_like(y) if x is None else ctx.set.times(x, *saved)
        for slope, bound in zip(ctx.set.by_bounds(*saved), bounds, strict=True):
            moved = moved if bound is None else moved + slope * bound
        if not ctx.set.smooth_norm:
            return moved, None
        along = torch.zeros_like(y) if x is None else x * ctx.set.norm_slope(*saved)
        return moved, along.sum(-1, keepdim=True)


def _by_bounds(ctx: Any, by_y: Tensor | None) -> tuple[Tensor | None, ...]:
    """Gradients in the bounds, where they are asked for."""
    bounds, wanted = ctx.saved_tensors[2:], ctx.needs_input_grad[2:]
    if by_y is None or not any(wanted):
        return (None,) * len(bounds)
    slopes = ctx.set.by_bounds(*ctx.saved_tensors)
    return tuple(
        (by_y * slope).sum_to_size(bound.shape) if want else None
        for slope, bound, want in zip(slopes, bounds, wanted, strict=True)
    )
