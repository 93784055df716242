"""Robust pooling as one differentiable operation."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from declarative_cvx.nonconvex.kernels.pooling.layout import PoolLayout, check_numbers
from declarative_cvx.nonconvex.kernels.pooling.pools import Minimum, Quality, blocks

Needs = tuple[bool, bool, bool]
Gradients = list[Tensor]


class Kernel(Protocol):
    """How pools are minimised, judged and differentiated.

    x is (batch, n, *point), alpha is (batch,), weights is (batch, n) or None; the minimiser y and
    its cotangent g are (batch, *point). For the gradients, batch may be of any rank.
    """

    def minimum(self, x: Tensor, alpha: Tensor, weights: Tensor | None) -> Minimum:
        """Minimise each pool."""

    def quality(self, x: Tensor, alpha: Tensor, weights: Tensor | None, y: Tensor) -> Quality:
        """How good minimisers are."""

    def gradients(
        self,
        x: Tensor,
        alpha: Tensor,
        weights: Tensor | None,
        y: Tensor,
        g: Tensor,
        needs: Needs,
    ) -> Gradients:
        """Gradients in those of x, alpha, weights that are needed, by differentiable operations."""


class ImplicitPool(torch.autograd.Function):
    """Minimisers of pools, with their certified gap and whether they are the only ones.

    The derivative is that of the implicit function theorem (DDN Prop. 4.4), not of the search.
    Only the data and the minimisers are kept for it.
    """

    @staticmethod
    def forward(
        kernel: Kernel,
        layout: PoolLayout,
        x: Tensor,  # (*batch, n, *point)
        alpha: Tensor,  # (*batch,)
        weights: Tensor | None,  # (*batch, n)
    ) -> tuple[Tensor, Tensor, Tensor]:
        # Here, as under vmap there are no numbers to look at outside.
        check_numbers(layout, x, alpha, weights)
        shape = alpha.shape + x.shape[alpha.dim() + 1 :]
        if not alpha.numel():
            return x.new_empty(shape), torch.empty_like(alpha), torch.empty_like(alpha).bool()
        found = kernel.minimum(*one_batch(x, alpha, weights))
        point = found.point.reshape(shape)
        return point, found.gap.reshape(alpha.shape), found.unique.reshape(alpha.shape)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.kernel, _, x, alpha, weights = inputs
        y, gap, unique = output
        ctx.mark_non_differentiable(gap, unique)
        ctx.save_for_backward(x, alpha, weights, y)

    @staticmethod
    def backward(ctx: Any, g: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        x, alpha, weights, y = ctx.saved_tensors
        needs = ctx.needs_input_grad[2:]
        if torch.is_grad_enabled():
            found = iter(ctx.kernel.gradients(x, alpha, weights, y, g, needs))
        else:
            found = iter(_BlockwiseGradients.apply(ctx.kernel, needs, x, alpha, weights, y, g))
        return None, None, *(next(found) if needed else None for needed in needs)

    @staticmethod
    def vmap(
        info: Any,
        in_dims: tuple[int | None, ...],
        kernel: Kernel,
        layout: PoolLayout,
        *tensors: Tensor | None,
    ) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        results = ImplicitPool.apply(kernel, layout, *_in_front(info, in_dims[2:], tensors))
        return results, (0, 0, 0)


class _BlockwiseGradients(torch.autograd.Function):
    """The gradients where none of them is wanted in turn: with little memory, and faster."""

    @staticmethod
    def forward(
        kernel: Kernel,
        needs: Needs,
        x: Tensor,
        alpha: Tensor,
        weights: Tensor | None,
        y: Tensor,
        g: Tensor,
    ) -> tuple[Tensor, ...]:
        batch = alpha.shape
        x, alpha, weights = one_batch(x, alpha, weights)
        y, g = (t.reshape(alpha.shape + x.shape[2:]) for t in (y, g))
        like = (x, alpha, x if weights is None else weights)
        # Made from g, to be as many as it is where it is many under a transformation.
        results = [g.new_empty(t.shape) for t, needed in zip(like, needs, strict=True) if needed]
        for rows in blocks(x):
            chosen = None if weights is None else weights[rows]
            found = kernel.gradients(x[rows], alpha[rows], chosen, y[rows], g[rows], needs)
            for result, part in zip(results, found, strict=True):
                result[rows] = part
        return tuple(result.reshape(batch + result.shape[1:]) for result in results)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.mark_non_differentiable(*output)

    @staticmethod
    def vmap(
        info: Any,
        in_dims: tuple[int | None, ...],
        kernel: Kernel,
        needs: Needs,
        *tensors: Tensor | None,
    ) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        found = _BlockwiseGradients.apply(kernel, needs, *_in_front(info, in_dims[2:], tensors))
        return found, (0,) * len(found)


def one_batch(
    x: Tensor, alpha: Tensor, weights: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The tensors with all batch dimensions made one."""
    rank = alpha.dim()
    pools = alpha.numel()
    if weights is not None:
        weights = weights.reshape(pools, *weights.shape[rank:])
    return x.reshape(pools, *x.shape[rank:]), alpha.reshape(pools), weights


def _in_front(
    info: Any, dims: tuple[int | None, ...], tensors: tuple[Tensor | None, ...]
) -> list[Tensor | None]:
    """Tensors with the mapped dimension first, repeated where there is none."""
    return [
        t if t is None else t.expand(info.batch_size, *t.shape) if d is None else t.movedim(d, 0)
        for t, d in zip(tensors, dims, strict=True)
    ]
