"""Pooling by the minimum of a sum of penalties, in place of a mean or a maximum (DDN Sec. 5.1)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from declarative_cvx.errors import ParameterError, SpecificationError
from declarative_cvx.nonconvex.kernels.pooling.implicit_pool import ImplicitPool, Kernel, one_batch
from declarative_cvx.nonconvex.kernels.pooling.layout import PoolLayout
from declarative_cvx.nonconvex.kernels.pooling.scalar_pool import ScalarPool
from declarative_cvx.nonconvex.kernels.pooling.vector_pool import VectorPool
from declarative_cvx.nonconvex.kernels.report import KernelSolution
from declarative_cvx.penalties import Penalty, penalty_named
from declarative_cvx.status import Status

# Largest gap with which a minimum passes for global; the search asks for half of it or less.
_GAP = 2e-4


@torch.compiler.disable
def robust_pool(
    x: Tensor,
    penalty: str | Penalty = "pseudo_huber",
    alpha: float | Tensor = 1.0,
    dim: int | tuple[int, ...] = -1,
    *,
    weights: Tensor | None = None,
    keepdim: bool = False,
    point_dim: int | None = None,
    restarts: int = 4,
) -> Tensor:
    """Minimise sum_i w_i phi(u - x_i; alpha) over u, for the x_i along some dimensions of a tensor.

    For numbers the minimum is global: truncated quadratic and Huber penalties are minimised
    exactly by sorting, convex ones by Newton's method, others by a search with a certified gap.
    Where several minima are equally good the smallest is taken; where they fill an interval
    (Huber), its middle. For points of R^d (`point_dim`) it is the best local minimum from several
    starts, which is global for a convex penalty.

    Differentiable in x, alpha and weights, also repeatedly. At a breakpoint of the penalty the
    derivative is that from the side of zero: a residual of alpha counts as inside.

    Parameters
    ----------
    x : Tensor
        Of any rank; float16 and bfloat16 are computed in float32.
    penalty : str or Penalty
        ``"quadratic"``, ``"pseudo_huber"``, ``"huber"``, ``"welsch"``, ``"truncated_quadratic"``,
        ``"cauchy"``, ``"geman_mcclure"``, ``"tukey"``, or an object of one's own.
    alpha : float or Tensor
        Scale of the penalty, positive, in the units of x; a tensor must broadcast to the result,
        with 1 in place of `point_dim`.
    dim : int or tuple of int
        Dimensions pooled over.
    weights : Tensor, optional
        Nonnegative, some of each pool positive; must broadcast to x, with 1 in place of
        `point_dim`.
    keepdim : bool
        Whether to leave the pooled dimensions in the result, with size 1.
    point_dim : int, optional
        Dimension that holds the coordinates of u in R^d; the penalty is then of ||u - x_i||_2.
    restarts : int
        With `point_dim`, and a penalty that is not convex: how many data points to start from
        besides the median and the mean.

    Returns
    -------
    Tensor
        The shape of x without `dim`.

    Raises
    ------
    SpecificationError
        If the penalty or a dimension is unknown.
    ParameterError
        If a number is not finite, alpha is not positive, weights are negative or all zero, or a
        pool is empty.
    """
    return Pooling(penalty, dim, keepdim, point_dim, restarts).pool(x, alpha, weights)


class RobustPool(nn.Module):
    """Layer of `robust_pool`, which stands where ``AdaptiveAvgPool2d(1)`` stood.

    Parameters
    ----------
    penalty, alpha, dim, keepdim, point_dim, restarts
        As of `robust_pool`; by default the last two dimensions are pooled and kept.
    learn_alpha : bool
        Whether alpha is a parameter of the layer; its logarithm is stored, as `log_alpha`.
    """

    def __init__(
        self,
        penalty: str | Penalty = "pseudo_huber",
        alpha: float | Tensor = 1.0,
        dim: int | tuple[int, ...] = (-2, -1),
        *,
        keepdim: bool = True,
        point_dim: int | None = None,
        restarts: int = 4,
        learn_alpha: bool = False,
    ) -> None:
        super().__init__()
        self._pooling = Pooling(penalty, dim, keepdim, point_dim, restarts)
        start = torch.as_tensor(alpha, dtype=None if isinstance(alpha, Tensor) else torch.float64)
        if not bool(((start > 0) & (start < torch.inf)).all()):
            raise ParameterError(f"alpha must be positive and finite, got {alpha}.")
        self.learn_alpha = learn_alpha
        if learn_alpha:
            kind = start.dtype if isinstance(alpha, Tensor) else torch.get_default_dtype()
            self.log_alpha = nn.Parameter(start.detach().log().to(kind))
        else:
            self.register_buffer("_alpha", start.detach().clone())

    _alpha: Tensor

    @property
    def alpha(self) -> Tensor:
        return self.log_alpha.exp() if self.learn_alpha else self._alpha

    def forward(self, x: Tensor, weights: Tensor | None = None) -> Tensor:
        return self._pooling.pool(x, self.alpha, weights)

    def solve(self, x: Tensor, weights: Tensor | None = None) -> KernelSolution:
        """The pooled values with the quality of each: `KernelSolution`.

        Its `residual` is the slope of the sum, relative to the sum of the weights and of the terms'
        slopes. Its `gap` is for each unit of weight, in units of the penalty's own, and NaN for
        points under a penalty that is not convex.
        """
        return self._pooling.solve(x, self.alpha, weights)

    def extra_repr(self) -> str:
        return f"{self._pooling}, learn_alpha={self.learn_alpha}"


class Pooling:
    """What is pooled how: everything but the tensors."""

    def __init__(
        self,
        penalty: str | Penalty,
        dim: int | tuple[int, ...],
        keepdim: bool,
        point_dim: int | None,
        restarts: int,
    ) -> None:
        if not isinstance(restarts, int) or restarts < 0:
            raise SpecificationError(f"restarts must be a nonnegative integer, got {restarts!r}.")
        self._penalty, self._dim, self._keepdim = penalty_named(penalty), dim, keepdim
        self._point_dim, self._restarts = point_dim, restarts
        self._kernel: Kernel = ScalarPool(self._penalty)
        if point_dim is not None:
            self._kernel = VectorPool(self._penalty, restarts)

    def pool(self, x: Tensor, alpha: float | Tensor, weights: Tensor | None) -> Tensor:
        layout, tensors = self._laid_out(x, alpha, weights)
        point, _, _ = ImplicitPool.apply(self._kernel, layout, *tensors)
        return layout.restore(point, self._keepdim).to(x.dtype)

    def solve(self, x: Tensor, alpha: float | Tensor, weights: Tensor | None) -> KernelSolution:
        layout, tensors = self._laid_out(x, alpha, weights)
        point, gap, unique = ImplicitPool.apply(self._kernel, layout, *tensors)
        with torch.no_grad():
            quality = self._kernel.quality(
                *one_batch(*tensors), point.reshape(-1, *point.shape[gap.dim() :])
            )
        good = quality.residual <= quality.rounding
        good &= ~(gap.flatten() > _GAP)
        status = torch.where(good, int(Status.OPTIMAL), int(Status.INACCURATE))
        return KernelSolution(
            layout.restore(point, self._keepdim).to(x.dtype),
            quality.objective.reshape(gap.shape),
            status.reshape(gap.shape),
            quality.residual.reshape(gap.shape),
            gap,
            quality.smooth.reshape(gap.shape) & unique,
        )

    def _laid_out(
        self, x: Tensor, alpha: float | Tensor, weights: Tensor | None
    ) -> tuple[PoolLayout, tuple[Tensor, Tensor, Tensor | None]]:
        """The layout, and the tensors in it: (*batch, n, *point), (*batch,), (*batch, n)."""
        if not isinstance(x, Tensor) or not x.is_floating_point():
            kind = x.dtype if isinstance(x, Tensor) else type(x).__name__
            raise ParameterError(f"x must be a tensor of floating-point numbers, got {kind}.")
        layout = PoolLayout.of(x, self._dim, self._point_dim)
        data = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
        scale = torch.as_tensor(alpha, dtype=data.dtype, device=data.device)
        scale = _broadcast("alpha", scale, layout.result_shape(self._keepdim))
        if weights is not None:
            weights = _broadcast("weights", weights.to(data.dtype), layout.one_per_point)
            weights = layout.flatten_weights(weights)
        return layout, (layout.flatten(data), scale.reshape(layout.batch), weights)

    def __repr__(self) -> str:
        text = f"{self._penalty.name}, dim={self._dim}, keepdim={self._keepdim}"
        return text if self._point_dim is None else f"{text}, point_dim={self._point_dim}"


def _broadcast(name: str, value: Tensor, shape: tuple[int, ...]) -> Tensor:
    try:
        return value.expand(shape)
    except RuntimeError:
        raise ParameterError(
            f"{name} of shape {tuple(value.shape)} does not broadcast to {shape}."
        ) from None
