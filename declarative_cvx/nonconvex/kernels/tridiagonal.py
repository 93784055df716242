"""Tridiagonal linear systems, batched, in linear time."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from declarative_cvx.errors import ParameterError
from declarative_cvx.nonconvex.kernels.arguments import BatchFunction, align, prepare, require
from declarative_cvx.nonconvex.kernels.report import KernelSolution
from declarative_cvx.status import Status

# Backward errors, in units of rounding, up to which reduction without pivoting is taken, and up
# to which an answer counts as solved.
ACCEPTED = 1e2
SOLVED = 1e4


# Lower, main and upper diagonal.
Bands = tuple[Tensor, ...]


@torch.compiler.disable  # looks at values
def tridiagonal_solve(lower: Tensor, diagonal: Tensor, upper: Tensor, rhs: Tensor) -> Tensor:
    """Solve T x = rhs for a tridiagonal matrix T, in time linear in its order.

    By cyclic reduction (Hockney 1965), which needs no pivoting if T is symmetric positive definite
    or diagonally dominant. Each answer's backward error is looked at, and a system for which it
    is not at rounding level is solved again by elimination with partial pivoting, so any
    nonsingular T will do; that takes a step of Python per unknown.

    Parameters
    ----------
    lower : Tensor, shape (..., n - 1)
        T[i + 1, i].
    diagonal : Tensor, shape (..., n)
    upper : Tensor, shape (..., n - 1)
        T[i, i + 1].
    rhs : Tensor, shape (..., n)
        Leading dimensions are batch dimensions and broadcast. Several right-hand sides of one
        matrix go into a leading dimension of `rhs`.

    Returns
    -------
    Tensor, shape (..., n)
        Twice differentiable for all arguments. Not finite where T is singular.

    Raises
    ------
    ParameterError
    """
    return _Solve.apply(*_checked(lower, diagonal, upper, rhs))


class TridiagonalSolve(nn.Module):
    """`tridiagonal_solve` as a module."""

    def forward(self, lower: Tensor, diagonal: Tensor, upper: Tensor, rhs: Tensor) -> Tensor:
        """The solution; see `tridiagonal_solve`."""
        return tridiagonal_solve(lower, diagonal, upper, rhs)

    def solve(self, lower: Tensor, diagonal: Tensor, upper: Tensor, rhs: Tensor) -> KernelSolution:
        """The solution and a report.

        The objective is ||T x - rhs||^2 / 2; the residual is the componentwise backward error
        (Oettli and Prager 1964): the smallest relative change of entries of T and rhs for which
        the answer is exact. A system is not `regular` if T is singular to working precision.
        """
        lower, diagonal, upper, rhs = _checked(lower, diagonal, upper, rhs)
        x = _Solve.apply(lower, diagonal, upper, rhs)
        return _report((lower, diagonal, upper), rhs, x)


def _checked(lower: Tensor, diagonal: Tensor, upper: Tensor, rhs: Tensor) -> list[Tensor]:
    named = {"diagonal": diagonal, "lower": lower, "upper": upper, "rhs": rhs}
    tensors = dict(zip(named, prepare(named), strict=True))
    n = diagonal.shape[-1] if diagonal.ndim else 0
    if n == 0:
        raise ParameterError(
            f"diagonal has shape {tuple(diagonal.shape)}; expected (..., n) with n >= 1."
        )
    for name, tensor in tensors.items():
        require(name, tensor)
    sizes = {"lower": n - 1, "diagonal": n, "upper": n - 1, "rhs": n}
    return align({name: (tensors[name], (size,)) for name, size in sizes.items()})


def _report(bands: Bands, rhs: Tensor, x: Tensor) -> KernelSolution:
    misfit = multiply(bands, x) - rhs
    with torch.no_grad():
        error = backward_error(bands, rhs, x)
        eps = torch.finfo(x.dtype).eps
        status = torch.where(error <= SOLVED * eps, int(Status.OPTIMAL), int(Status.INACCURATE))
        finite = x.isfinite().all(-1)
        rows = multiply(tuple(band.abs() for band in bands), torch.ones_like(x))
        # No matrix that is far from singular amplifies as much, once its rows are scaled alike.
        amplified = x.abs().amax(-1) * eps > (rhs.abs() / rows).amax(-1)
    return KernelSolution(
        value=x,
        objective=(misfit * misfit).sum(-1) / 2,
        status=torch.where(finite, status, int(Status.NUMERICAL_ERROR)),
        residual=error,
        gap=torch.zeros_like(error),
        regular=finite & ~amplified,
    )


def multiply(bands: Bands, x: Tensor) -> Tensor:
    """The product of a tridiagonal matrix and a vector."""
    lower, diagonal, upper = bands
    return diagonal * x + pad(lower * x[..., :-1], (1, 0)) + pad(upper * x[..., 1:], (0, 1))


def backward_error(bands: Bands, rhs: Tensor, x: Tensor) -> Tensor:
    """Componentwise backward error of an answer, shape (*batch); NaN if it is not finite."""
    misfit = (multiply(bands, x) - rhs).abs()
    size = multiply(tuple(band.abs() for band in bands), x.abs()) + rhs.abs()
    return torch.where(misfit == 0, 0.0, misfit / size).amax(-1)


class _Solve(BatchFunction):
    """The solution, with the transposed system for a derivative."""

    @staticmethod
    def forward(lower: Tensor, diagonal: Tensor, upper: Tensor, rhs: Tensor) -> Tensor:
        x = cyclic_reduction(pad(lower, (1, 0)), diagonal, pad(upper, (0, 1)), rhs)
        error = backward_error((lower, diagonal, upper), rhs, x)
        poor = ~(error <= ACCEPTED * torch.finfo(x.dtype).eps)
        batch = poor.shape
        x = x.expand(*batch, x.shape[-1])  # of one unknown, x has not met `lower` and `upper`
        if not bool(poor.any()):
            return x
        some = [t.expand(*batch, t.shape[-1])[poor] for t in (lower, diagonal, upper, rhs)]
        return x.masked_scatter(poor[..., None], _refined(*some))

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        *bands, rhs = inputs
        ctx.rhs_shape = rhs.shape
        ctx.save_for_backward(*bands, output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        lower, diagonal, upper, x = ctx.saved_tensors
        w = _Solve.apply(upper, diagonal, lower, grad)
        return (
            (-w[..., 1:] * x[..., :-1]).sum_to_size(lower.shape),
            (-w * x).sum_to_size(diagonal.shape),
            (-w[..., :-1] * x[..., 1:]).sum_to_size(upper.shape),
            w.sum_to_size(ctx.rhs_shape),
        )

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> Any:
        return _Solve.over_batch(in_dims, args)


def cyclic_reduction(lower: Tensor, diagonal: Tensor, upper: Tensor, rhs: Tensor) -> Tensor:
    """Eliminate every other unknown, solve for the rest, and substitute back.

    Parameters
    ----------
    lower, diagonal, upper, rhs : Tensor, shape (..., n)
        lower[0] and upper[n - 1] are zero.
    """
    n = diagonal.shape[-1]
    if n == 1:
        return rhs / diagonal
    if n % 2 == 0:
        grown = [pad(t, (0, 1)) for t in (lower, upper, rhs)]
        return cyclic_reduction(grown[0], pad(diagonal, (0, 1), value=1.0), *grown[1:])[..., :n]
    (l0, d0, u0, r0), (l1, d1, u1, r1) = (
        [t[..., start::2] for t in (lower, diagonal, upper, rhs)] for start in (0, 1)
    )
    left, right = l1 / d0[..., :-1], u1 / d0[..., 1:]
    odd = cyclic_reduction(
        -left * l0[..., :-1],
        d1 - left * u0[..., :-1] - right * l0[..., 1:],
        -right * u0[..., 1:],
        r1 - left * r0[..., :-1] - right * r0[..., 1:],
    )
    even = (r0 - l0 * pad(odd, (1, 0)) - u0 * pad(odd, (0, 1))) / d0
    x = even.new_empty(*even.shape[:-1], n)
    x[..., 0::2], x[..., 1::2] = even, odd
    return x


def _refined(lower: Tensor, diagonal: Tensor, upper: Tensor, rhs: Tensor) -> Tensor:
    """Elimination and one step of refinement, which makes the componentwise error small too."""
    x = pivoted_elimination(lower, diagonal, upper, rhs)
    correction = rhs - multiply((lower, diagonal, upper), x)
    return x + pivoted_elimination(lower, diagonal, upper, correction)


def pivoted_elimination(lower: Tensor, diagonal: Tensor, upper: Tensor, rhs: Tensor) -> Tensor:
    """Gaussian elimination with partial pivoting, one unknown of all systems at a time.

    Parameters
    ----------
    lower, upper : Tensor, shape (batch, n - 1)
    diagonal, rhs : Tensor, shape (batch, n)
    """
    n = diagonal.shape[-1]
    nil = torch.zeros_like(rhs)
    # A row: its entries in columns i, i + 1, i + 2, and its right-hand side.
    first = torch.stack([diagonal, pad(upper, (0, 1)), nil, rhs], -1)
    below = torch.stack([pad(lower, (1, 0)), diagonal, pad(upper, (0, 1)), rhs], -1)
    row, rows = first[:, 0], []
    for i in range(1, n):
        swap = (below[:, i, :1].abs() > row[:, :1].abs()).expand_as(row)
        top, other = torch.where(swap, below[:, i], row), torch.where(swap, row, below[:, i])
        rows.append(top)
        other = other - other[:, :1] / top[:, :1] * top
        row = torch.stack([other[:, 1], other[:, 2], nil[:, 0], other[:, 3]], -1)
    rows.append(row)
    x = [nil[:, 0], nil[:, 0]]
    for pivot, second, third, right in (row.unbind(-1) for row in reversed(rows)):
        x.append((right - second * x[-1] - third * x[-2]) / pivot)
    return torch.stack(x[:1:-1], -1)
