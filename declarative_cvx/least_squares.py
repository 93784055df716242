"""Batches of square linear systems that may be singular, differentiable any number of times."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

# Residual, relative to the right-hand side, up to which a factorisation's answer is taken.
FACTORED = 1e-9
# Singular values below this multiple of the largest count as zero.
RANK_TOLERANCE = 1e-11
# Order from which systems on the CPU are factorised one at a time.
LARGE = 128


def solve_consistent(matrix: Tensor, rhs: Tensor) -> tuple[Tensor, Tensor]:
    """Solve M w = v for every element, whether or not M is singular.

    Parameters
    ----------
    matrix : Tensor, shape (batch, k, k)
    rhs : Tensor, shape (batch, k, columns)

    Returns
    -------
    solution : Tensor, shape (batch, k, columns)
        The solution; the one of least norm where there are many, the least-squares one where
        there is none. Its derivative is that of a regular system.
    residual : Tensor, shape (batch, columns)
        Largest error, relative to the right-hand side; not differentiable.
    """
    return _Solve.apply(matrix, rhs)


class _Solve(torch.autograd.Function):
    @staticmethod
    def forward(matrix: Tensor, rhs: Tensor) -> tuple[Tensor, Tensor]:
        # In units of the right-hand side, so that gradients of 1e-12 and 1e+12 are treated alike.
        unit = rhs.abs().amax(1, keepdim=True)
        unit = torch.where(unit > 0, unit, 1.0)
        scaled = rhs / unit
        w = _each(_factor_and_solve, matrix, scaled)
        residual = _residual(matrix, w, scaled)
        failed = torch.where(~(residual <= FACTORED).all(1))[0]
        if len(failed):
            part = _each(_least_norm, matrix[failed], scaled[failed])
            found = _residual(matrix[failed], part, scaled[failed])
            worse = found > residual[failed]  # False where the factorisation gave NaN
            part = torch.where(worse[:, None], w[failed], part)
            w = w.index_copy(0, failed, part)
            residual = residual.index_copy(0, failed, torch.fmin(found, residual[failed]))
        return w * unit, residual

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        matrix, _ = inputs
        w, residual = output
        ctx.mark_non_differentiable(residual)
        ctx.save_for_backward(matrix, w)
        ctx.save_for_forward(matrix, w)

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Any) -> tuple[Tensor | None, Tensor]:  # type: ignore[override]
        matrix, w = ctx.saved_tensors
        grad_rhs, _ = solve_consistent(matrix.mT, grad)
        return (-grad_rhs @ w.mT if ctx.needs_input_grad[0] else None), grad_rhs

    @staticmethod
    def jvp(ctx: Any, matrix_tangent: Any, rhs_tangent: Any) -> Any:  # type: ignore[override]
        matrix, w = ctx.saved_tensors
        rhs = torch.zeros_like(w) if rhs_tangent is None else rhs_tangent
        if matrix_tangent is not None:
            rhs = rhs - matrix_tangent @ w
        tangent, residual = solve_consistent(matrix, rhs)
        return tangent, torch.zeros_like(residual)

    @staticmethod
    def vmap(info: Any, in_dims: Any, matrix: Tensor, rhs: Tensor) -> Any:  # type: ignore[override]
        if in_dims[0] is None:  # one factorisation, more columns
            columns = rhs.movedim(in_dims[1], -1)
            w, residual = solve_consistent(matrix, columns.flatten(2))
            shape = columns.shape[2:]
            return (w.unflatten(2, shape), residual.unflatten(1, shape)), (3, 2)
        matrix = matrix.movedim(in_dims[0], 0)
        size = info.batch_size
        rhs = rhs.expand(size, *rhs.shape) if in_dims[1] is None else rhs.movedim(in_dims[1], 0)
        w, residual = solve_consistent(matrix.flatten(0, 1), rhs.flatten(0, 1))
        return (w.unflatten(0, (size, -1)), residual.unflatten(0, (size, -1))), (0, 0)


def _factor_and_solve(matrix: Tensor, rhs: Tensor) -> Tensor:
    factors, pivots, _ = torch.linalg.lu_factor_ex(matrix)
    return torch.linalg.lu_solve(factors, pivots, rhs)


def _least_norm(matrix: Tensor, rhs: Tensor) -> Tensor:
    return torch.linalg.pinv(matrix, rtol=RANK_TOLERANCE) @ rhs


def _each(method: Callable[[Tensor, Tensor], Tensor], matrix: Tensor, rhs: Tensor) -> Tensor:
    """Apply a method to a batch of systems, at once or, on the CPU, one large one at a time.

    Large systems keep all cores busy one by one. Batched factorisations of them run LAPACK from
    several threads at once, which some builds of MKL do not survive (orders from about 200 on).
    """
    if matrix.device.type != "cpu" or matrix.shape[1] < LARGE or len(matrix) < 2:
        return method(matrix, rhs)
    return torch.stack([method(m, v) for m, v in zip(matrix, rhs, strict=True)])


def _residual(matrix: Tensor, w: Tensor, rhs: Tensor) -> Tensor:
    """Largest error of each system, shape (batch, columns)."""
    return (matrix @ w - rhs).abs().amax(1)
